//! The copy-on-write core: plain logic, without I/O, time or threads.
//!
//! [`head`] and [`frozen`] say what each block of a volume is, [`plan`] answers where the bytes of a range are,
//! [`core`] decides what happens to changes: admission, block [`ownership`], barriers, the commit cut, group commit.
//! [`map`] is the codec of a layer's map file (`docs/format.md`). Executors (`crate::exec`) carry out what the core
//! asks for; volumes (`crate::volume`) give it layers.

pub mod blocks;
pub mod changes;
pub mod core;
pub mod frozen;
pub mod head;
pub mod map;
pub mod ownership;
pub mod plan;

/// What a block is in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Nothing was written here by this generation: look below.
    Absent,
    /// In this layer's file, at the same offset.
    Data,
    /// Zeros, whatever lies below.
    Zero,
}

/// Blocks of a leaf, the unit in which indexes and checkpoints are kept: 128 MiB of the volume.
pub const LEAF_BLOCKS: u64 = 32768;
/// 64-bit words of a leaf's bitmap.
pub const LEAF_WORDS: usize = 512;
/// Bytes of a leaf's bitmap.
pub const LEAF_BITMAP_BYTES: usize = 4096;

/// Number of leaves that cover `blocks`.
pub const fn leaf_count(blocks: u64) -> usize {
    crate::units::to_usize(blocks.div_ceil(LEAF_BLOCKS))
}
