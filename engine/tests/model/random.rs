//! Random histories: several clients on several volumes that share frozen layers, with life operations, reads that are
//! carried out late, crashes, kills and faults of the medium, against plain [`Cells`].
//!
//! Every choice comes from one seed. A failure prints the seed; `BEDPLATE_SEED=n` runs it alone and prints its history.

use std::{
    collections::{HashMap, HashSet},
    io::ErrorKind,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bedplate_engine::{
    cow::{
        core::{CopySource, Op, Synced},
        frozen::{FrozenIndex, Slot},
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
            memory::{CallKind, Effect, Fault, MemoryStorage},
        },
        view::{LayerFiles, View},
    },
    units::{BlockRange, ByteLen, ByteRange},
};

use crate::{
    cells::{CELL, Cells, ChangeId, Content, Moment, image_value},
    disk::{self, Stack},
    setting,
};

const SEEDS: u64 = 3000;
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
                        // A failed sync may have dropped anything since the last good one.
                        Ok(_) if dropped => {}
                        Ok(bytes) => volume.model.check_read(range, &bytes, since)?,
                        Err(_) if matches!(faults, Faults::Transfers | Faults::Any) => {}
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

    /// Whether volume `n` alone stands on this layer.
    fn is_private(&self, n: usize, layer: u32) -> bool {
        let others = self.volumes.iter().enumerate().filter(|(other, _)| *other != n);
        let volumes = others.map(|(_, volume)| &volume.stack);
        !volumes
            .chain(self.snapshots.iter().map(|(stack, _)| stack))
            .any(|stack| stack.frozen.contains(&layer))
    }

    fn begin_life(&mut self, n: usize) -> Result<(), String> {
        if self.volumes[n].life != Life::None || self.volumes[n].sim.core().failed().is_some() {
            return Ok(());
        }
        let choice = self.seed.below(4);
        let stack = self.volumes[n].stack.clone();
        let top = stack.frozen.last().copied();
        let switch = match choice {
            0 if self.snapshots.len() < SNAPSHOTS_MAX => Switch::Snapshot,
            1 if self.volumes.len() < VOLUMES_MAX => Switch::Clone,
            2 if top.is_some_and(|top| self.is_private(n, top)) => Switch::Merge,
            3 if stack.image > 0 && stack.frozen.is_empty() => Switch::Flatten,
            _ => return Ok(()),
        };
        self.note(|| format!("volume {n}: begins {switch:?}"));
        match switch {
            Switch::Snapshot | Switch::Clone => self.close(n, switch),
            Switch::Merge | Switch::Flatten => {
                self.volumes[n].life = Life::Copying { switch, next: 0, under_way: false };
                Ok(())
            }
        }
    }

    fn close(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        match volume.sim.submit(Op::Barrier, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Barrier);
                volume.life = Life::Closing { switch };
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    /// Move the life operation of volume `n` on.
    fn advance_life(&mut self, n: usize) -> Result<(), String> {
        match self.volumes[n].life {
            Life::None | Life::Closing { .. } | Life::Flushing { .. } => Ok(()),
            Life::Copying { under_way: true, .. } => Ok(()),
            Life::Copying { switch, next, under_way: false } => self.copy(n, switch, next),
            Life::Closed { switch } => self.switch(n, switch),
        }
    }

    fn copy(&mut self, n: usize, switch: Switch, next: u64) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        let end = volume.stack.size.div_ceil(4096);
        if next >= end {
            // Either inside a barrier or, because both views read the same, after a flush.
            return if self.seed.one_in(2) { self.close(n, switch) } else { self.flush_for(n, switch) };
        }
        let from = match (switch, volume.stack.frozen.last()) {
            (Switch::Merge, Some(top)) => CopySource::Layer(Slot(*top)),
            _ => CopySource::Base,
        };
        let count = COPY_BLOCKS.min(end - next);
        let op = Op::CopyUp { blocks: BlockRange::new(next, count), from };
        match volume.sim.submit(op, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Copy);
                volume.life = Life::Copying { switch, next: next + count, under_way: true };
                self.note(|| format!("volume {n}: {tag:?} {op:?}"));
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    fn flush_for(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        let since = volume.model.now();
        match volume.sim.submit(Op::Flush, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Flush { since });
                volume.life = Life::Flushing { switch, tag };
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    /// The moment of a life operation.
    fn switch(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let closed = matches!(self.volumes[n].life, Life::Closed { .. });
        self.volumes[n].life = Life::None;
        self.note(|| format!("volume {n}: switches {switch:?}"));
        match switch {
            Switch::Snapshot | Switch::Clone => self.freeze(n, switch),
            Switch::Merge | Switch::Flatten => {
                let volume = &mut self.volumes[n];
                let old = volume.sim.view().clone();
                let gone = if switch == Switch::Merge { volume.stack.frozen.pop() } else { None };
                if switch == Switch::Flatten {
                    volume.stack.image = 0;
                }
                let stack = volume.stack.clone();
                let (frozen, layers) = self.frozen(&stack.frozen);
                let index = Index { frozen, base_len: ByteLen(stack.image), ..(*old.index).clone() };
                let base = if stack.image == 0 { None } else { old.base.clone() };
                let view = View { index: Arc::new(index), layers, base, ..old.clone() };
                drop(old);
                let volume = &mut self.volumes[n];
                let epoch = Arc::downgrade(&volume.sim.republish(view));
                if closed {
                    volume.sim.resume();
                }
                let data = gone.and_then(|gone| self.files.remove(&gone));
                self.doomed.extend(data.map(|data| Doomed { epoch, data }));
                self.follow(n)
            }
        }
    }

    fn frozen(&self, layers: &[u32]) -> (FrozenIndex, LayerFiles) {
        let index = layers.iter().fold(FrozenIndex::empty(), |below, layer| {
            below.overlaid(&self.indexes[layer], Slot(*layer), &[])
        });
        let files = layers.iter().map(|layer| (Slot(*layer), self.files[layer].clone())).collect();
        (index, LayerFiles::new(files))
    }

    /// Snapshot or clone: the head is frozen, and new ones stand on it.
    fn freeze(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let old = self.volumes[n].stack.clone();
        let head = self.next_layer;
        let second = head + 1;
        self.next_layer += 2;
        let made = disk::create_layer(&*self.storage, head, old.size, self.log_len)
            .and_then(|()| disk::create_layer(&*self.storage, second, old.size, self.log_len));
        let view = self.volumes[n].sim.view().clone();
        let data = view.head.clone().ok_or("a volume has a head")?;
        let mut frozen = old.frozen.clone();
        frozen.push(old.head);
        let stack = Stack { frozen: frozen.clone(), head, ..old.clone() };
        self.indexes.insert(old.head, view.index.head.clone());
        self.files.insert(old.head, data);
        let (index, layers) = self.frozen(&frozen);
        let opened = made.and_then(|()| {
            disk::open_head(&self.storage, &stack, index.clone(), layers.clone(), Synced::Yes)
        });
        let salt = self.salt();
        let second_opened = match (&opened, switch) {
            (Ok(_), Switch::Clone) => {
                let stack = Stack { head: second, ..stack.clone() };
                Some(
                    disk::open_over(&self.storage, &stack, index, layers, Synced::Yes)
                        .map(|sim| (stack, sim)),
                )
            }
            _ => None,
        };
        let volume = &mut self.volumes[n];
        let (state, view, files) = match (opened, &second_opened) {
            (Ok(parts), None | Some(Ok(_))) => parts,
            (Err(error), _) => return self.stay(n, &error),
            (Ok(_), Some(Err(error))) => {
                let error = error.clone();
                return self.stay(n, &error);
            }
        };
        volume.stack = stack.clone();
        volume.sim.install(state, view, files);
        let model = volume.model.snapshot(salt);
        match second_opened {
            Some(Ok((stack, sim))) => {
                self.volumes.push(Volume { stack, sim, model, flights: HashMap::new(), life: Life::None });
            }
            _ => self.snapshots.push((stack, model)),
        }
        self.follow(n)
    }

    /// A switch did not happen.
    fn stay(&mut self, n: usize, error: &Error) -> Result<(), String> {
        if self.faults == Faults::None && !self.stopped() {
            return Err(format!("a switch failed without a fault: {error}"));
        }
        self.volumes[n].sim.resume();
        self.follow(n)
    }

    fn stopped(&self) -> bool {
        self.stop_at.is_some_and(|at| self.storage.calls() >= at)
    }

    /// The end of a process, with or without the machine, and the next start.
    fn restart(&mut self, killed: bool) -> Result<(), String> {
        self.crashes += 1;
        self.storage.clear_faults();
        self.stop_at = None;
        self.dropped = Arc::default();
        self.doomed.clear();
        self.indexes.clear();
        self.files.clear();
        let seed = &mut self.seed;
        let style = seed.below(4);
        let storage = if killed {
            self.storage.kill()
        } else {
            self.storage.crash(|effect, outcomes| match style {
                0 => 0,
                1 => outcomes - 1,
                // One outcome for a whole file.
                2 => match effect {
                    Effect::Sector { file, .. } | Effect::Length { file } if file % 2 == 0 => 0,
                    Effect::Sector { .. } | Effect::Length { .. } => outcomes - 1,
                    Effect::Name { .. } => seed.index(outcomes),
                },
                _ => seed.index(outcomes),
            })
        };
        self.note(|| format!("killed: {killed}, style {style}"));
        self.storage = Arc::new(storage);
        if self.faults == Faults::Full {
            self.storage.limit(self.storage.used_bytes() + (1 << 20));
        }
        for n in 0..self.volumes.len() {
            let stack = self.volumes[n].stack.clone();
            for &layer in &stack.frozen {
                if !self.files.contains_key(&layer) {
                    let found =
                        disk::open_layer(&*self.storage, layer).map_err(|e| format!("layer {layer}: {e}"))?;
                    self.indexes.insert(layer, Arc::new(found.index));
                    self.files.insert(layer, found.data);
                }
            }
            let (index, layers) = self.frozen(&stack.frozen);
            let sim = disk::open_over(&self.storage, &stack, index, layers, Synced::No)
                .map_err(|error| format!("volume {n} does not open: {error}"))?;
            let bytes = disk::content(sim.view()).map_err(|e| e.to_string())?;
            let volume = &mut self.volumes[n];
            let checked = if killed { volume.model.killed(&bytes) } else { volume.model.crashed(&bytes) };
            checked.map_err(|error| format!("volume {n}: {error}"))?;
            volume.sim = sim;
            volume.flights.clear();
            volume.life = Life::None;
        }
        self.check_snapshots()?;
        self.inject();
        Ok(())
    }

    fn check_snapshots(&mut self) -> Result<(), String> {
        for (n, (stack, model)) in self.snapshots.iter_mut().enumerate() {
            let view = disk::frozen_view(&self.storage, stack).map_err(|e| format!("snapshot {n}: {e}"))?;
            let bytes = disk::content(&view).map_err(|e| format!("snapshot {n}: {e}"))?;
            model.crashed(&bytes).map_err(|error| format!("snapshot {n}: {error}"))?;
        }
        Ok(())
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

fn run(number: u64, trace: bool) -> u64 {
    let mut world = World::new(number, trace);
    let result = (|| {
        for _ in 0..STEPS {
            world.step()?;
        }
        world.drain()?;
        world.restart(false)
    })();
    if let Err(error) = result {
        let history = world.trace.take().unwrap_or_default().join("\n");
        panic!("BEDPLATE_SEED={number} ({:?}): {error}\n{history}", world.faults);
    }
    world.crashes
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
