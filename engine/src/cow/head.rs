//! The head index: what each block of a layer is, changed in place and read without a lock.
//!
//! Owns [`HeadIndex`] and its [`Leaf`]s. One writer at a time (the core, under its volume's lock), any number of
//! readers on any thread. Two bits a block, kept in two bitmaps that exist only where they are needed:
//!
//! - `data` set: the block is *data*, whatever `hidden` says;
//! - `data` clear, `hidden` set: the block is *zero*;
//! - both clear: the block is *absent*.
//!
//! Invariant: `hidden` is never cleared. Zero to data sets `data`; data to zero sets `hidden` first and clears `data`
//! after it; a reader looks at `data` first and at `hidden` after it. So no reader ever sees *absent* between *zero*
//! and *data* (design.md, "Map"), and a state and its layer change in one atomic step.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{BlockState, LEAF_BITMAP_BYTES, LEAF_BLOCKS, LEAF_WORDS, blocks::Touched, leaf_count};
use crate::units::{Block, BlockCount, BlockRange, to_usize};

/// Runs of one leaf that [`HeadIndex::written`] tells apart.
const WRITTEN_RUNS_MAX: usize = 64;

type Bits = Box<[AtomicU64; LEAF_WORDS]>;

/// The states of the blocks of one layer.
#[derive(Debug)]
pub struct HeadIndex {
    block_count: BlockCount,
    leaves: Box<[OnceLock<Arc<Leaf>>]>,
}

/// The states of [`LEAF_BLOCKS`] blocks. Memory follows what was written: a leaf that was zeroed whole has no bitmaps.
#[derive(Debug, Default)]
pub struct Leaf {
    data: OnceLock<Bits>,
    hidden: OnceLock<Bits>,
    /// Every block of the leaf is hidden; stands for a `hidden` of ones.
    all_hidden: AtomicBool,
}

/// A leaf's bitmap as a checkpoint keeps it.
#[derive(Clone, Copy, Debug)]
pub enum Bitmap<'a> {
    None,
    All,
    /// Bit `n % 8` of byte `n / 8` is block `n` of the leaf.
    Bits(&'a [u8; LEAF_BITMAP_BYTES]),
}

impl Bitmap<'_> {
    fn word(&self, word: usize) -> u64 {
        match self {
            Bitmap::None => 0,
            Bitmap::All => u64::MAX,
            Bitmap::Bits(bytes) => u64::from_le_bytes(bytes.as_chunks::<8>().0[word]),
        }
    }

    fn to_bits(self) -> Bits {
        let words: Box<[AtomicU64]> = (0..LEAF_WORDS).map(|word| AtomicU64::new(self.word(word))).collect();
        words.try_into().expect("as many words as a leaf has")
    }
}

fn new_bits() -> Bits {
    Box::new([const { AtomicU64::new(0) }; LEAF_WORDS])
}

/// The words that the bits `[first, first + count)` touch, each with the mask of these bits.
pub(super) fn masks(first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first + count;
    (first / 64..end.div_ceil(64)).map(move |word| {
        let low = first.max(word * 64) - word * 64;
        let high = end.min(word * 64 + 64) - word * 64;
        let ones = if high - low == 64 { u64::MAX } else { ((1u64 << (high - low)) - 1) << low };
        (to_usize(word), ones)
    })
}

impl Leaf {
    /// The word of data bits, then the word of hidden bits: in this order (see the file's header).
    fn words(&self, word: usize) -> (u64, u64) {
        let data = self.data.get().map_or(0, |bits| bits[word].load(Ordering::Acquire));
        let hidden = if self.all_hidden.load(Ordering::Acquire) {
            u64::MAX
        } else {
            self.hidden.get().map_or(0, |bits| bits[word].load(Ordering::Acquire))
        };
        (data, hidden)
    }

    /// Data bits and zero bits of a word, which exclude one another.
    pub fn data_and_zero(&self, word: usize) -> (u64, u64) {
        let (data, hidden) = self.words(word);
        (data, hidden & !data)
    }

    /// The state at `bit` and how many bits from there on, at most `limit`, share it.
    pub(super) fn run_at(&self, bit: u64, limit: u64) -> (BlockState, u64) {
        let end = bit + limit;
        let mut at = bit;
        let mut first = None;
        while at < end {
            let (data, zero) = self.data_and_zero(to_usize(at / 64));
            let shift = at % 64;
            let state = match ((data >> shift) & 1, (zero >> shift) & 1) {
                (1, _) => BlockState::Data,
                (_, 1) => BlockState::Zero,
                _ => BlockState::Absent,
            };
            if *first.get_or_insert(state) != state {
                break;
            }
            let same = match state {
                BlockState::Data => data,
                BlockState::Zero => zero,
                BlockState::Absent => !(data | zero),
            };
            let run = u64::from((!(same >> shift)).trailing_zeros()).min(64 - shift);
            at += run;
            if run < 64 - shift {
                break;
            }
        }
        (first.unwrap_or(BlockState::Absent), at.min(end) - bit)
    }

    /// Heap bytes of this leaf.
    pub fn memory_bytes(&self) -> usize {
        let bitmaps = usize::from(self.data.get().is_some()) + usize::from(self.hidden.get().is_some());
        size_of::<Leaf>() + bitmaps * size_of::<[AtomicU64; LEAF_WORDS]>()
    }

    fn set_data(&self, first: u64, count: u64) {
        let data = self.data.get_or_init(new_bits);
        for (word, mask) in masks(first, count) {
            data[word].fetch_or(mask, Ordering::Release);
        }
    }

    fn set_zero(&self, first: u64, count: u64) {
        if count == LEAF_BLOCKS {
            self.all_hidden.store(true, Ordering::Release);
        } else if !self.all_hidden.load(Ordering::Relaxed) {
            let hidden = self.hidden.get_or_init(new_bits);
            for (word, mask) in masks(first, count) {
                hidden[word].fetch_or(mask, Ordering::Release);
            }
        }
        if let Some(data) = self.data.get() {
            for (word, mask) in masks(first, count) {
                data[word].fetch_and(!mask, Ordering::Release);
            }
        }
    }
}

impl HeadIndex {
    /// An index in which every block is absent.
    pub fn new(block_count: BlockCount) -> HeadIndex {
        let leaves = (0..leaf_count(block_count.0)).map(|_| OnceLock::new()).collect();
        HeadIndex { block_count, leaves }
    }

    /// The same states for a device of at least as many blocks; leaves are shared, so the old index must not be
    /// changed any more.
    pub fn grown(&self, block_count: BlockCount) -> HeadIndex {
        debug_assert!(block_count >= self.block_count);
        let grown = HeadIndex::new(block_count);
        for (slot, leaf) in grown.leaves.iter().zip(&self.leaves) {
            if let Some(leaf) = leaf.get() {
                let _ = slot.set(leaf.clone());
            }
        }
        grown
    }

    /// Put a leaf of a checkpoint in its place. `false`, and nothing is put: a block is both *data* and *zero*, or lies
    /// past the end, or the place is taken.
    pub fn load(&self, number: usize, data: Bitmap<'_>, zero: Bitmap<'_>) -> bool {
        let start = number as u64 * LEAF_BLOCKS;
        let Some(blocks) = self.block_count.0.checked_sub(start).map(|left| left.min(LEAF_BLOCKS)) else {
            return false;
        };
        let one_only = matches!(data, Bitmap::None) || matches!(zero, Bitmap::None);
        let apart = one_only || (0..LEAF_WORDS).all(|word| data.word(word) & zero.word(word) == 0);
        let inside = (to_usize(blocks / 64)..LEAF_WORDS).all(|word| {
            let blocks_here = blocks.saturating_sub(word as u64 * 64).min(64);
            let outside = if blocks_here == 64 { 0 } else { u64::MAX << blocks_here };
            (data.word(word) | zero.word(word)) & outside == 0
        });
        if !apart || !inside {
            return false;
        }
        let leaf = Leaf { all_hidden: AtomicBool::new(matches!(zero, Bitmap::All)), ..Leaf::default() };
        if !matches!(data, Bitmap::None) {
            let _ = leaf.data.set(data.to_bits());
        }
        if matches!(zero, Bitmap::Bits(_)) {
            let _ = leaf.hidden.set(zero.to_bits());
        }
        self.leaves.get(number).is_some_and(|slot| slot.set(Arc::new(leaf)).is_ok())
    }

    pub fn block_count(&self) -> BlockCount {
        self.block_count
    }

    pub fn leaf_count(&self) -> usize {
        self.leaves.len()
    }

    /// The leaf with this number, if anything in it was ever changed.
    pub fn leaf(&self, number: usize) -> Option<&Arc<Leaf>> {
        self.leaves.get(number)?.get()
    }

    /// The state at `range.start` and how many blocks of `range` from there on share it. Blocks past the end of the
    /// index are absent. `range` is not empty.
    pub fn run_at(&self, range: BlockRange) -> (BlockState, BlockCount) {
        debug_assert!(!range.is_empty());
        let start = range.start.0;
        let in_leaf = start % LEAF_BLOCKS;
        let limit = range.count.0.min(LEAF_BLOCKS - in_leaf);
        match self.leaf(to_usize(start / LEAF_BLOCKS)) {
            None => (BlockState::Absent, BlockCount(limit)),
            Some(leaf) => {
                let (state, run) = leaf.run_at(in_leaf, limit);
                (state, BlockCount(run))
            }
        }
    }

    /// The state of one block.
    pub fn state(&self, block: Block) -> BlockState {
        self.run_at(BlockRange { start: block, count: BlockCount(1) }).0
    }

    /// Whether every block of `range` has `state`.
    pub fn all(&self, range: BlockRange, state: BlockState) -> bool {
        self.runs(range).all(|(_, found)| found == state)
    }

    /// The runs of `range`, in order.
    pub fn runs(&self, range: BlockRange) -> impl Iterator<Item = (BlockRange, BlockState)> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end()).then(|| {
                let (state, count) = self.run_at(BlockRange { start: at, count: range.end().since(at) });
                let run = BlockRange { start: at, count };
                at = run.end();
                (run, state)
            })
        })
    }

    /// At least every block that is not absent; a leaf of more than `WRITTEN_RUNS_MAX` runs counts whole.
    pub fn written(&self) -> Touched {
        let mut written = Touched::default();
        for number in (0..self.leaves.len()).filter(|number| self.leaf(*number).is_some()) {
            let start = number as u64 * LEAF_BLOCKS;
            let all = BlockRange::new(start, LEAF_BLOCKS.min(self.block_count.0 - start));
            let mut runs =
                self.runs(all).filter(|(_, state)| *state != BlockState::Absent).map(|(run, _)| run);
            let first: Vec<BlockRange> = runs.by_ref().take(WRITTEN_RUNS_MAX).collect();
            match runs.next() {
                None => first.into_iter().for_each(|run| written.add(run)),
                Some(_) => written.add(all),
            }
        }
        written
    }

    /// Heap bytes of this index.
    pub fn memory_bytes(&self) -> usize {
        let leaves = self.leaves.iter().filter_map(OnceLock::get);
        self.leaves.len() * size_of::<OnceLock<Arc<Leaf>>>()
            + leaves.map(|leaf| leaf.memory_bytes()).sum::<usize>()
    }

    /// Make `range` *data* or *zero*. The only writer is the core, under its volume's lock. A block never becomes
    /// absent again, so [`BlockState::Absent`] changes nothing.
    pub fn set(&self, range: BlockRange, state: BlockState) {
        debug_assert!(range.end().0 <= self.block_count.0);
        let mut at = range.start.0;
        let end = range.end().0;
        while at < end {
            let first = at % LEAF_BLOCKS;
            let count = (end - at).min(LEAF_BLOCKS - first);
            let leaf = self.leaves[to_usize(at / LEAF_BLOCKS)].get_or_init(Arc::default);
            match state {
                BlockState::Data => leaf.set_data(first, count),
                BlockState::Zero => leaf.set_zero(first, count),
                BlockState::Absent => {}
            }
            at += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_agree_with_a_plain_vector_over_leaf_borders() {
        let blocks = LEAF_BLOCKS * 2 + 100;
        let index = HeadIndex::new(BlockCount(blocks));
        let mut model = vec![BlockState::Absent; to_usize(blocks)];
        let mut seed = 7u64;
        for _ in 0..3000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 20) % blocks;
            let count = (1 + (seed >> 50) % 700).min(blocks - start);
            let state = if seed & (1 << 40) == 0 { BlockState::Data } else { BlockState::Zero };
            index.set(BlockRange::new(start, count), state);
            model[to_usize(start)..to_usize(start + count)].fill(state);
        }
        for (run, state) in index.runs(BlockRange::new(0, blocks)) {
            assert!(model[to_usize(run.start.0)..to_usize(run.end().0)].iter().all(|s| *s == state), "{run}");
        }
    }

    #[test]
    fn a_leaf_zeroed_whole_keeps_no_bitmap_and_takes_writes_after_it() {
        let index = HeadIndex::new(BlockCount(LEAF_BLOCKS));
        index.set(BlockRange::new(0, LEAF_BLOCKS), BlockState::Zero);
        assert!(index.leaf(0).is_some_and(|leaf| leaf.hidden.get().is_none()));
        index.set(BlockRange::new(5, 1), BlockState::Data);
        index.set(BlockRange::new(5, 1), BlockState::Zero);
        assert!(index.all(BlockRange::new(0, LEAF_BLOCKS), BlockState::Zero));
    }

    #[test]
    fn no_reader_sees_absent_between_zero_and_data() {
        let index = Arc::new(HeadIndex::new(BlockCount(64)));
        index.set(BlockRange::new(3, 1), BlockState::Data);
        let writer = std::thread::spawn({
            let index = index.clone();
            move || {
                for _ in 0..200_000 {
                    index.set(BlockRange::new(3, 1), BlockState::Zero);
                    index.set(BlockRange::new(3, 1), BlockState::Data);
                }
            }
        });
        while !writer.is_finished() {
            assert_ne!(index.state(Block(3)), BlockState::Absent);
        }
        writer.join().expect("the writer does not panic");
    }
}
