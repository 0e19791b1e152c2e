//! The address spaces of a volume and the only conversions between them.
//!
//! Owns [`ByteOffset`], [`ByteLen`], [`ByteRange`], [`Block`], [`BlockCount`] and [`BlockRange`]. Subtracting two
//! blocks gives a count; adding an offset to an offset does not compile. Arithmetic that a caller could overflow is
//! checked here once; past this file a value is known to lie within [`VOLUME_SIZE_MAX`].

use std::fmt;

use crate::error::{Error, Result};

/// Bytes of a block, the unit of copy-on-write and of the map.
pub const BLOCK_SIZE: u64 = 4096;
/// [`BLOCK_SIZE`] for buffers.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a logical sector, the unit that a medium writes whole.
pub const SECTOR_SIZE: u64 = 512;
/// Largest virtual size of a volume or image: 64 TiB.
pub const VOLUME_SIZE_MAX: u64 = 64 << 40;

/// A position in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(pub u64);

/// A length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteLen(pub u64);

/// The number of a 4 KiB block, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

/// A count of 4 KiB blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(pub u64);

impl ByteOffset {
    /// The block that holds this byte.
    pub const fn block(self) -> Block {
        Block(self.0 / BLOCK_SIZE)
    }

    /// Bytes between the start of the block and this byte.
    pub const fn in_block(self) -> u64 {
        self.0 % BLOCK_SIZE
    }

    /// The byte `len` further on. The caller has checked the range ([`ByteRange::within`]).
    pub const fn plus(self, len: ByteLen) -> ByteOffset {
        ByteOffset(self.0 + len.0)
    }

    /// The length from `start` to here; `start` is not past here.
    pub const fn since(self, start: ByteOffset) -> ByteLen {
        ByteLen(self.0 - start.0)
    }
}

impl ByteLen {
    /// The number of blocks that hold this many bytes from a block's start.
    pub const fn blocks_ceil(self) -> BlockCount {
        BlockCount(self.0.div_ceil(BLOCK_SIZE))
    }

    /// As an index type. Lossless: the engine runs on 64-bit machines only.
    pub const fn as_usize(self) -> usize {
        to_usize(self.0)
    }
}

impl Block {
    /// The first byte of this block, in a layer's file and in the volume alike.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * BLOCK_SIZE)
    }

    /// The block `count` further on.
    pub const fn plus(self, count: BlockCount) -> Block {
        Block(self.0 + count.0)
    }

    /// The number of blocks from `start` to here; `start` is not past here.
    pub const fn since(self, start: Block) -> BlockCount {
        BlockCount(self.0 - start.0)
    }
}

impl BlockCount {
    /// Bytes of this many blocks.
    pub const fn len(self) -> ByteLen {
        ByteLen(self.0 * BLOCK_SIZE)
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Lossless conversion for buffer indexes; `usize` has 64 bits wherever this crate compiles.
#[expect(clippy::cast_possible_truncation, reason = "guarded by the assertion below: usize has 64 bits")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}
const _: () = assert!(size_of::<usize>() == 8, "bedplate needs a 64-bit machine");

/// Bytes `[start, start + len)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    pub start: ByteOffset,
    pub len: ByteLen,
}

impl ByteRange {
    pub const fn new(start: u64, len: u64) -> ByteRange {
        ByteRange { start: ByteOffset(start), len: ByteLen(len) }
    }

    /// The range, if it lies within the first `size` bytes; [`Error::OutOfRange`] if not.
    pub fn within(start: u64, len: u64, size: ByteLen) -> Result<ByteRange> {
        match start.checked_add(len) {
            Some(end) if end <= size.0 => Ok(ByteRange::new(start, len)),
            _ => Err(Error::OutOfRange { start, len, size: size.0 }),
        }
    }

    pub const fn end(self) -> ByteOffset {
        ByteOffset(self.start.0 + self.len.0)
    }

    pub const fn is_empty(self) -> bool {
        self.len.0 == 0
    }

    /// Every block that this range touches, whole or in part.
    pub const fn blocks_touched(self) -> BlockRange {
        if self.len.0 == 0 {
            return BlockRange { start: self.start.block(), count: BlockCount(0) };
        }
        let first = self.start.0 / BLOCK_SIZE;
        let last = (self.start.0 + self.len.0 - 1) / BLOCK_SIZE;
        BlockRange { start: Block(first), count: BlockCount(last - first + 1) }
    }

    /// The part of this range in `other`, if any.
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| ByteRange { start, len: end.since(start) })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}+{}", self.start.0, self.len.0)
    }
}

/// Blocks `[start, start + count)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    pub start: Block,
    pub count: BlockCount,
}

impl BlockRange {
    pub const fn new(start: u64, count: u64) -> BlockRange {
        BlockRange { start: Block(start), count: BlockCount(count) }
    }

    pub const fn end(self) -> Block {
        Block(self.start.0 + self.count.0)
    }

    pub const fn is_empty(self) -> bool {
        self.count.0 == 0
    }

    /// The bytes of these blocks.
    pub const fn bytes(self) -> ByteRange {
        ByteRange { start: self.start.offset(), len: self.count.len() }
    }

    pub const fn overlaps(self, other: BlockRange) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    pub const fn contains(self, block: Block) -> bool {
        self.start.0 <= block.0 && block.0 < self.end().0
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}+{}", self.start.0, self.count.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_past_the_end_or_past_u64_is_refused() {
        let size = ByteLen(8192);
        assert!(ByteRange::within(0, 8192, size).is_ok());
        assert!(matches!(ByteRange::within(4096, 4097, size), Err(Error::OutOfRange { .. })));
        assert!(matches!(ByteRange::within(u64::MAX, 2, size), Err(Error::OutOfRange { .. })));
    }

    #[test]
    fn touched_blocks_cover_partial_ends() {
        assert_eq!(ByteRange::new(4095, 2).blocks_touched(), BlockRange::new(0, 2));
        assert_eq!(ByteRange::new(4096, 4096).blocks_touched(), BlockRange::new(1, 1));
        assert!(ByteRange::new(5, 0).blocks_touched().is_empty());
    }
}
