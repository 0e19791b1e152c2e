//! Short workloads with life operations on a disk, cut at every call that changes the medium.
//!
//! What a disk may hold after a cut is the state before the operation that was under way or the state after it, for
//! names and sizes ([`Catalog`]), with the contents that [`Cells`] allows (invariant 6). Nothing may be left behind that
//! no record names (invariant 12), opening may not need a second opening, and a merge that was cut can be finished.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::{Error, Result},
    exec::{
        simulated::Seed,
        storage::memory::{Fault, MemoryStorage},
    },
    image::{BaseImage, BaseSource},
    units::{ByteLen, ByteRange, SECTOR_SIZE},
    volume::{
        device::{Volume, VolumeState},
        disk::Disk,
        life::Origin,
        record::ImageRef,
    },
};
use uuid::Uuid;

use crate::{
    cells::{CELL, Cells, Content, image_value},
    crashes::{Reach, Tally, each_crash},
    image::Image,
    leftovers, setting,
};

const SIZE: u64 = 3 * 4096 + 1536;
const IMAGE: u64 = 2 * 4096 + 1024;
const GROWTH: u64 = 2 * 4096 + 512;
pub const VOLUME: &str = "v";

pub struct Images;

impl BaseSource for Images {
    fn open_base(&self, _: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        Ok(Arc::new(Image(IMAGE)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write,
    PartialWrite,
    /// Zeros as data in a block of its own.
    WriteZeros,
    /// From within block 0 over all that follow.
    LongWrite,
    /// A sector of block 0.
    FirstSector,
    Zero,
    Discard,
    /// Exactly block 1.
    Trim,
    Flush,
    Snapshot,
    /// To the newest snapshot.
    Revert,
    /// Deletes the oldest snapshot and reclaims its layer.
    Merge,
    Clone,
    FullClone,
    Flatten,
    Grow,
    /// By less than [`Step::Grow`].
    GrowLess,
}

const STEPS: [Step; 12] = [
    Step::Write,
    Step::PartialWrite,
    Step::Zero,
    Step::Discard,
    Step::Flush,
    Step::Snapshot,
    Step::Revert,
    Step::Merge,
    Step::Clone,
    Step::FullClone,
    Step::Flatten,
    Step::Grow,
];

/// What a workload starts from, besides a volume over an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    New,
    /// With a snapshot below the head: a merge goes into the head.
    OneSnapshot,
    /// With two snapshots: a merge goes up into the frozen layer above.
    Snapshots,
    /// With two snapshots, the second of a few changes: a merge goes down.
    SmallOverLarge,
}

/// What a volume is.
#[derive(Clone, Debug)]
struct Known {
    cells: Cells,
    snapshots: BTreeMap<String, Cells>,
}

/// What a disk holds.
#[derive(Clone, Debug)]
struct Catalog {
    volumes: BTreeMap<String, Known>,
    salt: u64,
}

impl Catalog {
    fn salt(&mut self) -> u64 {
        self.salt += 1;
        self.salt
    }

    fn volume(&mut self) -> &mut Known {
        self.volumes.get_mut(VOLUME).expect("the volume is never deleted")
    }

    /// Check a disk that was opened after a crash; what was found is durable from then on.
    fn check(&mut self, disk: &Disk) -> Result<(), String> {
        match disk.volumes().iter().find(|info| info.state != VolumeState::Ready) {
            Some(info) => Err(format!("{} is {:?}", info.name, info.state)),
            None => self.check_any_state(disk),
        }
    }

    /// The same for a disk on which volumes may take no writes.
    fn check_any_state(&mut self, disk: &Disk) -> Result<(), String> {
        let found = disk.volumes();
        let names: BTreeSet<&str> = found.iter().map(|info| info.name.as_str()).collect();
        let expected: BTreeSet<&str> = self.volumes.keys().map(String::as_str).collect();
        if names != expected {
            return Err(format!("volumes are {names:?} instead of {expected:?}"));
        }
        for info in found {
            let known = self.volumes.get_mut(&info.name).ok_or("unknown")?;
            let names: BTreeSet<&str> = info.snapshots.iter().map(|s| s.name.as_str()).collect();
            let expected: BTreeSet<&str> = known.snapshots.keys().map(String::as_str).collect();
            if names != expected {
                return Err(format!("{}: snapshots are {names:?} instead of {expected:?}", info.name));
            }
            let volume = disk.volume(&info.name).map_err(|e| e.to_string())?;
            check_device(&*volume, &mut known.cells, &info.name)?;
            for (name, cells) in &mut known.snapshots {
                let view = disk.view(&info.name, Some(name)).map_err(|e| e.to_string())?;
                check_device(&view, cells, &format!("{}@{name}", info.name))?;
            }
        }
        Ok(())
    }
}

fn check_device(device: &dyn BlockDevice, cells: &mut Cells, what: &str) -> Result<(), String> {
    let size = device.geometry().size.0;
    if size != cells.size() {
        return Err(format!("{what} has {size} bytes instead of {}", cells.size()));
    }
    let mut bytes = vec![0; usize::try_from(size).expect("a small volume")];
    match device.read_at(&mut bytes, 0) {
        Err(Error::Lost { .. }) => return check_readable(device, cells).map_err(|e| format!("{what}: {e}")),
        other => other.map_err(|e| format!("{what}: {e}"))?,
    }
    cells.crashed(&bytes).map_err(|e| format!("{what}: {e}"))
}

/// Check what a volume whose layer failed still shows; the rest is refused.
fn check_readable(device: &dyn BlockDevice, cells: &mut Cells) -> Result<(), String> {
    let since = cells.now();
    for sector in 0..cells.size() / SECTOR_SIZE {
        let range = ByteRange::new(sector * SECTOR_SIZE, SECTOR_SIZE);
        let mut bytes = [0; 512];
        match device.read_at(&mut bytes, range.start.0) {
            Ok(()) => cells.check_read(range, &bytes, since)?,
            Err(Error::Lost { .. }) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(())
}

struct Run {
    storage: Arc<MemoryStorage>,
    disk: Arc<Disk>,
    catalog: Catalog,
    count: usize,
}

/// A disk with a volume over an image.
pub fn create_volume() -> (Arc<MemoryStorage>, Arc<Disk>) {
    let storage = Arc::new(MemoryStorage::new(512));
    let disk = Disk::open_storage(storage.clone(), Arc::new(Images)).expect("an empty medium");
    let image = ImageRef { name: "base".into(), uuid: Uuid::from_u128(5), sha512: String::new() };
    disk.create_volume(VOLUME, Origin::Image(image), Some(ByteLen(SIZE))).expect("no faults");
    (storage, disk)
}

impl Run {
    fn new(before: Before) -> Run {
        let (storage, disk) = create_volume();
        let values = (0..SIZE / CELL).map(|cell| if cell * CELL < IMAGE { image_value(cell) } else { 0 });
        let known = Known { cells: Cells::new(values, 1), snapshots: BTreeMap::new() };
        let catalog = Catalog { volumes: BTreeMap::from([(VOLUME.to_owned(), known)]), salt: 1 };
        let mut run = Run { storage, disk, catalog, count: 0 };
        match before {
            Before::New => {}
            Before::Snapshots => {
                run.steps(&[Step::LongWrite, Step::WriteZeros, Step::Snapshot]);
                run.steps(&[Step::Discard, Step::FirstSector, Step::Snapshot]);
            }
            Before::OneSnapshot => {
                run.steps(&[Step::LongWrite, Step::WriteZeros, Step::Snapshot, Step::Discard])
            }
            Before::SmallOverLarge => {
                run.steps(&[Step::LongWrite, Step::WriteZeros, Step::Snapshot]);
                run.steps(&[Step::FirstSector, Step::Trim, Step::Snapshot]);
            }
        }
        run
    }

    fn steps(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(*step);
        }
    }

    /// Do a step; returns what the disk may hold while it is under way.
    fn step(&mut self, step: Step) -> Vec<Catalog> {
        let (catalogs, result) = self.attempt(step);
        result.unwrap_or_else(|error| panic!("{step:?} failed without a fault: {error}"));
        catalogs
    }

    /// Do a step that may fail; returns what the disk may hold then, and the result.
    fn attempt(&mut self, step: Step) -> (Vec<Catalog>, Result<()>) {
        self.count += 1;
        let disk = self.disk.clone();
        let before = self.catalog.clone();
        let new = format!("n{}", self.count);
        let salt = self.catalog.salt();
        let known = self.catalog.volume();
        let result = match step {
            Step::Write => return self.change(4096, 4096, Content::Stamped),
            Step::PartialWrite => return self.change(4096 + 3072, 1024 + 2048, Content::Stamped),
            Step::WriteZeros => return self.write_zeros(8192, 4096),
            Step::LongWrite => return self.change(1024, SIZE - 1024, Content::Stamped),
            Step::FirstSector => return self.change(0, 512, Content::Stamped),
            Step::Trim => return self.change(4096, 4096, Content::Zeros),
            Step::Zero => return self.change(4096, 8192, Content::Zeros),
            Step::Discard => return self.change(4096 - 1024, 1024 + 2048, Content::Zeros),
            Step::Flush => disk.volume(VOLUME).and_then(|volume| volume.flush()),
            Step::Snapshot => {
                known.snapshots.insert(new.clone(), known.cells.snapshot(salt));
                disk.create_snapshot(VOLUME, &new).map(drop)
            }
            Step::Revert => match known.snapshots.last_key_value() {
                None => Ok(()),
                Some((name, cells)) => {
                    let (name, size) = (name.clone(), known.cells.size());
                    known.cells = cells.snapshot(salt);
                    known.cells.grow(size);
                    disk.revert(VOLUME, &name, None).map(drop)
                }
            },
            Step::Merge => match known.snapshots.pop_first() {
                None => Ok(()),
                Some((name, _)) => disk.delete_snapshot(VOLUME, &name).and_then(|_| disk.reclaim(|| true)),
            },
            Step::Clone | Step::FullClone => {
                let cells = known.cells.snapshot(salt);
                self.catalog.volumes.insert(new.clone(), Known { cells, snapshots: BTreeMap::new() });
                match step {
                    Step::Clone => disk.clone_volume(VOLUME, None, &new).map(drop),
                    _ => disk.full_clone(VOLUME, None, &new, |_, _| true).map(drop),
                }
            }
            Step::Flatten => disk.flatten(VOLUME, |_, _| true).map(drop),
            Step::Grow | Step::GrowLess => {
                let size = known.cells.size() + if step == Step::Grow { GROWTH } else { SECTOR_SIZE };
                known.cells.grow(size);
                disk.resize(VOLUME, ByteLen(size)).map(drop)
            }
        };
        let after = self.catalog.clone();
        let is_flush = matches!(step, Step::Flush | Step::Snapshot | Step::Clone | Step::FullClone);
        if result.is_ok() && is_flush {
            self.flushed();
        }
        (vec![before, after], result)
    }

    fn change(&mut self, start: u64, len: u64, content: Content) -> (Vec<Catalog>, Result<()>) {
        let range = ByteRange::new(start, len);
        self.submit(range, content, |volume, bytes| match content {
            Content::Stamped => volume.write_at(bytes, start, Durability::Volatile),
            Content::Zeros => volume.discard(range),
        })
    }

    fn write_zeros(&mut self, start: u64, len: u64) -> (Vec<Catalog>, Result<()>) {
        self.submit(ByteRange::new(start, len), Content::Zeros, |volume, bytes| {
            volume.write_at(bytes, start, Durability::Volatile)
        })
    }

    fn submit(
        &mut self,
        range: ByteRange,
        content: Content,
        change: impl FnOnce(&Volume, &[u8]) -> Result<()>,
    ) -> (Vec<Catalog>, Result<()>) {
        let (id, bytes) = self.catalog.volume().cells.begin(range, content);
        let under_way = self.catalog.clone();
        let result = self.disk.volume(VOLUME).and_then(|volume| change(&volume, &bytes));
        let cells = &mut self.catalog.volume().cells;
        match result {
            Ok(()) => cells.acknowledged(id),
            Err(_) => cells.failed(id),
        }
        (vec![under_way], result)
    }

    /// A snapshot is itself a flush.
    fn flushed(&mut self) {
        let cells = &mut self.catalog.volume().cells;
        let since = cells.now();
        cells.flushed(since);
    }
}

/// Open what a crash left and check it, go on with a life operation, crash and check again.
fn check_crashed(left: MemoryStorage, catalogs: &[Catalog], seed: &mut Seed, what: &str) {
    let open = |storage: MemoryStorage| {
        let storage = Arc::new(storage);
        let disk = Disk::open_storage(storage.clone(), Arc::new(Images));
        (storage, disk.unwrap_or_else(|e| panic!("{what}: the disk does not open: {e}")))
    };
    let (storage, disk) = open(left);
    let mut errors = Vec::new();
    let found = catalogs.iter().find_map(|catalog| {
        let mut catalog = catalog.clone();
        catalog.check(&disk).map_err(|error| errors.push(error)).ok().map(|()| catalog)
    });
    let Some(mut catalog) = found else { panic!("{what}:\n{}", errors.join("\n")) };
    leftovers::check(&*storage, &[]).unwrap_or_else(|e| panic!("{what}: {e}"));
    disk.reclaim(|| true).unwrap_or_else(|e| panic!("{what}: a merge does not go on: {e}"));
    catalog.check(&disk).unwrap_or_else(|e| panic!("{what}, reclaimed: {e}"));
    let mut run = Run { storage, disk, catalog, count: 100 };
    let next = [Step::GrowLess, Step::Snapshot, Step::Clone, Step::Revert, Step::Flatten, Step::Write]
        [seed.index(6)];
    run.step(next);
    run.catalog.volume().cells.abandon();
    let Run { storage, disk, mut catalog, .. } = run;
    let second = storage.crash_losing_all();
    drop(disk);
    let (_, disk) = open(second);
    catalog.check(&disk).unwrap_or_else(|e| panic!("{what}, then {next:?}, crashed again: {e}"));
}

/// Outcomes of one cut, by the length of the workload.
fn reach(len: usize) -> Reach {
    Reach::of(match len {
        0 | 1 => 16,
        2 => 2,
        _ => 1,
    })
}

fn run_workload(before: Before, workload: &[Step], seed: &mut Seed) -> Tally {
    let mut run = Run::new(before);
    let Some((last, first)) = workload.split_last() else { return Tally::default() };
    for step in first {
        run.step(*step);
    }
    run.storage.record_cuts();
    let mut catalogs = run.step(*last);
    let cuts = run.storage.take_cuts();
    let every = setting("BEDPLATE_LIFE_CUTS", 3);
    let points = cuts.len();
    let mut tally = Tally::of_workload();
    for (n, cut) in cuts.into_iter().enumerate() {
        let ended = n + 1 == points;
        if ended {
            catalogs = vec![run.catalog.clone()];
        } else if workload.len() > 1 && !seed.one_in(every) {
            continue;
        }
        let what = format!("{before:?} {workload:?} cut at {n} of {points}");
        let mut after = Seed(seed.number());
        tally += each_crash(&cut, reach(workload.len()), seed, |left| {
            check_crashed(left, &catalogs, &mut after, &what);
        });
    }
    tally
}

#[test]
fn every_short_life_cut_at_every_call_is_before_or_after_and_leaves_nothing_behind() {
    let depth = setting("BEDPLATE_LIFE_DEPTH", 2);
    let mut seed = Seed(11);
    let mut tally = Tally::default();
    let mut level: Vec<Vec<Step>> = vec![Vec::new()];
    for _ in 0..depth {
        level = level
            .iter()
            .flat_map(|start| STEPS.iter().map(|step| [start.as_slice(), &[*step]].concat()))
            .collect();
        for before in [Before::New, Before::OneSnapshot, Before::Snapshots, Before::SmallOverLarge] {
            for workload in &level {
                tally += run_workload(before, workload, &mut seed);
            }
            println!("up to {before:?}: {tally}");
        }
    }
}

#[test]
fn what_a_start_after_a_kill_serves_is_what_a_power_cut_leaves() {
    let mut points = 0;
    for before in [Before::New, Before::OneSnapshot, Before::Snapshots, Before::SmallOverLarge] {
        for step in STEPS {
            for nth in 0.. {
                let mut run = Run::new(before);
                run.step(Step::PartialWrite);
                run.storage.stop_at(run.storage.calls() + nth);
                let (catalogs, result) = run.attempt(step);
                if result.is_ok() {
                    break;
                }
                points += 1;
                let what = format!("{before:?} {step:?} killed at call {nth}");
                check_killed(run.storage.kill(), &catalogs, &what);
            }
        }
    }
    println!("{points} kills");
}

/// The next start writes, flushes, and loses its power.
fn check_killed(left: MemoryStorage, catalogs: &[Catalog], what: &str) {
    let storage = Arc::new(left);
    let disk = Disk::open_storage(storage.clone(), Arc::new(Images));
    let disk = disk.unwrap_or_else(|e| panic!("{what}: the disk does not open: {e}"));
    let mut errors = Vec::new();
    let found = catalogs.iter().find_map(|catalog| {
        let mut catalog = catalog.clone();
        catalog.check(&disk).map_err(|error| errors.push(error)).ok().map(|()| catalog)
    });
    let Some(catalog) = found else { panic!("{what}:\n{}", errors.join("\n")) };
    let mut run = Run { storage, disk, catalog, count: 100 };
    run.steps(&[Step::LongWrite, Step::Flush]);
    let after = Arc::new(run.storage.crash_losing_all());
    let disk = Disk::open_storage(after, Arc::new(Images));
    let disk = disk.unwrap_or_else(|e| panic!("{what}, then a power cut: the disk does not open: {e}"));
    run.catalog.check(&disk).unwrap_or_else(|e| panic!("{what}, then a power cut: {e}"));
}

/// What a disk shows after an operation failed, and what a crash then leaves: before or after, and open.
fn check_failed(run: &Run, catalogs: &[Catalog], what: &str) {
    let check = |disk: &Disk, what: &str| {
        let mut errors = Vec::new();
        let found = catalogs.iter().any(|catalog| {
            let mut catalog = catalog.clone();
            catalog.check_any_state(disk).map_err(|error| errors.push(error)).is_ok()
        });
        assert!(found, "{what}:\n{}", errors.join("\n"));
    };
    check(&run.disk, what);
    for newest in [false, true] {
        let left = run.storage.crash(|_, outcomes| if newest { outcomes - 1 } else { 0 });
        let disk = Disk::open_storage(Arc::new(left), Arc::new(Images));
        let disk = disk.unwrap_or_else(|e| panic!("{what}: the disk does not open: {e}"));
        check(&disk, &format!("{what}, crashed, newest {newest}"));
        // Whatever happened, there is a way out of it.
        disk.recover(VOLUME).unwrap_or_else(|e| panic!("{what}: does not recover: {e}"));
        check(&disk, &format!("{what}, recovered"));
        let volume = disk.volume(VOLUME).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(volume.state(), VolumeState::Ready, "{what}");
    }
}

#[test]
fn a_life_operation_that_fails_at_any_call_has_happened_or_not() {
    let mut points = 0;
    for before in [Before::New, Before::OneSnapshot, Before::Snapshots, Before::SmallOverLarge] {
        for step in STEPS {
            for error in [ErrorKind::Other, ErrorKind::StorageFull] {
                for nth in 0.. {
                    let mut run = Run::new(before);
                    run.step(Step::PartialWrite);
                    let mut count = 0;
                    let hit = Arc::new(AtomicBool::new(false));
                    let seen = hit.clone();
                    run.storage.set_faults(move |call| {
                        let ours = error == ErrorKind::Other || call.kind.takes_space();
                        count += u64::from(ours);
                        (ours && count == nth + 1).then(|| {
                            seen.store(true, Ordering::Relaxed);
                            Fault::Error(error)
                        })
                    });
                    let (mut catalogs, result) = run.attempt(step);
                    run.storage.clear_faults();
                    if result.is_ok() {
                        catalogs = vec![run.catalog.clone()];
                    }
                    if !hit.load(Ordering::Relaxed) {
                        break;
                    }
                    points += 1;
                    check_failed(&run, &catalogs, &format!("{before:?} {step:?} {error:?} at call {nth}"));
                }
            }
        }
    }
    println!("{points} failed calls");
}
