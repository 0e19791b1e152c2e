//! Every pair of operations on one block at the same time, in every interleaving of their actions.
//!
//! A schedule is a list of choices among the moves that are possible; all schedules are found by running again with the
//! last choice that has another alternative changed. A read of the block goes on meanwhile. At the end everything is
//! read, what was merged or flattened is taken away and read again, and the machine crashes after a flush.

use std::sync::Arc;

use bedplate_engine::{
    cow::{
        core::{CopySource, Op, Synced},
        frozen::{FrozenIndex, Slot},
        plan::Index,
    },
    device::Durability,
    exec::{
        simulated::{Event, Planning},
        view::{LayerFiles, View},
    },
    units::{BlockRange, ByteLen, ByteRange},
};

use crate::{
    cells::{Cells, Content},
    disk::{self, Stack},
    enumerated::{Before, Bench, Flight},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Racer {
    FullWrite,
    PartialWrite,
    Zero,
    Discard,
    MergeCopy,
    FlattenCopy,
    Snapshot,
}

const RACERS: [Racer; 7] = [
    Racer::FullWrite,
    Racer::PartialWrite,
    Racer::Zero,
    Racer::Discard,
    Racer::MergeCopy,
    Racer::FlattenCopy,
    Racer::Snapshot,
];

const BLOCK: ByteRange = ByteRange::new(4096, 4096);

impl Racer {
    fn op(self) -> (Op, Content) {
        let volatile = Durability::Volatile;
        let part = |start: u64, len| ByteRange::new(4096 + start, len);
        match self {
            Racer::FullWrite => (Op::Write { range: BLOCK, durability: volatile }, Content::Stamped),
            Racer::PartialWrite => {
                (Op::Write { range: part(512, 1088), durability: volatile }, Content::Stamped)
            }
            Racer::Zero => {
                (Op::Zero { range: part(1024, 3072), durability: Durability::Fua }, Content::Zeros)
            }
            Racer::Discard => (Op::Zero { range: BLOCK, durability: volatile }, Content::Zeros),
            Racer::MergeCopy => (
                Op::CopyUp { blocks: BlockRange::new(0, 4), from: CopySource::Layer(Slot(0)) },
                Content::Zeros,
            ),
            Racer::FlattenCopy => {
                (Op::CopyUp { blocks: BlockRange::new(0, 4), from: CopySource::Base }, Content::Zeros)
            }
            Racer::Snapshot => (Op::Barrier, Content::Zeros),
        }
    }
}

/// One run of a pair under one schedule.
struct Race {
    bench: Bench,
    racers: [Racer; 2],
    flights: Vec<Flight>,
    snapshot: Option<(Stack, Cells)>,
}

impl Race {
    fn new(before: Before, racers: [Racer; 2]) -> Race {
        let mut bench = Bench::new(before, 512);
        let flights = racers
            .iter()
            .map(|racer| {
                let (op, content) = racer.op();
                bench.submit(op, content)
            })
            .collect();
        Race { bench, racers, flights, snapshot: None }
    }

    fn take_in(&mut self, read_since: u64) {
        for event in self.bench.sim.events() {
            match event {
                Event::Read { range, result, .. } => {
                    let bytes = result.expect("no faults");
                    let checked = self.bench.model.check_read(range, &bytes, read_since);
                    checked.unwrap_or_else(|e| panic!("{:?}: {e}", self.racers));
                }
                Event::Ended { tag, result } => {
                    result.expect("no faults");
                    let flight = self.flights.iter_mut().find(|flight| flight.tag == tag);
                    let flight = flight.expect("an operation of ours");
                    assert!(!flight.ended, "ended twice");
                    flight.ended = true;
                    flight.kind.acknowledge(&mut self.bench.model);
                }
            }
        }
        for n in 0..self.racers.len() {
            if self.racers[n] == Racer::Snapshot && self.flights[n].ended && self.snapshot.is_none() {
                self.freeze();
            }
        }
    }

    /// The barrier has ended: a new head stands on the old one.
    fn freeze(&mut self) {
        let bench = &mut self.bench;
        let old = bench.sim.view().clone();
        let stack = Stack {
            frozen: [bench.stack.frozen.clone(), vec![bench.stack.head]].concat(),
            head: 9,
            ..bench.stack.clone()
        };
        disk::create_layer(&*bench.storage, stack.head, stack.size, 512 * 64).expect("no faults");
        let slot = Slot(bench.stack.head);
        let frozen = old.index.frozen.overlaid(&old.index.head, slot, &[]);
        let file = old.head.clone().expect("a volume has a head");
        let layers = old.layers.with(&LayerFiles::new(vec![(slot, file)]));
        let (state, view, files) =
            disk::open_head(&bench.storage, &stack, frozen, layers, Synced::Yes).expect("no faults");
        self.snapshot = Some((stack.clone(), bench.model.snapshot(77)));
        bench.stack = stack;
        bench.sim.install(state, view, files);
    }

    /// Without what was merged or flattened the volume reads the same.
    fn take_away(&mut self) {
        let bench = &mut self.bench;
        let old = bench.sim.view().clone();
        let merged = self.racers.contains(&Racer::MergeCopy);
        let flattened = self.racers.contains(&Racer::FlattenCopy);
        if self.snapshot.is_some() || !(merged || flattened) {
            return;
        }
        let frozen = if merged { FrozenIndex::empty() } else { old.index.frozen.clone() };
        let base_len = if flattened { ByteLen(0) } else { old.index.base_len };
        if merged {
            bench.stack.frozen.clear();
        }
        if flattened {
            bench.stack.image = 0;
        }
        let index = Arc::new(Index { frozen, base_len, ..Index::clone(&old.index) });
        bench.sim.republish(View { index, ..old });
    }

    fn settle(mut self, schedule: &str) {
        let all = ByteRange::new(0, self.bench.stack.size);
        assert!(self.flights.iter().all(|flight| flight.ended), "{schedule}: an operation is stuck");
        for _ in 0..2 {
            let bytes = disk::content(self.bench.sim.view()).expect("no faults");
            let now = self.bench.model.now();
            let checked = self.bench.model.check_read(all, &bytes, now);
            checked.unwrap_or_else(|e| panic!("{schedule}: {e}"));
            self.take_away();
        }
        self.bench.run(Op::Flush, Content::Zeros);
        self.bench.check_crashed(self.bench.storage.crash_losing_all(), schedule);
        if let Some((stack, mut model)) = self.snapshot {
            let left = Arc::new(self.bench.storage.crash_losing_all());
            let view = disk::frozen_view(&left, &stack).expect("a snapshot opens");
            let bytes = disk::content(&view).expect("a snapshot is readable");
            model.crashed(&bytes).unwrap_or_else(|e| panic!("{schedule}, snapshot: {e}"));
        }
    }
}

/// Run one schedule: `choices` first, then always the first move. Returns the choices made and the alternatives each
/// one had.
fn run(before: Before, racers: [Racer; 2], planning: Planning, choices: &[usize]) -> Vec<(usize, usize)> {
    let mut race = Race::new(before, racers);
    let since = race.bench.model.now();
    race.bench.sim.read(BLOCK, planning);
    race.take_in(since);
    let mut made = Vec::new();
    loop {
        let moves = race.bench.sim.moves();
        if moves.is_empty() {
            break;
        }
        let choice = choices.get(made.len()).copied().unwrap_or(0);
        made.push((choice, moves.len()));
        race.bench.sim.make(moves[choice]);
        race.take_in(since);
    }
    race.settle(&format!("{before:?} {racers:?} {planning:?} {choices:?}"));
    made
}

/// The schedule after this one, in the order of a depth-first search.
fn next(mut made: Vec<(usize, usize)>) -> Option<Vec<usize>> {
    while let Some((choice, alternatives)) = made.pop() {
        if choice + 1 < alternatives {
            let mut choices: Vec<usize> = made.iter().map(|(choice, _)| *choice).collect();
            choices.push(choice + 1);
            return Some(choices);
        }
    }
    None
}

/// Schedules of one pair; more are left out, and said so.
const SCHEDULES_MAX: u64 = 3000;

#[test]
fn every_pair_on_one_block_in_every_interleaving_reads_as_one_after_the_other() {
    let most = crate::setting("BEDPLATE_SCHEDULES", SCHEDULES_MAX);
    let (mut pairs, mut schedules, mut cut) = (0, 0, 0);
    for (n, first) in RACERS.iter().enumerate() {
        for second in &RACERS[n..] {
            let racers = [*first, *second];
            if racers == [Racer::Snapshot; 2] {
                // The second is refused: one life operation at a time.
                continue;
            }
            for before in [Before::Absent, Before::Data, Before::Zero, Before::Frozen] {
                for order in [racers, [racers[1], racers[0]]] {
                    for planning in [Planning::AtStart, Planning::PartByPart] {
                        pairs += 1;
                        let mut choices = Some(Vec::new());
                        let mut count = 0;
                        while let Some(these) = choices {
                            choices = next(run(before, order, planning, &these));
                            count += 1;
                            if count >= most && choices.is_some() {
                                cut += 1;
                                break;
                            }
                        }
                        schedules += count;
                    }
                }
            }
        }
    }
    println!("{pairs} races, {schedules} schedules, {cut} races with more than {most}");
}
