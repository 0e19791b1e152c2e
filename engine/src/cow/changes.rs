//! Map changes that have landed and wait for a commit.
//!
//! Owns [`Changes`]: disjoint runs of blocks, each with its newest state, in block order; neighbours in one state are
//! one run. What a commit covers is one of these, taken whole at its cut.

use std::collections::BTreeMap;

use super::BlockState;
use crate::units::{Block, BlockCount, BlockRange};

/// Newest states of the blocks that changed. Never [`BlockState::Absent`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    runs: BTreeMap<Block, (BlockCount, BlockState)>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (BlockRange, BlockState)> + '_ {
        self.runs.iter().map(|(start, (count, state))| (BlockRange { start: *start, count: *count }, *state))
    }

    /// Whether any run has this state.
    pub fn any(&self, state: BlockState) -> bool {
        self.runs.values().any(|(_, found)| *found == state)
    }

    /// State `range` anew. Adds at most [`ENTRIES_PER_CHANGE_MAX`] runs.
    pub fn set(&mut self, range: BlockRange, state: BlockState) {
        if range.is_empty() || state == BlockState::Absent {
            return;
        }
        let mut new = range;
        // What reaches into the range from before it keeps its first part, and its last part if it ends past the range.
        if let Some((&start, &(count, old))) = self.runs.range(..range.start).next_back() {
            let end = start.plus(count);
            if end >= range.start && old == state {
                self.runs.remove(&start);
                new = BlockRange { start, count: new.end().max(end).since(start) };
            } else if end > range.start {
                self.runs.insert(start, (range.start.since(start), old));
                if end > range.end() {
                    self.runs.insert(range.end(), (end.since(range.end()), old));
                }
            }
        }
        while let Some((&start, &(count, old))) = self.runs.range(new.start..=new.end()).next() {
            let end = start.plus(count);
            if start == new.end() && old != state {
                break;
            }
            self.runs.remove(&start);
            if old == state {
                new.count = new.end().max(end).since(new.start);
            } else if end > new.end() {
                self.runs.insert(new.end(), (end.since(new.end()), old));
                break;
            }
        }
        self.runs.insert(new.start, (new.count, state));
    }
}

/// Runs that one change adds at most: itself, and the rest of a run that it splits.
pub const ENTRIES_PER_CHANGE_MAX: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::to_usize;

    #[test]
    fn runs_stay_disjoint_merged_and_equal_to_a_plain_vector() {
        let mut seed = 99u64;
        for _ in 0..200 {
            let mut changes = Changes::default();
            let mut model = [BlockState::Absent; 64];
            for _ in 0..40 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let start = (seed >> 33) % 64;
                let count = (1 + (seed >> 40) % 12).min(64 - start);
                let state = if seed >> 60 & 1 == 0 { BlockState::Data } else { BlockState::Zero };
                let before = changes.len();
                changes.set(BlockRange::new(start, count), state);
                assert!(changes.len() <= before + ENTRIES_PER_CHANGE_MAX);
                model[to_usize(start)..to_usize(start + count)].fill(state);
                let mut shown = [BlockState::Absent; 64];
                let mut last: Option<(BlockRange, BlockState)> = None;
                for (run, state) in changes.iter() {
                    if let Some((before, old)) = last {
                        assert!(before.end() < run.start || (before.end() == run.start && old != state));
                    }
                    last = Some((run, state));
                    shown[to_usize(run.start.0)..to_usize(run.end().0)].fill(state);
                }
                assert_eq!(shown, model);
            }
        }
    }
}
