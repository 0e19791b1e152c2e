//! How a job is told to end: cancelled, stopped with the node, or out of time.
//!
//! One value per job, shared by its threads. Blocking code asks [`Stop::check`] between pieces, asynchronous code races
//! [`Stop::fired`]. The first reason stays.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::failure::{Failure, Result};

/// The end of a job, when it comes from outside.
#[derive(Debug)]
pub struct Stop {
    token: CancellationToken,
    reason: OnceLock<Reason>,
    deadline: Option<(Instant, Duration)>,
}

#[derive(Clone, Copy, Debug)]
enum Reason {
    Cancelled,
    NodeStops,
}

impl Stop {
    /// A job that may take this long from now.
    pub fn after(limit: Duration) -> Stop {
        let deadline = Instant::now().checked_add(limit).map(|at| (at, limit));
        Stop { token: CancellationToken::new(), reason: OnceLock::new(), deadline }
    }

    /// Somebody does not want the image any more.
    pub fn cancel(&self) {
        self.end(Reason::Cancelled);
    }

    /// The node goes down; the job is to keep what it has.
    pub fn stop(&self) {
        self.end(Reason::NodeStops);
    }

    fn end(&self, reason: Reason) {
        // The first reason stays.
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    pub fn check(&self) -> Result<()> {
        match self.reason.get() {
            Some(Reason::Cancelled) => Err(Failure::Cancelled),
            Some(Reason::NodeStops) => Err(Failure::Stopped),
            None => match self.deadline {
                Some((at, limit)) if Instant::now() >= at => {
                    Err(Failure::TimedOut(format!("the job was not done within {} s", limit.as_secs())))
                }
                Some(_) | None => Ok(()),
            },
        }
    }

    /// Returns when [`Stop::check`] would fail.
    pub async fn fired(&self) {
        match self.deadline {
            Some((at, _)) => tokio::select! {
                () = self.token.cancelled() => {}
                () = tokio::time::sleep_until(at.into()) => {}
            },
            None => self.token.cancelled().await,
        }
    }
}
