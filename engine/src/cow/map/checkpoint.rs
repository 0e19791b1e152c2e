//! Header, directory and bitmaps of a map file.
//!
//! Owns [`Header`], [`encode`] and [`decode`]. A header parses to [`Header`] only after every field was checked against
//! the others and the file's length; nothing is allocated from a number that was not.

use uuid::Uuid;

use super::{Fields, MAP_LOG_MAX, MAP_LOG_MIN, checksum, log::LOG_SECTOR_LEN, seal};
use crate::{
    cow::{
        LEAF_BITMAP_BYTES, LEAF_BLOCKS, LEAF_WORDS,
        head::{Bitmap, HeadIndex},
        leaf_count,
    },
    error::Corruption,
    units::{BLOCK_SIZE, BlockCount, BlockRange, VOLUME_SIZE_MAX, to_usize},
};

pub const MAGIC: &[u8; 8] = b"BEDPMAP\0";
pub const VERSION: u32 = 1;
pub const HEADER_LEN: usize = 512;
const CHECKSUM_AT: usize = 12;
const DIRECTORY_ENTRY_LEN: usize = 16;
const LOG_ALIGN: u64 = 4096;
/// Generations and sequences count up from far below this; more is not ours, and leaves room to count on.
const COUNTER_MAX: u64 = 1 << 62;

/// The first sector of a map file, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub layer: Uuid,
    pub generation: u64,
    pub block_count: BlockCount,
    /// Sequence of the last commit that the checkpoint contains.
    pub sequence: u64,
    pub leaf_count: u32,
    directory_checksum: u32,
    pub log_offset: u64,
    pub log_len: u64,
    /// Checksum of the header itself: the predecessor of the first log sector.
    pub checksum: u32,
}

/// How long a log a new map file gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLen {
    /// For a head: a quarter of the checkpoint, at least this and at most [`MAP_LOG_MAX`], so that writing checkpoints
    /// never costs more than a few times what the log does.
    Live { least: u64 },
    /// For a layer that takes no more writes: one sector.
    Sealed,
}

impl LogLen {
    /// What a head's map file gets.
    pub const LIVE: LogLen = LogLen::Live { least: MAP_LOG_MIN };
}

/// What a directory says of one leaf.
struct Entry {
    number: u32,
    data: Kind,
    zero: Kind,
    checksum: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    All,
    Bits,
}

impl Kind {
    fn parse(byte: u8, field: &'static str) -> Result<Kind, Corruption> {
        match byte {
            0 => Ok(Kind::None),
            1 => Ok(Kind::All),
            2 => Ok(Kind::Bits),
            value => Err(Corruption::Field { field, value: value.into() }),
        }
    }

    const fn len(self) -> usize {
        match self {
            Kind::None | Kind::All => 0,
            Kind::Bits => LEAF_BITMAP_BYTES,
        }
    }

    /// This bitmap, taken off the front of `bytes` where it has any.
    fn bitmap<'a>(self, bytes: &mut &'a [u8]) -> Result<Bitmap<'a>, Corruption> {
        match self {
            Kind::None => Ok(Bitmap::None),
            Kind::All => Ok(Bitmap::All),
            Kind::Bits => {
                let (bits, rest) = bytes.split_first_chunk().ok_or(Corruption::Truncated("leaf"))?;
                *bytes = rest;
                Ok(Bitmap::Bits(bits))
            }
        }
    }
}

impl Header {
    /// Parse and check the first sector of a file of `file_len` bytes.
    pub fn parse(bytes: &[u8; HEADER_LEN], file_len: u64) -> Result<Header, Corruption> {
        let mut fields = Fields(bytes);
        if fields.take::<8>("map header")? != *MAGIC {
            return Err(Corruption::Magic("map"));
        }
        let version = fields.u32("map header")?;
        if version != VERSION {
            return Err(Corruption::Field { field: "map version", value: version.into() });
        }
        let stored = fields.u32("map header")?;
        if stored != checksum(bytes, CHECKSUM_AT) {
            return Err(Corruption::Checksum("map header"));
        }
        let header = Header {
            layer: Uuid::from_bytes(fields.take("map header")?),
            generation: fields.u64("map header")?,
            block_count: BlockCount(fields.u64("map header")?),
            sequence: fields.u64("map header")?,
            leaf_count: fields.u32("map header")?,
            directory_checksum: fields.u32("map header")?,
            log_offset: fields.u64("map header")?,
            log_len: fields.u64("map header")?,
            checksum: stored,
        };
        header.check(file_len)?;
        Ok(header)
    }

    fn check(&self, file_len: u64) -> Result<(), Corruption> {
        let field = |field, value| Err(Corruption::Field { field, value });
        if self.generation == 0 || self.generation > COUNTER_MAX {
            return field("generation", self.generation);
        }
        if self.sequence > COUNTER_MAX {
            return field("sequence", self.sequence);
        }
        if self.block_count.0 > VOLUME_SIZE_MAX / BLOCK_SIZE {
            return field("block count", self.block_count.0);
        }
        if to_usize(self.leaf_count.into()) > leaf_count(self.block_count.0) {
            return field("leaf count", self.leaf_count.into());
        }
        let bodies = 2 * LEAF_BITMAP_BYTES as u64 * u64::from(self.leaf_count);
        if !self.log_offset.is_multiple_of(LOG_ALIGN)
            || self.log_offset < self.bitmaps_at()
            || self.log_offset > self.bitmaps_at() + bodies + LOG_ALIGN
        {
            return field("log offset", self.log_offset);
        }
        if self.log_len == 0 || !self.log_len.is_multiple_of(512) || self.log_len > MAP_LOG_MAX {
            return field("log length", self.log_len);
        }
        if self.log_offset + self.log_len > file_len {
            return Err(Corruption::Truncated("map log"));
        }
        Ok(())
    }

    /// Bytes of the directory, at [`HEADER_LEN`].
    pub fn directory_len(&self) -> usize {
        to_usize(self.leaf_count.into()) * DIRECTORY_ENTRY_LEN
    }

    fn bitmaps_at(&self) -> u64 {
        HEADER_LEN as u64 + self.directory_len() as u64
    }
}

/// The checkpoint of `index` up to the log, whose bytes are zeros. Also returns the header's checksum, which the first
/// log sector names as its predecessor.
pub fn encode(
    layer: Uuid,
    generation: u64,
    sequence: u64,
    index: &HeadIndex,
    log_len: LogLen,
) -> (Vec<u8>, Header) {
    let mut directory = Vec::new();
    let mut bitmaps = Vec::new();
    let mut leaves = 0u32;
    for number in 0..index.leaf_count() {
        let Some(leaf) = index.leaf(number) else { continue };
        let first = bitmaps.len();
        let mut data = [0u64; LEAF_WORDS];
        let mut zero = [0u64; LEAF_WORDS];
        for (word, (data, zero)) in data.iter_mut().zip(&mut zero).enumerate() {
            (*data, *zero) = leaf.data_and_zero(word);
        }
        let full = (number as u64 + 1) * LEAF_BLOCKS <= index.block_count().0;
        let kinds = [&data, &zero].map(|words| {
            if words.iter().all(|word| *word == 0) {
                0u8
            } else if full && words.iter().all(|word| *word == u64::MAX) {
                1
            } else {
                let at = bitmaps.len();
                bitmaps.resize(at + LEAF_BITMAP_BYTES, 0);
                let (places, _) = bitmaps[at..].as_chunks_mut::<8>();
                for (place, word) in places.iter_mut().zip(words) {
                    *place = word.to_le_bytes();
                }
                2
            }
        });
        if kinds == [0, 0] {
            continue;
        }
        leaves += 1;
        let number = u32::try_from(number).expect("a volume of at most 64 TiB has at most 2^19 leaves");
        directory.extend(number.to_le_bytes());
        directory.extend(kinds);
        directory.extend([0; 2]);
        directory.extend(crc32c::crc32c(&bitmaps[first..]).to_le_bytes());
        directory.extend([0; 4]);
    }
    let directory_checksum = crc32c::crc32c(&directory);
    let log_offset =
        (HEADER_LEN + directory.len() + bitmaps.len()).next_multiple_of(to_usize(LOG_ALIGN)) as u64;
    let log_len = match log_len {
        LogLen::Live { least } => (log_offset / 4).next_multiple_of(LOG_ALIGN).clamp(least, MAP_LOG_MAX),
        LogLen::Sealed => LOG_SECTOR_LEN as u64,
    };
    let mut bytes = Vec::with_capacity(to_usize(log_offset));
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(layer.as_bytes());
    bytes.extend(generation.to_le_bytes());
    bytes.extend(index.block_count().0.to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    bytes.extend(leaves.to_le_bytes());
    bytes.extend(directory_checksum.to_le_bytes());
    bytes.extend(log_offset.to_le_bytes());
    bytes.extend(log_len.to_le_bytes());
    bytes.resize(HEADER_LEN, 0);
    let checksum = seal(&mut bytes, CHECKSUM_AT);
    bytes.extend(directory);
    bytes.extend(bitmaps);
    bytes.resize(to_usize(log_offset), 0);
    let header = Header {
        layer,
        generation,
        block_count: index.block_count(),
        sequence,
        leaf_count: leaves,
        directory_checksum,
        log_offset,
        log_len,
        checksum,
    };
    (bytes, header)
}

/// Gives a file's bytes in order.
pub trait Bitmaps {
    type Error: From<Corruption>;

    /// The next `count` bytes, at most two bitmaps.
    fn take(&mut self, count: usize) -> Result<&[u8], Self::Error>;
}

/// The file's bytes after the directory, in memory.
impl Bitmaps for &[u8] {
    type Error = Corruption;

    fn take(&mut self, count: usize) -> Result<&[u8], Corruption> {
        let (bytes, rest) = self.split_at_checked(count).ok_or(Corruption::Truncated("map bitmaps"))?;
        *self = rest;
        Ok(bytes)
    }
}

/// The index that directory and bitmaps describe, and the blocks of leaves whose bitmaps are damaged. `bitmaps` are the
/// bytes that follow the directory.
pub fn decode<B: Bitmaps>(
    header: &Header,
    directory: &[u8],
    bitmaps: &mut B,
) -> Result<(HeadIndex, Vec<BlockRange>), B::Error> {
    if crc32c::crc32c(directory) != header.directory_checksum {
        return Err(Corruption::Checksum("map directory").into());
    }
    let index = HeadIndex::new(header.block_count);
    let mut lost = Vec::new();
    let mut at = header.bitmaps_at();
    let mut least = 0u64;
    for bytes in directory.chunks(DIRECTORY_ENTRY_LEN) {
        let entry = Entry::parse(bytes)?;
        let number = u64::from(entry.number);
        if number < least || to_usize(number) >= index.leaf_count() {
            return Err(Corruption::Field { field: "leaf number", value: number }.into());
        }
        least = number + 1;
        let len = entry.data.len() + entry.zero.len();
        at += len as u64;
        if at > header.log_offset {
            return Err(Corruption::Truncated("map bitmaps").into());
        }
        if !entry.load(&index, bitmaps.take(len)?) {
            let start = number * LEAF_BLOCKS;
            lost.push(BlockRange::new(start, LEAF_BLOCKS.min(header.block_count.0 - start)));
        }
    }
    Ok((index, lost))
}

impl Entry {
    fn parse(bytes: &[u8]) -> Result<Entry, Corruption> {
        let mut fields = Fields(bytes);
        let number = fields.u32("map directory")?;
        let data = Kind::parse(fields.u8("map directory")?, "leaf data kind")?;
        let zero = Kind::parse(fields.u8("map directory")?, "leaf zero kind")?;
        fields.u16("map directory")?;
        Ok(Entry { number, data, zero, checksum: fields.u32("map directory")? })
    }

    /// Put the leaf into `index`; `false`, and nothing is put, if its bitmaps are damaged.
    fn load(&self, index: &HeadIndex, mut bitmaps: &[u8]) -> bool {
        if crc32c::crc32c(bitmaps) != self.checksum {
            return false;
        }
        match (self.data.bitmap(&mut bitmaps), self.zero.bitmap(&mut bitmaps)) {
            (Ok(data), Ok(zero)) => index.load(to_usize(self.number.into()), data, zero),
            (Err(_), _) | (_, Err(_)) => false,
        }
    }
}
