//! Random histories: several clients on several volumes that share frozen layers, with life operations, reads that are
//! carried out late, crashes, kills and faults of the medium, against plain [`Cells`]. [`life`] are the life operations,
//! [`restart`] crashes and kills.
//!
//! Every choice comes from one seed. A failure prints the seed; `BEDPLATE_SEED=n` runs it alone and prints its history.

mod life;
mod restart;

use std::{
    collections::{HashMap, HashSet},
    io::ErrorKind,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bedplate_engine::{
    cow::{
        core::{Op, Synced},
        head::HeadIndex,
        plan::Index,
    },
    device::Durability,
    error::{Error, Result},
    exec::{
        head::data_path,
        simulated::{Event, Move, Planning, Seed, Simulated, Tag},
        storage::{
            StorageFile,
            memory::{CallKind, Fault, MemoryStorage},
        },
    },
    units::ByteRange,
};

use crate::{
    cells::{CELL, Cells, ChangeId, Content, Moment, image_value},
    disk::{self, Stack},
    setting,
};

const SEEDS: u64 = 2000;
const STEPS: u64 = 600;
const VOLUMES_MAX: usize = 4;
const SNAPSHOTS_MAX: usize = 6;
/// Requests of one volume at a time.
const CLIENTS: usize = 6;
/// Failing seeds after which a run gives up.
const FAILURES_MAX: usize = 10;
const COPY_BLOCKS: u64 = 5;

/// What goes wrong in a history besides crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Faults {
    None,
    /// Some reads and writes fail.
    Transfers,
    /// Some syncs fail, with or without dropping what they should have kept.
    Syncs,
    /// Any call may fail.
    Any,
    /// The medium is nearly full.
    Full,
}

enum Flight {
    Change { id: ChangeId, durability: Durability },
    Flush { since: Moment },
    Read { since: Moment },
    Barrier,
    Copy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Switch {
    Snapshot,
    Clone,
    Merge,
    Flatten,
}

/// A life operation of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    None,
    /// Blocks from `next` on are still to be copied.
    Copying {
        switch: Switch,
        next: u64,
        under_way: bool,
    },
    /// A flush makes copied blocks durable.
    Flushing {
        switch: Switch,
        tag: Tag,
    },
    Closing {
        switch: Switch,
    },
    Closed {
        switch: Switch,
    },
}

struct Volume {
    stack: Stack,
    sim: Simulated,
    model: Cells,
    flights: HashMap<Tag, Flight>,
    life: Life,
}

/// A layer that nothing stands on any more, whose space goes once nobody follows the old epoch.
struct Doomed {
    epoch: Weak<Index>,
    data: Arc<dyn StorageFile>,
}

struct World {
    seed: Seed,
    faults: Faults,
    storage: Arc<MemoryStorage>,
    volumes: Vec<Volume>,
    snapshots: Vec<(Stack, Cells)>,
    indexes: HashMap<u32, Arc<HeadIndex>>,
    files: HashMap<u32, Arc<dyn StorageFile>>,
    doomed: Vec<Doomed>,
    next_layer: u32,
    next_salt: u64,
    /// Files whose unsynced bytes the medium has dropped, which whoever reads may see before the sync's error.
    dropped: Arc<Mutex<HashSet<String>>>,
    stop_at: Option<u64>,
    log_len: u64,
    trace: Option<Vec<String>>,
    pub crashes: u64,
}

impl World {
    fn new(number: u64, trace: bool) -> World {
        let mut seed = Seed(number);
        let faults = match seed.below(8) {
            0 => Faults::Transfers,
            1 => Faults::Syncs,
            2 => Faults::Any,
            3 => Faults::Full,
            _ => Faults::None,
        };
        let storage = disk::format(if seed.one_in(3) { 4096 } else { 512 });
        let log_len = 512 * (6 + seed.below(30));
        let mut world = World {
            seed,
            faults,
            storage,
            volumes: Vec::new(),
            snapshots: Vec::new(),
            indexes: HashMap::new(),
            files: HashMap::new(),
            doomed: Vec::new(),
            next_layer: 0,
            next_salt: 1,
            dropped: Arc::default(),
            stop_at: None,
            log_len,
            trace: trace.then(Vec::new),
            crashes: 0,
        };
        for _ in 0..=world.seed.below(2) {
            world.create_volume();
        }
        world.inject();
        world
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(text());
        }
    }

    fn salt(&mut self) -> u64 {
        self.next_salt += 1;
        self.next_salt
    }

    fn create_volume(&mut self) {
        let size = 4096 * (2 + self.seed.below(14)) + 512 * self.seed.below(8);
        let image = match self.seed.below(3) {
            0 => 0,
            1 => size,
            _ => CELL * self.seed.below(size / CELL),
        };
        let head = self.next_layer;
        self.next_layer += 1;
        disk::create_layer(&*self.storage, head, size, self.log_len).expect("no faults yet");
        let stack = Stack { size, image, frozen: Vec::new(), head };
        let values = (0..size / CELL).map(|cell| if cell * CELL < image { image_value(cell) } else { 0 });
        let model = Cells::new(values, self.salt());
        let sim = disk::open(&self.storage, &stack, Synced::Yes).expect("no faults yet");
        self.volumes.push(Volume { stack, sim, model, flights: HashMap::new(), life: Life::None });
    }

    /// Let the medium go wrong from now on.
    fn inject(&mut self) {
        let mut seed = Seed(self.seed.number());
        let faults = self.faults;
        let is_transfer = |kind| matches!(kind, CallKind::Read | CallKind::Write | CallKind::Punch);
        match faults {
            Faults::None => return,
            Faults::Full => {
                let room = 512 * seed.below(300);
                self.storage.limit(self.storage.used_bytes() + room);
                return;
            }
            Faults::Transfers | Faults::Syncs | Faults::Any => {}
        }
        let dropped = self.dropped.clone();
        self.storage.set_faults(move |call| {
            let hit = match faults {
                Faults::Transfers => is_transfer(call.kind) && !call.path.ends_with("map") && seed.one_in(30),
                Faults::Syncs => matches!(call.kind, CallKind::Sync | CallKind::SyncDir) && seed.one_in(30),
                Faults::Any => seed.one_in(80),
                Faults::None | Faults::Full => false,
            };
            let error = if seed.one_in(3) { ErrorKind::StorageFull } else { ErrorKind::Other };
            hit.then(|| match call.kind {
                CallKind::Write if seed.one_in(2) => {
                    Fault::Torn { sectors: usize::try_from(seed.below(9)).unwrap_or(0) }
                }
                CallKind::Sync if seed.one_in(2) => {
                    dropped.lock().unwrap_or_else(PoisonError::into_inner).insert(call.path.clone());
                    Fault::Dropped
                }
                _ => Fault::Error(error),
            })
        });
    }

    fn range(&mut self, size: u64) -> ByteRange {
        let unit = [CELL, 512, 4096][self.seed.index(3)];
        let units = size / unit;
        if units == 0 {
            return ByteRange::new(0, size);
        }
        let start = self.seed.below(units);
        let most = (units - start).min(1 + [2, 9, 4 * 4096 / unit][self.seed.index(3)]);
        let count = 1 + self.seed.below(most);
        // Now and then up to the end, which is not at a block.
        let end = if start + count == units && self.seed.one_in(2) { size } else { (start + count) * unit };
        ByteRange::new(start * unit, end - start * unit)
    }

    /// A client of volume `n` asks for something.
    fn submit(&mut self, n: usize) -> Result<(), String> {
        let size = self.volumes[n].stack.size;
        let range = self.range(size);
        let durability = if self.seed.one_in(6) { Durability::Fua } else { Durability::Volatile };
        let planning = if self.seed.one_in(2) { Planning::AtStart } else { Planning::PartByPart };
        let kind = self.seed.below(12);
        let volume = &mut self.volumes[n];
        let (op, content) = match kind {
            0..3 => (Op::Write { range, durability }, Content::Stamped),
            // Zeros that are data.
            3 => (Op::Write { range, durability }, Content::Zeros),
            4..6 => (Op::Zero { range, durability }, Content::Zeros),
            6..8 => {
                let since = volume.model.now();
                return match volume.sim.submit(Op::Flush, None) {
                    Ok(tag) => {
                        volume.flights.insert(tag, Flight::Flush { since });
                        self.note(|| format!("volume {n}: {tag:?} flush"));
                        self.follow(n)
                    }
                    Err(error) => self.refused(n, &error),
                };
            }
            _ => {
                let since = volume.model.now();
                let tag = volume.sim.read(range, planning);
                volume.flights.insert(tag, Flight::Read { since });
                self.note(|| format!("volume {n}: {tag:?} read {range} {planning:?}"));
                return Ok(());
            }
        };
        if volume.sim.core().failed().is_some() {
            return match volume.sim.submit(op, None) {
                Ok(_) => Err("a failed volume admitted a change".into()),
                Err(error) => self.refused(n, &error),
            };
        }
        let (id, bytes) = volume.model.begin(range, content);
        match volume.sim.submit(op, Some(bytes)) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Change { id, durability });
                self.note(|| format!("volume {n}: {tag:?} {op:?} {id:?}"));
                self.follow(n)
            }
            Err(error) => Err(format!("refused: {error}")),
        }
    }

    fn refused(&self, n: usize, error: &Error) -> Result<(), String> {
        match (error, self.volumes[n].sim.core().failed()) {
            (Error::Failed { .. }, Some(_)) => Ok(()),
            _ => Err(format!("refused: {error}")),
        }
    }

    /// Take in what volume `n` told its clients.
    fn follow(&mut self, n: usize) -> Result<(), String> {
        if self.stopped() {
            return Ok(());
        }
        for event in self.volumes[n].sim.events() {
            self.note(|| match &event {
                Event::Ended { tag, result } => format!("volume {n}: {tag:?} ended {result:?}"),
                Event::Read { tag, result, .. } => {
                    format!("volume {n}: {tag:?} read {:?}", result.as_ref().map(Vec::len))
                }
            });
            let faults = self.faults;
            let volume = &mut self.volumes[n];
            let path = data_path(&volume.sim.head().dir);
            let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner).contains(&path);
            match event {
                Event::Read { tag, range, result } => {
                    let Some(Flight::Read { since }) = volume.flights.remove(&tag) else {
                        return Err(format!("{tag:?} was no read"));
                    };
                    match result {
                        // The medium has dropped what was not synced, and the sync has not answered yet: nobody can
                        // know. From its answer on, nothing is shown that may have been dropped.
                        Ok(_) if dropped && volume.sim.core().failed().is_none() => {}
                        Ok(bytes) => volume.model.check_read(range, &bytes, since)?,
                        Err(_) if matches!(faults, Faults::Transfers | Faults::Any) => {}
                        Err(Error::Lost { .. }) if volume.sim.core().uncertain().is_some() => {}
                        Err(error) => return Err(format!("a read failed without a fault: {error}")),
                    }
                }
                Event::Ended { tag, result } => {
                    let flight = volume.flights.remove(&tag).ok_or(format!("{tag:?} ended twice"))?;
                    if result.is_err() && faults == Faults::None {
                        return Err(format!("an operation failed without a fault: {result:?}"));
                    }
                    match (flight, result) {
                        (Flight::Change { id, durability: Durability::Fua }, Ok(())) => {
                            volume.model.acknowledged_durable(id);
                        }
                        (Flight::Change { id, .. }, Ok(())) => volume.model.acknowledged(id),
                        (Flight::Change { id, .. }, Err(_)) => volume.model.failed(id),
                        (Flight::Flush { since }, Ok(())) => {
                            volume.model.flushed(since);
                            if let Life::Flushing { switch, tag: awaited } = volume.life
                                && awaited == tag
                            {
                                self.switch(n, switch)?;
                            }
                        }
                        (Flight::Barrier, Ok(())) => {
                            if let Life::Closing { switch } = volume.life {
                                volume.life = Life::Closed { switch };
                            }
                        }
                        (Flight::Copy, Ok(())) => {
                            if let Life::Copying { under_way, .. } = &mut volume.life {
                                *under_way = false;
                            }
                        }
                        (Flight::Flush { .. } | Flight::Barrier | Flight::Copy, Err(_)) => {
                            volume.life = Life::None;
                        }
                        (Flight::Read { .. }, _) => return Err(format!("{tag:?} was a read")),
                    }
                }
            }
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop_at.is_some_and(|at| self.storage.calls() >= at)
    }

    fn step(&mut self) -> Result<(), String> {
        if self.stopped() {
            return self.restart(false);
        }
        let n = self.seed.index(self.volumes.len());
        self.collect();
        match self.seed.below(100) {
            0 => self.restart(self.seed.clone().one_in(3)),
            1 => {
                self.stop_at = Some(self.storage.calls() + self.seed.below(12));
                self.storage.stop_at(self.stop_at.unwrap_or(u64::MAX));
                Ok(())
            }
            2..4 => self.begin_life(n),
            4..14 => self.advance_life(n),
            14..45 if self.volumes[n].flights.len() < CLIENTS => self.submit(n),
            _ => {
                let moves = self.volumes[n].sim.moves();
                if moves.is_empty() {
                    return self.advance_life(n);
                }
                let chosen = moves[self.seed.index(moves.len())];
                self.make(n, chosen)
            }
        }
    }

    fn make(&mut self, n: usize, chosen: Move) -> Result<(), String> {
        if self.trace.is_some() {
            let what = match chosen {
                Move::CarryOut(k) => format!("{:?}", self.volumes[n].sim.planned().nth(k).map(brief)),
                Move::Deliver(_) | Move::ReadPart(_) => String::new(),
            };
            self.note(|| format!("volume {n}: {chosen:?} {what}"));
        }
        self.volumes[n].sim.make(chosen);
        self.follow(n)
    }

    /// Scribble over layers that nobody may read any more.
    fn collect(&mut self) {
        self.doomed.retain(|doomed| {
            let waits = doomed.epoch.strong_count() > 0;
            if !waits {
                let _ = doomed.data.write_at(&[0xee; 4096 * 4], 0);
            }
            waits
        });
    }

    /// Let everything that was started end.
    fn drain(&mut self) -> Result<(), String> {
        for n in 0..self.volumes.len() {
            let mut steps = 0;
            while !self.volumes[n].flights.is_empty() || self.volumes[n].life != Life::None {
                steps += 1;
                if steps > 10_000 {
                    return Err(format!("volume {n} does not come to rest: {:?}", self.volumes[n].life));
                }
                if self.stopped() {
                    return self.restart(false);
                }
                let moves = self.volumes[n].sim.moves();
                if moves.is_empty() {
                    if self.volumes[n].life == Life::None {
                        return Err(format!("volume {n} is stuck"));
                    }
                    self.advance_life(n)?;
                } else {
                    let chosen = moves[self.seed.index(moves.len())];
                    self.make(n, chosen)?;
                }
            }
        }
        Ok(())
    }
}

fn brief(action: &bedplate_engine::cow::core::Action) -> String {
    let mut text = format!("{:?} {:?}", action.op, action.kind);
    text.truncate(200);
    text
}

/// The history of one seed: its crashes and kills, or what went wrong.
pub fn history(number: u64, trace: bool) -> Result<u64, String> {
    let mut world = World::new(number, trace);
    let result = (|| {
        for _ in 0..STEPS {
            world.step()?;
        }
        world.drain()?;
        world.restart(false)
    })();
    result.map(|()| world.crashes).map_err(|error| {
        let steps = world.trace.take().unwrap_or_default().join("\n");
        format!("BEDPLATE_SEED={number} ({:?}): {error}\n{steps}", world.faults)
    })
}

fn run(number: u64, trace: bool) -> u64 {
    history(number, trace).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn random_histories_of_many_clients_read_and_survive_as_plain_memory_would() {
    if std::env::var_os("BEDPLATE_SEED").is_some() {
        run(setting("BEDPLATE_SEED", 0), true);
        return;
    }
    let seeds = setting("BEDPLATE_SEEDS", SEEDS);
    let mut crashes = 0;
    let mut failed = Vec::new();
    for number in 0..seeds {
        match std::panic::catch_unwind(|| run(number, false)) {
            Ok(count) => crashes += count,
            Err(_) => failed.push(number),
        }
        assert!(failed.len() < FAILURES_MAX, "BEDPLATE_SEED={failed:?} fail");
    }
    assert!(failed.is_empty(), "BEDPLATE_SEED={failed:?} fail");
    println!("{seeds} seeds, {crashes} crashes and kills");
}
