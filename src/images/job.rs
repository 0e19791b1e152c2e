//! The two jobs of an image: its arrival, and reading it back from the medium.
//!
//! Owns who runs a job when, and what it fetches from where; the order of its steps on disk is that of `steps.rs`. A job
//! ends by [`Service::ended`], whatever happens in it.

use std::{path::Path, sync::Arc, time::Duration};

use bedplate_engine::image::{Format, qcow2::View};
use uuid::Uuid;

use super::{
    info::{Error, Verification},
    joined::join,
    origin::From as Origin,
    served::served_size,
    service::{Ready, Service},
    steps::{Fetched, NAMES, Steps, end_arrival, end_verification, failure_record},
    table::{Job, JobKind},
};
use crate::{
    catalog::{
        record::{IMAGE_SIZE_MAX, ImageRecord, Parts, Published, RecordState},
        sources::SourceFile,
        store::{IMAGE, ImageDir, stamp},
    },
    directory::Open,
    prep::{
        arrival::{Arrived, PIECE_LEN, Spec, arrive},
        checksum::Expected,
        clone::{Original, clone},
        failure::{Failure, Result},
        pipeline::Hands,
        progress::Meter,
        source::{device::DeviceSource, file::FileSource, http::HttpSource, upload::LostUpload},
        stop::Stop,
        verify::verify,
    },
};

/// What a job does.
pub(super) enum Work {
    Arrival(Origin),
    Verification,
}

impl Service {
    /// Begin a job of an image that has none. Returns once it is entered; it runs when it is its turn.
    pub(super) fn start(self: &Arc<Self>, uuid: Uuid, work: Work) {
        let kind = match work {
            Work::Arrival(_) => JobKind::Arrival,
            Work::Verification => JobKind::Verification,
        };
        let job = {
            let mut table = self.lock();
            let closing = table.closing;
            let Some(image) = table.by_uuid(uuid).filter(|image| image.job.is_none() && !closing) else {
                return;
            };
            // What a user allows for an arrival says nothing about reading it back.
            let asked = image.record.deadline_s.filter(|_| kind == JobKind::Arrival);
            let limit = asked.map_or(self.settings.deadline, Duration::from_secs);
            let job = Job { kind, meter: Arc::new(Meter::default()), stop: Arc::new(Stop::after(limit)) };
            image.job = Some(job.clone());
            image.verification = None;
            job
        };
        let service = self.clone();
        // An upload's sender is here now; how many there are is bounded by UPLOADS_MAX.
        let turns = (!matches!(work, Work::Arrival(Origin::Upload(_)))).then(|| self.turns.clone());
        self.runtime.spawn(async move {
            let turn = match turns {
                Some(turns) => tokio::select! {
                    turn = turns.acquire_owned() => turn.ok(),
                    () = job.stop.fired() => None,
                },
                None => None,
            };
            let (worker, its_job) = (service.clone(), job.clone());
            let work = tokio::task::spawn_blocking(move || {
                // Without a turn it was told to end while it waited.
                its_job.stop.check()?;
                worker.run(uuid, work, &its_job)
            });
            let outcome = work.await.unwrap_or_else(|_| {
                Err(Failure::Source("the job ended unexpectedly; see the log".to_owned()))
            });
            drop(turn);
            let (service, ending) = (service.clone(), job);
            // A join error here would mean that recording panicked; then the record still says what was before.
            let _ = tokio::task::spawn_blocking(move || service.ended(uuid, &ending, outcome)).await;
        });
    }

    fn run(self: &Arc<Self>, uuid: Uuid, work: Work, job: &Job) -> Result<Published> {
        let (record, dir) = self.look_up(uuid)?;
        match work {
            Work::Arrival(origin) => self.arrival(record, &dir, origin, job),
            Work::Verification => verification(&record, &dir, job),
        }
    }

    fn arrival(
        self: &Arc<Self>,
        record: ImageRecord,
        dir: &ImageDir,
        origin: Origin,
        job: &Job,
    ) -> Result<Published> {
        let steps = Steps { dir, meter: &job.meter, stop: &job.stop, recorded: &|record| self.know(record) };
        steps.arrive(record, |record, expected| {
            let source = origin.for_people();
            let uploaded = matches!(origin, Origin::Upload(_));
            let spec = Spec {
                dir: dir.directory()?,
                names: NAMES,
                source: source.clone(),
                // A guest may have written any header into its disk.
                format: matches!(origin, Origin::Volume { .. }).then_some(Format::Raw),
                expected,
                size_max: IMAGE_SIZE_MAX,
                reserve: self.settings.reserve,
                hands: Hands::Threads,
                piece_len: PIECE_LEN,
                sync_bytes: self.settings.sync_bytes,
                sync_interval: self.settings.sync_interval,
                meter: job.meter.clone(),
                stop: job.stop.clone(),
            };
            let (arrived, sources) = self.fetch(spec, origin, record)?;
            let virtual_size = served_size(&arrived, &record.view(), Path::new(&source), &job.stop);
            let virtual_size_bytes =
                if uploaded { virtual_size.map_err(Failure::of_whole_upload) } else { virtual_size }?;
            Ok(Fetched { arrived, virtual_size_bytes, sources })
        })
    }

    /// The bytes, and the files that they were joined from, if they were.
    fn fetch(
        self: &Arc<Self>,
        spec: Spec,
        origin: Origin,
        record: &mut ImageRecord,
    ) -> Result<(Arrived, Vec<SourceFile>)> {
        let arrived = match origin {
            Origin::Path(path) if path.is_dir() || record.parts != Parts::default() => {
                return join(spec, &path, record);
            }
            Origin::Path(path) => arrive(&spec, &mut FileSource::new(&path)),
            Origin::Http(origin) => {
                let settings = self.settings.http.clone();
                arrive(&spec, &mut HttpSource::new(origin, settings, self.runtime.clone()))
            }
            Origin::Volume { name, snapshot } => {
                let view = self.host.volume_view(&name, snapshot.as_deref()).map_err(Failure::Source)?;
                arrive(&spec, &mut DeviceSource::new(view))
            }
            Origin::Image(name) => self.fetch_image(spec, &name, record),
            Origin::Upload(Some(mut source)) => arrive(&spec, &mut source).map_err(Failure::of_upload),
            Origin::Upload(None) => arrive(&spec, &mut LostUpload).map_err(Failure::of_upload),
        };
        Ok((arrived?, Vec::new()))
    }

    /// A clone: whatever the user expects of it, it must also be what its original was.
    fn fetch_image(
        self: &Arc<Self>,
        mut spec: Spec,
        name: &str,
        record: &mut ImageRecord,
    ) -> Result<Arrived> {
        let source = |e: Error| Failure::Source(e.to_string());
        let Ready { file, path, published, view } = self.open_ready(name, Open::Read).map_err(source)?;
        if let (View::Snapshot(snapshot), None) = (view, &record.internal_snapshot) {
            record.internal_snapshot = Some(snapshot);
        }
        let theirs = Expected::Sha512(published.sha512.clone());
        if let Some(Expected::Sha512(wanted)) = spec.expected.as_ref().filter(|wanted| **wanted != theirs) {
            return Err(Failure::Checksum { expected: wanted.clone(), actual: published.sha512 });
        }
        let asked = spec.expected.get_or_insert_with(|| theirs.clone()).clone();
        spec.format = Some(published.format);
        let (size_bytes, format) = (published.stamp.size_bytes, published.format);
        let original = Original { file, path, size_bytes, format };
        match clone(&spec, original) {
            Ok(arrived) if arrived.sums.sha512 == published.sha512 => return Ok(arrived),
            Ok(_) => {}
            Err(Failure::Checksum { .. }) if asked == theirs => {}
            Err(e) => return Err(e),
        }
        self.doubt(name, "a clone of it had other bytes");
        Err(Failure::Corrupt(format!(
            "image {name:?} does not read as the bytes that were verified; it is verified again"
        )))
    }

    /// Enter the end of a job.
    fn ended(self: &Arc<Self>, uuid: Uuid, job: &Job, outcome: Result<Published>) {
        let Ok((mut record, dir)) = self.look_up(uuid) else { return };
        let (mut doubt, mut verification) = (None, None);
        match job.kind {
            JobKind::Arrival => end_arrival(&mut record, &dir, outcome),
            JobKind::Verification => {
                if let Err(failure @ (Failure::Stopped | Failure::Cancelled | Failure::TimedOut(_))) =
                    &outcome
                {
                    // It says nothing about the bytes: what was in doubt stays so, what was not, is not.
                    doubt = self
                        .doubt_of(uuid)
                        .map(|_| format!("its verification ended early: {failure}; verify it again"));
                }
                verification = Some(match &outcome {
                    Ok(_) => Verification::Passed,
                    Err(failure) => Verification::Failed(failure_record(failure)),
                });
                end_verification(&mut record, &dir, outcome);
            }
        }
        let allocated_bytes = matches!(record.state, RecordState::Ready(_)).then(|| dir.allocated_bytes());
        let mut table = self.lock();
        if let Some(image) = table.by_uuid(uuid) {
            image.record = record;
            image.allocated_bytes = allocated_bytes;
            image.doubt = doubt;
            image.job = None;
            image.upload = None;
            image.verification = verification;
        }
        drop(table);
        self.notify();
    }
}

/// Read a published file back from the medium.
fn verification(record: &ImageRecord, dir: &ImageDir, job: &Job) -> Result<Published> {
    let Some(published) = record.published().cloned() else {
        return Err(Failure::Corrupt("there is nothing to verify".to_owned()));
    };
    let path = dir.image_path();
    let file = dir.open_image(Open::Read)?;
    let before = stamp(&file, &path)?;
    let size = published.stamp.size_bytes;
    let sums = verify(&*dir.directory()?, IMAGE, size, None, &job.meter, &job.stop)?;
    if sums.sha512 != published.sha512 {
        return Err(Failure::Corrupt(format!(
            "{} has the SHA-512 {} where {} was verified before",
            path.display(),
            sums.sha512,
            published.sha512
        )));
    }
    if stamp(&file, &path)? != before {
        return Err(Failure::Corrupt(format!("{} changed while it was verified", path.display())));
    }
    Ok(Published { stamp: before, ..published })
}
