//! The boundary between the engine and every front end.
//!
//! Owns [`BlockDevice`]: requests are submitted and complete in any order. The blocking methods are wrappers that an
//! executor may replace by something that copies less. What a device promises: invariants 0, 1 and 4 of
//! `docs/design.md`.

use std::sync::PoisonError;

use crate::{
    error::{Error, Result},
    exec::asynchronous::Asynchronous,
    sync::{Condvar, Mutex},
    units::{ByteLen, ByteRange},
};

/// Longest single request. Front ends split nothing: they refuse what is longer.
pub const REQUEST_LEN_MAX: u64 = 32 << 20;

/// What a device is, asked once when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub size: ByteLen,
    pub access: Access,
}

/// Whether a device takes changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// When a change is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Once later reads see it.
    Volatile,
    /// Once it survives a crash (FUA).
    Fua,
}

/// One request with its buffers, which come back in the [`Reply`].
#[derive(Debug)]
pub enum Request {
    /// Fill `buffer` from `offset`.
    Read {
        offset: u64,
        buffer: Vec<u8>,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
        durability: Durability,
    },
    /// Make the range read as zeros; its space is given back.
    Zero {
        range: ByteRange,
        durability: Durability,
    },
    /// The content is not needed any more: the range reads as zeros, its space is given back.
    Discard {
        range: ByteRange,
    },
    /// Make every change that was acknowledged before this request survive a crash.
    Flush,
}

/// How a request ended, with its buffer (empty for requests without one).
#[derive(Debug)]
pub struct Reply {
    pub result: Result<()>,
    pub buffer: Vec<u8>,
}

/// Called exactly once per request, on any thread; it must not block.
pub type Complete = Box<dyn FnOnce(Reply) + Send>;

/// Whether a range holds bytes or reads as zeros without holding any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    Data,
    Zero,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub range: ByteRange,
    pub kind: ExtentKind,
}

/// A block device: 512-byte logical and 4 KiB physical sectors, any byte granularity accepted.
pub trait BlockDevice: Send + Sync {
    fn geometry(&self) -> Geometry;

    /// Start a request. `complete` may run before this returns.
    fn submit(&self, request: Request, complete: Complete);

    /// The runs of `range` in order, without gaps; a run may be cut short at any point, but at least one is returned
    /// for a range that is not empty.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>>;

    /// Fill `buffer` from `offset`. An error leaves the buffer's content undefined; there are no short reads.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let reply = wait(self, Request::Read { offset, buffer: vec![0; buffer.len()] });
        reply.result?;
        buffer.copy_from_slice(&reply.buffer);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> Result<()> {
        wait(self, Request::Write { offset, data: data.to_vec(), durability }).result
    }

    fn zero(&self, range: ByteRange, durability: Durability) -> Result<()> {
        wait(self, Request::Zero { range, durability }).result
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        wait(self, Request::Discard { range }).result
    }

    fn flush(&self) -> Result<()> {
        wait(self, Request::Flush).result
    }

    /// For a worker, which must not wait; without it, threads that may wait call the methods above.
    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        None
    }
}

/// Submit and wait for the reply.
fn wait<D: BlockDevice + ?Sized>(device: &D, request: Request) -> Reply {
    let slot = std::sync::Arc::new((Mutex::new(None), Condvar::new()));
    let answer = slot.clone();
    device.submit(
        request,
        Box::new(move |reply| {
            *answer.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
            answer.1.notify_one();
        }),
    );
    let mut reply = slot.0.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match reply.take() {
            Some(reply) => return reply,
            None => reply = slot.1.wait(reply).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// How much of a device is asked about at once.
const EXTENTS_SPAN: u64 = 1 << 30;

/// The runs of a device from `at`, which lies before its end: in order, without gaps, at least one. Not necessarily all.
pub fn runs_from(device: &dyn BlockDevice, at: u64) -> Result<Vec<Extent>> {
    let size = device.geometry().size;
    let asked = ByteRange::new(at, (size.0 - at).min(EXTENTS_SPAN));
    let extents = device.extents(asked)?;
    check_runs(asked, &extents)?;
    Ok(extents)
}

/// Refuse an answer to `asked` that is not in order, has gaps or is empty: it would corrupt what is made of it, or have
/// whoever asks for the rest ask for ever.
pub(crate) fn check_runs(asked: ByteRange, extents: &[Extent]) -> Result<()> {
    let mut at = asked.start.0;
    for extent in extents {
        if extent.range.start.0 != at || extent.range.is_empty() || extent.range.end() > asked.end() {
            let what = format!("the device gave the run {} where one at byte {at} was due", extent.range);
            return Err(Error::Invalid(what));
        }
        at = extent.range.end().0;
    }
    if extents.is_empty() {
        return Err(Error::Invalid(format!("the device has no run at byte {at}")));
    }
    Ok(())
}

/// Visit the runs of a device in order, without gaps.
pub fn for_each_extent<E: From<Error>>(
    device: &dyn BlockDevice,
    mut visit: impl FnMut(ByteRange, ExtentKind) -> Result<(), E>,
) -> Result<(), E> {
    let size = device.geometry().size;
    let mut at = 0;
    while at < size.0 {
        for extent in runs_from(device, at)? {
            visit(extent.range, extent.kind)?;
            at = extent.range.end().0;
        }
    }
    Ok(())
}

/// Refuse a change of a read-only device, or a request that is too long.
pub fn check_length(len: u64) -> Result<()> {
    if len > REQUEST_LEN_MAX {
        return Err(Error::Invalid(format!("a request of {len} bytes is longer than {REQUEST_LEN_MAX}")));
    }
    Ok(())
}
