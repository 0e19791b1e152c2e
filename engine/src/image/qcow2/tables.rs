//! The L1 table and its L2 tables: from guest clusters to entries.
//!
//! Owns [`Tables`]. The L1 table is read and held against the file when the image is opened: entries are aligned,
//! within the file, off all other metadata and distinct, so the number of L2 tables is bounded by the file's length.
//! An L2 table is read when it is first needed, checked entry by entry and kept as it was checked, in a slot that is
//! written once: readers take no lock. When [`L2_BYTES_MAX`] is used up, entries of further tables are read and checked
//! each time. A bad entry damages what it maps and nothing else.

mod entry;

use std::{
    ops::{ControlFlow, Range},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use self::entry::{Checked, OFFSET, RawEntry, Rules};
pub use self::entry::{Clusters, Entry};
use super::{
    fault::{EntryAt, Fault, be64},
    header::{Geometry, L1Ref, L2Format, Version},
    metadata::{Gap, Metadata},
    source::Source,
};
use crate::{
    error::{EntryProblem, Error, Result},
    units::{ByteLen, ByteRange, to_usize},
};

/// Bytes of L2 tables that one image keeps in memory: with clusters of 64 KiB they map 512 GiB.
pub const L2_BYTES_MAX: u64 = 64 << 20;
/// Entries that are read at once from a table that is not kept.
const PIECE_ENTRIES: u64 = 64;
/// Bytes of [`PIECE_ENTRIES`] of the larger kind.
const PIECE_LEN: usize = 1024;

/// Bits of an entry of the L1 table that are not used.
const RESERVED_L1: u64 = 0x7f00_0000_0000_01ff;
/// One entry of the L1 table that is not empty.
#[derive(Debug)]
struct Slot {
    table: Place,
    loaded: OnceLock<Box<[u64]>>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    At(u64),
    Damaged(EntryProblem),
}

#[derive(Debug)]
pub struct Tables {
    file: Arc<Source>,
    rules: Rules,
    /// Virtual size of what the tables map.
    size: u64,
    l1: L1Ref,
    /// For each entry of the L1 table that maps a part of the image, 0 or one more than the index of its slot.
    index: Box<[u32]>,
    slots: Box<[Slot]>,
    loaded_bytes: AtomicU64,
    l2_bytes_max: u64,
    /// Length of the file that data clusters lie in.
    data_len: u64,
}

/// What [`Tables::open`] is given besides the file.
pub struct Opening {
    pub geometry: Geometry,
    pub version: Version,
    pub clusters: Clusters,
    /// The L1 table to follow; it lies within the file and covers `size`.
    pub l1: L1Ref,
    pub size: ByteLen,
    /// All metadata but the L2 tables.
    pub taken: Vec<Range<u64>>,
    /// Bytes of L2 tables to keep.
    pub l2_bytes_max: u64,
}

impl Tables {
    pub fn open(file: Arc<Source>, opening: Opening) -> Result<Tables> {
        let Opening { geometry, version, clusters, l1, size, mut taken, l2_bytes_max } = opening;
        let cluster_size = geometry.cluster_size();
        let count = size.0.div_ceil(geometry.l2_span());
        // An image without bytes may have no table at all, and then its offset means nothing.
        let at = if count == 0 { 0 } else { l1.offset.0 };
        let bytes = file.bytes(at, count * 8, "L1 table")?;
        let fixed = Metadata::new(taken.clone());
        let mut gap = Gap::default();
        let mut slots = Vec::new();
        let mut index = Vec::with_capacity(to_usize(count));
        for word in bytes.chunks_exact(8).map(|bytes| be64(bytes, 0).unwrap_or_default()) {
            if word == 0 {
                index.push(0);
                continue;
            }
            let offset = word & OFFSET;
            let problem = if word & RESERVED_L1 != 0 {
                Some(EntryProblem::Reserved)
            } else if !offset.is_multiple_of(cluster_size) {
                Some(EntryProblem::Unaligned)
            } else if offset >= file.len() {
                Some(EntryProblem::PastEnd)
            } else if !fixed.is_clear(offset..offset + cluster_size, &mut gap) {
                Some(EntryProblem::Metadata)
            } else {
                None
            };
            let table = problem.map_or(Place::At(offset), Place::Damaged);
            slots.push(Slot { table, loaded: OnceLock::new() });
            index.push(u32::try_from(slots.len()).unwrap_or(u32::MAX));
        }
        refuse_shared(&mut slots);
        taken.extend(slots.iter().filter_map(|slot| match slot.table {
            Place::At(offset) => Some(offset..offset + cluster_size),
            Place::Damaged(_) => None,
        }));
        let metadata = Metadata::new(taken);
        let file_len = file.len();
        let data_len = match clusters {
            Clusters::Own => file_len,
            Clusters::External => u64::MAX,
        };
        Ok(Tables {
            rules: Rules { geometry, version, clusters, metadata, file_len },
            file,
            size: size.0,
            l1,
            index: index.into(),
            slots: slots.into(),
            loaded_bytes: AtomicU64::new(0),
            l2_bytes_max,
            data_len,
        })
    }

    pub fn geometry(&self) -> Geometry {
        self.rules.geometry
    }

    /// Virtual size of what the tables map.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Length of the file that data clusters lie in; unknown, and endless, while an external one is not attached.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Data clusters lie in a file of this length.
    pub fn set_data_len(&mut self, len: u64) {
        self.data_len = len;
    }

    /// Call `found` for each cluster or run of clusters of `range` in order, until it breaks. `range` lies within the
    /// image. Fails only where the file cannot be read.
    pub fn each(
        &self,
        range: ByteRange,
        mut found: impl FnMut(ByteRange, Entry) -> ControlFlow<()>,
    ) -> Result<()> {
        let span = self.rules.geometry.l2_span();
        let mut at = range.start.0;
        while at < range.end().0 {
            let l1_index = self.rules.geometry.l1_index(at);
            let end = range.end().0.min((l1_index + 1).saturating_mul(span));
            let part = ByteRange::new(at, end - at);
            let flow = match self.slot(l1_index) {
                None => found(part, Entry::Unallocated),
                Some(Slot { table: Place::Damaged(_), .. }) => found(part, Entry::Damaged),
                Some(Slot { table: Place::At(offset), loaded }) => {
                    self.each_of_table(l1_index, *offset, loaded, part, &mut found)?
                }
            };
            if flow.is_break() {
                return Ok(());
            }
            at = end;
        }
        Ok(())
    }

    /// The start of `range` that [`Tables::each`] can answer without reading the file; none if it begins with a table that
    /// is not in memory.
    pub fn known(&self, range: ByteRange) -> Option<ByteRange> {
        let span = self.rules.geometry.l2_span();
        let is_known = |index| match self.slot(index) {
            None | Some(Slot { table: Place::Damaged(_), .. }) => true,
            Some(Slot { table: Place::At(_), loaded }) => loaded.get().is_some(),
        };
        let mut end = range.start.0;
        while end < range.end().0 && is_known(self.rules.geometry.l1_index(end)) {
            end = (self.rules.geometry.l1_index(end) + 1).saturating_mul(span).min(range.end().0);
        }
        (end > range.start.0).then(|| ByteRange::new(range.start.0, end - range.start.0))
    }

    /// Why `lost`, a range that maps to [`Entry::Damaged`] or is cut off, cannot be read.
    pub fn explain(&self, lost: ByteRange) -> Error {
        match self.fault(lost) {
            Ok(fault) => fault.losing(lost).of(self.file.path()),
            Err(error) => error,
        }
    }

    /// What the first entry of the L1 table maps in vain that is damaged or whose table is cut off.
    pub fn first_damaged_table(&self) -> Option<ByteRange> {
        let span = self.rules.geometry.l2_span();
        (0..self.index.len() as u64).find_map(|index| {
            let start = index * span;
            let held = match self.slot(index)?.table {
                Place::Damaged(_) => 0,
                Place::At(offset) => {
                    let entries = (self.rules.file_len - offset) / self.rules.geometry.l2_entry_len();
                    entries.min(self.entries_needed(start)) * self.rules.geometry.cluster_size()
                }
            };
            let end = self.size.min(start + span);
            (start + held < end).then(|| ByteRange::new(start + held, end - start - held))
        })
    }

    fn fault(&self, lost: ByteRange) -> Result<Fault> {
        let geometry = self.rules.geometry;
        let index = geometry.l1_index(lost.start.0);
        let at = self.l1.offset.0 + index * 8;
        let of_l1 = |problem| {
            let value = be64(&self.file.bytes(at, 8, "L1 table")?, 0).unwrap_or_default();
            Ok(Fault::entry(EntryAt { table: "L1", index, value, at }, problem))
        };
        let table = match self.slot(index).map(|slot| slot.table) {
            Some(Place::At(offset)) => offset,
            Some(Place::Damaged(problem)) => return of_l1(problem),
            None => return of_l1(EntryProblem::Nowhere),
        };
        let index = geometry.l2_index(lost.start.0);
        let len = geometry.l2_entry_len();
        let at = table + index * len;
        if !self.file.holds(at, len) {
            return of_l1(EntryProblem::CutOff);
        }
        let bytes = self.file.bytes(at, len, "L2 table")?;
        let raw = RawEntry {
            word: be64(&bytes, 0).unwrap_or_default(),
            bitmap: be64(&bytes, 8).unwrap_or_default(),
        };
        let problem = self.rules.check(raw, &mut Gap::default()).err().unwrap_or(EntryProblem::CutOff);
        let value = if problem == EntryProblem::Contradiction { raw.bitmap } else { raw.word };
        Ok(Fault::entry(EntryAt { table: "L2", index, value, at }, problem))
    }

    /// Entries of an L2 table that map a part of the image; `guest` is the first byte that the table maps.
    fn entries_needed(&self, guest: u64) -> u64 {
        let geometry = self.rules.geometry;
        (self.size - guest).div_ceil(geometry.cluster_size()).min(geometry.l2_entries())
    }

    /// The part of `each` that lies in one L2 table.
    fn each_of_table(
        &self,
        l1_index: u64,
        offset: u64,
        loaded: &OnceLock<Box<[u64]>>,
        range: ByteRange,
        found: &mut impl FnMut(ByteRange, Entry) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let geometry = self.rules.geometry;
        let start = l1_index * geometry.l2_span();
        if let Some(words) = self.loaded(start, offset, loaded)? {
            let first = geometry.l2_index(range.start.0);
            let words = words.get(to_usize(first * self.words_per_entry())..).unwrap_or_default();
            return Ok(self.each_of_words(words, range, found));
        }
        let mut at = range.start.0;
        while at < range.end().0 {
            let first = geometry.l2_index(at);
            let end = range.end().0.min(start + (first + PIECE_ENTRIES) * geometry.cluster_size());
            let count = (end - start).div_ceil(geometry.cluster_size()) - first;
            let mut words = [0; PIECE_LEN / 8];
            let words = words.get_mut(..to_usize(count * self.words_per_entry())).unwrap_or_default();
            self.read_words(offset + first * geometry.l2_entry_len(), words)?;
            let flow = self.each_of_words(words, ByteRange::new(at, end - at), found);
            if flow.is_break() {
                return Ok(flow);
            }
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// `words` begin with the entry that `range` begins in.
    fn each_of_words(
        &self,
        words: &[u64],
        range: ByteRange,
        found: &mut impl FnMut(ByteRange, Entry) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let geometry = self.rules.geometry;
        let mut at = range.start.0;
        let mut words = words;
        while at < range.end().0 {
            let (word, bitmap) = match (geometry.l2_format(), words) {
                (L2Format::Standard, [word, rest @ ..]) => {
                    words = rest;
                    (*word, None)
                }
                (L2Format::Extended, [word, bitmap, rest @ ..]) => {
                    words = rest;
                    (*word, Some(*bitmap))
                }
                (L2Format::Standard | L2Format::Extended, _) => break,
            };
            let end = range.end().0.min(at - geometry.in_cluster(at) + geometry.cluster_size());
            found(ByteRange::new(at, end - at), self.rules.decode(Checked(word), bitmap))?;
            at = end;
        }
        ControlFlow::Continue(())
    }

    /// The table's checked words, if there is room to keep them.
    fn loaded<'a>(
        &self,
        guest: u64,
        offset: u64,
        loaded: &'a OnceLock<Box<[u64]>>,
    ) -> Result<Option<&'a [u64]>> {
        if let Some(words) = loaded.get() {
            return Ok(Some(words));
        }
        let len = self.entries_needed(guest) * self.rules.geometry.l2_entry_len();
        let room = self.loaded_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(len).filter(|used| *used <= self.l2_bytes_max)
        });
        if room.is_err() {
            return Ok(None);
        }
        let mut words = vec![0; to_usize(len / 8)];
        let read = self.read_words(offset, &mut words);
        if read.is_err() || loaded.set(words.into()).is_err() {
            // Nobody keeps these words: the file failed, or another reader was faster.
            self.loaded_bytes.fetch_sub(len, Ordering::Relaxed);
        }
        read?;
        Ok(loaded.get().map(|words| &**words))
    }

    /// Read and check the entries at `offset` of the file; those that the file does not have are damaged.
    fn read_words(&self, offset: u64, words: &mut [u64]) -> Result<()> {
        let wanted = words.len() as u64 * 8;
        let entry_len = self.rules.geometry.l2_entry_len();
        let there = self.rules.file_len.saturating_sub(offset).min(wanted) / entry_len * entry_len;
        let mut piece = [0; PIECE_LEN];
        let mut gap = Gap::default();
        let mut done = 0;
        for words in words.chunks_mut(PIECE_LEN / 8) {
            let len = to_usize(there.saturating_sub(done)).min(words.len() * 8);
            let bytes = piece.get_mut(..len).unwrap_or_default();
            self.file.read(bytes, offset + done, "L2 table")?;
            self.check_piece(bytes, words, &mut gap);
            done += words.len() as u64 * 8;
        }
        Ok(())
    }

    fn check_piece(&self, bytes: &[u8], words: &mut [u64], gap: &mut Gap) {
        let entry_len = to_usize(self.rules.geometry.l2_entry_len());
        for (place, checked) in words.chunks_exact_mut(entry_len / 8).enumerate() {
            let raw = bytes.get(place * entry_len..).filter(|rest| rest.len() >= entry_len).map(|rest| {
                let bitmap = if entry_len > 8 { be64(rest, 8) } else { None };
                RawEntry { word: be64(rest, 0).unwrap_or_default(), bitmap: bitmap.unwrap_or_default() }
            });
            let word = match raw {
                Some(raw) => self.rules.check(raw, gap).unwrap_or(Checked::DAMAGED),
                None => Checked::DAMAGED,
            };
            match checked {
                [first] => *first = word.0,
                [first, second] => {
                    *first = word.0;
                    *second = raw.map_or(0, |raw| raw.bitmap);
                }
                _ => {}
            }
        }
    }

    fn slot(&self, l1_index: u64) -> Option<&Slot> {
        let slot = self.index.get(to_usize(l1_index))?.checked_sub(1)?;
        self.slots.get(usize::try_from(slot).ok()?)
    }

    fn words_per_entry(&self) -> u64 {
        self.rules.geometry.l2_entry_len() / 8
    }
}

/// Two entries of one L1 table never share an L2 table: all but the first are damaged.
fn refuse_shared(slots: &mut [Slot]) {
    let mut seen = std::collections::HashSet::with_capacity(slots.len());
    for slot in slots {
        if let Place::At(offset) = slot.table
            && !seen.insert(offset)
        {
            slot.table = Place::Damaged(EntryProblem::Shared);
        }
    }
}

#[cfg(test)]
mod tests;
