//! The steps of an image's life on its disk, without threads, runtime or network around them.
//!
//! Owns their order: the record says *in progress*, bytes arrive and are verified, the file gets its name, the record
//! says *ready*; what a failure leaves behind; what a start makes of what it finds. Upholds the service's part of
//! invariants 5, 9 and 12. The service carries them out for its jobs, and the crash lab on its simulated machine.

use bedplate_engine::error::{Error as Storage, Result as StorageResult};

use crate::{
    catalog::{
        record::{FailureCode, FailureRecord, ImageRecord, Published, RecordState},
        sources::SourceFile,
        store::{ImageDir, PARTIAL_DATA, PARTIAL_RECORD},
    },
    images::origin::UPLOAD,
    prep::{
        arrival::Arrived,
        checksum::Expected,
        failure::{Failure, Result},
        partial::{Kept, PartialNames},
        progress::{Meter, Phase},
        stop::Stop,
    },
};

/// The names of what is kept of an arrival.
pub const NAMES: PartialNames = PartialNames { data: PARTIAL_DATA, record: PARTIAL_RECORD };

/// What an arrival is carried out with.
pub struct Steps<'a> {
    pub dir: &'a ImageDir,
    pub meter: &'a Meter,
    pub stop: &'a Stop,
    /// Told of each record once it is durable.
    pub recorded: &'a dyn Fn(&ImageRecord),
}

/// What has arrived, verified and durable.
#[derive(Debug)]
pub struct Fetched {
    pub arrived: Arrived,
    /// Of the device over it.
    pub virtual_size_bytes: u64,
    /// The files that it was joined from, if it was.
    pub sources: Vec<SourceFile>,
}

impl Steps<'_> {
    /// Carry out an arrival, or go on with it. `fetch` brings the bytes, and is told which checksum is expected; it may
    /// say more precisely in the record what they are.
    pub fn arrive(
        &self,
        mut record: ImageRecord,
        fetch: impl FnOnce(&mut ImageRecord, Option<Expected>) -> Result<Fetched>,
    ) -> Result<Published> {
        if self.dir.has_image()? {
            // Published by a run that did not live to record it. Its hash is kept, so this costs nothing.
            self.dir.unpublish_file()?;
        }
        record.state = RecordState::InProgress;
        self.record(&record)?;
        let expected = match &record.expected {
            Some(text) => Some(Expected::parse(text).map_err(Failure::Unsupported)?),
            None => None,
        };
        let Fetched { arrived, virtual_size_bytes, sources } = fetch(&mut record, expected)?;
        self.meter.enter(Phase::Publishing);
        self.stop.check()?;
        let stamp = self.dir.publish_file(&arrived.file)?;
        if stamp.size_bytes != arrived.size_bytes {
            let (is, was) = (stamp.size_bytes, arrived.size_bytes);
            return Err(Failure::Corrupt(format!("the file has {is} bytes after {was} had arrived")));
        }
        let Arrived { format, sums, .. } = arrived;
        let published = Published { format, virtual_size_bytes, sha512: sums.sha512, stamp, sources };
        record.state = RecordState::Ready(published.clone());
        self.record(&record)?;
        // It is ready, whatever is left beside it: the next start clears that away.
        clear(&record, self.dir);
        Ok(published)
    }

    fn record(&self, record: &ImageRecord) -> StorageResult<()> {
        self.dir.write_record(record)?;
        (self.recorded)(record);
        Ok(())
    }
}

/// Enter the end of an arrival: its reason, if it failed, and nothing that is of no more use.
pub fn end_arrival(record: &mut ImageRecord, dir: &ImageDir, outcome: Result<Published>) {
    let discard = outcome.as_ref().err().is_some_and(|failure| !failure.keeps_partial());
    match outcome {
        Ok(published) => ready(record, dir, published),
        // It goes on at the next start.
        Err(Failure::Stopped) => {}
        Err(failure) => failed(record, dir, &failure, None),
    }
    if discard {
        clear(record, dir);
    }
}

/// Enter the end of a verification.
pub fn end_verification(record: &mut ImageRecord, dir: &ImageDir, outcome: Result<Published>) {
    match outcome {
        Ok(published) => ready(record, dir, published),
        // These say nothing about the bytes.
        Err(Failure::Stopped | Failure::Cancelled | Failure::TimedOut(_)) => {}
        Err(failure) => {
            let published = record.published().cloned();
            failed(record, dir, &failure, published);
        }
    }
}

fn ready(record: &mut ImageRecord, dir: &ImageDir, published: Published) {
    let (size_bytes, sha512) = (published.stamp.size_bytes, &published.sha512);
    tracing::info!(image = %record.name, size_bytes, sha512, "ready");
    change(record, dir, RecordState::Ready(published));
}

fn failed(record: &mut ImageRecord, dir: &ImageDir, failure: &Failure, published: Option<Published>) {
    tracing::warn!(image = %record.name, %failure, "the job failed");
    change(record, dir, RecordState::Failed { failure: failure_record(failure), published });
}

/// The record first: a crash before the rest leaves bytes that the next start clears away.
fn change(record: &mut ImageRecord, dir: &ImageDir, state: RecordState) {
    if record.state == state {
        return;
    }
    record.state = state;
    if let Err(error) = dir.write_record(record) {
        tracing::error!(image = %record.name, %error, "the end of the job is not recorded");
    }
}

/// Clear away what is of no use beside the record, and beside the verified file if there ever was one.
pub fn discard(record: &ImageRecord, dir: &ImageDir) -> StorageResult<()> {
    match record.published() {
        Some(_) => dir.discard_partial(),
        None => dir.discard_unpublished(),
    }
}

/// Make an image that failed pending again. What is kept of it may be old, and whoever asks now wants what the source has
/// now; of one that failed for its bytes nothing is kept.
pub fn begin_again(failed: &ImageRecord, record: &ImageRecord, dir: &ImageDir) -> StorageResult<()> {
    if is_of_use(failed, dir) {
        Kept::demand_proof(&*dir.directory()?, NAMES)?;
    } else {
        // It could not be cleared away when it failed.
        discard(failed, dir)?;
    }
    dir.write_record(record)
}

/// What a start has to do with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Its arrival goes on.
    Unfinished,
    /// It is served, if its file is as it was.
    Ready,
    Failed,
}

/// Take up an image as a start finds it: what failures left and nobody can use is cleared away.
pub fn take_up(record: &ImageRecord, dir: &ImageDir) -> Left {
    let left = match &record.state {
        RecordState::Pending | RecordState::InProgress => return Left::Unfinished,
        RecordState::Ready(_) => Left::Ready,
        RecordState::Failed { .. } => Left::Failed,
    };
    if !is_of_use(record, dir) {
        clear(record, dir);
    }
    left
}

fn clear(record: &ImageRecord, dir: &ImageDir) {
    if let Err(error) = discard(record, dir) {
        tracing::warn!(image = %record.name, %error, "what an arrival left behind is not cleared away");
    }
}

/// Whether another try could go on with what is kept.
fn is_of_use(record: &ImageRecord, dir: &ImageDir) -> bool {
    match &record.state {
        RecordState::Pending | RecordState::InProgress => true,
        RecordState::Ready(_) => false,
        RecordState::Failed { published: None, .. } if record.source == UPLOAD => false,
        RecordState::Failed { failure, .. } => match failure.code {
            FailureCode::Checksum
            | FailureCode::Corrupt
            | FailureCode::Unsupported
            | FailureCode::Cancelled => false,
            // Of a source that never said how much there is, nothing is kept: see `Failure::keeps_partial`.
            FailureCode::NoSpace => knows_its_length(dir),
            FailureCode::Source | FailureCode::TimedOut | FailureCode::Storage => true,
        },
    }
}

/// Whether what is kept of an arrival is of a source that said how long it is. What cannot be read now may.
fn knows_its_length(dir: &ImageDir) -> bool {
    match dir.directory().and_then(|directory| directory.read_small(NAMES.record)) {
        Ok(json) => Kept::parse(&json).is_some_and(|kept| kept.total.is_some()),
        Err(error) => !error.is_not_found(),
    }
}

/// Why an image failed, as its record says it.
pub fn failure_record(failure: &Failure) -> FailureRecord {
    FailureRecord { code: failure_code(failure), message: failure.to_string() }
}

fn failure_code(failure: &Failure) -> FailureCode {
    match failure {
        Failure::Checksum { .. } => FailureCode::Checksum,
        Failure::Corrupt(_) | Failure::Storage(Storage::Corrupt { .. }) => FailureCode::Corrupt,
        Failure::NoSpace { .. }
        | Failure::NoSpaceForUnknown { .. }
        | Failure::Storage(Storage::NoSpace { .. }) => FailureCode::NoSpace,
        Failure::Unsupported(_) | Failure::Storage(Storage::Unsupported { .. }) => FailureCode::Unsupported,
        // A stopped job is not recorded as failed.
        Failure::Source(_) | Failure::Changed(_) | Failure::Stopped => FailureCode::Source,
        Failure::TimedOut(_) => FailureCode::TimedOut,
        Failure::Cancelled => FailureCode::Cancelled,
        Failure::Storage(_) => FailureCode::Storage,
        Failure::Upload(reason) => failure_code(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc, time::Duration};

    use bedplate_engine::{
        exec::storage::memory::{CallKind, Fault, MemoryStorage},
        units::ByteLen,
    };

    use super::*;
    use crate::{
        catalog::{
            store::Found,
            testing::{record, store_over},
        },
        directory::Open,
        prep::{
            arrival::{Arrival, Opening, PIECE_LEN, Spec, arrive},
            checksum::Hasher,
            partial::Proof,
            pipeline::Hands,
            room::Reserve,
            source::{Source, Validator},
        },
    };

    /// A source of one block.
    struct Block;

    impl Source for Block {
        fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
            if arrival.position() == 0 {
                let validator = Validator::Etag("\"a\"".to_owned());
                arrival.begin(Opening { total: Some(4096), needed_bytes: None, validator })?;
                arrival.bytes(&[1; 4096])?;
            }
            Ok(())
        }
    }

    fn run(dir: &ImageDir) -> Result<Published> {
        let (meter, stop) = (Arc::new(Meter::default()), Arc::new(Stop::after(Duration::from_secs(600))));
        let steps = Steps { dir, meter: &meter, stop: &stop, recorded: &|_| {} };
        let outcome = steps.arrive(record(), |_, expected| {
            let spec = Spec {
                dir: dir.directory()?,
                names: NAMES,
                source: "a".to_owned(),
                format: None,
                expected,
                size_max: u64::MAX,
                reserve: Reserve::Fixed(ByteLen(0)),
                hands: Hands::Threads,
                piece_len: PIECE_LEN,
                sync_bytes: 4096,
                sync_interval: Duration::from_secs(600),
                meter: meter.clone(),
                stop: stop.clone(),
            };
            let arrived = arrive(&spec, &mut Block)?;
            Ok(Fetched { arrived, virtual_size_bytes: 4096, sources: Vec::new() })
        });
        let mut record = ImageRecord { state: RecordState::InProgress, ..record() };
        end_arrival(&mut record, dir, outcome.clone());
        outcome
    }

    #[test]
    fn what_is_ready_stays_ready_when_what_lies_beside_it_cannot_be_removed() {
        let storage = Arc::new(MemoryStorage::new(512));
        let store = store_over(&storage);
        let dir = store.create(&record()).unwrap();
        // An arrival begins by forgetting what an earlier one kept.
        let mut begun = false;
        storage.set_faults(move |call| {
            let removes = call.kind == CallKind::Remove && call.path.ends_with(PARTIAL_RECORD);
            let fails = removes && std::mem::replace(&mut begun, true);
            fails.then_some(Fault::Error(io::ErrorKind::Other))
        });
        run(&dir).unwrap();
        storage.clear_faults();
        let found = store.scan().unwrap();
        let [Found::Image(record, dir)] = found.as_slice() else { panic!("{found:?}") };
        assert!(matches!(record.state, RecordState::Ready(_)));
        assert_eq!(take_up(record, dir), Left::Ready);
        assert_eq!(dir.directory().unwrap().names().unwrap(), ["image", "image.json"]);
    }

    #[test]
    fn what_failed_after_its_file_had_its_name_is_cleared_away_whole() {
        let storage = Arc::new(MemoryStorage::new(512));
        let dir = store_over(&storage).create(&record()).unwrap();
        run(&dir).unwrap();
        let failure = failure_record(&Failure::Cancelled);
        let failed = ImageRecord { state: RecordState::Failed { failure, published: None }, ..record() };
        dir.write_record(&failed).unwrap();
        assert_eq!(take_up(&failed, &dir), Left::Failed);
        assert_eq!(dir.directory().unwrap().names().unwrap(), ["image.json"]);
    }

    /// An arrival of known length ended for this reason, and something is kept of it.
    fn failed_with_something_kept(dir: &ImageDir, code: FailureCode) -> (Kept, ImageRecord) {
        let directory = dir.directory().unwrap();
        drop(directory.open_file(NAMES.data, Open::CreateWrite).unwrap());
        let kept = Kept {
            position: 0,
            total: Some(4096),
            complete: false,
            validator: Validator::Etag("\"a\"".to_owned()),
            proof: Proof::NotNeeded,
            midstate: Hasher::new(None).midstate(),
        };
        kept.store(&directory, NAMES).unwrap();
        let failure = FailureRecord { code, message: String::new() };
        (kept, ImageRecord { state: RecordState::Failed { failure, published: None }, ..record() })
    }

    #[test]
    fn what_is_known_to_be_wrong_is_not_kept_for_who_asks_again() {
        let dir = store_over(&Arc::new(MemoryStorage::new(512))).create(&record()).unwrap();
        for (code, is_kept) in [(FailureCode::Source, true), (FailureCode::Checksum, false)] {
            let (_, failed) = failed_with_something_kept(&dir, code);
            begin_again(&failed, &record(), &dir).unwrap();
            assert_eq!(dir.directory().unwrap().exists(NAMES.record).unwrap(), is_kept, "{code:?}");
        }
    }

    #[test]
    fn what_is_kept_is_not_cleared_away_because_it_could_not_be_read_once() {
        let storage = Arc::new(MemoryStorage::new(512));
        let dir = store_over(&storage).create(&record()).unwrap();
        let (kept, failed) = failed_with_something_kept(&dir, FailureCode::NoSpace);
        let directory = dir.directory().unwrap();
        let is_kept = || {
            assert_eq!(take_up(&failed, &dir), Left::Failed);
            directory.exists(NAMES.data).unwrap()
        };
        storage.set_faults(|call| {
            let reads = call.kind == CallKind::Read && call.path.ends_with(NAMES.record);
            reads.then_some(Fault::Error(io::ErrorKind::Other))
        });
        assert!(is_kept(), "it may be read the next time");
        storage.clear_faults();
        assert!(is_kept());
        Kept { total: None, ..kept }.store(&directory, NAMES).unwrap();
        assert!(!is_kept());
    }
}
