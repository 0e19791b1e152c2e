//! The log of a map file: one record of one or more self-checking sectors for each commit.
//!
//! Owns [`LogEnd`] (where the next record goes), [`encode`] and [`replay`]. A sector names the checksum of the one
//! before it, so an intact sector vouches for everything before it, and a sector is written whole or not at all: that
//! is how [`replay`] tells a tail that nobody was told about from damage to what was acknowledged.

use super::{Fields, checkpoint::Header, checksum, seal};
use crate::{
    cow::{BlockState, blocks::BlockSet, changes::Changes, head::HeadIndex},
    error::Corruption,
    planted::{self, Bug},
    units::{Block, BlockCount, BlockRange, to_usize},
};

pub const LOG_SECTOR_LEN: usize = 512;
/// Entries of one sector.
pub const ENTRIES_PER_SECTOR: usize = 39;
const MAGIC: &[u8; 4] = b"BLOG";
const CHECKSUM_AT: usize = 4;
const STATE_SHIFT: u32 = 56;

/// Where the next record goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    pub generation: u64,
    /// Sequence of the last record (of the checkpoint, if there is none).
    pub sequence: u64,
    /// Sectors used.
    pub used: u64,
    /// Sectors of the log.
    pub sectors: u64,
    /// Sectors from the end on in which a torn record left something: to be cleared before anything is appended.
    pub torn: u64,
    /// Checksum of the sector before the end.
    previous: u32,
}

/// What reading a log found.
#[derive(Debug)]
pub struct Replayed {
    pub end: LogEnd,
    /// Blocks that a damaged record may have touched, in order.
    pub lost: Vec<BlockRange>,
    /// Where in the log acknowledged bytes are damaged.
    pub damage: Option<(Corruption, u64)>,
}

impl LogEnd {
    /// The start of the log behind `header`.
    pub fn start(header: &Header) -> LogEnd {
        LogEnd {
            generation: header.generation,
            sequence: header.sequence,
            used: 0,
            sectors: header.log_len / LOG_SECTOR_LEN as u64,
            torn: 0,
            previous: header.checksum,
        }
    }

    /// Sectors that are still free.
    pub fn room(&self) -> u64 {
        self.sectors - self.used
    }

    /// Bytes of the whole log.
    pub fn log_len(&self) -> u64 {
        self.sectors * LOG_SECTOR_LEN as u64
    }

    /// Bytes from the start of the log to its end.
    pub fn offset(&self) -> u64 {
        self.used * LOG_SECTOR_LEN as u64
    }
}

/// Sectors of a record of `entries` runs.
pub fn sectors_of(entries: usize) -> u64 {
    entries.div_ceil(ENTRIES_PER_SECTOR) as u64
}

/// The record of one commit, and where the log ends after it. The caller has checked the room and cleared what a torn
/// record left: a part of that could go on in this one, if both begin alike.
pub fn encode(end: &LogEnd, changes: &Changes) -> (Vec<u8>, LogEnd) {
    let entries: Vec<(BlockRange, BlockState)> =
        changes.iter().flat_map(|(run, state)| split(run, state)).collect();
    let count = u16::try_from(sectors_of(entries.len())).expect("a log has at most 2^14 sectors");
    let mut next = LogEnd { sequence: end.sequence + 1, ..*end };
    let mut bytes = Vec::with_capacity(usize::from(count) * LOG_SECTOR_LEN);
    for (part, chunk) in entries.chunks(ENTRIES_PER_SECTOR).enumerate() {
        let mut sector = Vec::with_capacity(LOG_SECTOR_LEN);
        sector.extend(MAGIC);
        sector.extend([0; 4]);
        sector.extend(next.generation.to_le_bytes());
        sector.extend(next.sequence.to_le_bytes());
        sector.extend(u16::try_from(part).expect("less than the count").to_le_bytes());
        sector.extend(count.to_le_bytes());
        sector.extend(next.previous.to_le_bytes());
        sector.extend(u16::try_from(chunk.len()).expect("at most 39").to_le_bytes());
        sector.extend([0; 6]);
        for (run, state) in chunk {
            let code: u64 = match state {
                BlockState::Data => 1,
                BlockState::Zero => 2,
                BlockState::Absent => unreachable!("a change is never to absent"),
            };
            sector.extend((run.start.0 | code << STATE_SHIFT).to_le_bytes());
            sector.extend(u32::try_from(run.count.0).expect("runs are split").to_le_bytes());
        }
        sector.resize(LOG_SECTOR_LEN, 0);
        next.previous = seal(&mut sector, CHECKSUM_AT);
        next.used += 1;
        bytes.extend(sector);
    }
    (bytes, next)
}

/// A run in pieces whose counts fit an entry.
fn split(run: BlockRange, state: BlockState) -> impl Iterator<Item = (BlockRange, BlockState)> {
    const COUNT_MAX: u64 = u32::MAX as u64;
    (0..run.count.0.div_ceil(COUNT_MAX)).map(move |n| {
        let start = run.start.0 + n * COUNT_MAX;
        (BlockRange::new(start, (run.end().0 - start).min(COUNT_MAX)), state)
    })
}

/// An intact sector.
struct Sector {
    generation: u64,
    sequence: u64,
    part: u16,
    parts: u16,
    previous: u32,
    checksum: u32,
    entries: Vec<(BlockRange, BlockState)>,
}

/// What a sector of the log is.
enum Found {
    Unused,
    Intact(Sector),
    Damaged,
}

impl Sector {
    fn read(bytes: &[u8], block_count: BlockCount) -> Found {
        if bytes == [0; LOG_SECTOR_LEN] {
            return Found::Unused;
        }
        Sector::parse(bytes, block_count).map_or(Found::Damaged, Found::Intact)
    }

    fn parse(bytes: &[u8], block_count: BlockCount) -> Result<Sector, Corruption> {
        let what = "log sector";
        let mut fields = Fields(bytes);
        if fields.take::<4>(what)? != *MAGIC {
            return Err(Corruption::Magic("map log"));
        }
        let stored = fields.u32(what)?;
        if stored != checksum(bytes, CHECKSUM_AT) {
            return Err(Corruption::Checksum(what));
        }
        let mut sector = Sector {
            checksum: stored,
            generation: fields.u64(what)?,
            sequence: fields.u64(what)?,
            part: fields.u16(what)?,
            parts: fields.u16(what)?,
            previous: fields.u32(what)?,
            entries: Vec::new(),
        };
        let count = usize::from(fields.u16(what)?);
        fields.take::<6>(what)?;
        if count > ENTRIES_PER_SECTOR || sector.part >= sector.parts {
            return Err(Corruption::Field { field: "log entries", value: count as u64 });
        }
        for _ in 0..count {
            let start = fields.u64(what)?;
            let blocks = u64::from(fields.u32(what)?);
            let state = match start >> STATE_SHIFT {
                1 => BlockState::Data,
                2 => BlockState::Zero,
                value => return Err(Corruption::Field { field: "log entry state", value }),
            };
            let first = start & ((1 << STATE_SHIFT) - 1);
            if blocks == 0 || first + blocks > block_count.0 {
                return Err(Corruption::Field { field: "log entry", value: first });
            }
            sector.entries.push((BlockRange::new(first, blocks), state));
        }
        Ok(sector)
    }

    /// Whether this sector is part `part` of the record after `end`, whose last sector so far has `previous`.
    fn follows(&self, end: &LogEnd, part: u16, parts: Option<u16>, previous: u32) -> bool {
        self.generation == end.generation
            && self.sequence == end.sequence + 1
            && self.part == part
            && parts.is_none_or(|parts| parts == self.parts)
            && self.previous == previous
    }
}

/// Apply the records of `log`, the whole log of the file behind `header`, to the checkpoint's `index`. `lost` are the
/// blocks that the checkpoint has lost.
pub fn replay(header: &Header, log: &[u8], index: &HeadIndex, lost: Vec<BlockRange>) -> Replayed {
    let mut end = LogEnd::start(header);
    let sectors: Vec<Found> =
        log.chunks(LOG_SECTOR_LEN).map(|bytes| Sector::read(bytes, header.block_count)).collect();
    // What is stated is collected, and taken out of what is lost once: there may be a million of each.
    let mut stated = BlockSet::default();
    while let Some(record) = record_at(&sectors, &end) {
        for (run, state) in record.iter().flat_map(|sector| &sector.entries) {
            index.set(*run, *state);
            if !lost.is_empty() {
                stated.insert(*run);
            }
        }
        end.sequence += 1;
        end.used += record.len() as u64;
        end.previous = record.last().map_or(end.previous, |sector| sector.checksum);
    }
    let rest = sectors.get(to_usize(end.used)..).unwrap_or_default();
    end.torn = rest.iter().zip(1u64..).fold(0, |torn, (found, n)| match found {
        Found::Unused => torn,
        Found::Intact(_) | Found::Damaged => n,
    });
    let damage = damage_in(rest, &end).filter(|_| !planted::is(Bug::DamageAsTornTail));
    let lost = if damage.is_some() {
        stated = BlockSet::default();
        for (run, state) in stated_after_damage(rest, &end) {
            index.set(run, state);
            stated.insert(run);
        }
        without(&[BlockRange { start: Block(0), count: header.block_count }], &stated)
    } else {
        without(&lost, &stated)
    };
    Replayed { end, lost, damage }
}

/// The whole record that follows `end`, if it is there.
fn record_at<'a>(sectors: &'a [Found], end: &LogEnd) -> Option<Vec<&'a Sector>> {
    let mut record: Vec<&Sector> = Vec::new();
    let mut previous = end.previous;
    for found in sectors.get(to_usize(end.used)..)? {
        let Found::Intact(sector) = found else { return None };
        let part = u16::try_from(record.len()).ok()?;
        if !sector.follows(end, part, record.first().map(|first| first.parts), previous) {
            return None;
        }
        previous = sector.checksum;
        record.push(sector);
        if record.len() == usize::from(sector.parts) {
            return Some(record);
        }
    }
    None
}

/// The first thing in `rest` that a torn tail does not explain.
fn damage_in(rest: &[Found], end: &LogEnd) -> Option<(Corruption, u64)> {
    rest.iter().zip(0u64..).find_map(|(found, n)| {
        let torn = match found {
            Found::Unused => true,
            Found::Damaged => false,
            Found::Intact(sector) => {
                sector.generation < end.generation
                    || (sector.generation == end.generation && sector.sequence <= end.sequence + 1)
            }
        };
        (!torn).then(|| {
            (Corruption::LogGap { sequence: end.sequence + 1 }, (end.used + n) * LOG_SECTOR_LEN as u64)
        })
    })
}

/// What the intact records behind the last damage state: each sector follows the one before it without a gap.
fn stated_after_damage(rest: &[Found], end: &LogEnd) -> Vec<(BlockRange, BlockState)> {
    let mut stated = Vec::new();
    let mut last: Option<&Sector> = None;
    for found in rest {
        match found {
            Found::Unused => {}
            Found::Damaged => {
                stated.clear();
                last = None;
            }
            Found::Intact(sector)
                if sector.generation == end.generation && sector.sequence > end.sequence + 1 =>
            {
                if last.is_none_or(|last| sector.previous != last.checksum) {
                    stated.clear();
                    last = None;
                }
                // A record counts from its first sector on.
                if last.is_some() || sector.part == 0 {
                    stated.extend(sector.entries.iter().copied());
                    last = Some(sector);
                }
            }
            Found::Intact(_) => {
                stated.clear();
                last = None;
            }
        }
    }
    stated
}

/// The blocks of `lost`, which are in order, that are not `known`.
fn without(lost: &[BlockRange], known: &BlockSet) -> Vec<BlockRange> {
    lost.iter().flat_map(|range| known.missing_in(*range)).collect()
}
