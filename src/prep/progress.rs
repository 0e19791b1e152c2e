//! What a running job says about itself: phase, bytes, rate, time left.
//!
//! Owns [`Meter`], which the threads of one job share, and [`Progress`], the picture that is taken of it for people and
//! the API. It does not decide anything: no limit or deadline is derived from these figures.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::Serialize;

/// The rate is the mean over this long.
const RATE_WINDOW: Duration = Duration::from_secs(8);
/// Two samples are at least this far apart, which bounds their number.
const SAMPLE_DISTANCE: Duration = Duration::from_millis(250);

/// What a job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for its turn; [`Progress::done_bytes`] is what an earlier run kept.
    Queued,
    /// Waiting for the source, for the first time or again.
    Connecting,
    /// Bytes arrive, and are hashed and written as they do.
    Transferring,
    /// Everything has arrived and the hash catches up; or a kept prefix, or what an image was joined from, is read again.
    Hashing,
    /// What was written is being made durable.
    Syncing,
    /// The verified file gets its name and record.
    Publishing,
    /// The file is read back from the medium.
    Verifying,
}

/// A picture of a job at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Progress {
    pub phase: Phase,
    pub done_bytes: u64,
    /// Unknown while the source has not said it, or never will.
    pub total_bytes: Option<u64>,
    pub rate_bytes_per_s: u64,
    /// Time left in seconds, once there is a rate and a total.
    pub eta_s: Option<u64>,
    /// The number of the present attempt at the source, from 1; 0 before the first.
    pub attempt: u32,
    /// Why the attempt before this one ended.
    pub last_error: Option<String>,
    /// Set while the job pauses between two attempts.
    pub next_retry_at: Option<Timestamp>,
}

/// The shared state behind [`Progress`].
#[derive(Debug)]
pub struct Meter(Mutex<State>);

#[derive(Debug)]
struct State {
    phase: Phase,
    done: u64,
    total: Option<u64>,
    samples: VecDeque<(Instant, u64)>,
    attempt: u32,
    last_error: Option<String>,
    next_retry_at: Option<Timestamp>,
}

impl Default for Meter {
    fn default() -> Meter {
        Meter(Mutex::new(State {
            phase: Phase::Queued,
            done: 0,
            total: None,
            samples: VecDeque::new(),
            attempt: 0,
            last_error: None,
            next_retry_at: None,
        }))
    }
}

impl Meter {
    /// Enter a phase. Figures of the phase before stay until they are changed.
    pub fn enter(&self, phase: Phase) {
        self.lock().phase = phase;
    }

    /// Start counting anew: `done` of `total` bytes, without a rate.
    pub fn begin(&self, phase: Phase, done: u64, total: Option<u64>) {
        let mut state = self.lock();
        state.phase = phase;
        state.done = done;
        state.total = total;
        state.samples.clear();
    }

    /// `done` bytes in all are through.
    pub fn advance_to(&self, done: u64) {
        self.advance(|_| done);
    }

    /// `len` more bytes are through, by one of several threads.
    pub fn advance_by(&self, len: u64) {
        self.advance(|done| done.saturating_add(len));
    }

    fn advance(&self, next: impl FnOnce(u64) -> u64) {
        let now = Instant::now();
        let mut state = self.lock();
        let done = next(state.done);
        if state.done > done {
            state.samples.clear();
        }
        state.done = done;
        if state.samples.back().is_none_or(|(at, _)| now.duration_since(*at) >= SAMPLE_DISTANCE) {
            state.samples.push_back((now, done));
        }
        while state.samples.front().is_some_and(|(at, _)| now.duration_since(*at) > RATE_WINDOW) {
            state.samples.pop_front();
        }
    }

    pub fn attempt(&self) {
        let mut state = self.lock();
        state.attempt = state.attempt.saturating_add(1);
        state.next_retry_at = None;
        state.phase = Phase::Connecting;
    }

    /// An attempt ended for this reason; the next one starts after `pause`.
    pub fn pausing(&self, reason: &str, pause: Duration) {
        let mut state = self.lock();
        state.phase = Phase::Connecting;
        state.last_error = Some(reason.to_owned());
        state.next_retry_at = Timestamp::now().checked_add(pause).ok();
    }

    pub fn progress(&self) -> Progress {
        let now = Instant::now();
        let state = self.lock();
        let rate = match state.samples.front() {
            Some((at, bytes)) => {
                let elapsed = u64::try_from(now.duration_since(*at).as_millis()).unwrap_or(u64::MAX).max(1);
                state.done.saturating_sub(*bytes).saturating_mul(1000) / elapsed
            }
            None => 0,
        };
        let left = state.total.map(|total| total.saturating_sub(state.done));
        Progress {
            phase: state.phase,
            done_bytes: state.done,
            total_bytes: state.total,
            rate_bytes_per_s: rate,
            eta_s: left.and_then(|left| left.checked_div(rate)),
            attempt: state.attempt,
            last_error: state.last_error.clone(),
            next_retry_at: state.next_retry_at,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_unknown_without_a_total_and_zero_when_done() {
        let meter = Meter::default();
        meter.begin(Phase::Transferring, 0, None);
        meter.advance_to(10);
        assert_eq!(meter.progress().eta_s, None);
        meter.begin(Phase::Transferring, 100, Some(100));
        assert_eq!(meter.progress().eta_s, None, "no rate, so no time");
        assert_eq!(meter.progress().done_bytes, 100);
    }

    #[test]
    fn what_several_threads_have_done_never_becomes_less() {
        let meter = Meter::default();
        meter.begin(Phase::Hashing, 0, Some(40_000));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let before = meter.progress().done_bytes;
                        meter.advance_by(1);
                        assert!(meter.progress().done_bytes > before);
                    }
                });
            }
        });
        assert_eq!(meter.progress().done_bytes, 40_000);
    }

    #[test]
    fn a_pause_names_its_reason_and_the_next_attempt_clears_the_clock() {
        let meter = Meter::default();
        meter.attempt();
        meter.pausing("connection refused", Duration::from_secs(5));
        let progress = meter.progress();
        assert_eq!(progress.last_error.as_deref(), Some("connection refused"));
        assert!(progress.next_retry_at.is_some_and(|at| at > Timestamp::now()));
        meter.attempt();
        assert_eq!((meter.progress().attempt, meter.progress().next_retry_at), (2, None));
    }
}
