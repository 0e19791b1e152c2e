//! Memory that the serving threads need, fetched before the first request needs it.
//!
//! A host, or a cgroup, that is short of memory writes dirty pages through us. If one of our threads then touches a
//! page for the first time, the kernel may make it wait for just these writes, and nobody moves again. `IO_FLUSHER`
//! prevents that where the process may have it (CAP_SYS_RESOURCE); where not, no page may be left to fetch. `fuser`
//! receives into a buffer of its own in each thread and shows it to nobody, except that the names of a request lie in
//! it. So a mount begins with as many lookups of names that do not exist as it has threads; each is held until all are
//! there, hence in a thread of its own, and that thread locks its buffers into memory.
//! The threads that ask are the only ones of a node that go through its own mount; see [`leave_files`].
//! Not here: what a device allocates to carry a write out, and what the kernel allocates in its name. Without
//! `IO_FLUSHER` only a memory limit that is not shared with the mount's users keeps these apart.

use std::{
    ffi::OsStr,
    fs,
    hint::black_box,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{Condvar, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};
use rustix::mm::{Advice, madvise, mlock};

use crate::buffer::{BUFFER_ALIGN, BUFFER_LEN, with_buffer};

/// How long the threads may take to come together. A kernel that lines lookups up never gets there.
const GATHER_MAX: Duration = Duration::from_secs(2);
/// What no client asks for.
const NAME_PREFIX: &str = ".bedplate-warm-";
/// The longest write with its headers, from the start of the page that it begins in.
const RECEIVED_BYTES_MAX: usize = BUFFER_LEN + BUFFER_ALIGN;
/// What a request uses of its thread's stack, with room to spare.
const STACK_BYTES: usize = 128 << 10;

/// Where the threads meet.
#[derive(Debug)]
pub(crate) struct Warming {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug)]
enum Meeting {
    /// Threads are coming; so many are missing.
    Gathering { missing: usize },
    /// All have come, or it took too long; nobody waits.
    Over,
}

impl Warming {
    pub(crate) fn new(threads: usize) -> Warming {
        Warming { meeting: Mutex::new(Meeting::Gathering { missing: threads }), changed: Condvar::new() }
    }

    /// Called for each lookup in the root of a mount on the thread that serves it. `name` lies where this thread
    /// receives its requests.
    pub(crate) fn attend(&self, name: &OsStr) {
        if name.as_bytes().starts_with(NAME_PREFIX.as_bytes()) && self.meet() {
            keep(name.as_bytes(), RECEIVED_BYTES_MAX);
            with_buffer(|buffer| keep(buffer, buffer.len()));
            black_box([1_u8; STACK_BYTES]);
        }
    }

    /// Ask for as many names beneath `dir` as there are `threads`, all at once, and wait until they are answered.
    pub(crate) fn gather(&self, dir: &Path, threads: usize) {
        let deadline = Instant::now() + GATHER_MAX;
        let (answer, answered) = mpsc::channel();
        for index in 0..threads {
            let (path, answer) = (dir.join(format!("{NAME_PREFIX}{index}")), answer.clone());
            let asking = thread::Builder::new().name("fuse-warm".into()).spawn(move || {
                if let Err(error) = leave_files() {
                    return tracing::warn!(%error, "no thread may ask while it holds the mount's connection");
                }
                // It does not exist; the receiver may have given up.
                let _ = fs::symlink_metadata(path);
                let _ = answer.send(());
            });
            if let Err(error) = asking {
                tracing::warn!(%error, "no thread to prepare the mount's memory with");
                break;
            }
        }
        drop(answer);
        let left = || deadline.saturating_duration_since(Instant::now());
        let count = (0..threads).take_while(|_| answered.recv_timeout(left()).is_ok()).count();
        if count < threads {
            tracing::warn!(threads, count, "not every serving thread has its memory yet");
        }
        self.end();
    }

    /// Wait for the others; whether this thread was expected.
    fn meet(&self) -> bool {
        let mut meeting = self.meeting.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *meeting {
            Meeting::Over => return false,
            Meeting::Gathering { missing } => *missing = missing.saturating_sub(1),
        }
        if matches!(*meeting, Meeting::Gathering { missing: 0 }) {
            *meeting = Meeting::Over;
            self.changed.notify_all();
        }
        let gathering = |meeting: &mut Meeting| matches!(meeting, Meeting::Gathering { .. });
        let waited = self.changed.wait_timeout_while(meeting, GATHER_MAX, gathering);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        true
    }

    /// Nobody is to be waited for any more.
    pub(crate) fn end(&self) {
        *self.meeting.lock().unwrap_or_else(PoisonError::into_inner) = Meeting::Over;
        self.changed.notify_all();
    }
}

/// Give this thread a table of open files of its own, an empty one.
///
/// A thread that waits for an answer of its own mount cannot be killed, and keeps what the process has open: where that
/// is the mount's connection too, a SIGKILL leaves a process that waits for itself, with the locks of its disks.
fn leave_files() -> io::Result<()> {
    let unshare = libc::c_int::try_from(libc::CLOSE_RANGE_UNSHARE).expect("a small flag");
    // SAFETY: descriptors of this thread's own copy are closed, and what it does from here on uses none.
    #[expect(unsafe_code, reason = "no crate offers it")]
    let closed = unsafe { libc::close_range(0, libc::c_uint::MAX, unshare) };
    Errno::result(closed).map(drop).map_err(io::Error::from)
}

/// Have the `len` bytes from `start`'s page on present in memory, and keep them there if that is allowed.
fn keep(start: &[u8], len: usize) {
    let first = start.as_ptr().map_addr(|address| address & !(BUFFER_ALIGN - 1)).cast_mut().cast();
    // SAFETY: neither call changes a byte or needs the range to be ours: they make pages present with the content that
    // they have, and report what is not mapped.
    #[expect(unsafe_code, reason = "the pages are fuser's; only their address is known here")]
    let kept = unsafe { mlock(first, len).or_else(|_| madvise(first, len, Advice::LinuxPopulateWrite)) };
    if let Err(error) = kept {
        tracing::debug!(%error, "a thread's buffer is not all in memory");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_once_it_is_over_and_other_names_never_do() {
        let warming = Warming::new(2);
        warming.attend(OsStr::new("images"));
        assert!(matches!(*warming.meeting.lock().unwrap(), Meeting::Gathering { missing: 2 }));
        warming.end();
        assert!(!warming.meet());
    }

    #[test]
    fn the_last_to_come_lets_all_go() {
        let warming = Warming::new(3);
        let met = thread::scope(|scope| {
            let threads = [(); 3].map(|()| scope.spawn(|| warming.meet()));
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(met, [true; 3]);
        assert!(matches!(*warming.meeting.lock().unwrap(), Meeting::Over));
    }
}
