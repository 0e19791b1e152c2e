//! How other threads reach a worker that sleeps in its ring.
//!
//! Owns [`Post`], a worker's inbox, and [`Handle`], what others see of it. What is put into the inbox is bounded by what
//! the worker has asked for: the ends of its threads' jobs, the actions and ends of its operations.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering, fence},
};

use crossbeam::queue::SegQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{
    error::{Error, Result},
    exec::carrier::{ChangeId, Message},
};

/// What a worker is told by other threads.
#[derive(Debug)]
pub(super) enum Letter {
    Change(ChangeId, Message),
    /// A thread is through with this flight.
    Landed {
        flight: u32,
        result: Result<()>,
    },
}

#[derive(Debug)]
pub(in crate::exec) struct Post {
    /// Readable while there is something that a sleeping worker has not looked at.
    event: EventFd,
    asleep: AtomicBool,
    woken: AtomicBool,
    stopping: AtomicBool,
    letters: SegQueue<Letter>,
}

impl Post {
    pub fn tell(&self, change: ChangeId, message: Message) {
        self.send(Letter::Change(change, message));
    }

    pub(super) fn send(&self, letter: Letter) {
        self.letters.push(letter);
        self.knock();
    }

    /// Called after something that [`Post::may_sleep`] looks at was changed.
    fn knock(&self) {
        // Either the worker sees what changed before it falls asleep, or this sees that it does.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            // Full means that it is readable already.
            let _ = self.event.write(1);
        }
    }

    pub(super) fn next(&self) -> Option<Letter> {
        self.letters.pop()
    }

    /// Announce that the worker is about to sleep; `false` if there is something to do first.
    pub(super) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let quiet = self.letters.is_empty() && !self.woken.load(Ordering::Acquire);
        if !quiet {
            self.awake();
        }
        quiet
    }

    pub(super) fn awake(&self) {
        self.asleep.store(false, Ordering::Release);
    }

    /// Whether somebody has called [`Handle::wake`] or [`Handle::stop`] since this was asked last.
    pub(super) fn take_woken(&self) -> bool {
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Reaches one worker from any thread, also when it is gone.
#[derive(Clone, Debug)]
pub struct Handle {
    post: Arc<Post>,
}

impl Handle {
    pub(super) fn new() -> Result<Handle> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("make", "eventfd", e.into()))?;
        let post = Post {
            event,
            asleep: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            letters: SegQueue::new(),
        };
        Ok(Handle { post: Arc::new(post) })
    }

    /// Have the worker call [`FrontEnd::woken`](super::FrontEnd::woken) soon.
    pub fn wake(&self) {
        self.post.woken.store(true, Ordering::Release);
        self.post.knock();
    }

    /// Have the worker leave [`Worker::run`](super::Worker::run) once every request that it has started has ended.
    pub fn stop(&self) {
        self.post.stopping.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn post(&self) -> &Arc<Post> {
        &self.post
    }
}
