//! The ring itself: pushing entries, entering the kernel, taking completions.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::{errno::Errno, libc};

use super::window::Lent;
use crate::{
    error::{Error, Result},
    units::ByteRange,
};

/// Entries of the submission queue. More are pushed by entering the kernel in between.
const SUBMISSIONS_MAX: u32 = 256;
/// Completions that the kernel holds before it keeps them elsewhere.
const COMPLETIONS_MAX: u32 = 1024;

/// Whom a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Wake,
    Command(u32),
    Flight(u32),
}

impl Tag {
    const COMMAND: u64 = 1 << 32;
    const FLIGHT: u64 = 2 << 32;

    fn encode(self) -> u64 {
        match self {
            Tag::Wake => 0,
            Tag::Command(token) => Tag::COMMAND | u64::from(token),
            Tag::Flight(flight) => Tag::FLIGHT | u64::from(flight),
        }
    }

    fn decode(data: u64) -> Tag {
        let low = u32::try_from(data & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        match data - u64::from(low) {
            Tag::COMMAND => Tag::Command(low),
            Tag::FLIGHT => Tag::Flight(low),
            _ => Tag::Wake,
        }
    }
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub tag: Tag,
    pub result: i32,
    /// Further completions of the same entry follow.
    pub more: bool,
}

pub(super) struct Ring {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    /// Entries that the submission queue had no room for.
    backlog: VecDeque<squeue::Entry128>,
}

impl Ring {
    /// A ring for the calling thread, which alone may use it.
    pub fn new() -> Result<Ring> {
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(COMPLETIONS_MAX)
            .build(SUBMISSIONS_MAX)
            .map_err(|e| Error::io("make", "io_uring", e))?;
        Ok(Ring { ring, backlog: VecDeque::new() })
    }

    /// Push an entry of the front end.
    ///
    /// # Safety
    ///
    /// Whatever the entry points to stays valid, and nobody else's, until its completion was taken.
    #[expect(unsafe_code, reason = "the kernel follows the pointers of an entry")]
    pub unsafe fn push_command(&mut self, entry: squeue::Entry128, token: u32) {
        self.push(entry.user_data(Tag::Command(token).encode()));
    }

    pub fn read(&mut self, fd: RawFd, offset: u64, into: Lent, flight: u32) {
        let entry = opcode::Read::new(types::Fd(fd), into.pointer(), length(into)).offset(offset).build();
        self.push(squeue::Entry128::from(entry.user_data(Tag::Flight(flight).encode())));
    }

    pub fn write(&mut self, fd: RawFd, offset: u64, bytes: Lent, flight: u32) {
        let entry = opcode::Write::new(types::Fd(fd), bytes.pointer(), length(bytes)).offset(offset).build();
        self.push(squeue::Entry128::from(entry.user_data(Tag::Flight(flight).encode())));
    }

    pub fn punch(&mut self, fd: RawFd, range: ByteRange, flight: u32) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let entry =
            opcode::Fallocate::new(types::Fd(fd), range.len.0).offset(range.start.0).mode(mode).build();
        self.push(squeue::Entry128::from(entry.user_data(Tag::Flight(flight).encode())));
    }

    /// Ask to be woken when this descriptor becomes readable, again and again.
    pub fn watch(&mut self, event: &impl AsRawFd) {
        let readable = u32::try_from(libc::POLLIN).unwrap_or_default();
        let entry = opcode::PollAdd::new(types::Fd(event.as_raw_fd()), readable).multi(true).build();
        self.push(squeue::Entry128::from(entry.user_data(Tag::Wake.encode())));
    }

    fn push(&mut self, entry: squeue::Entry128) {
        if self.backlog.is_empty() && self.try_push(&entry) {
            return;
        }
        self.backlog.push_back(entry);
        self.push_backlog();
    }

    #[expect(unsafe_code, reason = "the kernel follows the pointers of an entry")]
    fn try_push(&mut self, entry: &squeue::Entry128) -> bool {
        // SAFETY: what a command points to is the promise of `push_command`'s caller; the other entries point to lent
        // memory, which stays until its flight has landed, or to nothing.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn push_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if self.try_push(&entry) {
                continue;
            }
            // Full: hand over what there is. If the kernel cannot take it now, it can after some completions.
            let handed_over = self.ring.submit().is_ok();
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                if !handed_over {
                    return;
                }
            }
        }
    }

    /// Hand over what was pushed and let the kernel post what has completed, without waiting.
    pub fn enter(&mut self) -> Result<()> {
        self.push_backlog();
        let submission = self.ring.submission();
        let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        if idle { Ok(()) } else { outcome(self.ring.submit_and_wait(0)) }
    }

    /// The same, and wait for a completion, but no longer than `patience`.
    pub fn wait(&mut self, patience: Option<Duration>) -> Result<()> {
        self.push_backlog();
        match patience {
            None => outcome(self.ring.submit_and_wait(1)),
            Some(patience) => {
                let until = types::Timespec::from(patience);
                outcome(self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&until)))
            }
        }
    }

    pub fn next(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let more = cqueue::more(entry.flags());
        Some(Completion { tag: Tag::decode(entry.user_data()), result: entry.result(), more })
    }
}

#[cfg(test)]
impl Ring {
    /// From now on the kernel knows nothing of this ring.
    pub fn break_down(&mut self) {
        let null = std::fs::File::open("/dev/null").expect("every Linux has it");
        #[expect(unsafe_code, reason = "the descriptor becomes another file")]
        // SAFETY: it is the ring's own, which stays open, and is closed once, as that file.
        let duplicated = unsafe { libc::dup2(null.as_raw_fd(), self.ring.as_raw_fd()) };
        assert_eq!(duplicated, self.ring.as_raw_fd());
    }
}

/// Requests are far shorter than 4 GiB; one that is not comes in short pieces.
fn length(lent: Lent) -> u32 {
    u32::try_from(lent.len()).unwrap_or(1 << 30)
}

fn outcome(entered: io::Result<usize>) -> Result<()> {
    match entered {
        Ok(_) => Ok(()),
        Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or_default()) {
            // Interrupted, time over, or short of memory: completions make room.
            Errno::EINTR | Errno::ETIME | Errno::EBUSY | Errno::EAGAIN | Errno::ENOMEM => Ok(()),
            _ => Err(Error::io("enter", "io_uring", e)),
        },
    }
}
