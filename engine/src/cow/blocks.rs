//! Sets of blocks.
//!
//! Owns [`BlockSet`], exact, and [`Touched`], which grows coarser instead of larger: what is kept while a volume is
//! written to has a limit, whatever is written.

use std::collections::BTreeMap;

use crate::units::{Block, BlockCount, BlockRange};

/// Runs that a [`Touched`] keeps.
pub const TOUCHED_RUNS_MAX: usize = 1024;

/// Blocks, as disjoint runs that do not touch one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSet {
    runs: BTreeMap<Block, BlockCount>,
}

impl BlockSet {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.runs.iter().map(|(start, count)| BlockRange { start: *start, count: *count })
    }

    pub fn insert(&mut self, range: BlockRange) {
        if range.is_empty() {
            return;
        }
        let mut new = range;
        while let Some((&start, &count)) = self.runs.range(..=new.end()).next_back() {
            let end = start.plus(count);
            if end < new.start {
                break;
            }
            if start <= new.start && end >= new.end() && new == range {
                return;
            }
            self.runs.remove(&start);
            let first = start.min(new.start);
            new = BlockRange { start: first, count: end.max(new.end()).since(first) };
        }
        self.runs.insert(new.start, new.count);
    }

    /// The first blocks of `range` that are in the set.
    pub fn first_in(&self, range: BlockRange) -> Option<BlockRange> {
        if range.is_empty() {
            return None;
        }
        let before = self
            .runs
            .range(..=range.start)
            .next_back()
            .filter(|(start, count)| start.plus(**count) > range.start);
        let (start, count) = before.or_else(|| self.runs.range(range.start..range.end()).next())?;
        let first = range.start.max(*start);
        Some(BlockRange { start: first, count: start.plus(*count).min(range.end()).since(first) })
    }

    /// The blocks of `all` that are not in the set, in order.
    pub fn missing_in(&self, all: BlockRange) -> impl Iterator<Item = BlockRange> + '_ {
        let mut at = all.start;
        std::iter::from_fn(move || {
            while at < all.end() {
                let rest = BlockRange { start: at, count: all.end().since(at) };
                let known =
                    self.first_in(rest).unwrap_or(BlockRange { start: all.end(), count: BlockCount(0) });
                at = known.end();
                if known.start > rest.start {
                    return Some(BlockRange { start: rest.start, count: known.start.since(rest.start) });
                }
            }
            None
        })
    }
}

/// At least the blocks that were added, in at most [`TOUCHED_RUNS_MAX`] runs.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    set: BlockSet,
    /// Runs begin and end at multiples of this power of two.
    grain_log2: u32,
}

impl Touched {
    pub fn add(&mut self, range: BlockRange) {
        self.set.insert(self.coarse(range));
        while self.set.runs.len() > TOUCHED_RUNS_MAX {
            self.grain_log2 += 1;
            let finer = std::mem::take(&mut self.set);
            finer.iter().for_each(|run| self.set.insert(self.coarse(run)));
        }
    }

    pub fn set(&self) -> &BlockSet {
        &self.set
    }

    fn coarse(&self, range: BlockRange) -> BlockRange {
        let grain = 1 << self.grain_log2;
        let start = range.start.0 / grain * grain;
        BlockRange::new(start, range.end().0.next_multiple_of(grain) - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::to_usize;

    #[test]
    fn a_set_holds_what_a_plain_vector_holds_in_runs_that_do_not_touch() {
        let mut seed = 5u64;
        for _ in 0..300 {
            let mut set = BlockSet::default();
            let mut model = [false; 64];
            for _ in 0..20 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let start = (seed >> 33) % 64;
                let count = ((seed >> 40) % 7).min(64 - start);
                set.insert(BlockRange::new(start, count));
                model[to_usize(start)..to_usize(start + count)].fill(true);
                let mut shown = [false; 64];
                let mut end = None;
                for run in set.iter() {
                    assert!(end.is_none_or(|end| end < run.start) && !run.is_empty());
                    end = Some(run.end());
                    shown[to_usize(run.start.0)..to_usize(run.end().0)].fill(true);
                }
                assert_eq!(shown, model);
                let mut missing = [true; 64];
                for run in set.missing_in(BlockRange::new(3, 50)) {
                    missing[to_usize(run.start.0)..to_usize(run.end().0)].fill(false);
                }
                assert_eq!(missing[3..53], model[3..53]);
            }
        }
    }

    #[test]
    fn what_is_touched_all_over_is_remembered_in_few_runs() {
        let mut touched = Touched::default();
        let blocks = |n: u64| BlockRange::new(n * n * 3, 1);
        (0..20_000).for_each(|n| touched.add(blocks(n)));
        assert!(touched.set().iter().count() <= TOUCHED_RUNS_MAX);
        assert!((0..20_000).all(|n| touched.set().first_in(blocks(n)) == Some(blocks(n))));
    }
}
