//! The refcount table and its blocks.
//!
//! Owns [`Refcounts`]: how often each cluster of the file is said to be used. Nothing here is needed to read an image;
//! `check` compares it with what the tables refer to, and opening asks it where the blocks are, because no guest byte
//! lies in them.

use std::{ops::Range, sync::Arc};

use super::{
    fault::{EntryAt, Fault, be16, be32, be64},
    header::{Geometry, RefcountRef},
    source::Source,
};
use crate::{
    error::{EntryProblem, Result},
    units::to_usize,
};

const RESERVED: u64 = 0x1ff;

#[derive(Debug)]
pub struct Refcounts {
    file: Arc<Source>,
    geometry: Geometry,
    table: RefcountRef,
    /// Entries of the table, as far as the file has them.
    entries: Box<[u64]>,
}

impl Refcounts {
    /// Read the table. What it points at is not looked at yet.
    pub fn open(file: Arc<Source>, geometry: Geometry, table: RefcountRef) -> Result<Refcounts> {
        let bytes = file.bytes_up_to(table.range.start.0, table.range.len.0, "refcount table")?;
        let entries = bytes.chunks_exact(8).map(|entry| be64(entry, 0).unwrap_or_default()).collect();
        Ok(Refcounts { file, geometry, table, entries })
    }

    /// Clusters that one block counts.
    pub fn clusters_per_block(&self) -> u64 {
        (self.geometry.cluster_size() * 8) >> self.table.order
    }

    /// Number of blocks that the table has room for, as far as the file goes.
    pub fn block_count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Where the block with this index lies; none if it is not allocated. A fault says what is wrong with its entry.
    pub fn block(&self, index: u64) -> Result<Option<u64>, Fault> {
        let Some(&value) = self.entries.get(to_usize(index)) else { return Ok(None) };
        if value == 0 {
            return Ok(None);
        }
        let problem = if value & RESERVED != 0 {
            EntryProblem::Reserved
        } else if !value.is_multiple_of(self.geometry.cluster_size()) {
            EntryProblem::Unaligned
        } else if !self.file.holds(value, 1) {
            EntryProblem::PastEnd
        } else {
            return Ok(Some(value));
        };
        let at = self.table.range.start.0 + index * 8;
        Err(Fault::entry(EntryAt { table: "refcount table", index, value, at }, problem))
    }

    /// The table and its sound blocks, as ranges of the file.
    pub fn metadata(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let table = self.table.range;
        let blocks = (0..self.block_count()).filter_map(|index| self.block(index).ok().flatten());
        let cluster_size = self.geometry.cluster_size();
        let blocks = blocks.map(move |at| at..at.saturating_add(cluster_size));
        std::iter::once(table.start.0..table.end().0).chain(blocks)
    }

    /// The refcounts of one block; none are there for a block that is not allocated, and what the end of the file cuts
    /// off is 0.
    pub fn read_block(&self, index: u64) -> Result<Vec<u64>> {
        let Some(at) = self.block(index).map_err(|fault| fault.of(self.file.path()))? else {
            return Ok(Vec::new());
        };
        let len = self.geometry.cluster_size();
        let mut bytes = self.file.bytes_up_to(at, len, "refcount block")?;
        bytes.resize(to_usize(len), 0);
        let mut counts = Vec::with_capacity(to_usize(self.clusters_per_block()));
        counts
            .extend((0..to_usize(self.clusters_per_block())).map(|n| count_at(&bytes, self.table.order, n)));
        Ok(counts)
    }
}

/// The `n`-th refcount of a block whose refcounts are `1 << order` bits wide. Those of less than a byte begin with the
/// low bits.
fn count_at(block: &[u8], order: u32, n: usize) -> u64 {
    let count = match order {
        0..=2 => {
            let (bits, per_byte) = (1_usize << order, 8_usize >> order);
            block.get(n / per_byte).map(|byte| u64::from(*byte >> (n % per_byte * bits)) & ((1 << bits) - 1))
        }
        3 => block.get(n).copied().map(u64::from),
        4 => be16(block, n * 2).map(u64::from),
        5 => be32(block, n * 4).map(u64::from),
        _ => be64(block, n * 8),
    };
    count.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_read() {
        let block = [0b1110_0100, 0x1b, 0, 0, 0, 0, 0x01, 0x02, 0xff];
        let counts =
            |order, range: Range<usize>| -> Vec<u64> { range.map(|n| count_at(&block, order, n)).collect() };
        assert_eq!(counts(0, 0..8), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!(counts(1, 0..6), [0, 1, 2, 3, 3, 2]);
        assert_eq!(counts(2, 0..3), [4, 14, 11]);
        assert_eq!(counts(3, 0..2), [0xe4, 0x1b]);
        assert_eq!(counts(4, 0..1), [0xe41b]);
        assert_eq!(counts(5, 0..2), [0xe41b_0000, 0x0102]);
        assert_eq!(counts(6, 0..1), [0xe41b_0000_0000_0102]);
    }
}
