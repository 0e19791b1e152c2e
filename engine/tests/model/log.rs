//! The log never grows, whatever is written to it.

use std::sync::Arc;

use bedplate_engine::{
    cow::{
        core::{ActionKind, Core, HeadState, Op, Output, Step, Synced},
        frozen::FrozenIndex,
        head::HeadIndex,
        map::{
            checkpoint::{self, LogLen},
            log::LogEnd,
        },
        plan::Index,
    },
    device::Durability,
    units::{BlockCount, BlockRange, ByteLen, ByteRange},
};
use uuid::Uuid;

use crate::{disk::decode_map, setting};

const BLOCKS: u64 = 64;
/// Operations between two flushes.
const FLUSH_EVERY: u64 = 16;

/// A core whose data goes nowhere and whose map file is these bytes.
struct Bench {
    core: Core,
    map: Vec<u8>,
    staged: Vec<u8>,
    checkpoints: u64,
}

fn bytes_of(n: u64) -> usize {
    usize::try_from(n).expect("a small map")
}

impl Bench {
    fn new() -> Bench {
        let head = HeadIndex::new(BlockCount(BLOCKS));
        let (mut map, header) = checkpoint::encode(Uuid::from_u128(1), 1, 0, &head, LogLen::LIVE);
        map.resize(map.len() + bytes_of(header.log_len), 0);
        let index = Index {
            size: ByteLen(BLOCKS * 4096),
            head: Arc::new(head),
            frozen: FrozenIndex::empty(),
            base_len: ByteLen(0),
        };
        let state = HeadState {
            index: Arc::new(index),
            layer: Uuid::from_u128(1),
            log: LogEnd::start(&header),
            log_offset: header.log_offset,
            synced: Synced::Yes,
        };
        Bench { core: Core::new(state, 512), map, staged: Vec::new(), checkpoints: 0 }
    }

    /// Run an operation to its end.
    fn run(&mut self, op: Op) {
        let (id, step) = self.core.submit(op).expect("admitted");
        let mut ended = false;
        let mut steps = vec![step];
        while let Some(Step { actions, finished }) = steps.pop() {
            for (op, result) in finished {
                result.expect("no faults");
                ended |= op == id;
            }
            for action in actions {
                self.carry_out(&action.kind);
                steps.push(self.core.complete(action.id, Ok(Output::Done)));
            }
        }
        assert!(ended, "{op:?} is stuck");
    }

    fn carry_out(&mut self, kind: &ActionKind) {
        match kind {
            ActionKind::AppendLog { offset, bytes } => {
                // Past the end of the file this panics: a commit changes no size.
                let at = bytes_of(*offset);
                self.map[at..at + bytes.len()].copy_from_slice(bytes);
            }
            ActionKind::StageMap { bytes, log_len } => {
                self.staged = bytes.clone();
                self.staged.resize(bytes.len() + bytes_of(*log_len), 0);
            }
            ActionKind::SwitchMap { offset, log } => {
                let at = bytes_of(*offset);
                self.staged[at..at + log.len()].copy_from_slice(log);
                self.map = std::mem::take(&mut self.staged);
                self.checkpoints += 1;
            }
            ActionKind::ReadEdge { .. }
            | ActionKind::ReadCopy { .. }
            | ActionKind::Write { .. }
            | ActionKind::Punch { .. }
            | ActionKind::SyncData
            | ActionKind::SyncMap
            | ActionKind::MarkFailed { .. } => {}
        }
    }

    fn check(&self) {
        let (_, index, replayed) = decode_map(&self.map).expect("the map is whole");
        assert!(replayed.damage.is_none() && replayed.lost.is_empty());
        let all = BlockRange::new(0, BLOCKS);
        assert!(index.runs(all).eq(self.core.index().head.runs(all)), "the map says what the index says");
    }
}

#[test]
fn ten_million_writes_and_discards_leave_a_map_of_the_size_it_had() {
    let operations = setting("BEDPLATE_LOG_OPERATIONS", 10_000_000);
    let mut bench = Bench::new();
    let len = bench.map.len();
    for n in 0..operations {
        let range = ByteRange::new(n / 2 * 7 % BLOCKS * 4096, 4096);
        let durability = Durability::Volatile;
        bench.run(if n % 2 == 0 { Op::Write { range, durability } } else { Op::Zero { range, durability } });
        if n % FLUSH_EVERY == 0 {
            bench.run(Op::Flush);
        }
        if n % 1_000_003 == 0 {
            bench.run(Op::Flush);
            bench.check();
        }
    }
    bench.run(Op::Flush);
    bench.check();
    // A checkpoint has one leaf of two bitmaps at most.
    assert!(bench.map.len() <= len + 3 * 4096, "{} bytes instead of {len}", bench.map.len());
    assert!(bench.checkpoints > operations / FLUSH_EVERY / 512 / 2, "{} checkpoints", bench.checkpoints);
    println!("{operations} operations, {} checkpoints, {} bytes", bench.checkpoints, bench.map.len());
}
