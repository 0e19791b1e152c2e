//! Block ownership: who may change which blocks.
//!
//! Every operation that changes what a block holds in a layer owns that block from its decision until its map change
//! is visible; another waits, in the order of arrival, so that nobody starves. Plain logic over a table that the core
//! bounds by [`OPS_MAX`](super::core::OPS_MAX).

use std::collections::{BTreeMap, VecDeque};

use super::core::OpId;
use crate::units::{Block, BlockRange};

/// Who owns which blocks, and who waits for some.
#[derive(Debug, Default)]
pub struct Ownership {
    /// Disjoint ranges by their start and owner.
    owned: BTreeMap<(Block, OpId), BlockRange>,
    waiting: VecDeque<(BlockRange, OpId)>,
}

impl Ownership {
    /// Whether nobody owns or waits.
    pub fn is_empty(&self) -> bool {
        self.owned.is_empty() && self.waiting.is_empty()
    }

    /// Take `range` for `op`; `false`: it waits, and [`Ownership::release`] names it when it owns the range.
    pub fn acquire(&mut self, op: OpId, range: BlockRange) -> bool {
        if self.is_owned(range) || self.waiting.iter().any(|(other, _)| other.overlaps(range)) {
            self.waiting.push_back((range, op));
            return false;
        }
        self.owned.insert((range.start, op), range);
        true
    }

    /// Give back what `op` took with the range that starts at `start`; returns who owns its range now.
    pub fn release(&mut self, op: OpId, start: Block) -> Vec<OpId> {
        let released = self.owned.remove(&(start, op));
        debug_assert!(released.is_some(), "{op:?} owned nothing at {start:?}");
        let mut granted = Vec::new();
        let mut still: VecDeque<(BlockRange, OpId)> = VecDeque::with_capacity(self.waiting.len());
        for (range, waiter) in std::mem::take(&mut self.waiting) {
            if self.is_owned(range) || still.iter().any(|(other, _)| other.overlaps(range)) {
                still.push_back((range, waiter));
            } else {
                self.owned.insert((range.start, waiter), range);
                granted.push(waiter);
            }
        }
        self.waiting = still;
        granted
    }

    fn is_owned(&self, range: BlockRange) -> bool {
        let last = self.owned.range(..(range.end(), OpId(0))).next_back();
        last.is_some_and(|(_, other)| other.overlaps(range))
    }
}

#[cfg(feature = "planted")]
impl Ownership {
    pub fn owns(&self, op: OpId, start: Block) -> bool {
        self.owned.contains_key(&(start, op))
    }

    /// Take `range`, which one other owns in part or whole and that begins where its range does.
    pub fn share(&mut self, op: OpId, range: BlockRange) {
        self.owned.insert((range.start, op), range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_go_one_after_another_in_order_of_arrival() {
        let mut table = Ownership::default();
        assert!(table.acquire(OpId(1), BlockRange::new(0, 4)));
        assert!(!table.acquire(OpId(2), BlockRange::new(2, 4)));
        assert!(!table.acquire(OpId(3), BlockRange::new(5, 1)), "an earlier waiter goes first");
        assert!(table.acquire(OpId(4), BlockRange::new(8, 1)));
        assert_eq!(table.release(OpId(1), Block(0)), [OpId(2)]);
        assert_eq!(table.release(OpId(2), Block(2)), [OpId(3)]);
        assert!(table.release(OpId(4), Block(8)).is_empty());
        assert!(table.release(OpId(3), Block(5)).is_empty());
        assert!(table.is_empty());
    }
}
