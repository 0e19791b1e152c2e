//! The entries of one worker: memory that the kernel and we use by turns.
//!
//! Owns that memory, mapped once, and who holds each entry ([`Holder`]): every access asks that first, so nobody touches
//! what is not his, whatever the kernel sends. An entry is a page with the request's header and a payload of whole
//! pages, so that direct I/O can use it as it is. The memory stays mapped until the last command on it has ended; should
//! one never end, it stays for good.

#![expect(unsafe_code, reason = "memory that the kernel writes, named by address")]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    ptr::{self, NonNull},
    slice,
    sync::Arc,
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    exec::ring::{Job, Window, Worker},
};
use fuser::Errno;
use io_uring::{opcode, squeue::Entry128, types};
use nix::libc;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

use super::protocol::{
    COMMIT_AND_FETCH, ENTRY_LEN, HEADER_LEN, Header, REGISTER, REQUEST_HEADER_LEN, Request, command,
    decode_entry, out_header,
};

/// What a header takes: a page, so that the payload behind it begins with one.
pub(super) const HEADER_BYTES: usize = 4096;
/// Where in that page the two vectors lie that a registration points to.
const VECTORS_AT: usize = 1024;
const _: () = assert!(REQUEST_HEADER_LEN <= VECTORS_AT);

/// Where `len` is in a submission (include/uapi/linux/io_uring.h); the crate has no setter for it in this command.
const SUBMISSION_LEN_AT: usize = 24;
const _: () = assert!(size_of::<Entry128>() == 128);
/// How many vectors a registration has.
const VECTORS: u32 = 2;

/// Who may touch an entry's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// We do: before it is registered, and between a request's arrival and its answer.
    Us,
    /// The kernel, with a command that has not ended.
    Kernel,
    /// A request on a device has the payload.
    Device,
    /// Nobody: the connection is gone.
    Gone,
}

struct Entry {
    queue: u16,
    memory: NonNull<u8>,
    holder: Holder,
    /// What the answer is committed with.
    commit_id: u64,
}

/// A worker's entries.
pub(super) struct Entries {
    device: Arc<OwnedFd>,
    payload_len: usize,
    start: NonNull<u8>,
    entries: Vec<Entry>,
}

impl Entries {
    /// Memory for one entry for each of `queues`, present and, where that is allowed, locked: a host short of memory
    /// must not make us wait for its writes.
    pub(super) fn map(device: Arc<OwnedFd>, queues: &[u16], payload_len: usize) -> io::Result<Entries> {
        let step = HEADER_BYTES + payload_len;
        let len = step * queues.len();
        // SAFETY: new memory, at no address of ours.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        // SAFETY: the range was just mapped. A child of ours is not to get a copy of what the kernel writes into.
        if let Err(error) = unsafe { madvise(start, len, Advice::LinuxDontFork) } {
            tracing::debug!(%error, "the entries of a ring are passed on to children");
        }
        // SAFETY: as before.
        let kept = unsafe { mlock(start, len).or_else(|_| madvise(start, len, Advice::LinuxPopulateWrite)) };
        if let Err(error) = kept {
            tracing::debug!(%error, "the entries of a ring are not all in memory");
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let entries = queues.iter().enumerate().map(|(index, queue)| Entry {
            queue: *queue,
            // SAFETY: within the range.
            memory: unsafe { start.add(index * step) },
            holder: Holder::Us,
            commit_id: 0,
        });
        Ok(Entries { device, payload_len, start, entries: entries.collect() })
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn payload_len(&self) -> usize {
        self.payload_len
    }

    pub(super) fn queue(&self, index: usize) -> u16 {
        self.entries.get(index).map_or(0, |entry| entry.queue)
    }

    /// Give an entry to the kernel for the first time.
    pub(super) fn register(&mut self, worker: &mut Worker, index: usize) {
        let payload_len = self.payload_len;
        let Some(entry) = self.held(index, Holder::Us) else { return };
        let vectors = [
            libc::iovec { iov_base: entry.memory.as_ptr().cast(), iov_len: REQUEST_HEADER_LEN },
            libc::iovec { iov_base: entry.payload().as_ptr().cast(), iov_len: payload_len },
        ];
        // SAFETY: within the entry's first page, which we hold; a page is aligned enough.
        let at = unsafe {
            let at = entry.memory.add(VECTORS_AT).cast::<[libc::iovec; 2]>();
            at.write(vectors);
            at
        };
        entry.holder = Holder::Kernel;
        let queue = entry.queue;
        let build = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), REGISTER);
        let address = u64::try_from(at.addr().get()).unwrap_or_default();
        let submission = build.cmd(command(0, queue)).addr(Some(address)).build();
        self.push(worker, index, with_len(submission, VECTORS));
    }

    /// The kernel's command has ended with a request; we hold the entry from now on.
    pub(super) fn arrived(&mut self, index: usize) -> Option<(Header, Request)> {
        let payload_len = self.payload_len;
        let entry = self.held(index, Holder::Kernel)?;
        entry.holder = Holder::Us;
        // SAFETY: the command has ended, so the kernel writes there no more, and we hold it; within the entry's page.
        let header = unsafe { entry.memory.cast::<[u8; REQUEST_HEADER_LEN]>().as_ref() };
        let (general, rest) = header.split_first_chunk::<HEADER_LEN>()?;
        let (operation, rest) = rest.split_first_chunk::<HEADER_LEN>()?;
        let (commit_id, len) = decode_entry(rest.first_chunk::<ENTRY_LEN>()?);
        // More than there is room for: nothing of it is believed.
        let len = if len <= payload_len { len } else { 0 };
        // SAFETY: as above; the payload has `payload_len` bytes.
        let payload = unsafe { slice::from_raw_parts(entry.payload().as_ptr(), len) };
        let general = Header::decode(general);
        let request = Request::decode(general, operation, payload);
        entry.commit_id = commit_id;
        Some((general, request))
    }

    /// The kernel's command has ended because the connection did.
    pub(super) fn gone(&mut self, index: usize) {
        if let Some(entry) = self.held(index, Holder::Kernel) {
            entry.holder = Holder::Gone;
        }
    }

    /// Whether an entry is used no more.
    pub(super) fn is_gone(&self, index: usize) -> bool {
        self.entries.get(index).is_none_or(|entry| entry.holder == Holder::Gone)
    }

    /// Put an answer's bytes into the payload; false if there is no room for them.
    pub(super) fn fill(&mut self, index: usize, bytes: &[u8]) -> bool {
        if bytes.len() > self.payload_len {
            return false;
        }
        let Some(entry) = self.held(index, Holder::Us) else { return false };
        // SAFETY: we hold the payload, and it is as long.
        unsafe { entry.payload().copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
        true
    }

    /// Have a device read into the payload's first `len` bytes.
    pub(super) fn start_read(
        &mut self,
        worker: &mut Worker,
        index: usize,
        device: &Arc<dyn BlockDevice>,
        offset: u64,
        len: usize,
    ) {
        self.start(worker, index, device, len, |window| Job::Read { offset, window });
    }

    /// Have a device write the payload's first `len` bytes.
    pub(super) fn start_write(
        &mut self,
        worker: &mut Worker,
        index: usize,
        device: &Arc<dyn BlockDevice>,
        offset: u64,
        len: usize,
        durability: Durability,
    ) {
        self.start(worker, index, device, len, |window| Job::Write { offset, window, durability });
    }

    /// Have a device make durable what it has acknowledged.
    pub(super) fn start_flush(&mut self, worker: &mut Worker, index: usize, device: &Arc<dyn BlockDevice>) {
        self.start(worker, index, device, 0, |_| Job::Flush);
    }

    /// A request on a device has ended; we hold the entry again.
    pub(super) fn returned(&mut self, index: usize) {
        if let Some(entry) = self.held(index, Holder::Device) {
            entry.holder = Holder::Us;
        }
    }

    /// Hold an entry again whose request was not started after all: the worker panics before it lends the payload.
    pub(super) fn reclaim(&mut self, index: usize) {
        if let Some(entry) = self.entries.get_mut(index)
            && entry.holder == Holder::Device
        {
            entry.holder = Holder::Us;
        }
    }

    /// Answer with the payload's first `len` bytes or with an error, and wait for the next request.
    pub(super) fn commit(
        &mut self,
        worker: &mut Worker,
        index: usize,
        unique: u64,
        answer: Result<u32, Errno>,
    ) {
        let Some(entry) = self.held(index, Holder::Us) else { return };
        let header = out_header(unique, answer.err());
        let len = answer.unwrap_or(0).to_ne_bytes();
        // SAFETY: we hold the entry; both lie within its header. The second is `payload_sz`, behind flags and commit id.
        unsafe {
            entry.memory.copy_from_nonoverlapping(NonNull::from(&header).cast(), header.len());
            let at = entry.memory.add(2 * HEADER_LEN + 16);
            at.copy_from_nonoverlapping(NonNull::from(&len).cast(), len.len());
        }
        entry.holder = Holder::Kernel;
        let (commit_id, queue) = (entry.commit_id, entry.queue);
        let build = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), COMMIT_AND_FETCH);
        self.push(worker, index, build.cmd(command(commit_id, queue)).build());
    }

    fn start(
        &mut self,
        worker: &mut Worker,
        index: usize,
        device: &Arc<dyn BlockDevice>,
        len: usize,
        job: impl FnOnce(Window) -> Job,
    ) {
        let len = len.min(self.payload_len);
        let Some(entry) = self.held(index, Holder::Us) else { return };
        entry.holder = Holder::Device;
        let job = job(Window { start: entry.payload(), len });
        // SAFETY: the payload is the device's until `returned`, which the end of the request leads to.
        unsafe { worker.start(device, job, token(index)) };
    }

    fn push(&mut self, worker: &mut Worker, index: usize, submission: Entry128) {
        // SAFETY: all that the command names is the entry's memory, which is the kernel's until the command ends.
        unsafe { worker.push_command(submission, token(index)) };
    }

    fn held(&mut self, index: usize, by: Holder) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(index)?;
        if entry.holder != by {
            tracing::error!(queue = entry.queue, holder = ?entry.holder, expected = ?by, "an entry is not held as it should be");
            return None;
        }
        Some(entry)
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        if self.entries.iter().all(|entry| matches!(entry.holder, Holder::Us | Holder::Gone)) {
            let len = (HEADER_BYTES + self.payload_len) * self.entries.len();
            // SAFETY: the range that `map` made, which nobody else holds a part of.
            if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), len) } {
                tracing::debug!(%error, "the entries of a ring stay mapped");
            }
        }
    }
}

impl Entry {
    fn payload(&self) -> NonNull<u8> {
        // SAFETY: an entry is a header's page and its payload.
        unsafe { self.memory.add(HEADER_BYTES) }
    }
}

/// How the worker names an entry.
fn token(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn with_len(mut submission: Entry128, len: u32) -> Entry128 {
    let start = ptr::from_mut(&mut submission).cast::<u8>();
    // SAFETY: four bytes of the submission's 128, at an offset and in a type of the kernel's interface.
    unsafe { start.add(SUBMISSION_LEN_AT).cast::<u32>().write(len) };
    submission
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn entries(payload_len: usize) -> Entries {
        let device = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        Entries::map(device, &[0, 0, 1], payload_len).unwrap()
    }

    #[test]
    fn the_length_lands_where_another_operation_has_its_own() {
        let bytes = |entry: Entry128| {
            // SAFETY: plain bytes, all of them initialised.
            unsafe { std::mem::transmute::<Entry128, [u8; 128]>(entry) }
        };
        let read = |len| Entry128::from(opcode::Read::new(types::Fd(1), ptr::null_mut(), len).build());
        assert_eq!(bytes(with_len(read(0), 77)), bytes(read(77)));
    }

    #[test]
    fn nobody_touches_an_entry_that_he_does_not_hold() {
        let mut entries = entries(8192);
        assert!(entries.arrived(0).is_none(), "it is not the kernel's");
        assert!(entries.fill(0, b"ours"));
        entries.entries[0].holder = Holder::Device;
        assert!(!entries.fill(0, b"no more"));
        entries.returned(0);
        assert!(entries.fill(0, &[1; 8192]));
        assert!(!entries.fill(0, &[1; 8193]), "longer than the payload");
        assert!(!entries.fill(3, b"there is none"));
    }

    #[test]
    fn a_request_with_an_impossible_payload_length_is_refused() {
        let mut entries = entries(4096);
        let entry = &mut entries.entries[1];
        entry.holder = Holder::Kernel;
        let mut header = [0_u8; REQUEST_HEADER_LEN];
        // A lookup with a name that is longer than there is memory.
        header[4] = 1;
        header[2 * HEADER_LEN + 16..2 * HEADER_LEN + 20].copy_from_slice(&u32::MAX.to_ne_bytes());
        // SAFETY: the test holds the entry.
        unsafe { entry.memory.copy_from_nonoverlapping(NonNull::from(&header).cast(), header.len()) };
        let (_, request) = entries.arrived(1).unwrap();
        assert_eq!(request, Request::Refused(Errno::EIO));
    }

    #[test]
    fn payloads_begin_with_a_page_and_do_not_overlap() {
        let entries = entries(12288);
        let starts: Vec<usize> = entries.entries.iter().map(|entry| entry.payload().addr().get()).collect();
        assert!(starts.iter().all(|start| start % 4096 == 0));
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 12288 + HEADER_BYTES));
    }
}
