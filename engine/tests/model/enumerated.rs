//! All short workloads of one volume, cut at every action, with every combination of what survives.
//!
//! Operations follow one another; what happens at the same time is [`crate::pairs`]. Each workload runs over blocks
//! that are absent over an image, data, zero, or known to a frozen layer only. A workload is cut before every action
//! that reaches the medium and at its end: between those nothing that a crash could tell apart happens.

use std::sync::Arc;

use bedplate_engine::{
    cow::core::{Op, Synced},
    device::Durability,
    exec::{
        simulated::{Event, Move, Seed, Simulated, Tag},
        storage::memory::MemoryStorage,
    },
    units::ByteRange,
};

use crate::{
    cells::{CELL, Cells, ChangeId, Content, image_value},
    crashes::{Reach, Tally, each_crash},
    disk::{self, Stack},
    setting,
};

pub const SIZE: u64 = 3 * 4096 + 1536;
const IMAGE: u64 = 2 * 4096 + 1024;
/// A log this short makes a checkpoint part of many workloads.
const LOG_LEN: u64 = 512 * 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All of block 1.
    Write,
    /// Two sectors of block 1, not at its ends.
    PartialWrite,
    /// From within block 1 over block 2 to within the last.
    LongWrite,
    /// Two sectors of block 1, answered when durable.
    FuaWrite,
    /// Blocks 1 and 2.
    Zero,
    /// From within block 0 to within block 1.
    Discard,
    Flush,
}

const STEPS: [Step; 7] = [
    Step::Write,
    Step::PartialWrite,
    Step::LongWrite,
    Step::FuaWrite,
    Step::Zero,
    Step::Discard,
    Step::Flush,
];

/// What the blocks are before the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    Absent,
    Data,
    Zero,
    Frozen,
}

pub struct Bench {
    pub storage: Arc<MemoryStorage>,
    pub stack: Stack,
    pub sim: Simulated,
    pub model: Cells,
}

impl Bench {
    pub fn new(before: Before, write_align: u64) -> Bench {
        let storage = disk::format(write_align);
        disk::create_layer(&*storage, 0, SIZE, LOG_LEN).expect("no faults");
        let mut stack = Stack { size: SIZE, image: IMAGE, frozen: Vec::new(), head: 0 };
        let values = (0..SIZE / CELL).map(|cell| if cell * CELL < IMAGE { image_value(cell) } else { 0 });
        let model = Cells::new(values, 1);
        let sim = disk::open(&storage, &stack, Synced::Yes).expect("no faults");
        let mut bench = Bench { storage: storage.clone(), stack: stack.clone(), sim, model };
        let all = ByteRange::new(0, SIZE);
        match before {
            Before::Absent => return bench,
            Before::Data | Before::Frozen => {
                bench.run(Op::Write { range: all, durability: Durability::Fua }, Content::Stamped);
            }
            Before::Zero => bench.run(Op::Zero { range: all, durability: Durability::Fua }, Content::Zeros),
        }
        if before == Before::Frozen {
            disk::create_layer(&*storage, 1, SIZE, LOG_LEN).expect("no faults");
            stack = Stack { frozen: vec![0], head: 1, ..stack };
            bench.sim = disk::open(&storage, &stack, Synced::Yes).expect("no faults");
            bench.stack = stack;
        }
        bench
    }

    /// Run one change alone.
    pub fn run(&mut self, op: Op, content: Content) {
        let mut flight = self.submit(op, content);
        self.finish(&mut flight, |_| {});
    }

    pub fn submit(&mut self, op: Op, content: Content) -> Flight {
        match op {
            Op::Write { range, durability } | Op::Zero { range, durability } => {
                let (id, bytes) = self.model.begin(range, content);
                let tag = self.sim.submit(op, Some(bytes)).expect("admitted");
                Flight { tag, kind: Kind::Change(id, durability), ended: false }
            }
            Op::Flush => {
                let since = self.model.now();
                let tag = self.sim.submit(op, None).expect("admitted");
                Flight { tag, kind: Kind::Flush(since), ended: false }
            }
            Op::CopyUp { .. } | Op::Barrier => {
                let tag = self.sim.submit(op, None).expect("admitted");
                Flight { tag, kind: Kind::Other, ended: false }
            }
        }
    }

    /// Carry everything out in the order in which it was asked for, until nothing is left to do; `cut` is called before
    /// every action.
    fn finish(&mut self, flight: &mut Flight, mut cut: impl FnMut(&Bench)) {
        self.take_in(flight);
        while let Some(first) = first_move(&self.sim) {
            if matches!(first, Move::CarryOut(_)) {
                cut(self);
            }
            self.sim.make(first);
            self.take_in(flight);
        }
        assert!(flight.ended, "an operation is stuck");
    }

    fn take_in(&mut self, flight: &mut Flight) {
        for event in self.sim.events() {
            match event {
                Event::Ended { tag, result } if tag == flight.tag => {
                    result.expect("no faults");
                    flight.ended = true;
                    flight.kind.acknowledge(&mut self.model);
                }
                Event::Ended { .. } | Event::Read { .. } => panic!("an event of nobody: {event:?}"),
            }
        }
    }

    /// Check what the volume holds on a medium after a crash.
    pub fn check_crashed(&self, storage: MemoryStorage, what: &str) {
        let mut model = self.model.clone();
        let storage = Arc::new(storage);
        let sim = disk::open(&storage, &self.stack, Synced::No).unwrap_or_else(|e| panic!("{what}: {e}"));
        let bytes = disk::content(sim.view()).unwrap_or_else(|e| panic!("{what}: {e}"));
        model.crashed(&bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

pub struct Flight {
    pub tag: Tag,
    pub kind: Kind,
    pub ended: bool,
}

pub enum Kind {
    Change(ChangeId, Durability),
    Flush(u64),
    Other,
}

impl Kind {
    pub fn acknowledge(&self, model: &mut Cells) {
        match self {
            Kind::Change(id, Durability::Fua) => model.acknowledged_durable(*id),
            Kind::Change(id, Durability::Volatile) => model.acknowledged(*id),
            Kind::Flush(since) => model.flushed(*since),
            Kind::Other => {}
        }
    }
}

/// Completions first, so that every cut is made when clients know as much as they can.
fn first_move(sim: &Simulated) -> Option<Move> {
    let moves = sim.moves();
    moves.iter().find(|step| matches!(step, Move::Deliver(_))).or(moves.first()).copied()
}

impl Step {
    fn op(self) -> (Op, Content) {
        let write = |start, len, durability| {
            (Op::Write { range: ByteRange::new(start, len), durability }, Content::Stamped)
        };
        let zero = |start, len| {
            let range = ByteRange::new(start, len);
            (Op::Zero { range, durability: Durability::Volatile }, Content::Zeros)
        };
        match self {
            Step::Write => write(4096, 4096, Durability::Volatile),
            Step::PartialWrite => write(4096 + 1024, 1024, Durability::Volatile),
            Step::LongWrite => write(4096 + 3072, 1024 + 4096 + 1024, Durability::Volatile),
            Step::FuaWrite => write(4096 + 512, 1024, Durability::Fua),
            Step::Zero => zero(4096, 8192),
            Step::Discard => zero(4096 - 1024, 1024 + 2048),
            Step::Flush => (Op::Flush, Content::Zeros),
        }
    }
}

/// Outcomes of one crash point, by the length of the workload.
fn reach(len: usize) -> Reach {
    Reach::of(match len {
        0 | 1 => 4096,
        2 => 256,
        _ => 12,
    })
}

fn run_workload(before: Before, write_align: u64, workload: &[Step], seed: &mut Seed) -> Tally {
    let mut bench = Bench::new(before, write_align);
    let mut tally = Tally::of_workload();
    let reach = reach(workload.len());
    for (n, step) in workload.iter().enumerate() {
        let (op, content) = step.op();
        let mut flight = bench.submit(op, content);
        // Cuts in the operations before the last were made by shorter workloads.
        let last = n + 1 == workload.len();
        bench.finish(&mut flight, |bench| {
            if last {
                let point = tally.points;
                let what = format!("{before:?} {write_align} {workload:?} cut at point {point}");
                tally += each_crash(&bench.storage, reach, seed, |left| bench.check_crashed(left, &what));
            }
        });
    }
    let what = format!("{before:?} {write_align} {workload:?} cut at the end");
    tally += each_crash(&bench.storage, reach, seed, |left| bench.check_crashed(left, &what));
    let bytes = disk::content(bench.sim.view()).expect("no faults");
    let now = bench.model.now();
    bench.model.check_read(ByteRange::new(0, SIZE), &bytes, now).unwrap_or_else(|e| panic!("{what}: {e}"));
    tally
}

#[test]
fn every_short_workload_cut_at_every_action_leaves_what_was_flushed_or_came_later() {
    let depth = setting("BEDPLATE_DEPTH", 3);
    let mut seed = Seed(7);
    let mut tally = Tally::default();
    let mut level: Vec<Vec<Step>> = vec![Vec::new()];
    for _ in 0..depth {
        level = level
            .iter()
            .flat_map(|start| STEPS.iter().map(|step| [start.as_slice(), &[*step]].concat()))
            .collect();
        for before in [Before::Absent, Before::Data, Before::Zero, Before::Frozen] {
            for write_align in [512, 4096] {
                for workload in &level {
                    tally += run_workload(before, write_align, workload, &mut seed);
                }
                println!("up to {before:?} at {write_align}: {tally}");
            }
        }
    }
}
