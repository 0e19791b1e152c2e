//! Bytes from an http(s) URL, however often the connection breaks.
//!
//! Owns the loop of attempts: what an answer means is decided in `response`, how a request travels in `request`.
//! Promises: a byte that arrived is not asked for again as long as the origin can prove that it serves the same file
//! (a strong validator; or, when a checksum was given, a range of the same length); a body that ends early is an error
//! and is resumed; an origin that never delivers is given up within [`HttpSettings::first_byte_within`], one that has
//! begun when nothing new came for [`HttpSettings::stalled_max`]; it begins again at most [`RESTARTS_MAX`] times.

mod request;
pub mod response;

use std::{
    hash::{BuildHasher, RandomState},
    pin::pin,
    time::{Duration, Instant},
};

use reqwest::{Client, Response};
use tokio::runtime::Handle;

use request::{NoAnswer, ask, client, describe};
pub use request::{Origin, REDIRECTS_MAX};
use response::{Answer, Asked, Checksum, judge};

use super::{Source, Validator};
use crate::prep::{
    arrival::{Arrival, Opening},
    failure::{Failure, Result},
    partial::Proof,
};

/// How often a download may begin again at byte 0 because the origin changed, or cannot resume.
pub const RESTARTS_MAX: u32 = 8;

/// How patient a download is; [`Default`] is sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpSettings {
    /// The longest that making a connection may take.
    pub connect_timeout: Duration,
    /// The longest that a connection may say nothing.
    pub idle_timeout: Duration,
    /// An origin that refuses from the first try on is given up within this.
    pub first_byte_within: Duration,
    /// A download that has begun is given up when nothing new has come for this long.
    pub stalled_max: Duration,
    /// The first pause between two attempts; each further one is twice as long ...
    pub pause_min: Duration,
    /// ... up to this.
    pub pause_max: Duration,
}

impl Default for HttpSettings {
    fn default() -> HttpSettings {
        HttpSettings {
            connect_timeout: Duration::from_secs(8),
            idle_timeout: Duration::from_secs(30),
            first_byte_within: Duration::from_secs(28),
            stalled_max: Duration::from_secs(15 * 60),
            pause_min: Duration::from_millis(500),
            pause_max: Duration::from_secs(30),
        }
    }
}

/// A download.
pub struct HttpSource {
    origin: Origin,
    settings: HttpSettings,
    runtime: Handle,
}

/// How an attempt ended without being the last.
enum Ended {
    /// Everything is here.
    Complete,
    /// Go on where it broke, after a pause of at least `after`.
    Broken { reason: String, after: Duration },
    /// Begin again at byte 0.
    StartAgain { reason: String },
}

/// What the attempts have in common.
struct Attempts {
    began: Instant,
    /// When something new last came; `None` while nothing ever did.
    progressed: Option<Instant>,
    /// How far an attempt has come.
    position: u64,
    failed_in_a_row: u32,
    restarts: u32,
}

impl HttpSource {
    /// `runtime` carries the network; the transfer itself runs on the thread that calls it.
    pub fn new(origin: Origin, settings: HttpSettings, runtime: Handle) -> HttpSource {
        HttpSource { origin, settings, runtime }
    }

    async fn download(&self, arrival: &mut Arrival<'_>) -> Result<()> {
        let refused = |reason: String| Failure::Source(format!("{}: {reason}", self.origin.for_people()));
        let client = client(&self.origin, &self.settings).map_err(refused)?;
        let now = Instant::now();
        let mut attempts = Attempts {
            began: now,
            // Whoever asks anew for what failed before wants to know soon whether the origin is there.
            progressed: (arrival.position() > 0 && arrival.proof() == Proof::NotNeeded).then_some(now),
            position: arrival.position(),
            failed_in_a_row: 0,
            restarts: 0,
        };
        loop {
            arrival.stop().check()?;
            arrival.meter().attempt();
            let ended = self.attempt(&client, arrival, attempts.patience(&self.settings)).await?;
            attempts.note_progress(arrival.position());
            let (reason, after) = match ended {
                Ended::Complete => return Ok(()),
                Ended::StartAgain { reason } if attempts.restarts == RESTARTS_MAX => {
                    return Err(refused(format!("begun again {RESTARTS_MAX} times, last because {reason}")));
                }
                Ended::StartAgain { reason } => {
                    tracing::info!(url = self.origin.for_people(), reason, "the download begins again");
                    arrival.restart()?;
                    attempts.restarts += 1;
                    attempts.position = 0;
                    (reason, Duration::ZERO)
                }
                Ended::Broken { reason, after } => (reason, after),
            };
            let pause = attempts.pause(&self.settings).max(after);
            if let Some(given_up) = attempts.give_up(&self.settings, pause) {
                return Err(refused(format!("{reason}; {given_up}")));
            }
            tracing::debug!(url = self.origin.for_people(), reason, ?pause, "the download pauses");
            // What has arrived is kept, should the node go down in the pause.
            arrival.mark()?;
            arrival.meter().pausing(&reason, pause);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = arrival.stop().fired() => {}
            }
        }
    }

    /// One request and its body. Its first byte must come within `patience`, whatever redirects are in between.
    async fn attempt(&self, client: &Client, arrival: &mut Arrival<'_>, patience: Duration) -> Result<Ended> {
        let due = tokio::time::Instant::now() + patience;
        let broken = |reason: String| Ended::Broken { reason, after: Duration::ZERO };
        let checksum = if arrival.expected().is_some() { Checksum::Given } else { Checksum::NotGiven };
        let position = arrival.position();
        let validator = arrival.validator().clone();
        let proof = arrival.proof();
        // Nothing is missing, but only the origin can tell that it is still the same: it is asked for the last byte again.
        let recalled = u64::from(proof == Proof::Needed && arrival.total() == Some(position)).min(position);
        if position > 0 {
            if recalled == 0 && arrival.total() == Some(position) {
                return Ok(Ended::Complete);
            }
            if validator == Validator::None && (checksum == Checksum::NotGiven || proof == Proof::Needed) {
                let reason =
                    "the origin gives nothing that tells whether the file is still the same".to_owned();
                return Ok(Ended::StartAgain { reason });
            }
        }
        let first = position - recalled;
        let idle = self.settings.idle_timeout;
        let stop = arrival.stop().clone();
        let answer = tokio::select! {
            answer = ask(client, &self.origin, first, &validator, checksum, idle) => answer,
            () = tokio::time::sleep_until(due) => {
                Err(NoAnswer::Broken(format!("no answer within {} s", patience.as_secs_f32())))
            }
            () = stop.fired() => return stopped(arrival),
        };
        let response = match answer {
            Ok(response) => response,
            Err(NoAnswer::Broken(reason)) => return Ok(broken(reason)),
            Err(NoAnswer::Refused(reason)) => return Err(self.refused(&reason)),
        };
        let asked = Asked { position: first, total: arrival.total(), validator: &validator, checksum };
        match judge(response.status(), response.headers(), &asked) {
            Answer::Whole { total, validator } => {
                if position > 0 {
                    // The range was not given: the file has changed, or the origin cannot give any.
                    tracing::info!(
                        url = self.origin.for_people(),
                        position,
                        "the origin sends the file from its start"
                    );
                    arrival.restart()?;
                }
                arrival.begin(Opening { total, needed_bytes: None, validator })?;
            }
            Answer::Part { total } => {
                // It has shown its validator, if there was one.
                arrival.proven();
                if recalled > 0 {
                    return Ok(Ended::Complete);
                }
                if validator == Validator::None {
                    arrival.join_unproven();
                }
                arrival.begin(Opening { total: Some(total), needed_bytes: None, validator })?;
            }
            Answer::Complete if proof == Proof::Needed => {
                let reason = "the origin does not show that the image is still the same".to_owned();
                return Ok(Ended::StartAgain { reason });
            }
            Answer::Complete => return Ok(Ended::Complete),
            Answer::StartAgain { reason } => return Ok(Ended::StartAgain { reason }),
            Answer::TryLater { reason, after } => return Ok(Ended::Broken { reason, after }),
            Answer::Refused { reason } => return Err(self.refused(&reason)),
        }
        self.body(response, arrival, due).await
    }

    /// The first byte is due then; every other within the idle limit.
    async fn body(
        &self,
        mut response: Response,
        arrival: &mut Arrival<'_>,
        due: tokio::time::Instant,
    ) -> Result<Ended> {
        let first = due.saturating_duration_since(tokio::time::Instant::now());
        let mut idle = self.settings.idle_timeout.min(first);
        let stop = arrival.stop().clone();
        let broken = |reason| Ok(Ended::Broken { reason, after: Duration::ZERO });
        loop {
            let mut next = pin!(tokio::time::timeout(idle, response.chunk()));
            let next = loop {
                tokio::select! {
                    next = &mut next => break next,
                    // What came last before a silence is kept, too.
                    () = tokio::time::sleep(arrival.mark_due_in()) => arrival.mark()?,
                    () = stop.fired() => return stopped(arrival),
                }
            };
            match next {
                Ok(Ok(Some(bytes))) => {
                    idle = self.settings.idle_timeout;
                    arrival.bytes(&bytes)?;
                }
                Ok(Ok(None)) => {
                    return match arrival.total() {
                        Some(total) if arrival.position() < total => {
                            broken(format!("the body ended after {} of {total} bytes", arrival.position()))
                        }
                        Some(_) | None => Ok(Ended::Complete),
                    };
                }
                Ok(Err(e)) => return broken(describe(e)),
                Err(_) => return broken(format!("nothing came for {} s", idle.as_secs_f32())),
            }
        }
    }

    fn refused(&self, reason: &str) -> Failure {
        Failure::Source(format!("{}: {reason}", self.origin.for_people()))
    }
}

impl Source for HttpSource {
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        let runtime = self.runtime.clone();
        runtime.block_on(self.download(arrival))
    }
}

impl Attempts {
    fn note_progress(&mut self, position: u64) {
        // Coming back to where an earlier attempt had been is no progress.
        if position > self.position {
            self.progressed = Some(Instant::now());
            self.failed_in_a_row = 0;
            self.position = position;
        }
    }

    /// How long to wait before the next attempt: twice as long each time, with a random part, so that many nodes that
    /// lost one origin do not come back at once.
    fn pause(&mut self, settings: &HttpSettings) -> Duration {
        let doubled = 1_u32.checked_shl(self.failed_in_a_row).unwrap_or(u32::MAX);
        let pause = settings.pause_min.saturating_mul(doubled).min(settings.pause_max);
        self.failed_in_a_row = self.failed_in_a_row.saturating_add(1);
        let random = u32::try_from(RandomState::new().hash_one(self.began) % 512).unwrap_or(0);
        pause / 2 + pause * random / 1024
    }

    /// How long the next attempt may take until something new comes.
    fn patience(&self, settings: &HttpSettings) -> Duration {
        let (since, within) = match self.progressed {
            None => (self.began, settings.first_byte_within),
            Some(at) => (at, settings.stalled_max),
        };
        within.saturating_sub(since.elapsed())
    }

    /// Why there is no further attempt after this pause, if there is none.
    fn give_up(&self, settings: &HttpSettings, pause: Duration) -> Option<String> {
        match self.progressed {
            // The next connection must have failed by then, too.
            None if self.began.elapsed() + pause + settings.connect_timeout > settings.first_byte_within => {
                Some("no byte ever came".to_owned())
            }
            Some(at) if at.elapsed() + pause > settings.stalled_max => {
                Some(format!("nothing new came for {} s", settings.stalled_max.as_secs_f32()))
            }
            None | Some(_) => None,
        }
    }
}

fn stopped(arrival: &Arrival<'_>) -> Result<Ended> {
    arrival.stop().check()?;
    // The deadline is nearly there; the loop asks again.
    Ok(Ended::Broken { reason: "out of time".to_owned(), after: Duration::ZERO })
}
