//! The tables of a qcow2 file as they stand, for those who judge them.
//!
//! Owns [`QcowFile`], a file with its header, and [`L2Entry`], an entry with every bit that the file has. The engine's
//! reader hides what it refuses; `check` and `dump` show it. Nothing here is trusted: offsets are held against the
//! file whenever they are followed.

use std::{fs::File, ops::Range, path::Path};

use bedplate_engine::{
    error::{Error, Result},
    image::qcow2::{
        Qcow2Layer, SNAPSHOT_TABLE_BYTES_MAX, Source, UnverifiedHeader, View,
        header::{BitmapsState, Geometry, Header, L1Ref, L2Format, PEEK_LEN, Version},
    },
    units::ByteOffset,
};

pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// A qcow2 file and its header.
pub struct QcowFile {
    pub source: Source,
    /// As the engine reads it.
    pub layer: Qcow2Layer,
}

impl QcowFile {
    /// Fails where the header is not one that can be followed.
    pub fn open(file: File, path: &Path) -> Result<QcowFile> {
        let again = file.try_clone().map_err(|e| Error::io("open", path, e))?;
        let layer = Qcow2Layer::open(again, path, &View::Active)?;
        Ok(QcowFile { source: Source::new(file, path)?, layer })
    }

    pub fn header(&self) -> &Header {
        self.layer.header()
    }

    pub fn geometry(&self) -> Geometry {
        self.header().geometry
    }

    /// The words of a table, as far as the file has them.
    pub fn words(&self, at: u64, count: u64, what: &'static str) -> Result<Vec<u64>> {
        let bytes = self.source.bytes_up_to(at, count.saturating_mul(8), what)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    pub fn l1(&self, table: L1Ref) -> Result<Vec<u64>> {
        self.words(table.offset.0, table.entries.into(), "L1 table")
    }

    /// The L2 table at `at`, as far as the file has it.
    pub fn l2(&self, at: u64) -> Result<Vec<L2Entry>> {
        let words = self.words(at, self.geometry().cluster_size() / 8, "L2 table")?;
        Ok(match self.geometry().l2_format() {
            L2Format::Standard => words.into_iter().map(|word| L2Entry { word, bitmap: None }).collect(),
            L2Format::Extended => {
                let (pairs, _) = words.as_chunks::<2>();
                pairs.iter().map(|[word, bitmap]| L2Entry { word: *word, bitmap: Some(*bitmap) }).collect()
            }
        })
    }

    /// What an entry says.
    pub fn decode(&self, entry: L2Entry) -> Decoded {
        let geometry = self.geometry();
        let L2Entry { word, bitmap } = entry;
        if word & COMPRESSED != 0 {
            let offset_bits = 62 - (geometry.cluster_bits() - 8);
            let host = word & ((1 << offset_bits) - 1);
            let sectors = (word >> offset_bits) & ((1 << (geometry.cluster_bits() - 8)) - 1);
            let len = (sectors + 1) * 512 - (host & 511);
            return Decoded::Compressed { host: ByteOffset(host), len };
        }
        let host = ByteOffset(word & OFFSET);
        // Only a file of its own can hold a cluster at offset 0.
        let external = self.header().data_file.is_some();
        let is_zero = bitmap.is_none() && self.header().version == Version::V3 && word & ZERO != 0;
        let has_host = host.0 != 0 || (external && word & COPIED != 0 && !is_zero);
        match (is_zero, has_host) {
            (true, true) => Decoded::Zero { host: Some(host) },
            (true, false) => Decoded::Zero { host: None },
            (false, true) => Decoded::Data { host },
            (false, false) => Decoded::Unallocated,
        }
    }

    /// Bits that are set and must not be.
    pub fn reserved(&self, entry: L2Entry) -> u64 {
        let zero_bit = match (entry.bitmap, self.header().version) {
            (None, Version::V3) => 0,
            (Some(_), _) | (None, Version::V2) => ZERO,
        };
        if entry.word & COMPRESSED != 0 { 0 } else { entry.word & (L2_RESERVED | zero_bit) }
    }

    /// Bytes of the snapshot table, which the header does not say.
    pub fn snapshot_table_len(&self) -> Result<u64> {
        let table = self.header().snapshots;
        let bytes = self.source.bytes_up_to(table.offset, SNAPSHOT_TABLE_BYTES_MAX, "snapshot table")?;
        let mut end: usize = 0;
        for _ in 0..table.count {
            let start = end.next_multiple_of(8);
            let len = bytes.get(start..).and_then(|entry| {
                let text = usize::from(be16(entry, 12)?) + usize::from(be16(entry, 14)?);
                usize::try_from(be32(entry, 36)?).ok()?.checked_add(40 + text)
            });
            match len.and_then(|len| start.checked_add(len)).filter(|end| *end <= bytes.len()) {
                Some(entry_end) => end = entry_end,
                None => break,
            }
        }
        Ok(end as u64)
    }

    /// Where bitmaps lie. None without bitmaps, or with
    /// ones that something made stale: their clusters belong to nobody.
    pub fn bitmap_tables(&self) -> Result<Option<BitmapTables>> {
        let Some(bitmaps) = self.header().bitmaps else { return Ok(None) };
        if bitmaps.state == BitmapsState::Stale {
            return Ok(None);
        }
        // Refuses a directory that is out of bounds or cannot be parsed.
        let count = self.layer.bitmaps()?.len();
        let bytes = self.source.bytes(bitmaps.directory, bitmaps.directory_len, "bitmap directory")?;
        let mut tables = Vec::with_capacity(count);
        let mut start: usize = 0;
        for _ in 0..count {
            let Some(entry) = bytes.get(start..) else { break };
            let (Some(at), Some(entries)) = (be64(entry, 0), be32(entry, 8)) else { break };
            tables.push((at, entries));
            let (Some(name), Some(extra)) = (be16(entry, 18), be32(entry, 20)) else { break };
            let len = usize::try_from(extra).unwrap_or(usize::MAX).saturating_add(24 + usize::from(name));
            start = start.saturating_add(len).next_multiple_of(8);
        }
        let directory = bitmaps.directory..bitmaps.directory + bitmaps.directory_len;
        Ok(Some(BitmapTables { directory, tables }))
    }
}

/// The header's fields, whatever they say.
pub fn raw_header(source: &Source) -> Result<UnverifiedHeader> {
    let start = source.bytes_up_to(0, PEEK_LEN, "qcow2 header")?;
    let area = source.bytes_up_to(0, UnverifiedHeader::area_len(&start), "qcow2 header")?;
    UnverifiedHeader::parse(&area).map_err(|fault| fault.of(source.path()))
}

/// Where bitmaps lie.
pub struct BitmapTables {
    pub directory: Range<u64>,
    /// Offset and number of entries of each bitmap's table.
    pub tables: Vec<(u64, u32)>,
}

/// An entry as the file has it; only extended entries have a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry {
    pub word: u64,
    pub bitmap: Option<u64>,
}

impl L2Entry {
    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }
}

/// What an entry says, sound or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    Unallocated,
    Zero { host: Option<ByteOffset> },
    Data { host: ByteOffset },
    Compressed { host: ByteOffset, len: u64 },
}

/// The two bytes at `at`.
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// The four bytes at `at`.
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// The eight bytes at `at`.
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_be_bytes)
}
