//! What threads meet at: locks, queues, and the threads themselves.
//!
//! These are the standard library's and crossbeam's. With the feature `shuttle`, which is for `tests/schedules` alone, they
//! are that crate's: its scheduler decides at each of them who goes on, so that what ships is tried in orders that a
//! machine would show once in years. It runs one thread at a time: memory orders weaker than the strongest are not its
//! subject.

#[cfg(not(feature = "shuttle"))]
pub(crate) use {
    crossbeam::queue::SegQueue,
    std::{
        sync::{Condvar, Mutex, MutexGuard, atomic},
        thread,
    },
};

#[cfg(feature = "shuttle")]
pub(crate) use {
    scheduled::SegQueue,
    shuttle::{
        sync::{Condvar, Mutex, MutexGuard, atomic},
        thread,
    },
};

#[cfg(feature = "shuttle")]
mod scheduled {
    use std::{collections::VecDeque, sync::PoisonError};

    use shuttle::sync::{Mutex, MutexGuard};

    /// As crossbeam has it.
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
