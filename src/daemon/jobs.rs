//! Jobs: work on volumes that may outlast its request.
//!
//! Owns the table of running and ended jobs, its bounds, and the threads that they run on. A job is *running* until its
//! work returns, then *done* or *failed* with the reason, for good; ended ones are kept until [`JOBS_KEPT_MAX`] newer
//! ones have ended. Every job can be told to stop, by a person or by the node when it goes down; one that ends early for
//! that reason says so, whatever its work made of it, unless that is a fault. A recovery alone does not listen: what it
//! leaves half done nobody could use. Bringing in images is not here: the image service has its own.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use bedplate_engine::{error::Error as Engine, units::ByteLen};
use jiff::Timestamp;

use super::show;
use crate::{
    api::{
        problem::{Code, Refusal},
        types::{self, ExportDigests, JobKind, JobState, RecoverReport},
    },
    prep::{
        progress::{Meter, Phase},
        stop::Stop,
    },
};

/// Jobs that run at once; one more is refused.
pub const JOBS_RUNNING_MAX: usize = 16;
/// Ended jobs that can still be asked about.
pub const JOBS_KEPT_MAX: usize = 256;
/// The longest that a job may take.
const JOB_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How a job's work ends.
pub type Outcome = Result<Report, Refusal>;

/// What a job that is done has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Nothing,
    Recovered(RecoverReport),
    Exported(ExportDigests),
}

/// What a job's work has at hand.
#[derive(Debug)]
pub struct Control {
    pub meter: Meter,
    pub stop: Stop,
}

impl Control {
    /// For the engine's calls that report progress: count, and say whether to go on.
    pub fn go_on(&self, done: ByteLen, total: ByteLen) -> bool {
        if self.meter.progress().total_bytes != Some(total.0) {
            self.meter.begin(Phase::Transferring, done.0, Some(total.0));
        }
        self.meter.advance_to(done.0);
        self.stop.check().is_ok()
    }

    /// Work that was told to stop ends with an error of its own, which does not say that. One that nobody's wish to
    /// stop brings about stays as it is.
    fn explain(&self, refusal: Refusal) -> Refusal {
        match self.stop.check() {
            Ok(()) => refusal,
            Err(why) => {
                let why = Refusal::from(why);
                if why.code == refusal.code || is_fault(refusal.code) {
                    return refusal;
                }
                let detail = format!("{}: {}", why.detail, refusal.detail);
                Refusal { detail, ..why }
            }
        }
    }
}

/// Whether something is wrong that somebody has to know of, also when the job was told to stop.
fn is_fault(code: Code) -> bool {
    match code {
        Code::Faulted
        | Code::ChecksumMismatch
        | Code::Corrupt
        | Code::NoSpace
        | Code::Storage
        | Code::Internal => true,
        Code::Invalid
        | Code::Unsupported
        | Code::NotFound
        | Code::NoSuchRoute
        | Code::TooLarge
        | Code::Exists
        | Code::InUse
        | Code::NotReady
        | Code::Busy
        | Code::ReadOnly
        | Code::Source
        | Code::TimedOut
        | Code::Cancelled
        | Code::ShuttingDown => false,
    }
}

#[derive(Debug)]
struct Job {
    kind: JobKind,
    object: String,
    created_at: Timestamp,
    control: Arc<Control>,
    state: State,
}

#[derive(Debug)]
enum State {
    Running,
    Ended(Outcome),
}

#[derive(Debug, Default)]
struct Table {
    jobs: BTreeMap<u64, Job>,
    last_id: u64,
    closing: bool,
}

/// A job that has not begun; dropped, it never was.
#[derive(Debug)]
pub struct Place {
    jobs: Arc<Jobs>,
    id: u64,
    shown: types::Job,
    control: Arc<Control>,
    is_run: bool,
}

impl Place {
    /// Run `work` on a thread of its own.
    pub fn run(mut self, work: impl FnOnce(&Control) -> Outcome + Send + 'static) -> types::Job {
        self.is_run = true;
        let (id, jobs, control) = (self.id, self.jobs.clone(), self.control.clone());
        let spawned = thread::Builder::new().name(format!("job-{id}")).spawn(move || {
            // A fault in one job must not leave it running for ever.
            let outcome = catch_unwind(AssertUnwindSafe(|| work(&control))).unwrap_or_else(|_| {
                Err(Refusal::new(Code::Internal, "the job ended without an answer; see the node's log"))
            });
            jobs.end(id, outcome.map_err(|refusal| control.explain(refusal)));
        });
        if let Err(error) = spawned {
            self.jobs.end(id, Err(Engine::io("start", "a thread for the job", error).into()));
        }
        self.shown.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_run {
            self.jobs.lock().jobs.remove(&self.id);
            self.jobs.ended.notify_all();
        }
    }
}

/// The jobs of a node.
#[derive(Debug, Default)]
pub struct Jobs {
    table: Mutex<Table>,
    /// A job has ended.
    ended: Condvar,
}

impl Jobs {
    /// Run `work` on a thread of its own.
    pub fn start(
        self: &Arc<Self>,
        kind: JobKind,
        object: impl Into<String>,
        work: impl FnOnce(&Control) -> Outcome + Send + 'static,
    ) -> Result<types::Job, Refusal> {
        Ok(self.take(kind, object)?.run(work))
    }

    /// Take a place for work that begins once something else has been done, which a busy node must not do in vain.
    pub fn take(self: &Arc<Self>, kind: JobKind, object: impl Into<String>) -> Result<Place, Refusal> {
        let control = Arc::new(Control { meter: Meter::default(), stop: Stop::after(JOB_MAX) });
        let (id, shown) = {
            let mut table = self.lock();
            if table.closing {
                return Err(Refusal::new(Code::ShuttingDown, "the node is shutting down"));
            }
            if table.running().count() >= JOBS_RUNNING_MAX {
                return Err(Refusal::new(
                    Code::Busy,
                    "too many jobs at once (JOBS_RUNNING_MAX); try again later",
                ));
            }
            table.last_id += 1;
            let id = table.last_id;
            let job = Job {
                kind,
                object: object.into(),
                created_at: Timestamp::now(),
                control: control.clone(),
                state: State::Running,
            };
            let shown = job.show(id);
            table.jobs.insert(id, job);
            (id, shown)
        };
        Ok(Place { jobs: self.clone(), id, shown, control, is_run: false })
    }

    pub fn list(&self) -> Vec<types::Job> {
        self.lock().jobs.iter().map(|(id, job)| job.show(*id)).collect()
    }

    pub fn get(&self, id: u64) -> Result<types::Job, Refusal> {
        self.lock().show(id)
    }

    /// The job when it has ended, or as it is after `patience`.
    pub fn wait(&self, id: u64, patience: Duration) -> Result<types::Job, Refusal> {
        let deadline = Instant::now() + patience;
        let mut table = self.lock();
        loop {
            let job = table.show(id)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if job.state != JobState::Running || left.is_zero() {
                return Ok(job);
            }
            table = self.ended.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tell a job to stop. It has not stopped yet when this returns.
    pub fn cancel(&self, id: u64) -> Result<(), Refusal> {
        let table = self.lock();
        table.show(id)?;
        let Some(job) = table.jobs.get(&id).filter(|job| job.is_running()) else {
            return Err(Refusal::new(Code::NotReady, format!("job \"{id}\" has ended already")));
        };
        match job.kind {
            JobKind::VolumeRecover => {
                let detail =
                    format!("job \"{id}\" is a recovery, which is not stopped half way; it ends by itself");
                return Err(Refusal::new(Code::Invalid, detail));
            }
            JobKind::VolumeClone
            | JobKind::VolumeFlatten
            | JobKind::VolumeExport
            | JobKind::ImageExport
            | JobKind::SnapshotDelete
            | JobKind::DiskReclaim => job.control.stop.cancel(),
        }
        Ok(())
    }

    /// Whether a job of this kind runs for this object.
    pub fn is_running(&self, kind: JobKind, object: &str) -> bool {
        self.lock().running().any(|job| job.kind == kind && job.object == object)
    }

    /// Start nothing more, tell everything to stop, and wait for that. The names of those that are left.
    pub fn shut_down(&self, patience: Duration) -> Vec<String> {
        let deadline = Instant::now() + patience;
        let mut table = self.lock();
        table.closing = true;
        table.running().for_each(|job| job.control.stop.stop());
        loop {
            let left: Vec<String> = table.running().map(|job| job.object.clone()).collect();
            let time = deadline.saturating_duration_since(Instant::now());
            if left.is_empty() || time.is_zero() {
                return left;
            }
            table = self.ended.wait_timeout(table, time).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end(&self, id: u64, outcome: Outcome) {
        let mut table = self.lock();
        if let Some(job) = table.jobs.get_mut(&id) {
            match &outcome {
                Ok(_) => tracing::info!(job = id, kind = ?job.kind, object = %job.object, "job done"),
                Err(refusal) => {
                    tracing::warn!(job = id, kind = ?job.kind, object = %job.object, %refusal, "job failed");
                }
            }
            job.state = State::Ended(outcome);
        }
        let ended: Vec<u64> =
            table.jobs.iter().filter(|(_, job)| !job.is_running()).map(|(id, _)| *id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(JOBS_KEPT_MAX)) {
            table.jobs.remove(id);
        }
        drop(table);
        self.ended.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn running(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(|job| job.is_running())
    }

    fn show(&self, id: u64) -> Result<types::Job, Refusal> {
        let job = self.jobs.get(&id);
        job.map(|job| job.show(id)).ok_or_else(|| {
            Refusal::new(Code::NotFound, format!("job \"{id}\" not found; it may be long over"))
        })
    }
}

impl Job {
    fn is_running(&self) -> bool {
        matches!(self.state, State::Running)
    }

    fn show(&self, id: u64) -> types::Job {
        let (kind, object, created_at) = (self.kind, self.object.clone(), self.created_at);
        let state = JobState::Running;
        let (progress, error, report, digests) = (None, None, None, None);
        let mut job = types::Job { id, kind, object, state, progress, error, report, digests, created_at };
        match &self.state {
            State::Running => job.progress = Some(show::progress(&self.control.meter.progress())),
            State::Ended(Err(refusal)) => {
                (job.state, job.error) = (JobState::Failed, Some(refusal.problem()));
            }
            State::Ended(Ok(report)) => {
                job.state = JobState::Done;
                match report {
                    Report::Nothing => {}
                    Report::Recovered(report) => job.report = Some(report.clone()),
                    Report::Exported(digests) => job.digests = Some(digests.clone()),
                }
            }
        }
        job
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_job_runs_and_then_is_done_or_failed_with_its_reason() {
        let jobs = Arc::new(Jobs::default());
        let (go, wait) = mpsc::channel::<()>();
        let job = jobs
            .start(JobKind::VolumeFlatten, "a", move |_| {
                wait.recv().ok();
                Ok(Report::Recovered(RecoverReport::default()))
            })
            .unwrap();
        assert_eq!((job.state, job.report), (JobState::Running, None));
        assert!(jobs.is_running(JobKind::VolumeFlatten, "a"));
        assert_eq!(jobs.wait(job.id, Duration::ZERO).unwrap().state, JobState::Running);
        drop(go);
        let job = jobs.wait(job.id, LONG).unwrap();
        assert_eq!((job.state, job.report), (JobState::Done, Some(RecoverReport::default())));

        let job =
            jobs.start(JobKind::VolumeFlatten, "b", |_| Err(Refusal::new(Code::NoSpace, "full"))).unwrap();
        let job = jobs.wait(job.id, LONG).unwrap();
        assert_eq!((job.state, job.error.unwrap().code), (JobState::Failed, Code::NoSpace));
        assert_eq!(jobs.get(99).unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_place_counts_as_a_job_until_it_is_dropped() {
        let jobs = Arc::new(Jobs::default());
        let places: Vec<Place> =
            (0..JOBS_RUNNING_MAX).map(|_| jobs.take(JobKind::SnapshotDelete, "a@s").unwrap()).collect();
        assert_eq!(jobs.take(JobKind::SnapshotDelete, "a@s").unwrap_err().code, Code::Busy);
        drop(places);
        assert!(jobs.list().is_empty());
        let job = jobs.take(JobKind::SnapshotDelete, "a@s").unwrap().run(|_| Ok(Report::Nothing));
        assert_eq!(jobs.wait(job.id, LONG).unwrap().state, JobState::Done);
    }

    #[test]
    fn a_job_that_panics_has_failed() {
        let jobs = Arc::new(Jobs::default());
        let job = jobs.start(JobKind::VolumeExport, "a", |_| panic!("a fault")).unwrap();
        let job = jobs.wait(job.id, LONG).unwrap();
        assert_eq!(job.error.unwrap().code, Code::Internal);
    }

    #[test]
    fn one_job_too_many_is_refused_and_shutting_down_stops_those_that_run() {
        let jobs = Arc::new(Jobs::default());
        for n in 0..JOBS_RUNNING_MAX {
            let work = |control: &Control| {
                while control.go_on(ByteLen(1), ByteLen(2)) {
                    thread::yield_now();
                }
                Err(Refusal::new(Code::ShuttingDown, "stopped"))
            };
            jobs.start(JobKind::VolumeExport, n.to_string(), work).unwrap();
        }
        let refused = jobs.start(JobKind::VolumeExport, "one more", |_| Ok(Report::Nothing)).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        assert_eq!(jobs.shut_down(LONG), Vec::<String>::new());
        let refused = jobs.start(JobKind::VolumeExport, "late", |_| Ok(Report::Nothing)).unwrap_err();
        assert_eq!(refused.code, Code::ShuttingDown);
    }

    #[test]
    fn a_job_is_cancelled_once_and_a_recovery_and_an_ended_one_are_not() {
        let jobs = Arc::new(Jobs::default());
        let (go, wait) = mpsc::channel::<()>();
        let recovery = jobs.start(JobKind::VolumeRecover, "a", move |_| {
            wait.recv().ok();
            Ok(Report::Nothing)
        });
        let recovery = recovery.unwrap().id;
        assert_eq!(jobs.cancel(recovery).unwrap_err().code, Code::Invalid);
        drop(go);
        assert_eq!(jobs.wait(recovery, LONG).unwrap().state, JobState::Done);

        let work = |control: &Control| {
            while control.go_on(ByteLen(1), ByteLen(2)) {
                thread::yield_now();
            }
            Err(Refusal::new(Code::Invalid, "what was copied is kept"))
        };
        let id = jobs.start(JobKind::VolumeFlatten, "a", work).unwrap().id;
        jobs.cancel(id).unwrap();
        let error = jobs.wait(id, LONG).unwrap().error.unwrap();
        assert_eq!(
            (error.code, error.detail.as_str()),
            (Code::Cancelled, "cancelled: what was copied is kept")
        );
        assert_eq!(jobs.cancel(id).unwrap_err().code, Code::NotReady);
        assert_eq!(jobs.cancel(99).unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_fault_that_a_cancelled_job_ends_with_is_told_as_what_it_is() {
        fn ends_with(fault: impl FnOnce() -> Outcome + Send + 'static) -> Code {
            let jobs = Arc::new(Jobs::default());
            let (go, wait) = mpsc::channel::<()>();
            let work = move |_: &Control| {
                wait.recv().ok();
                fault()
            };
            let id = jobs.start(JobKind::VolumeFlatten, "a", work).unwrap().id;
            jobs.cancel(id).unwrap();
            drop(go);
            jobs.wait(id, LONG).unwrap().error.unwrap().code
        }
        for code in Code::ALL.into_iter().filter(|code| is_fault(*code)) {
            assert_eq!(ends_with(move || Err(Refusal::new(code, "a fault"))), code);
        }
        assert_eq!(ends_with(|| panic!("a fault of the program")), Code::Internal);
        assert_eq!(ends_with(|| Err(Refusal::new(Code::InUse, "told to stop"))), Code::Cancelled);
    }

    #[test]
    fn the_oldest_ended_jobs_are_forgotten() {
        let jobs = Arc::new(Jobs::default());
        for _ in 0..JOBS_KEPT_MAX + 3 {
            let job = jobs.start(JobKind::VolumeClone, "a", |_| Ok(Report::Nothing)).unwrap();
            jobs.wait(job.id, LONG).unwrap();
        }
        assert_eq!(jobs.list().len(), JOBS_KEPT_MAX);
        assert_eq!(jobs.list().first().map(|job| job.id), Some(4));
    }
}
