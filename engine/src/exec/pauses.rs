//! How long changes of a volume had to wait for life operations: a figure that people ask for.
//!
//! Owns [`Pauses`]. A pause is the time in which a barrier admits no change, from its asking to its end; the flush that
//! goes before it is not part of it. Reads never wait.

use std::time::Duration;

/// The pauses of a volume since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    pub count: u64,
    pub total: Duration,
    pub longest: Duration,
    pub last: Duration,
}

impl Pauses {
    pub fn add(&mut self, pause: Duration) {
        self.count += 1;
        self.total += pause;
        self.longest = self.longest.max(pause);
        self.last = pause;
    }
}
