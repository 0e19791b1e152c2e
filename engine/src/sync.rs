//! What threads meet at: locks, queues, and the threads themselves.
//!
//! These are the standard library's and crossbeam's. With the feature `shuttle`, which is for `tests/schedules` alone, they
//! are that crate's: its scheduler decides at each of them who goes on, so that what ships is tried in orders that a
//! machine would show once in years. Memory orders weaker than the strongest are not its subject; `tools/sanitize` has
//! Miri for them.

#[cfg(not(feature = "shuttle"))]
pub(crate) use {
    crossbeam::{
        channel::{Sender, unbounded},
        queue::SegQueue,
    },
    std::{
        sync::{Condvar, Mutex, MutexGuard, atomic},
        thread,
    },
};

#[cfg(feature = "shuttle")]
pub(crate) use {
    scheduled::{SegQueue, Sender, unbounded},
    shuttle::{
        sync::{Condvar, Mutex, MutexGuard, atomic},
        thread,
    },
};

#[cfg(feature = "shuttle")]
mod scheduled {
    use std::{
        collections::VecDeque,
        fmt,
        sync::{Arc, PoisonError},
    };

    use shuttle::sync::{Mutex, MutexGuard, mpsc};

    /// As crossbeam has it, whatever it carries.
    pub struct Sender<T>(mpsc::Sender<T>);

    impl<T> Sender<T> {
        pub fn send(&self, value: T) -> Result<(), mpsc::SendError<T>> {
            self.0.send(value)
        }
    }

    impl<T> fmt::Debug for Sender<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Sender")
        }
    }

    /// As crossbeam has it: it can be shared.
    pub struct Receiver<T>(Arc<Mutex<mpsc::Receiver<T>>>);

    pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = mpsc::channel();
        (Sender(sender), Receiver(Arc::new(Mutex::new(receiver))))
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Receiver<T> {
            Receiver(self.0.clone())
        }
    }

    impl<T> Receiver<T> {
        pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
            std::iter::from_fn(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).recv().ok())
        }
    }

    #[derive(Debug)]
    pub struct SegQueue<T>(Mutex<VecDeque<T>>);

    impl<T> SegQueue<T> {
        pub fn new() -> SegQueue<T> {
            SegQueue(Mutex::default())
        }

        pub fn push(&self, value: T) {
            self.lock().push_back(value);
        }

        pub fn pop(&self) -> Option<T> {
            self.lock().pop_front()
        }

        pub fn is_empty(&self) -> bool {
            self.lock().is_empty()
        }

        fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }
}
