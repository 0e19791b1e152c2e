//! Where everything goes in a qcow2 file that is only ever appended to: plain logic, no I/O.
//!
//! Owns [`Layout`]. Guest clusters are placed in guest order; a mapping table (L2) is placed as soon as the order has
//! passed its range, the list of mapping tables (L1) and the reference counts come last, and the header, at the start,
//! is what the caller writes after everything else: a file that was not finished is not a qcow2 file. Every host
//! cluster is counted, a compressed one once for each guest cluster that has bytes in it. The bytes are those of the
//! public specification ("qcow2" in QEMU's `docs/interop`), version 3.

use super::{ClusterSize, Compression};
use crate::{
    error::{Error, Result},
    units::to_usize,
};

/// Longest L1 table that readers accept (32 MiB): what bounds the virtual size for a cluster size.
const L1_BYTES_MAX: u64 = 32 << 20;
/// Longest refcount table that readers accept.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// References to one host cluster that 16 bits can count.
const REFCOUNT_MAX: u16 = u16::MAX;
/// An entry's cluster has exactly one reference.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const SECTOR: u64 = 512;
const REFCOUNT_ORDER: u32 = 4;
const HEADER_LEN: u32 = 104;
/// With the compression type, which only others than zlib need.
const HEADER_LEN_COMPRESSION: u32 = 112;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;

/// Bytes that belong at a place of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub at: u64,
    pub bytes: Vec<u8>,
}

/// What has been placed so far.
#[derive(Debug)]
pub struct Layout {
    cluster: ClusterSize,
    virtual_size: u64,
    compression: Option<Compression>,
    /// Offset of each finished L2 table, 0 for none.
    l1: Vec<u64>,
    l2: OpenTable,
    /// References to each host cluster of the file, in order.
    refcounts: Vec<u16>,
    /// Where the next compressed bytes go while their cluster has room: the file's last cluster.
    compressed_end: Option<u64>,
}

/// The mapping table that the guest order is in.
#[derive(Debug)]
struct OpenTable {
    index: u64,
    /// Empty until its first entry.
    entries: Vec<u64>,
}

impl Layout {
    /// An empty image. Refuses sizes that this cluster size cannot address.
    pub fn new(cluster: ClusterSize, virtual_size: u64, compression: Option<Compression>) -> Result<Layout> {
        let l1_len = virtual_size.div_ceil(cluster.bytes() * cluster.entries()).max(1);
        let clusters = virtual_size.div_ceil(cluster.bytes());
        // Data, its tables and reference counts are together less than twice the data's own count.
        let refcount_table = clusters.saturating_mul(2).div_ceil(cluster.bytes() / 2).saturating_mul(8);
        if l1_len > L1_BYTES_MAX / 8 || refcount_table > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Error::Invalid(format!(
                "{virtual_size} bytes are too many for clusters of {} bytes; choose larger clusters",
                cluster.bytes()
            )));
        }
        Ok(Layout {
            cluster,
            virtual_size,
            compression,
            l1: vec![0; to_usize(l1_len)],
            l2: OpenTable { index: 0, entries: Vec::new() },
            // The header's.
            refcounts: vec![1],
            compressed_end: None,
        })
    }

    /// Place a guest cluster that is stored as it is. Returns its offset in the file; a finished table goes to `out`.
    pub fn place(&mut self, guest: u64, out: &mut Vec<Placed>) -> u64 {
        self.turn_to(guest, out);
        let at = self.allocate(1);
        self.map(guest, at | COPIED);
        at
    }

    /// Place a guest cluster's `len` compressed bytes (fewer than a cluster). Returns their offset in the file, which
    /// follows the previous ones where it can.
    pub fn place_compressed(&mut self, guest: u64, len: u64, out: &mut Vec<Placed>) -> u64 {
        debug_assert!(len > 0 && len < self.cluster.bytes());
        self.turn_to(guest, out);
        // After the previous ones, while their last cluster can be counted once more; else from the next cluster on.
        let shared = self.compressed_end.filter(|_| self.refcounts.last().is_some_and(|c| *c < REFCOUNT_MAX));
        let at = shared.unwrap_or(self.clusters() * self.cluster.bytes());
        let (first, last) = (at / self.cluster.bytes(), (at + len - 1) / self.cluster.bytes());
        self.refcounts.resize(to_usize(last + 1), 0);
        self.refcounts.iter_mut().skip(to_usize(first)).for_each(|count| *count += 1);
        let end = at + len;
        self.compressed_end = (!end.is_multiple_of(self.cluster.bytes())).then_some(end);
        let sectors_more = (at + len - 1) / SECTOR - at / SECTOR;
        self.map(guest, COMPRESSED | (sectors_more << (62 - (self.cluster.bits() - 8))) | at);
        at
    }

    /// Place the last table, the L1 table and the reference counts, and make the header, which is to be written when
    /// everything else is. No more clusters follow.
    pub fn finish(mut self, out: &mut Vec<Placed>) -> Placed {
        self.close_table(out);
        let l1_at = self.append(&bytes_of(&self.l1), out);
        let l1_len = self.l1.len();

        // The blocks and the table count themselves.
        let (per_block, cluster) = (self.cluster.bytes() / 2, self.cluster.bytes());
        let (mut blocks, mut table) = (0_u64, 0_u64);
        loop {
            let total = self.clusters() + blocks + table;
            let (needed_blocks, needed_table) = (total.div_ceil(per_block), (blocks * 8).div_ceil(cluster));
            if (needed_blocks, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed_blocks, needed_table.max(table));
        }
        let blocks_at = self.allocate(blocks);
        let table_at = self.allocate(table);
        let mut counts = Vec::with_capacity(self.refcounts.len() * 2);
        self.refcounts.iter().for_each(|count| counts.extend(count.to_be_bytes()));
        counts.resize(to_usize(blocks * cluster), 0);
        out.push(Placed { at: blocks_at, bytes: counts });
        let mut block_offsets: Vec<u64> = (0..blocks).map(|n| blocks_at + n * cluster).collect();
        block_offsets.resize(to_usize(table * cluster / 8), 0);
        out.push(Placed { at: table_at, bytes: bytes_of(&block_offsets) });

        Placed { at: 0, bytes: self.header(l1_at, l1_len, table_at, table) }
    }

    fn header(&self, l1_at: u64, l1_len: usize, table_at: u64, table_clusters: u64) -> Vec<u8> {
        let (compression_type, incompatible, header_len) = match self.compression {
            None | Some(Compression::Zlib) => (0_u8, 0, HEADER_LEN),
            Some(Compression::Zstd) => (1, INCOMPATIBLE_COMPRESSION, HEADER_LEN_COMPRESSION),
        };
        let mut header = Vec::with_capacity(self.cluster.as_usize());
        header.extend(b"QFI\xfb");
        header.extend(3_u32.to_be_bytes());
        header.extend(0_u64.to_be_bytes()); // no backing file
        header.extend(0_u32.to_be_bytes());
        header.extend(self.cluster.bits().to_be_bytes());
        header.extend(self.virtual_size.to_be_bytes());
        header.extend(0_u32.to_be_bytes()); // not encrypted
        header.extend(u32::try_from(l1_len).unwrap_or(u32::MAX).to_be_bytes());
        header.extend(l1_at.to_be_bytes());
        header.extend(table_at.to_be_bytes());
        header.extend(u32::try_from(table_clusters).unwrap_or(u32::MAX).to_be_bytes());
        header.extend(0_u32.to_be_bytes()); // no snapshots
        header.extend(0_u64.to_be_bytes());
        header.extend(u64::to_be_bytes(incompatible));
        header.extend(0_u64.to_be_bytes()); // compatible features
        header.extend(0_u64.to_be_bytes()); // autoclear features
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend(header_len.to_be_bytes());
        if header_len > HEADER_LEN {
            header.extend([compression_type, 0, 0, 0, 0, 0, 0, 0]);
        }
        // No extensions follow, which eight zero bytes say; the rest of the cluster is zeros.
        header.resize(self.cluster.as_usize(), 0);
        header
    }

    /// Make `guest`'s mapping table the open one.
    fn turn_to(&mut self, guest: u64, out: &mut Vec<Placed>) {
        let index = guest / self.cluster.bytes() / self.cluster.entries();
        debug_assert!(index >= self.l2.index, "guest clusters come in order");
        if index != self.l2.index {
            self.close_table(out);
            self.l2.index = index;
        }
    }

    fn map(&mut self, guest: u64, entry: u64) {
        let entries = to_usize(self.cluster.entries());
        self.l2.entries.resize(entries, 0);
        let slot = usize::try_from(guest / self.cluster.bytes() % self.cluster.entries()).unwrap_or(entries);
        if let Some(slot) = self.l2.entries.get_mut(slot) {
            *slot = entry;
        }
    }

    fn close_table(&mut self, out: &mut Vec<Placed>) {
        if self.l2.entries.is_empty() {
            return;
        }
        let entries = std::mem::take(&mut self.l2.entries);
        let at = self.append(&bytes_of(&entries), out);
        let index = to_usize(self.l2.index);
        if let Some(slot) = self.l1.get_mut(index) {
            *slot = at | COPIED;
        }
    }

    fn append(&mut self, bytes: &[u8], out: &mut Vec<Placed>) -> u64 {
        let clusters = (bytes.len() as u64).div_ceil(self.cluster.bytes());
        let at = self.allocate(clusters);
        let mut bytes = bytes.to_vec();
        bytes.resize(to_usize(clusters) * self.cluster.as_usize(), 0);
        out.push(Placed { at, bytes });
        at
    }

    /// The next `count` clusters of the file, each with one reference.
    fn allocate(&mut self, count: u64) -> u64 {
        let at = self.clusters() * self.cluster.bytes();
        self.refcounts.resize(self.refcounts.len() + to_usize(count), 1);
        self.compressed_end = None;
        at
    }

    fn clusters(&self) -> u64 {
        self.refcounts.len() as u64
    }
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_cannot_be_counted_any_more_is_not_shared_any_further() {
        let cluster = ClusterSize::new(2 << 20).unwrap();
        let mut layout = Layout::new(cluster, 140_000 * cluster.bytes(), Some(Compression::Zstd)).unwrap();
        let mut tables = Vec::new();
        let places: Vec<u64> =
            (0..70_000).map(|n| layout.place_compressed(n * cluster.bytes(), 3, &mut tables)).collect();
        assert_eq!(places[65_534], cluster.bytes() + 3 * 65_534);
        assert_eq!(places[65_535], 2 * cluster.bytes());
        assert_eq!(layout.refcounts, [1, 65_535, 4_465]);
    }

    #[test]
    fn compressed_bytes_that_cross_into_the_next_cluster_count_in_both() {
        let cluster = ClusterSize::new(512).unwrap();
        let mut layout = Layout::new(cluster, 1 << 20, Some(Compression::Zlib)).unwrap();
        let mut tables = Vec::new();
        let places: Vec<u64> = (0..3).map(|n| layout.place_compressed(n * 512, 300, &mut tables)).collect();
        assert_eq!(places, [512, 812, 1112]);
        assert_eq!(layout.refcounts, [1, 2, 2]);
        // What is stored as it is begins a cluster of its own, and what is compressed after it another.
        assert_eq!(layout.place(3 * 512, &mut tables), 3 * 512);
        assert_eq!(layout.place_compressed(4 * 512, 1, &mut tables), 4 * 512);
        assert_eq!(layout.refcounts, [1, 2, 2, 1, 1]);
    }

    #[test]
    fn a_finished_table_is_placed_when_the_order_has_passed_it() {
        let cluster = ClusterSize::new(512).unwrap();
        let mut layout = Layout::new(cluster, 1 << 20, None).unwrap();
        let mut tables = Vec::new();
        layout.place(0, &mut tables);
        assert!(tables.is_empty());
        layout.place(5 * 64 * 512, &mut tables);
        assert_eq!(tables.len(), 1);
        assert_eq!((tables[0].at, tables[0].bytes.len()), (2 * 512, 512));
        assert_eq!(layout.l1[0], 1024 | COPIED);
        assert_eq!(layout.l1[5], 0);
    }
}
