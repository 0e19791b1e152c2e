//! What a device tells an executor that never waits.
//!
//! Owns [`Asynchronous`]: where the bytes of a range are, so that the executor gets them itself, and who takes changes.
//! An answer may always be [`Located::Waits`]; then a thread that may wait asks the device for the bytes. So nothing
//! here has to know everything, and no error has two origins.

use std::{fs::File, os::fd::BorrowedFd, sync::Arc};

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::{
    executor::{Live, Shared},
    fair::Key,
};
use crate::{error::Result, units::ByteRange};

/// An open file for whoever carries its reads and writes out without the engine's calls.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor<'a> {
    pub fd: BorrowedFd<'a>,
    pub cache: Cache,
}

/// How a file's bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Through the page cache.
    Buffered,
    /// Past it: offsets, lengths and memory are multiples of `align`.
    Direct { align: u64 },
    /// Of a file system that has no other place than memory: they are copied, and nothing is waited for. What was
    /// swapped out is waited for like any memory of ours.
    Memory,
}

impl Cache {
    /// How the bytes of an open file travel that was not opened to go past the page cache. The kernel gives each request
    /// of a ring for a file in memory to a thread, as if it could wait, and does not try it at once when it is asked to.
    pub fn of(file: &File) -> Cache {
        match fstatfs(file) {
            Ok(stat) if stat.filesystem_type() == TMPFS_MAGIC => Cache::Memory,
            Ok(_) | Err(_) => Cache::Buffered,
        }
    }
}

/// Whose bytes a part of a range is made of.
#[derive(Debug)]
pub enum Located<'a> {
    /// This file's, from `offset` on.
    File { file: Descriptor<'a>, offset: u64 },
    /// These, as long as the part.
    Bytes(&'a [u8]),
    /// Nobody's: zeros.
    Zeros,
    /// Only a thread that may wait can get them, or say why not.
    Waits,
}

/// Keeps what a plan names: files stay open, space is not given back.
#[derive(Debug)]
pub struct Pin(Option<Arc<Live>>);

impl Pin {
    /// Of a device whose answers hold as long as it exists itself.
    pub const DEVICE: Pin = Pin(None);

    pub(super) fn of(live: Arc<Live>) -> Pin {
        Pin(Some(live))
    }

    /// Whether nobody else holds what it holds.
    pub(super) fn is_last(&self) -> bool {
        self.0.as_ref().is_some_and(|live| Arc::strong_count(live) == 1)
    }
}

/// A device that can be read and changed without waiting.
pub trait Asynchronous: Send + Sync {
    /// Call `found` with where the bytes of each part of `range` are: in order, without gaps. The answers hold until
    /// the pin and the device are dropped. An error means that nothing was found.
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<Pin>;

    /// Asked after the bytes of `range` have come: whether they can be told.
    fn confirm(&self, range: ByteRange) -> Result<()>;

    /// What threads that get its bytes may wait for, together with those of other devices: the image that they share.
    fn waits_for(&self) -> Key;

    /// Who takes changes and flushes; an error if nobody does.
    fn changes(&self) -> Result<&Arc<Shared>>;
}
