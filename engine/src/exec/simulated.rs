//! The simulated executor: one thread, no time, every order.
//!
//! Owns [`Simulated`], a volume under test: the core with its files, its operations under way and its reads. Whoever
//! drives it chooses one [`Move`] after another: to carry an action out (its effect happens then), to tell the core of
//! one that was carried out (its completion arrives then), to do one part of a read. Nothing else ever happens, so a
//! seed is a history, and all histories of a small workload can be enumerated. Actions are carried out by the code of
//! the other executors ([`HeadFiles`], [`Buffers`], [`View`]); only their order is ours. Crashes and faults belong to
//! the storage ([`super::storage::memory`]): a crashed volume is dropped and opened again.
//!
//! [`SteppedChange`] and [`SteppedRead`] are the same for one operation of a live volume, which shares its core with whatever
//! else uses it: life operations of its disk, for one.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{
    blocking::Mailbox,
    carrier::{Carrier, Message, Planned, Reporter},
    executor::{Executor, Shared},
    head::HeadFiles,
    request::Buffers,
    view::{View, uncertain_bytes},
};
use crate::{
    cow::{
        core::{Action, ActionId, Core, HeadState, Op, OpId, Output, Step},
        plan::{Index, Segment},
    },
    error::{Error, Result},
    units::{ByteRange, to_usize},
};

/// A repeatable sequence of numbers (SplitMix64, <https://prng.di.unimi.it/splitmix64.c>).
#[derive(Clone, Debug)]
pub struct Seed(pub u64);

impl Seed {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// An index of a collection of `len` entries, which is not 0.
    pub fn index(&mut self, len: usize) -> usize {
        to_usize(self.below(len as u64))
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Names an operation or read for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u64);

/// Something that can happen next. Numbers index what [`Simulated::moves`] counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Carry out the planned action with this number.
    CarryOut(usize),
    /// Tell the core about the action with this number that was carried out.
    Deliver(usize),
    /// Do the next part of the read with this number.
    ReadPart(usize),
}

/// What a client is told.
#[derive(Debug)]
pub enum Event {
    Ended { tag: Tag, result: Result<()> },
    Read { tag: Tag, range: ByteRange, result: Result<Vec<u8>> },
}

/// When a read learns where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planning {
    /// All at once when it starts; the parts are read later.
    AtStart,
    /// Each part when the one before it has been read.
    PartByPart,
}

/// A read between its start and its last part.
#[derive(Debug)]
struct Reading {
    range: ByteRange,
    view: View,
    planned: VecDeque<Segment>,
    /// Bytes that have been planned.
    planned_len: u64,
    buffer: Vec<u8>,
}

impl Reading {
    fn start(view: View, range: ByteRange, planning: Planning) -> Reading {
        let planned: VecDeque<Segment> = match planning {
            Planning::AtStart => view.index.plan(range).into(),
            Planning::PartByPart => VecDeque::new(),
        };
        let planned_len = planned.iter().map(|segment| segment.range.len.0).sum();
        Reading { range, view, planned, planned_len, buffer: vec![0; range.len.as_usize()] }
    }

    /// Read the next part.
    fn part(&mut self) -> Result<()> {
        if self.planned.is_empty() {
            let start = self.range.start.0 + self.planned_len;
            let rest = ByteRange::new(start, self.range.end().0 - start);
            let first = self.view.index.plan_bounded(rest, 1);
            self.planned_len += first.iter().map(|segment| segment.range.len.0).sum::<u64>();
            self.planned.extend(first);
        }
        let Some(segment) = self.planned.pop_front() else { return Ok(()) };
        let at = to_usize(segment.range.start.0 - self.range.start.0);
        let place = &mut self.buffer[at..at + segment.range.len.as_usize()];
        self.view.read_segment(segment, place)
    }

    fn is_whole(&self) -> bool {
        self.planned.is_empty() && self.planned_len == self.range.len.0
    }
}

/// A volume whose every step is chosen.
#[derive(Debug)]
pub struct Simulated {
    core: Core,
    view: View,
    head: Arc<HeadFiles>,
    running: HashMap<OpId, (Tag, Buffers<'static>)>,
    /// Each with the view that it was planned in: a later one may not know its files any more.
    planned: Vec<(Action, View)>,
    carried_out: Vec<(ActionId, Result<Output>)>,
    reads: Vec<(Tag, Reading)>,
    events: Vec<Event>,
    next_tag: u64,
}

impl Simulated {
    pub fn new(state: HeadState, view: View, head: Arc<HeadFiles>) -> Simulated {
        let core = Core::new(state, head.data.write_align());
        Simulated {
            core,
            view,
            head,
            running: HashMap::new(),
            planned: Vec::new(),
            carried_out: Vec::new(),
            reads: Vec::new(),
            events: Vec::new(),
            next_tag: 0,
        }
    }

    pub fn core(&self) -> &Core {
        &self.core
    }

    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn head(&self) -> &Arc<HeadFiles> {
        &self.head
    }

    fn tag(&mut self) -> Tag {
        self.next_tag += 1;
        Tag(self.next_tag)
    }

    /// Start an operation; `data` are a write's bytes.
    pub fn submit(&mut self, op: Op, data: Option<Vec<u8>>) -> Result<Tag> {
        let (id, step) = self.core.submit(op)?;
        let tag = self.tag();
        let buffers = match (op, data) {
            (Op::Write { range, .. }, Some(data)) => Buffers::of_write(range.start.0, data),
            _ => Buffers::default(),
        };
        self.running.insert(id, (tag, buffers));
        self.follow(step);
        Ok(tag)
    }

    /// Start a read of `range`, which lies within the volume.
    pub fn read(&mut self, range: ByteRange, planning: Planning) -> Tag {
        let tag = self.tag();
        self.reads.push((tag, Reading::start(self.view.clone(), range, planning)));
        tag
    }

    /// What can happen next. Empty: everything that was started has ended.
    pub fn moves(&self) -> Vec<Move> {
        let carry = (0..self.planned.len()).map(Move::CarryOut);
        let deliver = (0..self.carried_out.len()).map(Move::Deliver);
        let read = (0..self.reads.len()).map(Move::ReadPart);
        carry.chain(deliver).chain(read).collect()
    }

    /// The actions that [`Move::CarryOut`] counts.
    pub fn planned(&self) -> impl Iterator<Item = &Action> {
        self.planned.iter().map(|(action, _)| action)
    }

    pub fn make(&mut self, step: Move) {
        match step {
            Move::CarryOut(n) => {
                let (action, view) = self.planned.remove(n);
                let result = self.carry_out(&action, &view);
                self.carried_out.push((action.id, result));
            }
            Move::Deliver(n) => {
                let (action, result) = self.carried_out.remove(n);
                let step = self.core.complete(action, result);
                self.follow(step);
            }
            Move::ReadPart(n) => self.read_part(n),
        }
    }

    /// What clients are told since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// After a barrier has ended: go on with the same head.
    pub fn resume(&mut self) {
        let step = self.core.resume();
        self.follow(step);
    }

    /// After a barrier has ended: go on with another head.
    pub fn install(&mut self, state: HeadState, view: View, head: Arc<HeadFiles>) {
        self.view = view;
        self.head = head;
        let step = self.core.install(state);
        self.follow(step);
    }

    /// Follow another view that reads the same. The epoch that ended is returned: while others hold it, reads and
    /// operations may still follow it.
    pub fn republish(&mut self, view: View) -> Arc<Index> {
        let old = self.view.index.clone();
        self.core.republish(&view.index);
        self.view = view;
        old
    }

    fn follow(&mut self, step: Step) {
        let view = &self.view;
        self.planned.extend(step.actions.into_iter().map(|action| (action, view.clone())));
        for (op, result) in step.finished {
            if let Some((tag, _)) = self.running.remove(&op) {
                self.events.push(Event::Ended { tag, result });
            }
        }
    }

    fn carry_out(&mut self, action: &Action, view: &View) -> Result<Output> {
        let mut housekeeping = Buffers::default();
        let buffers = match action.op.and_then(|op| self.running.get_mut(&op)) {
            Some((_, buffers)) => buffers,
            None => &mut housekeeping,
        };
        buffers.carry_out(&action.kind, &self.head, view)
    }

    fn read_part(&mut self, n: usize) {
        let (_, reading) = &mut self.reads[n];
        let result = reading.part();
        let whole = reading.is_whole();
        // Asked at the end, as the blocking executor does.
        let uncertain = self.core.uncertain().and_then(|blocks| uncertain_bytes(blocks, reading.range));
        let result = match uncertain {
            Some(part) if whole => result.and(Err(Error::uncertain(part, self.core.failed().cloned()))),
            Some(_) | None => result,
        };
        if whole || result.is_err() {
            let (tag, Reading { range, buffer, .. }) = self.reads.remove(n);
            self.events.push(Event::Read { tag, range, result: result.map(|()| buffer) });
        }
    }
}

/// A change or flush of a live volume whose every step is chosen.
#[derive(Debug)]
pub struct SteppedChange {
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    buffers: Buffers<'static>,
    planned: Vec<Planned>,
    carried_out: Vec<(ActionId, Result<Output>)>,
    result: Option<Result<()>>,
}

impl SteppedChange {
    /// Start an operation; `data` are a write's bytes. An error means that it did not start.
    pub fn start(executor: &Executor, op: Op, data: Option<Vec<u8>>) -> Result<SteppedChange> {
        let shared = executor.shared().clone();
        let buffers = match (op, data) {
            (Op::Write { range, .. }, Some(data)) => {
                shared.reserve().admit()?;
                Buffers::of_write(range.start.0, data)
            }
            _ => Buffers::default(),
        };
        let mailbox = Arc::new(Mailbox::default());
        shared.submit(op, Carrier::Thread(mailbox.clone()), &mut Reporter::Thread)?;
        let (planned, carried_out) = (Vec::new(), Vec::new());
        let mut change = SteppedChange { shared, mailbox, buffers, planned, carried_out, result: None };
        change.take_in();
        Ok(change)
    }

    /// Learn what others have set free.
    pub fn take_in(&mut self) {
        while let Some(message) = self.mailbox.poll() {
            match message {
                Message::Do(planned) => self.planned.push(planned),
                Message::Done(result) => self.result = Some(result),
            }
        }
    }

    /// How it ended, if it has.
    pub fn result(&self) -> Option<&Result<()>> {
        self.result.as_ref()
    }

    /// The actions that [`SteppedChange::carry_out`] counts.
    pub fn planned(&self) -> impl ExactSizeIterator<Item = &Action> {
        self.planned.iter().map(|planned| &planned.action)
    }

    /// How many actions [`SteppedChange::deliver`] counts.
    pub fn carried_out(&self) -> usize {
        self.carried_out.len()
    }

    /// Carry out the planned action with this number.
    pub fn carry_out(&mut self, n: usize) {
        let planned = self.planned.remove(n);
        let result = planned.carry_out(&mut self.buffers);
        self.carried_out.push((planned.action.id, result));
    }

    /// Tell the core about the action with this number that was carried out.
    pub fn deliver(&mut self, n: usize) {
        let (action, result) = self.carried_out.remove(n);
        self.shared.complete(action, result, &mut Reporter::Thread);
        self.take_in();
    }
}

/// A read of a live volume, part by part.
#[derive(Debug)]
pub struct SteppedRead {
    /// None where the volume only reads.
    shared: Option<Arc<Shared>>,
    reading: Reading,
}

impl SteppedRead {
    /// Start a read of `range`, which lies within the volume that reads as `view`.
    pub fn start(
        executor: Option<&Executor>,
        view: View,
        range: ByteRange,
        planning: Planning,
    ) -> SteppedRead {
        let shared = executor.map(|executor| executor.shared().clone());
        SteppedRead { shared, reading: Reading::start(view, range, planning) }
    }

    /// Read the next part; the bytes after the last one.
    pub fn part(&mut self) -> Option<Result<Vec<u8>>> {
        match self.reading.part() {
            Err(error) => return Some(Err(error)),
            Ok(()) if !self.reading.is_whole() => return None,
            Ok(()) => {}
        }
        let uncertain = self.shared.as_ref().and_then(|shared| shared.uncertain_in(self.reading.range));
        Some(match uncertain {
            Some(part) => Err(Error::uncertain(part, None)),
            None => Ok(std::mem::take(&mut self.reading.buffer)),
        })
    }
}
