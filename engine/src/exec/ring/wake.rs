//! How other threads reach a worker that sleeps in its ring.
//!
//! Owns [`Post`], a worker's inbox, and [`Handle`], what others see of it. What is put into the inbox is bounded by what
//! the worker has asked for: the ends of its threads' jobs, the actions and ends of its operations.

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{
    error::{Error, Result},
    exec::carrier::{ChangeId, Message},
    sync::{
        SegQueue,
        atomic::{AtomicBool, Ordering, fence},
    },
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

    /// Sleep as a worker without a ring does, after [`Post::may_sleep`].
    pub(super) fn wait(&self, patience: Option<Duration>) -> Result<()> {
        let patience = patience.map_or(PollTimeout::NONE, |patience| {
            PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)], patience) {
            Ok(_) | Err(Errno::EINTR) => {
                let _ = self.event.read();
                Ok(())
            }
            Err(errno) => Err(Error::io("wait for", "eventfd", errno.into())),
        }
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

/// Run by `cargo test -p bedplate-engine --features shuttle --lib schedules`, see [`crate::sync`].
#[cfg(all(test, feature = "shuttle"))]
mod schedules {
    use shuttle::{Config, MaxSteps, Runner, scheduler::RandomScheduler, thread};

    use super::*;

    const SCHEDULES: usize = 5000;
    /// A worker that sleeps for ever takes more.
    const STEPS_MAX: usize = 20_000;
    const SENDERS: u32 = 3;

    /// What [`Worker::run`](super::super::Worker::run) does with its post, and the ring with its event.
    fn work(post: &Post, handed_in: &SegQueue<u32>) -> (u32, u32) {
        let (mut letters, mut requests) = (0, 0);
        loop {
            while post.next().is_some() {
                letters += 1;
            }
            if post.take_woken() {
                while handed_in.pop().is_some() {
                    requests += 1;
                }
            }
            if post.is_stopping() && letters == SENDERS && requests == SENDERS {
                return (letters, requests);
            }
            if post.may_sleep() {
                while !is_readable(post.event()) {
                    thread::yield_now();
                }
                post.awake();
                let _ = post.event().read();
            }
        }
    }

    fn is_readable(event: &EventFd) -> bool {
        let mut watched = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    #[test]
    fn a_worker_that_sleeps_is_woken_by_whatever_comes() {
        let mut config = Config::new();
        config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
        Runner::new(RandomScheduler::new(SCHEDULES), config).run(|| {
            let handle = Handle::new().expect("a descriptor more");
            let handed_in = Arc::new(SegQueue::new());
            let worker = thread::spawn({
                let (handle, handed_in) = (handle.clone(), handed_in.clone());
                move || work(handle.post(), &handed_in)
            });
            let senders: Vec<_> = (0..SENDERS)
                .map(|flight| {
                    let (handle, handed_in) = (handle.clone(), handed_in.clone());
                    thread::spawn(move || {
                        handle.post().send(Letter::Landed { flight, result: Ok(()) });
                        handed_in.push(flight);
                        handle.wake();
                    })
                })
                .collect();
            for sender in senders {
                sender.join().expect("no panic");
            }
            handle.stop();
            assert_eq!(worker.join().expect("no panic"), (SENDERS, SENDERS));
        });
    }
}
