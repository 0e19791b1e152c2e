//! The machine at one moment: the disk, its clients, and what the reference says of every volume.
//!
//! Owns [`World`] and the steps of clients. A client's operation is a state machine whose actions are carried out and
//! told one at a time ([`World::turn`]); `life.rs` are the operations on the disk, `restart.rs` the ends of a process.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bedplate_engine::{
    cow::core::Op,
    device::{BlockDevice, Durability, Extent},
    error::{Error, Result},
    exec::{
        head::data_path,
        pool::Pool,
        simulated::{Planning, Seed, SteppedChange, SteppedRead},
    },
    image::{BaseImage, BaseSource},
    units::{ByteLen, ByteRange},
    volume::{
        device::{Hold, Volume, VolumeState},
        disk::{Disk, Held},
        layer,
        record::ImageRef,
    },
};

use crate::{
    arrivals::Arrivals,
    cells::{CELL, Cells, ChangeId, Content, Moment},
    faults::FaultKind,
    image::Image,
    medium::Medium,
    operation::Operation,
    script::{self, Ask, Script, Setup, Step},
    stats::Stats,
    turns,
};

/// Operations of one client at a time.
const PER_CLIENT: usize = 2;
/// Requests that a busy client or a stopped machine does not take are asked for again so often.
const ROUNDS_MORE: u32 = 20;
/// Log of a new head: checkpoints are frequent.
const LOG_LEN: u64 = 4096;

/// The one image.
pub struct Images(pub u64);

impl BaseSource for Images {
    fn open_base(&self, _: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        Ok(Arc::new(SlowImage(Image(self.0))))
    }
}

/// Others get a turn between a read of the image and what is done with it.
#[derive(Debug)]
struct SlowImage(Image);

impl BaseImage for SlowImage {
    fn len(&self) -> ByteLen {
        self.0.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buffer, offset)?;
        turns::others_go_on();
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }
}

/// What the reference says of a volume.
#[derive(Clone, Debug)]
pub struct Known {
    pub cells: Cells,
    pub snapshots: BTreeMap<String, Cells>,
}

/// A life operation of which only a restart tells whether it happened.
#[derive(Clone, Debug)]
pub enum Perhaps {
    Snapshot { volume: String, name: String, cells: Cells },
    Volume { name: String, cells: Cells },
    NoSnapshot { volume: String, name: String },
    NoVolume { name: String },
    Size { volume: String, size: u64 },
    Content { volume: String, cells: Cells },
}

impl Perhaps {
    /// Whether its volume may be gone.
    pub fn is_deletion(&self) -> bool {
        matches!(self, Perhaps::NoVolume { .. })
    }

    /// The volume that it is about.
    pub fn volume(&self) -> &str {
        match self {
            Perhaps::Snapshot { volume, .. }
            | Perhaps::NoSnapshot { volume, .. }
            | Perhaps::Size { volume, .. }
            | Perhaps::Content { volume, .. } => volume,
            Perhaps::Volume { name, .. } | Perhaps::NoVolume { name } => name,
        }
    }
}

enum Doing {
    Change {
        change: SteppedChange,
        id: ChangeId,
        durability: Durability,
    },
    Flush {
        flush: SteppedChange,
        since: Moment,
    },
    Read {
        read: SteppedRead,
        range: ByteRange,
        since: Moment,
    },
    /// What is still to be carried out of a change whose client has been answered.
    Rest {
        rest: SteppedChange,
    },
}

impl Doing {
    fn steps(&mut self) -> Option<&mut SteppedChange> {
        match self {
            Doing::Change { change: step, .. }
            | Doing::Flush { flush: step, .. }
            | Doing::Rest { rest: step } => Some(step),
            Doing::Read { .. } => None,
        }
    }
}

/// What a client waits for.
struct Flight {
    client: u8,
    volume: String,
    operation: Operation,
    doing: Doing,
    device: Arc<Volume>,
    _hold: Hold,
    /// Faults before it began.
    errors: u64,
    /// Moves of others that it lets go first; none ends a stuck one.
    waits: Option<u32>,
}

/// One thing that can happen to a flight.
#[derive(Clone, Copy)]
enum Move {
    CarryOut(usize, usize),
    Deliver(usize, usize),
    Part(usize),
    Job(usize),
}

pub struct World {
    pub setup: Setup,
    pub medium: Medium,
    pub disk: Option<Arc<Disk>>,
    pub known: BTreeMap<String, Known>,
    pub perhaps: Vec<Perhaps>,
    pub steps: VecDeque<Step>,
    pub seed: Seed,
    pub stats: Stats,
    /// Life operations under way, the outermost first.
    pub lives: Vec<(Operation, String)>,
    /// What those that read a volume read, by the name of what they make.
    pub read: BTreeMap<String, Cells>,
    /// How the process will end, once it is decided.
    pub cut: Option<crate::script::Cut>,
    pub finding: Option<String>,
    pub history: Option<Vec<String>>,
    /// Records of volumes as earlier starts found them, by path.
    pub older_records: Vec<(String, Vec<u8>)>,
    pub arrivals: Arrivals,
    /// Volumes that a recovery closed and could not open again.
    pub unopened: BTreeSet<String>,
    flights: Vec<Flight>,
    names: u64,
    /// How often clients may still ask for more, see [`World::ask_more`].
    rounds_more: u32,
}

pub fn index(n: u64) -> usize {
    usize::try_from(n).expect("small")
}

impl World {
    pub fn new(script: &Script, trace: bool) -> World {
        let setup = script.setup.clone();
        World {
            medium: Medium::new(setup.write_align.into(), setup.seed),
            seed: Seed(setup.seed),
            setup,
            disk: None,
            known: BTreeMap::new(),
            perhaps: Vec::new(),
            steps: script.steps.iter().cloned().collect(),
            stats: Stats::of_one(),
            lives: Vec::new(),
            read: BTreeMap::new(),
            cut: None,
            finding: None,
            history: trace.then(Vec::new),
            older_records: Vec::new(),
            arrivals: Arrivals::default(),
            unopened: BTreeSet::new(),
            flights: Vec::new(),
            names: 0,
            rounds_more: ROUNDS_MORE,
        }
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(history) = &mut self.history {
            history.push(text());
        }
    }

    /// Something that must not be; the machine stops here.
    pub fn found(&mut self, what: String) {
        self.note(|| format!("FOUND {what}"));
        if self.finding.is_none() {
            self.finding = Some(what);
            self.medium.stop_after(0);
        }
    }

    /// A number that nothing else has: for names and stamps.
    pub fn fresh(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    /// Open what the medium has.
    pub fn open(&self) -> Result<Arc<Disk>> {
        let pool = Arc::new(Pool::in_turns(Arc::new(turns::OneThread)));
        let held = Held::over(Arc::new(self.medium.clone()))?.housekeeper(pool).log_len_min(LOG_LEN);
        held.serve(Arc::new(Images(self.setup.image.into())))
    }

    /// The process has ended: nothing of it is told any more.
    pub fn forget_process(&mut self) {
        self.flights.clear();
        self.lives.clear();
        self.read.clear();
        self.unopened.clear();
        self.arrivals.forget_process();
        turns::clear_jobs();
        self.disk = None;
    }

    pub fn volume_names(&self) -> Vec<String> {
        self.known.keys().cloned().collect()
    }

    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// An operation begins: count whom it meets.
    pub fn meets(&mut self, operation: Operation, volume: Option<&str>) {
        for flight in &self.flights {
            if volume.is_none_or(|volume| flight.volume == volume) {
                self.stats.pair(operation, flight.operation);
            }
        }
        for (life, _) in &self.lives {
            self.stats.pair(operation, *life);
        }
    }

    /// Between two calls of a life operation.
    pub fn interlude(&mut self) {
        // Now and then so many that others begin and end within two calls.
        for _ in 0..[0, 0, 1, 8][self.seed.index(4)] {
            if self.medium.has_stopped() {
                return;
            }
            if self.seed.one_in(4) {
                self.next_small_step();
            } else {
                self.turn();
            }
        }
    }

    /// Take the next step of the script if it is not for the whole disk; whether it was.
    pub fn next_small_step(&mut self) -> bool {
        match self.steps.front() {
            None | Some(Step::Life { .. } | Step::Image(_)) => return false,
            Some(Step::Cut { cut: crate::script::Cut::Close, .. }) if !self.lives.is_empty() => return false,
            Some(_) => {}
        }
        let Some(step) = self.steps.pop_front() else { return false };
        self.note(|| format!("{step:?}"));
        match step {
            Step::Client { client, volume, ask, start, cells, moves } => {
                self.ask(client, volume, ask, start.into(), cells.into());
                for _ in 0..moves {
                    self.turn();
                }
            }
            Step::Fault { fault, after } => self.medium.arm(fault, after.into()),
            Step::Cut { cut, after } if !self.medium.will_stop() => {
                self.cut = Some(cut);
                self.medium.stop_after(after.into());
            }
            Step::Room { bytes } if self.setup.medium.is_some() => self.medium.leave(bytes.into()),
            Step::Cut { .. } | Step::Room { .. } | Step::Life { .. } | Step::Image(_) => {}
        }
        true
    }

    /// Let clients ask for more where there were too few operations; whether they did.
    pub fn ask_more(&mut self) -> bool {
        let missing = u64::from(self.setup.operations).saturating_sub(self.stats.operation_count());
        if missing == 0 || self.rounds_more == 0 {
            return false;
        }
        self.rounds_more -= 1;
        let more = (0..missing).map(|_| script::one_more(&mut self.seed));
        self.steps.extend(more);
        true
    }

    fn ask(&mut self, client: u8, volume: u8, ask: Ask, start: u64, cells: u64) {
        let names = self.volume_names();
        let busy = self.flights.iter().filter(|flight| flight.client == client).count() >= PER_CLIENT;
        if names.is_empty() || busy || self.medium.has_stopped() {
            return;
        }
        let name = names[usize::from(volume) % names.len()].clone();
        let Some(disk) = &self.disk else { return };
        // Deleting takes it away, recovering closes it and opens it again.
        let going = |perhaps: &Perhaps| perhaps.is_deletion() && perhaps.volume() == name;
        let closing = |(life, volume): &(Operation, String)| {
            matches!(life, Operation::DeleteVolume | Operation::Recover) && *volume == name
        };
        let device = match disk.volume(&name) {
            Ok(device) => device,
            Err(_) if self.perhaps.iter().any(going) || self.lives.iter().any(closing) => return,
            // It was closed to be recovered, and a fault kept it from being opened again.
            Err(Error::Failed { .. }) if self.unopened.contains(&name) => return,
            Err(error) => return self.found(format!("volume {name} is not there: {error}")),
        };
        // Refused while it is reverted, deleted or recovered.
        let Ok(hold) = device.hold("a client") else { return };
        // These let clients in again before they answer; what is found then is not known yet.
        let anew = |(life, volume): &(Operation, String)| {
            matches!(life, Operation::Revert | Operation::Recover) && *volume == name
        };
        if self.lives.iter().any(anew) {
            return;
        }
        let all = self.known[&name].cells.size();
        let start = start * CELL % all;
        let range = ByteRange::new(start, (cells * CELL).min(all - start));
        let operation = Operation::from(ask);
        self.stats.operation(operation);
        let volatile = Durability::Volatile;
        let (op, content) = match ask {
            Ask::Write => (Op::Write { range, durability: volatile }, Content::Stamped),
            Ask::FuaWrite => (Op::Write { range, durability: Durability::Fua }, Content::Stamped),
            Ask::WriteZeros => (Op::Write { range, durability: volatile }, Content::Zeros),
            Ask::Zero | Ask::Discard => (Op::Zero { range, durability: volatile }, Content::Zeros),
            Ask::FuaZero => (Op::Zero { range, durability: Durability::Fua }, Content::Zeros),
            Ask::Flush => (Op::Flush, Content::Zeros),
            Ask::Read | Ask::ReadAhead => {
                let planning = if ask == Ask::Read { Planning::PartByPart } else { Planning::AtStart };
                let since = self.cells(&name).now();
                let read = device.step_read(range, planning);
                return self.launch(
                    client,
                    name,
                    operation,
                    Doing::Read { read, range, since },
                    device,
                    hold,
                );
            }
        };
        if op == Op::Flush {
            let since = self.cells(&name).now();
            match device.step_change(op, None) {
                Ok(flush) => {
                    self.launch(client, name, operation, Doing::Flush { flush, since }, device, hold);
                }
                Err(error) => self.refused(&name, &device, &error),
            }
            return;
        }
        let durability = match op {
            Op::Write { durability, .. } | Op::Zero { durability, .. } => durability,
            Op::Flush | Op::CopyUp { .. } | Op::Barrier => volatile,
        };
        let (id, bytes) = self.cells(&name).begin(range, content);
        match device.step_change(op, Some(bytes)) {
            Ok(change) => {
                self.launch(client, name, operation, Doing::Change { change, id, durability }, device, hold);
            }
            Err(error) => {
                self.cells(&name).withdrawn(range, id);
                self.refused(&name, &device, &error);
            }
        }
    }

    fn launch(
        &mut self,
        client: u8,
        volume: String,
        operation: Operation,
        doing: Doing,
        device: Arc<Volume>,
        hold: Hold,
    ) {
        self.meets(operation, Some(&volume));
        let mut waits = Some(0);
        if self.medium.take(FaultKind::Slow) {
            self.medium.count(FaultKind::Slow);
            waits = Some(40);
        } else if self.medium.take(FaultKind::Stuck) {
            self.medium.count(FaultKind::Stuck);
            waits = None;
        }
        let errors = self.medium.errors();
        self.flights.push(Flight { client, volume, operation, doing, device, _hold: hold, errors, waits });
        let last = self.flights.len() - 1;
        self.settle(last);
    }

    pub fn cells(&mut self, volume: &str) -> &mut Cells {
        &mut self.known.get_mut(volume).expect("a volume that is known").cells
    }

    /// Whether an operation may have failed with this error.
    fn refused(&mut self, volume: &str, device: &Volume, error: &Error) {
        let fine = match error {
            Error::Failed { .. } => device.state() != VolumeState::Ready,
            Error::NoSpace { .. } => self.medium.errors() > 0 || self.setup.medium.is_some(),
            _ => false,
        };
        if !fine && !self.medium.has_stopped() {
            self.found(format!("volume {volume} refuses: {error}"));
        }
    }

    /// One thing happens. `false`: nothing can.
    pub fn turn(&mut self) -> bool {
        if self.medium.has_stopped() {
            // Whoever waits is to learn that: everything ends in the same error.
            self.flights.iter_mut().for_each(|flight| flight.waits = Some(0));
        }
        let mut moves = self.moves();
        if moves.is_empty() && self.flights.iter().any(|flight| flight.waits.is_some_and(|waits| waits > 0)) {
            self.flights.iter_mut().for_each(|flight| flight.waits = flight.waits.map(|_| 0));
            moves = self.moves();
        }
        if moves.is_empty() && self.flights.iter().any(|flight| flight.waits.is_none()) {
            // Only what is stuck is left, and somebody waits: the process has to be killed.
            self.cut = Some(crate::script::Cut::Kill);
            self.medium.stop_after(0);
            return self.turn();
        }
        let Some(chosen) = (!moves.is_empty()).then(|| self.seed.index(moves.len())) else { return false };
        if chosen > 0 {
            self.medium.count(FaultKind::Reordered);
        }
        for flight in &mut self.flights {
            flight.waits = flight.waits.map(|waits| waits.saturating_sub(1));
        }
        match moves[chosen] {
            Move::CarryOut(flight, n) => {
                if let Some(step) = self.flights[flight].doing.steps() {
                    step.carry_out(n);
                }
            }
            Move::Deliver(flight, n) => {
                if let Some(step) = self.flights[flight].doing.steps() {
                    step.deliver(n);
                }
                self.settle(flight);
            }
            Move::Part(flight) => self.read_part(flight),
            Move::Job(n) => turns::run_job(n),
        }
        true
    }

    /// What can happen next. Messages may have come from other flights' completions.
    fn moves(&mut self) -> Vec<Move> {
        let mut moves = Vec::new();
        let mut ended = Vec::new();
        for (n, flight) in self.flights.iter_mut().enumerate() {
            let answered = matches!(flight.doing, Doing::Rest { .. });
            match flight.doing.steps() {
                Some(step) => {
                    step.take_in();
                    if step.result().is_some() && (!answered || is_idle(step)) {
                        ended.push(n);
                    } else if flight.waits == Some(0) {
                        moves.extend((0..step.planned().len()).map(|action| Move::CarryOut(n, action)));
                        moves.extend((0..step.carried_out()).map(|action| Move::Deliver(n, action)));
                    }
                }
                None if flight.waits == Some(0) => moves.push(Move::Part(n)),
                None => {}
            }
        }
        if !ended.is_empty() {
            ended.into_iter().rev().for_each(|n| self.settle(n));
            return self.moves();
        }
        moves.extend((0..turns::jobs()).map(Move::Job));
        moves
    }

    /// The medium has dropped what was not synced, and the volume has not failed for it yet: nobody can know.
    pub fn nobody_knows(&self, device: &Volume) -> bool {
        let head = device.record().head;
        self.medium.was_dropped(&data_path(&layer::dir(head))) && device.state() == VolumeState::Ready
    }

    fn read_part(&mut self, n: usize) {
        let before = self.medium.errors();
        let flight = &mut self.flights[n];
        let Doing::Read { read, range, since } = &mut flight.doing else { return };
        let Some(result) = read.part() else { return };
        let (range, since) = (*range, *since);
        let flight = self.flights.remove(n);
        if self.medium.has_stopped() {
            return;
        }
        let (volume, device) = (flight.volume, flight.device);
        self.note(|| format!("volume {volume}: read {range} {:?}", result.as_ref().map(Vec::len)));
        match result {
            _ if self.nobody_knows(&device) => {}
            Ok(bytes) => {
                if let Err(error) = self.cells(&volume).check_read(range, &bytes, since) {
                    self.found(format!("volume {volume}: {error}"));
                }
            }
            Err(Error::Lost { .. }) if device.state() != VolumeState::Ready => {}
            Err(_) if self.medium.errors() > before => {}
            Err(error) => self.found(format!("volume {volume}: a read failed without a fault: {error}")),
        }
    }

    /// Take in how flight `n` ended, if it has.
    fn settle(&mut self, n: usize) {
        let Some(result) = self.flights[n].doing.steps().and_then(|step| step.result().cloned()) else {
            return;
        };
        let answered = self.flights.remove(n);
        if self.medium.has_stopped() {
            return;
        }
        let Flight { client, volume, operation, doing, device, _hold, errors, waits } = answered;
        self.note(|| format!("volume {volume}: {operation} ended {result:?}"));
        let full = self.setup.medium.is_some();
        match &result {
            Err(Error::NoSpace { .. }) if full && operation != Operation::Flush => {}
            // Of a medium that said so once, it may be believed for longer.
            Err(Error::NoSpace { .. }) if operation != Operation::Flush && self.medium.errors() > 0 => {}
            Err(error) if self.medium.errors() == errors && device.state() == VolumeState::Ready => {
                return self.found(format!("volume {volume}: {operation} failed without a fault: {error}"));
            }
            Err(Error::NoSpace { .. }) if operation == Operation::Flush => {
                return self.found(format!("volume {volume}: a full medium does not flush"));
            }
            _ => {}
        }
        let cells = self.cells(&volume);
        match (&doing, result) {
            (Doing::Change { id, durability: Durability::Fua, .. }, Ok(())) => {
                cells.acknowledged_durable(*id)
            }
            (Doing::Change { id, .. }, Ok(())) => cells.acknowledged(*id),
            (Doing::Change { id, .. }, Err(_)) => cells.failed(*id),
            (Doing::Flush { since, .. }, Ok(())) => cells.flushed(*since),
            (Doing::Flush { .. }, Err(_)) | (Doing::Read { .. } | Doing::Rest { .. }, _) => {}
        }
        // An engine that answers too early still does the rest: others may come in between.
        if let Doing::Change { change: rest, .. } | Doing::Flush { flush: rest, .. } = doing
            && !is_idle(&rest)
        {
            let doing = Doing::Rest { rest };
            self.flights.push(Flight { client, volume, operation, doing, device, _hold, errors, waits });
        }
    }

    /// Let everything end that was started.
    pub fn drain(&mut self) {
        while (self.under_way() > 0 || turns::jobs() > 0) && !self.medium.has_stopped() {
            if !self.turn() && self.under_way() > 0 {
                return self.found(format!("{} operations never end", self.under_way()));
            }
        }
    }

    /// Whether every volume takes writes.
    pub fn all_ready(&self) -> bool {
        let Some(disk) = &self.disk else { return false };
        disk.volumes().iter().all(|info| info.state == VolumeState::Ready)
    }
}

/// Whether nothing of an operation is left to be carried out or told.
fn is_idle(step: &SteppedChange) -> bool {
    step.planned().len() == 0 && step.carried_out() == 0
}

/// All bytes of a device.
pub fn content(device: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mut bytes = vec![0; device.geometry().size.as_usize()];
    device.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
