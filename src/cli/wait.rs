//! Waiting for images and jobs, with a bar for people.
//!
//! Owns `--wait` and `--timeout`, how often the node is asked ([`POLL_MAX`]), and what an image or job that ended badly
//! becomes. Progress goes to stderr and only to a terminal. What is waited for goes on when the wait ends, by timeout
//! or by Ctrl-C.

use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::exit::Failure;
use crate::{
    api::{
        client::Client,
        problem::Code,
        types::{Image, ImageState, Job, JobState, Phase, Progress, Verification, VerificationState},
    },
    duration::parse_duration,
};

/// Pauses between two questions grow from the first to the second.
const POLL_MIN: Duration = Duration::from_millis(10);
const POLL_MAX: Duration = Duration::from_millis(400);

/// The flags of commands that may wait.
#[derive(Args, Clone, Copy, Debug)]
pub struct WaitArgs {
    /// Return when it has ended, with its result
    #[arg(long)]
    pub wait: bool,
    /// With --wait: give up after this long (30s, 5m, 2h) and exit with 6; the work goes on
    #[arg(long, requires = "wait", value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

/// The flag of commands that always wait.
#[derive(Args, Clone, Copy, Debug)]
pub struct TimeoutArgs {
    /// Give up waiting after this long (30s, 5m, 2h) and exit with 6; the work goes on
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

/// Until no job is at the image: it, if it is ready.
pub async fn image(client: &Client, mut image: Image, timeout: Option<Duration>) -> Result<Image, Failure> {
    let name = image.name.clone();
    let mut patience = Patience::new(timeout);
    loop {
        let progress = image.copies.iter().find_map(|copy| copy.progress.clone());
        match image.state {
            ImageState::Failed => return Err(failed(&image)),
            ImageState::Ready if progress.is_none() => return Ok(image),
            ImageState::Unknown if progress.is_none() => return Err(failed(&image)),
            ImageState::Pending | ImageState::InProgress | ImageState::Ready | ImageState::Unknown => {}
        }
        patience.pause(&name, progress.as_ref(), || format!("image {name:?} is not ready")).await?;
        image = client.image(&name).await?;
    }
}

/// Until the verification that runs has ended: the image, if its bytes are what they were.
pub async fn verification(
    client: &Client,
    mut image: Image,
    timeout: Option<Duration>,
) -> Result<Image, Failure> {
    let name = image.name.clone();
    let mut patience = Patience::new(timeout);
    while let Some(progress) = image.copies.iter().find_map(|copy| copy.progress.clone()) {
        patience.pause(&name, Some(&progress), || format!("image {name:?} is not verified")).await?;
        image = client.image(&name).await?;
    }
    verified(&image)?;
    Ok(image)
}

/// What a verification found, whatever else is to be said of the image.
fn verified(image: &Image) -> Result<(), Failure> {
    let outcome = image.copies.iter().find_map(|copy| copy.verification.as_ref());
    let (code, message) = match outcome {
        Some(Verification { state: VerificationState::Passed, .. }) => return Ok(()),
        Some(Verification { state: VerificationState::Failed, message, code }) => {
            (code.unwrap_or(Code::Internal), message.as_deref().unwrap_or("no reason is known"))
        }
        // Its node was restarted, or somebody made another image of this name.
        None => (Code::Cancelled, "the node does not know how its verification ended"),
    };
    Err(Failure::Ended { code, detail: format!("image {:?} is not verified: {message}", image.name) })
}

/// What became of an image that is not good.
fn failed(image: &Image) -> Failure {
    let copy = image.copies.iter().find(|copy| copy.message.is_some());
    let message =
        copy.and_then(|copy| copy.message.clone()).unwrap_or_else(|| "no reason is known".to_owned());
    let code = copy.and_then(|copy| copy.code).unwrap_or(Code::NotReady);
    Failure::Ended { code, detail: format!("image {:?} failed: {message}", image.name) }
}

/// Until the job has ended: it, if it is done.
pub async fn job(client: &Client, mut job: Job, timeout: Option<Duration>) -> Result<Job, Failure> {
    let mut patience = Patience::new(timeout);
    loop {
        match (job.state, &job.error) {
            (JobState::Done, _) => return Ok(job),
            (JobState::Failed, Some(problem)) => {
                return Err(Failure::Ended { code: problem.code, detail: problem.detail.clone() });
            }
            (JobState::Failed, None) => {
                let detail = format!("job {} failed; see the node's log", job.id);
                return Err(Failure::Ended { code: Code::Internal, detail });
            }
            (JobState::Running, _) => {}
        }
        let (object, id) = (job.object.clone(), job.id);
        patience.pause(&object, job.progress.as_ref(), || format!("{object:?} is not done")).await?;
        job = client.job(id).await?;
    }
}

/// The pauses of one wait, its deadline and its bar.
struct Patience {
    deadline: Option<(Instant, Duration)>,
    pause: Duration,
    bar: Option<ProgressBar>,
}

impl Patience {
    fn new(timeout: Option<Duration>) -> Patience {
        let deadline = timeout.and_then(|timeout| Some((Instant::now().checked_add(timeout)?, timeout)));
        Patience { deadline, pause: POLL_MIN, bar: None }
    }

    async fn pause(
        &mut self,
        name: &str,
        progress: Option<&Progress>,
        what: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let mut pause = self.pause;
        if let Some((deadline, after)) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::TimedOut { what: what(), after });
            }
            pause = pause.min(left);
        }
        if let Some(progress) = progress {
            show(self.bar.get_or_insert_with(|| ProgressBar::new(0)), name, progress);
        }
        tokio::time::sleep(pause).await;
        self.pause = (self.pause * 2).min(POLL_MAX);
        Ok(())
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Draw; indicatif draws on stderr, and only on a terminal.
fn show(bar: &ProgressBar, name: &str, progress: &Progress) {
    let template = match progress.total_bytes {
        Some(_) => "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {prefix}",
        None => "{msg} {spinner} {binary_bytes} {prefix}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_length(progress.total_bytes.unwrap_or(0));
    bar.set_position(progress.done_bytes);
    bar.set_message(format!("{name}: {}", phase(progress.phase)));
    bar.set_prefix(aside(progress));
    bar.tick();
}

/// Rate and time left; while a source is tried again, why.
fn aside(progress: &Progress) -> String {
    let rate = format!("{}/s", super::size::show(progress.rate_bytes_per_s));
    match (&progress.last_error, progress.next_retry_at, progress.eta_s) {
        (Some(error), Some(_), _) => format!("attempt {} failed: {error}", progress.attempt),
        (_, _, Some(eta)) => format!("{rate}, {eta} s left"),
        (_, _, None) => rate,
    }
}

const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Queued => "queued",
        Phase::Connecting => "connecting",
        Phase::Transferring => "transferring",
        Phase::Hashing => "hashing",
        Phase::Syncing => "syncing",
        Phase::Publishing => "publishing",
        Phase::Verifying => "verifying",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_image_says_why_with_the_code_of_its_copy() {
        let json = serde_json::json!({
            "name": "a", "uuid": null, "state": "failed", "format": null, "size_bytes": null,
            "virtual_size_bytes": null, "allocated_bytes": 0, "sha512": null, "source": "x", "created_at": null,
            "copies": [{"disk": "/d", "state": "failed", "progress": null, "message": "expected 1, got 2",
                        "code": "checksum_mismatch"}],
        });
        let failure = failed(&serde_json::from_value(json).unwrap());
        assert_eq!(failure.exit_code(), 5);
        assert!(failure.to_string().starts_with("image \"a\" failed: expected 1, got 2"), "{failure}");
    }

    #[test]
    fn the_end_of_a_verification_is_told_and_not_the_state_of_its_image() {
        let ended = |state: &str, verification: serde_json::Value| {
            let json = serde_json::json!({
                "name": "a", "uuid": null, "state": state, "format": null, "size_bytes": null,
                "virtual_size_bytes": null, "allocated_bytes": 0, "sha512": null, "source": "x",
                "created_at": null,
                "copies": [{"disk": "/d", "state": state, "progress": null, "message": null, "code": null,
                            "verification": verification}],
            });
            verified(&serde_json::from_value(json).unwrap()).map_err(|failure| failure.exit_code())
        };
        let failed = |code: &str| serde_json::json!({"state": "failed", "message": "x", "code": code});
        let passed = serde_json::json!({"state": "passed", "message": null, "code": null});
        assert_eq!(ended("ready", passed), Ok(()));
        assert_eq!(ended("ready", failed("cancelled")), Err(1));
        assert_eq!(ended("ready", failed("timed_out")), Err(6));
        assert_eq!(ended("failed", failed("corrupt")), Err(5));
        assert_eq!(ended("failed", failed("cancelled")), Err(1));
        assert_eq!(ended("ready", serde_json::Value::Null), Err(1));
    }
}
