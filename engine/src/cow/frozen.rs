//! The frozen index: for each block, which frozen layer answers for it. Immutable once built.
//!
//! Owns [`FrozenIndex`]. It is built once per frozen top layer and shared by every volume on it; freezing a head makes
//! a new index that shares every leaf which the head did not touch. One step of lookup, for 1 layer or 200. A leaf of
//! which only one layer knows is that layer's own head leaf, shared; others keep a palette of the values that occur
//! and a packed index into it, so that memory follows the number of distinct answers, not of layers.

use std::{ops::Range, sync::Arc};

use super::{
    BlockState, LEAF_BLOCKS, LEAF_WORDS,
    head::{HeadIndex, Leaf, masks},
    leaf_count,
};
use crate::units::{Block, BlockCount, BlockRange, to_usize};

/// Names a layer in the table of files that goes with an index. Slots are never given to another layer while an index
/// that knows them lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// What the frozen layers say of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// No layer knows it: look in the image.
    Absent,
    /// In this layer's file, at the same offset.
    Data(Slot),
    /// This layer made it zeros.
    Zero(Slot),
    /// This layer's map was damaged here: nobody knows.
    Lost(Slot),
}

/// For each block, which frozen layer answers for it.
#[derive(Clone, Debug)]
pub struct FrozenIndex {
    leaves: Arc<[Option<FrozenLeaf>]>,
}

#[derive(Clone, Debug)]
enum FrozenLeaf {
    /// Only this layer knows blocks of this leaf.
    One {
        slot: Slot,
        leaf: Arc<Leaf>,
    },
    Mixed(Arc<Palette>),
}

/// `bits` per block, 0 or a power of two: an index into `values`.
#[derive(Debug)]
struct Palette {
    values: Vec<Value>,
    bits: u32,
    words: Vec<u64>,
}

impl Palette {
    /// The value at `bit` and how many blocks from there on, at most `limit`, share it. A word at a time: `bits`, and so
    /// the blocks of a word, are powers of two.
    fn run_at(&self, bit: u64, limit: u64) -> (Value, u64) {
        if self.bits == 0 {
            return (self.values[0], limit);
        }
        let bits = u64::from(self.bits);
        let (mut word, mut shift) = (to_usize(bit * bits / 64), bit * bits % 64);
        let index = (self.words[word] >> shift) & ((1 << bits) - 1);
        let same = repeated(index, self.bits);
        let mut run = 0;
        while run < limit {
            let differs = (self.words[word] ^ same) >> shift;
            if differs != 0 {
                run += u64::from(differs.trailing_zeros()) / bits;
                break;
            }
            run += (64 - shift) / bits;
            (word, shift) = (word + 1, 0);
        }
        (self.values[to_usize(index)], run.min(limit))
    }
}

/// A word of blocks that all have this index.
fn repeated(index: u64, bits: u32) -> u64 {
    index * (u64::MAX / ((1 << bits) - 1))
}

/// Makes a palette from the runs of a leaf, in order.
#[derive(Default)]
struct Packer {
    values: Vec<Value>,
    /// Where each run ends, and its value's index.
    runs: Vec<(u64, usize)>,
}

impl Packer {
    /// Blocks up to `end` have this value.
    fn push(&mut self, value: Value, end: u64) {
        if let Some((last_end, index)) = self.runs.last_mut()
            && self.values[*index] == value
        {
            *last_end = end;
            return;
        }
        let index = self.values.iter().position(|known| *known == value).unwrap_or_else(|| {
            self.values.push(value);
            self.values.len() - 1
        });
        self.runs.push((end, index));
    }

    fn finish(self) -> Palette {
        let Packer { values, runs } = self;
        let bits = match usize::BITS - (values.len() - 1).leading_zeros() {
            0 => 0,
            bits => bits.next_power_of_two(),
        };
        let mut words = vec![0; LEAF_WORDS * to_usize(bits.into())];
        if bits > 0 {
            let mut start = 0;
            for (end, index) in runs {
                let same = repeated(index as u64, bits);
                for (word, mask) in masks(start * u64::from(bits), (end - start) * u64::from(bits)) {
                    words[word] |= same & mask;
                }
                start = end;
            }
        }
        Palette { values, bits, words }
    }
}

impl FrozenLeaf {
    fn run_at(&self, bit: u64, limit: u64) -> (Value, u64) {
        match self {
            FrozenLeaf::One { slot, leaf } => {
                let (state, run) = leaf.run_at(bit, limit);
                (Value::of(state, *slot), run)
            }
            FrozenLeaf::Mixed(palette) => palette.run_at(bit, limit),
        }
    }

    /// A layer's leaf over what lies below it. `lost` are the blocks of this leaf that the layer's map does not tell,
    /// counted from its start, in order.
    fn overlaid(
        below: Option<&FrozenLeaf>,
        leaf: Option<&Leaf>,
        slot: Slot,
        lost: impl Iterator<Item = Range<u64>>,
    ) -> FrozenLeaf {
        let mut lost = lost.peekable();
        let mut packer = Packer::default();
        let mut at = 0;
        while at < LEAF_BLOCKS {
            if let Some(range) = lost.next_if(|range| range.start <= at) {
                at = at.max(range.end);
                packer.push(Value::Lost(slot), at);
                continue;
            }
            let limit = lost.peek().map_or(LEAF_BLOCKS, |range| range.start) - at;
            let (state, run) = leaf.map_or((BlockState::Absent, limit), |leaf| leaf.run_at(at, limit));
            let (value, run) = match below {
                Some(below) if state == BlockState::Absent => below.run_at(at, run),
                Some(_) | None => (Value::of(state, slot), run),
            };
            at += run;
            packer.push(value, at);
        }
        FrozenLeaf::Mixed(Arc::new(packer.finish()))
    }
}

impl Value {
    fn of(state: BlockState, slot: Slot) -> Value {
        match state {
            BlockState::Absent => Value::Absent,
            BlockState::Data => Value::Data(slot),
            BlockState::Zero => Value::Zero(slot),
        }
    }

    /// The layer that this answer comes from.
    pub fn slot(self) -> Option<Slot> {
        match self {
            Value::Absent => None,
            Value::Data(slot) | Value::Zero(slot) | Value::Lost(slot) => Some(slot),
        }
    }
}

impl FrozenIndex {
    /// An index over no layers.
    pub fn empty() -> FrozenIndex {
        FrozenIndex { leaves: Arc::new([]) }
    }

    /// This index with one more layer on top of it. `layer` must not change any more: its leaves are shared. `lost`
    /// are blocks of which that layer's map does not say what they are, in order.
    #[must_use]
    pub fn overlaid(&self, layer: &HeadIndex, slot: Slot, lost: &[BlockRange]) -> FrozenIndex {
        let count = self.leaves.len().max(leaf_count(layer.block_count().0));
        let leaves = (0..count).map(|number| {
            let below = self.leaves.get(number).and_then(Option::as_ref);
            let start = number as u64 * LEAF_BLOCKS;
            // The ranges are in order and apart, so those of a leaf are found without looking at the others.
            let first = lost.partition_point(|range| range.end().0 <= start);
            let end = lost.partition_point(|range| range.start.0 < start + LEAF_BLOCKS);
            let lost_here = lost.get(first..end).unwrap_or_default();
            match (layer.leaf(number), below, lost_here) {
                (None, _, []) => below.cloned(),
                (Some(leaf), None, []) => Some(FrozenLeaf::One { slot, leaf: leaf.clone() }),
                (leaf, _, _) => {
                    let lost = lost_here.iter().map(|range| {
                        range.start.0.max(start) - start..range.end().0.min(start + LEAF_BLOCKS) - start
                    });
                    Some(FrozenLeaf::overlaid(below, leaf.map(|leaf| &**leaf), slot, lost))
                }
            }
        });
        FrozenIndex { leaves: leaves.collect() }
    }

    /// The value at `range.start` and how many blocks of `range` from there on share it. `range` is not empty.
    pub fn run_at(&self, range: BlockRange) -> (Value, BlockCount) {
        let in_leaf = range.start.0 % LEAF_BLOCKS;
        let limit = range.count.0.min(LEAF_BLOCKS - in_leaf);
        match self.leaves.get(to_usize(range.start.0 / LEAF_BLOCKS)) {
            Some(Some(leaf)) => {
                let (value, run) = leaf.run_at(in_leaf, limit);
                (value, BlockCount(run))
            }
            Some(None) | None => (Value::Absent, BlockCount(limit)),
        }
    }

    /// The value of one block.
    pub fn value(&self, block: Block) -> Value {
        self.run_at(BlockRange { start: block, count: BlockCount(1) }).0
    }

    /// The runs of `range`, in order.
    pub fn runs(&self, range: BlockRange) -> impl Iterator<Item = (BlockRange, Value)> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end()).then(|| {
                let (value, count) = self.run_at(BlockRange { start: at, count: range.end().since(at) });
                let run = BlockRange { start: at, count };
                at = run.end();
                (run, value)
            })
        })
    }

    /// Heap bytes of this index, leaves shared with other indexes included.
    pub fn memory_bytes(&self) -> usize {
        let leaf_bytes = |leaf: &FrozenLeaf| match leaf {
            FrozenLeaf::One { leaf, .. } => leaf.memory_bytes(),
            FrozenLeaf::Mixed(palette) => {
                size_of::<Palette>() + palette.words.len() * 8 + palette.values.len() * size_of::<Value>()
            }
        };
        self.leaves.len() * size_of::<Option<FrozenLeaf>>()
            + self.leaves.iter().flatten().map(leaf_bytes).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_layer_answers_and_untouched_leaves_are_shared() {
        let blocks = LEAF_BLOCKS * 3;
        let bottom = HeadIndex::new(BlockCount(blocks));
        bottom.set(BlockRange::new(0, 10), BlockState::Data);
        bottom.set(BlockRange::new(LEAF_BLOCKS * 2, 5), BlockState::Data);
        let top = HeadIndex::new(BlockCount(blocks));
        top.set(BlockRange::new(4, 2), BlockState::Zero);
        top.set(BlockRange::new(5, 1), BlockState::Data);
        let one = FrozenIndex::empty().overlaid(&bottom, Slot(0), &[]);
        let two = one.overlaid(&top, Slot(1), &[]);
        let values: Vec<_> = (3..7).map(|n| two.value(Block(n))).collect();
        assert_eq!(
            values,
            [Value::Data(Slot(0)), Value::Zero(Slot(1)), Value::Data(Slot(1)), Value::Data(Slot(0))]
        );
        assert!(matches!(&two.leaves[2], Some(FrozenLeaf::One { slot: Slot(0), .. })));
        assert!(two.leaves[1].is_none());
    }

    #[test]
    fn lost_blocks_hide_what_lies_below() {
        let bottom = HeadIndex::new(BlockCount(100));
        bottom.set(BlockRange::new(0, 100), BlockState::Data);
        let index = FrozenIndex::empty().overlaid(&bottom, Slot(0), &[]).overlaid(
            &HeadIndex::new(BlockCount(100)),
            Slot(1),
            &[BlockRange::new(10, 5)],
        );
        assert_eq!(index.value(Block(9)), Value::Data(Slot(0)));
        assert_eq!(index.run_at(BlockRange::new(10, 90)), (Value::Lost(Slot(1)), BlockCount(5)));
    }

    #[test]
    fn two_hundred_layers_read_like_a_plain_vector() {
        let blocks = 2000u64;
        let mut index = FrozenIndex::empty();
        let mut model = vec![Value::Absent; to_usize(blocks)];
        for n in 0..200u32 {
            let layer = HeadIndex::new(BlockCount(blocks));
            for k in 0..20u64 {
                let at = (u64::from(n) * 37 + k * 97) % (blocks - 3);
                let state = if (at + k).is_multiple_of(3) { BlockState::Zero } else { BlockState::Data };
                layer.set(BlockRange::new(at, 3), state);
                model[to_usize(at)..to_usize(at + 3)].fill(Value::of(state, Slot(n)));
            }
            index = index.overlaid(&layer, Slot(n), &[]);
        }
        for (run, value) in index.runs(BlockRange::new(0, blocks)) {
            assert!(model[to_usize(run.start.0)..to_usize(run.end().0)].iter().all(|known| *known == value));
        }
    }
}
