//! Images on the simulated machine: the shipped steps of their arrival, in the middle of everything else.
//!
//! What runs is what ships: the directories of images and their records (`bedplate::catalog`), the pass that hashes,
//! writes, syncs and keeps (`bedplate::prep`), and the order of steps around it (`bedplate::images::steps`), over the same
//! medium as the volumes. Replaced are the source (`origin.rs`), the three threads of a pass, which take turns, and the
//! tokio jobs and tables of the service. `start.rs` is what a process makes of the images that it finds.
//!
//! The reference (`Reference`) knows the bytes of each image, whether it was ready, and how much of it is kept for
//! certain.

mod origin;
pub mod script;
mod start;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bedplate::{
    catalog::{
        name::ImageName,
        record::{FailureCode, IMAGE_SIZE_MAX, ImageRecord, Published, RecordState},
        store::{ImageDir, ImageStore},
    },
    images::steps::{Fetched, NAMES, Steps, begin_again, discard, end_arrival, failure_record},
    prep::{
        arrival::{Spec, arrive},
        failure::{Failure, Result},
        partial::Kept,
        pipeline::{Hands, Turns},
        progress::Meter,
        room::Reserve,
        stop::Stop,
    },
};
use bedplate_engine::{error::Error, exec::storage::memory::MemoryStorage, units::ByteLen};
use uuid::Uuid;

use self::{
    origin::{LabSource, Origin, Seen},
    script::{Act, ImageStep, Manner},
};
use crate::{operation::Operation, turns, world::World};

/// Images at a time.
const IMAGES_MAX: usize = 5;
/// Bytes of a piece, and of what comes between two marks: an image has some tens of KiB.
const PIECE_LEN: u64 = 4096;
const SYNC_BYTES: u64 = 9000;
/// Nothing in here is decided by a clock.
const EVER: Duration = Duration::from_secs(1 << 30);

/// Whether an image exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Known,
    /// It was being made, or deleted, when something came in between.
    Perhaps,
}

/// What the reference says of an image.
#[derive(Debug)]
struct Reference {
    origin: Origin,
    /// Where it lies.
    directory: String,
    presence: Presence,
    /// Of its origin's versions the oldest that it may be: the one that was there when it was last asked for.
    oldest: usize,
    /// It was said to be ready, so it is until it is deleted.
    ready: bool,
    /// It was said to have failed for this reason.
    failed: Option<FailureCode>,
    /// Bytes that have arrived and are kept, whatever happens.
    floor: u64,
    /// What is kept may not be what is expected: a wrong byte came, or the file has changed.
    tainted: bool,
}

/// An image as the process knows it.
#[derive(Clone, Debug)]
struct Entry {
    record: ImageRecord,
    dir: ImageDir,
}

/// The images of a machine.
#[derive(Debug, Default)]
pub struct Arrivals {
    known: BTreeMap<Uuid, Reference>,
    store: Option<ImageStore>,
    /// What this process has found and made.
    table: BTreeMap<Uuid, Entry>,
    /// Something is being done with these.
    busy: BTreeSet<Uuid>,
    /// Arrivals that go on.
    unfinished: Vec<Uuid>,
}

impl Arrivals {
    /// The process has ended.
    pub fn forget_process(&mut self) {
        self.store = None;
        self.table.clear();
        self.busy.clear();
        self.unfinished.clear();
    }

    /// An image whose arrival was cut off.
    pub fn next_unfinished(&mut self) -> Option<Uuid> {
        self.unfinished.pop()
    }

    /// Those that nothing is being done with, and that `fits`.
    fn idle(&self, fits: impl Fn(&RecordState) -> bool) -> Vec<Uuid> {
        let idle = self.table.iter().filter(|(uuid, _)| !self.busy.contains(uuid));
        idle.filter(|(_, entry)| fits(&entry.record.state)).map(|(uuid, _)| *uuid).collect()
    }
}

/// The order of a pass is the seed's.
#[derive(Debug)]
struct OneThread;

impl Turns for OneThread {
    fn choose(&self, count: usize) -> usize {
        turns::choose(count)
    }
}

fn has_failed(state: &RecordState) -> bool {
    matches!(state, RecordState::Failed { published: None, .. })
}

/// Take a step.
pub fn run(world: &Rc<RefCell<World>>, step: ImageStep) {
    if world.borrow().medium.has_stopped() {
        return;
    }
    match step.act {
        Act::Arrive => {
            if let Some(uuid) = ask_for(world, step.image) {
                run_arrival(world, uuid, step.manner);
            }
        }
        Act::Delete => delete(world, step.image),
        Act::Clear => clear(world, step.image),
    }
}

/// Let an arrival go on that was cut off.
pub fn go_on(world: &Rc<RefCell<World>>, uuid: Uuid) {
    let manner = {
        let mut now = world.borrow_mut();
        if now.seed.one_in(4) { Manner::of(&mut now.seed) } else { Manner::SOUND }
    };
    run_arrival(world, uuid, manner);
}

/// Let all arrivals come to their end, from sources that deliver.
pub fn go_on_with_all(world: &Rc<RefCell<World>>) {
    while let Some(uuid) = { world.borrow_mut().arrivals.next_unfinished() } {
        run_arrival(world, uuid, Manner::SOUND);
        let mut now = world.borrow_mut();
        let entry = now.arrivals.table.get(&uuid);
        let state = entry.map(|entry| entry.record.state.clone());
        if !matches!(state, None | Some(RecordState::Ready(_) | RecordState::Failed { .. })) {
            now.found(format!("the arrival of image {uuid} does not end: {state:?}"));
        }
    }
}

/// Make an image, or ask again for one that failed. Which one, unless that fails.
fn ask_for(world: &Rc<RefCell<World>>, pick: u8) -> Option<Uuid> {
    let mut now = world.borrow_mut();
    let failed = now.arrivals.idle(has_failed);
    let room = usize::from(now.arrivals.known.len() < IMAGES_MAX);
    let choices = failed.len() + room;
    if choices == 0 {
        return None;
    }
    let again = failed.get(usize::from(pick) % choices).copied();
    let errors = now.medium.errors();
    let created_at = bedplate_engine::exec::storage::Storage::now(&now.medium);
    match again {
        Some(uuid) => {
            let Entry { record: failed, dir } = now.arrivals.table.get(&uuid)?.clone();
            let record = ImageRecord { created_at, state: RecordState::Pending, ..failed.clone() };
            now.arrivals.busy.insert(uuid);
            let is_whole = start::is_whole(now.medium.storage(), &directory(&failed));
            let known = now.arrivals.known.get_mut(&uuid)?;
            known.failed = None;
            let provable = known.origin.says_validator && start::may_be_kept(&failed, known, is_whole);
            let floor = std::mem::take(&mut known.floor);
            now.note(|| format!("image {} is asked for again", record.name));
            drop(now);
            let asked = begin_again(&failed, &record, &dir);
            let mut now = world.borrow_mut();
            now.arrivals.busy.remove(&uuid);
            if now.refuses(uuid, &format!("asking again for image {}", record.name), asked, errors) {
                return None;
            }
            let faults = now.medium.errors() > errors;
            let known = now.arrivals.known.get_mut(&uuid)?;
            known.presence = Presence::Known;
            known.oldest = known.origin.versions.len() - 1;
            // A record of what is kept that cannot be read is taken for none.
            if provable && !faults {
                known.floor = floor;
            }
            now.arrivals.table.insert(uuid, Entry { record, dir });
            Some(uuid)
        }
        None => {
            let store = now.arrivals.store.clone()?;
            let uuid = bedplate_engine::exec::storage::Storage::new_uuid(&now.medium);
            let origin = Origin::new(&mut now.seed);
            let name = format!("i{:04}", now.fresh());
            let record = ImageRecord {
                name: ImageName::parse(&name).expect("letters and digits"),
                uuid,
                created_at,
                source: format!("/origin/{name}"),
                expected: origin.expected.clone(),
                deadline_s: None,
                internal_snapshot: None,
                parts: Default::default(),
                state: RecordState::Pending,
            };
            now.note(|| format!("image {name}: {} bytes", origin.newest().bytes.len()));
            let reference = Reference {
                origin,
                directory: directory(&record),
                presence: Presence::Perhaps,
                oldest: 0,
                ready: false,
                failed: None,
                floor: 0,
                tainted: false,
            };
            now.arrivals.known.insert(uuid, reference);
            drop(now);
            let made = store.create(&record);
            let mut now = world.borrow_mut();
            match made {
                Ok(dir) if !now.medium.has_stopped() => {
                    now.arrivals.known.get_mut(&uuid)?.presence = Presence::Known;
                    now.arrivals.table.insert(uuid, Entry { record, dir });
                    Some(uuid)
                }
                made => {
                    now.refuses(uuid, &format!("making image {}", record.name), made.map(drop), errors);
                    None
                }
            }
        }
    }
}

impl World {
    /// Whether something failed; if it must not have, that is a finding.
    fn refuses(&mut self, uuid: Uuid, what: &str, result: Result<(), Error>, errors: u64) -> bool {
        let Err(error) = result else { return self.medium.has_stopped() };
        let full = self.setup.medium.is_some() && matches!(error, Error::NoSpace { .. });
        // A deletion that failed may have come to its last step.
        let known = self.arrivals.known.get(&uuid);
        let gone = known.is_some_and(|known| known.presence == Presence::Perhaps) && error.is_not_found();
        if self.medium.errors() == errors && !full && !gone && !self.medium.has_stopped() {
            self.found(format!("{what} failed without a fault: {error}"));
        }
        true
    }
}

/// What a run of an arrival begins with.
struct Call {
    uuid: Uuid,
    entry: Entry,
    source: LabSource,
    floor: u64,
    /// Faults so far in its directory.
    errors: u64,
}

fn run_arrival(world: &Rc<RefCell<World>>, uuid: Uuid, manner: Manner) {
    let Some(mut call) = begin(&mut world.borrow_mut(), uuid, manner) else { return };
    let told_ready = std::cell::Cell::new(false);
    let Entry { record, dir } = call.entry.clone();
    let (meter, stop) = (Arc::new(Meter::default()), Arc::new(Stop::after(EVER)));
    let recorded = |record: &ImageRecord| {
        told_ready.set(matches!(record.state, RecordState::Ready(_)));
        world.borrow_mut().arrivals.recorded(record);
    };
    let steps = Steps { dir: &dir, meter: &meter, stop: &stop, recorded: &recorded };
    let outcome = steps.arrive(record, |_, expected| {
        let spec = Spec {
            dir: dir.directory()?,
            names: NAMES,
            source: "the origin".to_owned(),
            format: None,
            expected,
            size_max: IMAGE_SIZE_MAX,
            reserve: Reserve::Fixed(ByteLen(0)),
            hands: Hands::Turns(Arc::new(OneThread)),
            piece_len: PIECE_LEN,
            sync_bytes: SYNC_BYTES,
            sync_interval: EVER,
            meter: meter.clone(),
            stop: stop.clone(),
        };
        let arrived = arrive(&spec, &mut call.source)?;
        let virtual_size_bytes = arrived.size_bytes.next_multiple_of(512);
        Ok(Fetched { arrived, virtual_size_bytes, sources: Vec::new() })
    });
    let entry = world.borrow().arrivals.table.get(&uuid).cloned();
    if let Some(Entry { mut record, .. }) = entry {
        end_arrival(&mut record, &dir, outcome.clone());
        world.borrow_mut().arrivals.recorded(&record);
    }
    let mut world = world.borrow_mut();
    world.lives.pop();
    world.arrivals.busy.remove(&uuid);
    if let Err(what) = world.arrival_ended(&call, outcome, told_ready.get())
        && !world.medium.has_stopped()
    {
        world.found(format!("image {}: {what}", call.entry.record.name));
    }
}

fn begin(world: &mut World, uuid: Uuid, manner: Manner) -> Option<Call> {
    if world.medium.has_stopped() || world.arrivals.busy.contains(&uuid) {
        return None;
    }
    let entry = world.arrivals.table.get(&uuid)?.clone();
    let reference = world.arrivals.known.get_mut(&uuid)?;
    if manner.changed {
        reference.origin.change(&mut world.seed);
        reference.tainted = true;
    }
    let (source, floor) = (LabSource::new(&reference.origin, manner), reference.floor);
    reference.failed = None;
    world.arrivals.busy.insert(uuid);
    world.stats.operation(Operation::Arrive);
    world.meets(Operation::Arrive, None);
    world.lives.push((Operation::Arrive, entry.record.name.to_string()));
    world.note(|| format!("image {} arrives, {manner:?}, {floor} bytes are kept", entry.record.name));
    let errors = world.medium.errors_below(&directory(&entry.record));
    Some(Call { uuid, entry, source, floor, errors })
}

impl Arrivals {
    fn recorded(&mut self, record: &ImageRecord) {
        if let Some(entry) = self.table.get_mut(&record.uuid) {
            entry.record = record.clone();
        }
    }
}

impl World {
    /// Hold an end of an arrival against the reference.
    fn arrival_ended(
        &mut self,
        call: &Call,
        outcome: Result<Published>,
        told_ready: bool,
    ) -> Result<(), String> {
        let name = &call.entry.record.name;
        self.note(|| format!("the arrival of image {name} ends {:?}", outcome.as_ref().map(drop)));
        let full = self.setup.medium.is_some();
        let durable = self.medium.storage().crash_losing_all();
        let directory = directory(&call.entry.record);
        let faults = self.medium.errors_below(&directory) > call.errors;
        let Some(known) = self.arrivals.known.get_mut(&call.uuid) else { return Ok(()) };
        known.tainted |= call.source.seen.lied;
        let stopped = self.medium.has_stopped();
        if !faults && call.source.seen.from.is_some_and(|from| from < call.floor) {
            let from = call.source.seen.from;
            return Err(format!("it goes on at {from:?} although {} bytes are kept", call.floor));
        }
        if stopped {
            known.ready |= told_ready;
            return Ok(());
        }
        let failure = match outcome {
            Ok(published) => {
                known.ready = true;
                return known
                    .check_ready(&durable, &directory, &published)
                    .map_err(|what| format!("after a power cut, {what}"));
            }
            Err(failure) => failure,
        };
        if told_ready {
            return Err(format!("it was ready, and then failed: {failure}"));
        }
        let Seen { broke, position, .. } = call.source.seen;
        let fine = match &failure {
            Failure::Source(_) | Failure::TimedOut(_) | Failure::Stopped | Failure::Cancelled => broke,
            Failure::Checksum { .. } => known.tainted,
            Failure::NoSpace { .. } | Failure::NoSpaceForUnknown { .. } => full,
            Failure::Storage(Error::NoSpace { .. }) => full,
            _ => false,
        };
        if !fine && !faults {
            return Err(format!("it failed without a fault: {failure}"));
        }
        known.floor = 0;
        if !failure.keeps_partial() {
            known.tainted = known.origin.versions.len() > 1;
        } else if faults || full {
            known.floor = kept(&durable, &directory).min(kept(self.medium.storage(), &directory));
        } else {
            known.floor = kept(&durable, &directory);
            if known.floor < position {
                return Err(format!("of {position} bytes that arrived {} are kept", known.floor));
            }
        }
        if !faults && !full && !matches!(failure, Failure::Stopped) {
            known.failed = Some(failure_record(&failure).code);
        }
        Ok(())
    }
}

impl Reference {
    /// Whether the image that lies there is what its record says, and what its origin had.
    fn check_ready(
        &self,
        storage: &MemoryStorage,
        directory: &str,
        published: &Published,
    ) -> Result<(), String> {
        let json = storage.bytes(&format!("{directory}/image.json")).map_err(|e| e.to_string())?;
        let record = ImageRecord::parse(&json, "image.json".as_ref()).map_err(|e| e.to_string())?;
        if record.state != RecordState::Ready(published.clone()) {
            return Err(format!("its record says {:?}", record.state));
        }
        let bytes = storage.bytes(&format!("{directory}/image")).map_err(|e| e.to_string())?;
        let found = self.origin.versions.iter().enumerate().rfind(|(_, version)| version.bytes == bytes);
        let Some((number, version)) = found else {
            let newest = &self.origin.newest().bytes;
            let same = newest.iter().zip(&bytes).take_while(|(a, b)| a == b).count();
            let (is, was) = (bytes.len(), newest.len());
            return Err(format!(
                "it is ready with bytes that nobody sent: {is} of {was}, {same} are the same"
            ));
        };
        if number < self.oldest {
            return Err("it is ready with bytes that its origin had before it was asked for again".into());
        }
        if self.origin.expected.is_some() && version.sha512 != self.origin.versions[0].sha512 {
            return Err("it is ready with other bytes than those that were asked for".into());
        }
        if published.sha512 != version.sha512 || published.stamp.size_bytes != bytes.len() as u64 {
            return Err("its record is of other bytes".into());
        }
        Ok(())
    }
}

/// Where an image lies.
fn directory(record: &ImageRecord) -> String {
    format!("images/{}", record.directory_name())
}

/// How much of an arrival is kept there.
fn kept(storage: &MemoryStorage, directory: &str) -> u64 {
    let bytes = |name| storage.bytes(&format!("{directory}/{name}")).ok();
    // What was being cleared away may have lost the one and not the other.
    let json = bytes(NAMES.data).and_then(|_| bytes(NAMES.record));
    json.and_then(|json| Kept::parse(&json)).map_or(0, |kept| kept.position)
}

fn delete(world: &Rc<RefCell<World>>, pick: u8) {
    let mut now = world.borrow_mut();
    let all = now.arrivals.idle(|_| true);
    let Some(uuid) = all.get(usize::from(pick) % all.len().max(1)).copied() else { return };
    let (Some(store), Some(Entry { record, dir })) =
        (now.arrivals.store.clone(), now.arrivals.table.get(&uuid).cloned())
    else {
        return;
    };
    now.arrivals.busy.insert(uuid);
    now.arrivals.unfinished.retain(|unfinished| *unfinished != uuid);
    if let Some(known) = now.arrivals.known.get_mut(&uuid) {
        known.presence = Presence::Perhaps;
        known.floor = 0;
    }
    now.stats.operation(Operation::DeleteImage);
    now.meets(Operation::DeleteImage, None);
    now.lives.push((Operation::DeleteImage, record.name.to_string()));
    now.note(|| format!("image {} is deleted", record.name));
    let errors = now.medium.errors();
    drop(now);
    let result = store.delete(&dir);
    let mut now = world.borrow_mut();
    now.lives.pop();
    now.arrivals.busy.remove(&uuid);
    if !now.refuses(uuid, &format!("deleting image {}", record.name), result, errors) {
        now.arrivals.table.remove(&uuid);
        now.arrivals.known.remove(&uuid);
    } else if start::names(now.medium.storage(), &directory(&record)).contains("image.json")
        && let Some(known) = now.arrivals.known.get_mut(&uuid)
    {
        known.presence = Presence::Known;
    }
}

fn clear(world: &Rc<RefCell<World>>, pick: u8) {
    let mut now = world.borrow_mut();
    let failed = now.arrivals.idle(has_failed);
    let Some(uuid) = failed.get(usize::from(pick) % failed.len().max(1)).copied() else { return };
    let Some(Entry { record, dir }) = now.arrivals.table.get(&uuid).cloned() else { return };
    now.arrivals.busy.insert(uuid);
    if let Some(known) = now.arrivals.known.get_mut(&uuid) {
        known.floor = 0;
    }
    now.note(|| format!("what is kept of image {} is cleared away", record.name));
    let errors = now.medium.errors();
    drop(now);
    let result = discard(&record, &dir);
    let mut now = world.borrow_mut();
    now.arrivals.busy.remove(&uuid);
    if now.refuses(uuid, &format!("clearing image {}", record.name), result, errors) {
        return;
    }
    let left = start::names(now.medium.storage(), &directory(&record));
    let taken = left.iter().any(|name| name != "image.json" && name != "deleted.json");
    if taken && now.arrivals.known.get(&uuid).is_some_and(|known| known.presence == Presence::Known) {
        now.found(format!("image {}, cleared, still has {left:?}", record.name));
    }
}
