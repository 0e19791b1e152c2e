//! Internal snapshots: the list in the file.
//!
//! Owns [`Snapshot`] and [`list`]. The list is parsed when somebody asks for it or for a snapshot's view, never to
//! read the active image: a damaged list damages nobody else. Where a snapshot's L1 table lies is checked when
//! the snapshot is opened ([`Snapshot::l1`]).

use super::{
    fault::{Fault, Result, be16, be32, be64},
    header::{Geometry, Header, L1_BYTES_MAX, L1Ref, Version},
};
use crate::units::{ByteLen, ByteOffset, VOLUME_SIZE_MAX};

/// Most snapshots of one image.
pub const SNAPSHOTS_MAX: u32 = 65536;
/// Longest table of snapshots that is read.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 16 << 20;

const FIXED_LEN: usize = 40;
/// Bytes of an entry up to which each field of the extra data reaches.
const EXTRA_VM_STATE: usize = 8;
const EXTRA_DISK_SIZE: usize = 16;
const EXTRA_ICOUNT: usize = 24;

/// One internal snapshot, as its entry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    /// When it was taken, since the epoch.
    pub date_sec: u32,
    pub date_nsec: u32,
    /// How long the guest had been running.
    pub vm_clock_nsec: u64,
    pub vm_state_len: u64,
    /// Virtual size at that time, where the entry says.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, where they were counted.
    pub icount: Option<u64>,
    l1_offset: u64,
    l1_entries: u32,
    /// Where in the file the entry is.
    at: u64,
}

/// Parse `table`, the bytes at `at` of the file from the table's start on: at most [`SNAPSHOT_TABLE_BYTES_MAX`], and
/// maybe more than the table.
pub fn list(table: &[u8], at: u64, count: u32) -> Result<Vec<Snapshot>> {
    if count > SNAPSHOTS_MAX {
        return Err(Fault::field("nb_snapshots", count, 60));
    }
    let mut snapshots = Vec::new();
    let mut start = 0;
    for _ in 0..count {
        let place = at + start as u64;
        let bytes = table.get(start..).unwrap_or_default();
        let (snapshot, len) =
            Snapshot::parse(bytes, place).ok_or_else(|| Fault::truncated("snapshot table", place))?;
        snapshots.push(snapshot);
        start += len.next_multiple_of(8);
    }
    Ok(snapshots)
}

impl Snapshot {
    /// The entry that `bytes` begin with, and its length.
    fn parse(bytes: &[u8], at: u64) -> Option<(Snapshot, usize)> {
        let id_len = usize::from(be16(bytes, 12)?);
        let name_len = usize::from(be16(bytes, 14)?);
        let extra_len = usize::try_from(be32(bytes, 36)?).ok()?;
        let extra = bytes.get(FIXED_LEN..)?.get(..extra_len)?;
        let id_at = FIXED_LEN + extra_len;
        let text =
            |at: usize, len: usize| Some(String::from_utf8_lossy(bytes.get(at..)?.get(..len)?).into_owned());
        let extra_field = |end: usize| if extra_len >= end { be64(extra, end - 8) } else { None };
        let snapshot = Snapshot {
            l1_offset: be64(bytes, 0)?,
            l1_entries: be32(bytes, 8)?,
            id: text(id_at, id_len)?,
            name: text(id_at + id_len, name_len)?,
            date_sec: be32(bytes, 16)?,
            date_nsec: be32(bytes, 20)?,
            vm_clock_nsec: be64(bytes, 24)?,
            vm_state_len: extra_field(EXTRA_VM_STATE).unwrap_or(be32(bytes, 32)?.into()),
            disk_size: extra_field(EXTRA_DISK_SIZE),
            icount: extra_field(EXTRA_ICOUNT).filter(|count| *count != u64::MAX),
            at,
        };
        Some((snapshot, id_at + id_len + name_len))
    }

    /// Virtual size of the image when the snapshot was taken. Where the entry does not say, the image's own, as far
    /// as the snapshot's L1 table goes: the image may have grown since.
    pub fn size(&self, header: &Header) -> ByteLen {
        let mapped = u64::from(self.l1_entries) * header.geometry.l2_span();
        ByteLen(self.disk_size.unwrap_or(header.size.0.min(mapped)))
    }

    /// Where its L1 table is, held against the file.
    pub fn l1(&self, header: &Header, file_len: u64) -> Result<L1Ref> {
        let geometry: Geometry = header.geometry;
        if header.version == Version::V3 && self.disk_size.is_none() {
            return Err(Fault::truncated(
                "extra data of a snapshot (version 3 asks for a disk size)",
                self.at,
            ));
        }
        let size = self.size(header);
        if size.0 > VOLUME_SIZE_MAX {
            return Err(Fault::field("disk size of a snapshot", size.0, self.at + 48));
        }
        let bytes = u64::from(self.l1_entries) * 8;
        if bytes > L1_BYTES_MAX || u64::from(self.l1_entries) < size.0.div_ceil(geometry.l2_span()) {
            return Err(Fault::field("l1_size of a snapshot", self.l1_entries, self.at + 8));
        }
        let fits = self.l1_offset.checked_add(bytes).is_some_and(|end| end <= file_len);
        let aligned = self.l1_offset != 0 && self.l1_offset.is_multiple_of(geometry.cluster_size());
        if self.l1_entries > 0 && !(fits && aligned) {
            return Err(Fault::field("l1_table_offset of a snapshot", self.l1_offset, self.at));
        }
        Ok(L1Ref { offset: ByteOffset(self.l1_offset), entries: self.l1_entries })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

    use super::*;
    use crate::error::Corruption;

    fn entry(id: &str, name: &str, extra: &[u64]) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_LEN];
        bytes[0..8].copy_from_slice(&0x3_0000_u64.to_be_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_be_bytes());
        bytes[12..14].copy_from_slice(&u16::try_from(id.len()).unwrap().to_be_bytes());
        bytes[14..16].copy_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        bytes[32..36].copy_from_slice(&77_u32.to_be_bytes());
        bytes[36..40].copy_from_slice(&u32::try_from(extra.len() * 8).unwrap().to_be_bytes());
        extra.iter().for_each(|field| bytes.extend(field.to_be_bytes()));
        bytes.extend(id.as_bytes());
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn entries_of_both_versions_are_listed_in_order() {
        let mut table = entry("1", "before", &[]);
        table.extend(entry("22", "after the update", &[5, 1 << 30, u64::MAX, 9]));
        let found = list(&table, 0x5_0000, 2).unwrap();
        assert_eq!((found[0].name.as_str(), found[0].vm_state_len, found[0].disk_size), ("before", 77, None));
        assert_eq!((found[1].id.as_str(), found[1].name.as_str()), ("22", "after the update"));
        assert_eq!((found[1].vm_state_len, found[1].disk_size, found[1].icount), (5, Some(1 << 30), None));
    }

    #[test]
    fn a_table_that_is_cut_or_counts_too_many_is_corrupt() {
        let table = entry("1", "one", &[1, 2]);
        assert!(matches!(
            list(&table, 0, 2),
            Err(Fault::Corrupt { what: Corruption::Truncated("snapshot table"), .. })
        ));
        assert!(list(&table[..table.len() - 8], 0, 1).is_err());
        assert!(matches!(list(&table, 0, u32::MAX), Err(Fault::Corrupt { at: ByteOffset(60), .. })));
    }
}
