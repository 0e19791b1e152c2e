//! The content of one simulated file: what reads show, what is on the medium, and what lies between.
//!
//! A sector of 512 bytes is the unit: it is written whole or not at all. A sector without a value is a hole and reads
//! as zeros. For every sector that changed since the last sync all values since then are kept, because a crash may
//! leave any of them.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io::ErrorKind,
    sync::Arc,
};

use super::Effect;
use crate::units::{ByteRange, SECTOR_SIZE, to_usize};

const SECTOR_BYTES: usize = 512;
const _: () = assert!(SECTOR_BYTES as u64 == SECTOR_SIZE);

type Sector = Arc<[u8; SECTOR_BYTES]>;

/// Whether a file was opened through the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    Buffered,
    Direct,
}

/// Sectors that hold something, and a length.
#[derive(Clone, Debug, Default)]
struct Content {
    sectors: BTreeMap<u64, Sector>,
    len: u64,
}

/// Values of a sector since the last sync, the oldest first; `None` is a hole. Mostly there is one.
#[derive(Clone, Debug)]
struct Values {
    first: Option<Sector>,
    later: Vec<Option<Sector>>,
}

impl Values {
    fn len(&self) -> usize {
        1 + self.later.len()
    }

    fn get(&self, number: usize) -> Option<Sector> {
        match number.checked_sub(1) {
            None => self.first.clone(),
            Some(later) => self.later.get(later).cloned().flatten(),
        }
    }

    fn newest(&self) -> Option<Sector> {
        self.later.last().unwrap_or(&self.first).clone()
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct FileNode {
    /// What reads show.
    shown: Content,
    /// What is on the medium for certain.
    kept: Content,
    unsynced: BTreeMap<u64, Values>,
    unsynced_lens: Vec<u64>,
    /// Bytes that are allocated and hold nothing.
    pub(super) reserved: u64,
    pub(super) handles: usize,
}

impl FileNode {
    pub(super) fn len(&self) -> u64 {
        self.shown.len.max(self.reserved)
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.shown.sectors.len() as u64 * SECTOR_SIZE + self.reserved
    }

    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), ErrorKind> {
        let end = offset.checked_add(buffer.len() as u64).ok_or(ErrorKind::InvalidInput)?;
        if end > self.shown.len {
            return Err(ErrorKind::UnexpectedEof);
        }
        for (sector, place, part) in pieces(offset, buffer.len()) {
            match self.shown.sectors.get(&sector) {
                Some(bytes) => buffer[place].copy_from_slice(&bytes[part]),
                None => buffer[place].fill(0),
            }
        }
        Ok(())
    }

    /// Writes sector by sector while `free` lasts.
    pub(super) fn write(&mut self, data: &[u8], offset: u64, mut free: u64) -> Result<(), ErrorKind> {
        for (sector, place, part) in pieces(offset, data.len()) {
            let old = self.shown.sectors.get(&sector);
            if old.is_none() {
                free = free.checked_sub(SECTOR_SIZE).ok_or(ErrorKind::StorageFull)?;
            }
            let mut bytes = old.map_or([0; SECTOR_BYTES], |old| **old);
            let end = sector * SECTOR_SIZE + part.end as u64;
            bytes[part].copy_from_slice(&data[place]);
            self.put(sector, Some(Arc::new(bytes)));
            if end > self.shown.len {
                self.shown.len = end;
                self.unsynced_lens.push(end);
            }
        }
        Ok(())
    }

    fn put(&mut self, sector: u64, value: Option<Sector>) {
        match &value {
            Some(bytes) => self.shown.sectors.insert(sector, bytes.clone()),
            None => self.shown.sectors.remove(&sector),
        };
        match self.unsynced.entry(sector) {
            Entry::Vacant(free) => drop(free.insert(Values { first: value, later: Vec::new() })),
            Entry::Occupied(values) => values.into_mut().later.push(value),
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.shown.len {
            // The last sector goes as a whole.
            self.punch(ByteRange::new(len, self.shown.len.next_multiple_of(SECTOR_SIZE) - len));
        }
        self.shown.len = len;
        self.unsynced_lens.push(len);
    }

    pub(super) fn punch(&mut self, range: ByteRange) {
        let present: Vec<u64> = self
            .shown
            .sectors
            .range(range.start.0 / SECTOR_SIZE..range.end().0.div_ceil(SECTOR_SIZE))
            .map(|(sector, _)| *sector)
            .collect();
        for sector in present {
            let start = sector * SECTOR_SIZE;
            let from = to_usize(range.start.0.saturating_sub(start));
            let to = to_usize((range.end().0 - start).min(SECTOR_SIZE));
            if from == 0 && to == SECTOR_BYTES {
                self.put(sector, None);
            } else if let Some(old) = self.shown.sectors.get(&sector) {
                let mut bytes = **old;
                bytes[from..to].fill(0);
                self.put(sector, Some(Arc::new(bytes)));
            }
        }
    }

    pub(super) fn sync(&mut self) {
        for (sector, values) in std::mem::take(&mut self.unsynced) {
            set(&mut self.kept, sector, values.newest());
        }
        if let Some(newest) = std::mem::take(&mut self.unsynced_lens).pop() {
            self.kept.len = newest;
        }
    }

    /// A sync that failed: the medium keeps what it had.
    pub(super) fn drop_unsynced(&mut self, cache: Cache) {
        match cache {
            // The system believes that it wrote these pages, and goes on showing them. What was cut off is no page: that
            // stays to be written.
            Cache::Buffered => {
                self.unsynced.retain(|_, values| values.newest().is_none());
                let shorter = self.unsynced_lens.pop().filter(|len| *len < self.kept.len);
                self.unsynced_lens.clear();
                self.unsynced_lens.extend(shorter);
            }
            // The length stays known, and to be written.
            Cache::Direct => {
                self.unsynced.clear();
                self.shown = Content { len: self.shown.len, ..self.kept.clone() };
            }
        }
    }

    /// Only what needs no writing back can be forgotten.
    pub(super) fn drop_cache(&mut self) {
        let mut content = self.kept.clone();
        for (sector, values) in &self.unsynced {
            set(&mut content, *sector, values.newest());
        }
        content.len = self.unsynced_lens.last().copied().unwrap_or(content.len);
        self.shown = content;
    }

    /// The file after a crash of which `choose` picks the outcome.
    pub(super) fn survivor(&self, file: u64, choose: &mut impl FnMut(Effect, usize) -> usize) -> FileNode {
        let mut kept = self.kept.clone();
        for (&sector, values) in &self.unsynced {
            match choose(Effect::Sector { file, sector }, values.len() + 1) {
                0 => {}
                n => set(&mut kept, sector, values.get(n - 1)),
            }
        }
        if !self.unsynced_lens.is_empty() {
            match choose(Effect::Length { file }, self.unsynced_lens.len() + 1) {
                0 => {}
                n => kept.len = self.unsynced_lens.get(n - 1).copied().unwrap_or(kept.len),
            }
        }
        let past = kept.len.div_ceil(SECTOR_SIZE);
        kept.sectors.split_off(&past);
        FileNode { shown: kept.clone(), kept, reserved: self.reserved, ..FileNode::default() }
    }

    /// Sectors whose newest value is a hole and not yet on the medium.
    pub(super) fn unsynced_holes(&self) -> impl Iterator<Item = u64> {
        let newest = self.unsynced.iter().filter(|(_, values)| values.newest().is_none());
        newest.map(|(sector, _)| *sector)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(self.shown.len)];
        for (sector, value) in &self.shown.sectors {
            let at = to_usize(sector * SECTOR_SIZE);
            let len = SECTOR_BYTES.min(bytes.len().saturating_sub(at));
            bytes[at..at + len].copy_from_slice(&value[..len]);
        }
        bytes
    }

    /// Make `bytes` the durable content.
    pub(super) fn replace(&mut self, bytes: &[u8]) {
        *self = FileNode { handles: self.handles, ..FileNode::default() };
        for (sector, place, part) in pieces(0, bytes.len()) {
            let mut value = [0; SECTOR_BYTES];
            value[part].copy_from_slice(&bytes[place]);
            self.kept.sectors.insert(sector, Arc::new(value));
        }
        self.kept.len = bytes.len() as u64;
        self.shown = self.kept.clone();
    }

    pub(super) fn data_ranges(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut found: Vec<ByteRange> = Vec::new();
        let first = range.start.0 / SECTOR_SIZE;
        for (&sector, _) in self.shown.sectors.range(first..range.end().0.div_ceil(SECTOR_SIZE)) {
            let here = ByteRange::new(sector * SECTOR_SIZE, SECTOR_SIZE);
            let Some(part) = here.intersect(range) else { continue };
            match found.last_mut() {
                Some(last) if last.end() == part.start => last.len.0 += part.len.0,
                Some(_) | None => found.push(part),
            }
        }
        found
    }
}

fn set(content: &mut Content, sector: u64, value: Option<Sector>) {
    match value {
        Some(bytes) => content.sectors.insert(sector, bytes),
        None => content.sectors.remove(&sector),
    };
}

type Piece = (u64, std::ops::Range<usize>, std::ops::Range<usize>);

/// The sectors that `[offset, offset + len)` touches: which, where in the buffer, where in the sector.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + done as u64;
            let skip = to_usize(at % SECTOR_SIZE);
            let take = (SECTOR_BYTES - skip).min(len - done);
            let piece = (at / SECTOR_SIZE, done..done + take, skip..skip + take);
            done += take;
            piece
        })
    })
}
