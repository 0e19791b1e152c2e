//! One entry of an L2 table: what it may say, and what it means.
//!
//! Owns [`Entry`], the meaning, and `Rules`, what the bits are held against before they mean anything: the format, the
//! end of the file and its metadata. An entry that has passed is kept as one word; one that has not is *damaged*, and
//! `Rules::check` says why.

use super::super::{
    header::{Geometry, L2Format, Version},
    metadata::{Gap, Metadata},
};
use crate::{
    error::EntryProblem,
    units::{ByteLen, ByteOffset},
};

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED_L2: u64 = 0x3f00_0000_0000_01fe;
/// Above the largest offset of a compressed cluster.
const COMPRESSED_OFFSET_END: u64 = 1 << 56;

/// What one guest cluster is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Unallocated,
    Zero {
        host: Option<ByteOffset>,
    },
    Data {
        host: ByteOffset,
    },
    /// Bit n of `allocated` and `zero` says what the n-th of 32 parts is. No bit is set in both, and a cluster that has
    /// allocated parts has a host.
    Subclusters {
        host: Option<ByteOffset>,
        allocated: u32,
        zero: u32,
    },
    Compressed {
        host: ByteOffset,
        len: ByteLen,
    },
    Damaged,
}

/// An entry as the file has it; `bitmap` is 0 in the standard format.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawEntry {
    pub word: u64,
    pub bitmap: u64,
}

/// A checked word: the upper two bits are 00 nothing or zeros, 01 compressed, 10 data, 11 damaged. The rest is as
/// in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checked(pub u64);

impl Checked {
    pub(super) const DAMAGED: Checked = Checked(0b11 << 62);
}

/// What an entry is held against.
#[derive(Debug)]
pub(super) struct Rules {
    pub geometry: Geometry,
    pub version: Version,
    pub clusters: Clusters,
    pub metadata: Metadata,
    pub file_len: u64,
}

/// Where data clusters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clusters {
    /// Among the tables, in the same file.
    Own,
    /// In a file of their own.
    External,
}

impl Rules {
    /// Hold an entry against the file.
    pub(super) fn check(&self, raw: RawEntry, gap: &mut Gap) -> Result<Checked, EntryProblem> {
        let RawEntry { word, bitmap } = raw;
        if word & COMPRESSED != 0 {
            return self.check_compressed(raw, gap);
        }
        let extended = self.geometry.l2_format() == L2Format::Extended;
        let zero_bit = if extended || self.version == Version::V2 { ZERO } else { 0 };
        if word & (RESERVED_L2 | zero_bit) != 0 {
            return Err(EntryProblem::Reserved);
        }
        let host = word & OFFSET;
        if !host.is_multiple_of(self.geometry.cluster_size()) {
            return Err(EntryProblem::Unaligned);
        }
        // Only a file of its own can hold a cluster at offset 0; here the header is.
        let has_host = host != 0 || (word & COPIED != 0 && word & ZERO == 0);
        let (needed, kind) = if extended {
            let (allocated, zero) = halves(bitmap);
            if allocated & zero != 0 {
                return Err(EntryProblem::Contradiction);
            }
            if allocated != 0 && !has_host {
                return Err(EntryProblem::Nowhere);
            }
            (allocated != 0, if has_host { COPIED } else { 0 })
        } else if word & ZERO != 0 {
            (false, ZERO)
        } else {
            (has_host, if has_host { COPIED } else { 0 })
        };
        if has_host && self.clusters == Clusters::Own {
            if needed && host >= self.file_len {
                return Err(EntryProblem::PastEnd);
            }
            if !self.metadata.is_clear(host..host + self.geometry.cluster_size(), gap) {
                return Err(EntryProblem::Metadata);
            }
        }
        Ok(Checked(host | kind))
    }

    fn check_compressed(&self, raw: RawEntry, gap: &mut Gap) -> Result<Checked, EntryProblem> {
        let RawEntry { word, bitmap } = raw;
        let (host, _) = self.descriptor(word);
        let contradicts = word & COPIED != 0 || bitmap != 0 || self.clusters == Clusters::External;
        if contradicts || host >= COMPRESSED_OFFSET_END {
            return Err(EntryProblem::Reserved);
        }
        if host >= self.file_len {
            return Err(EntryProblem::PastEnd);
        }
        if !self.metadata.is_clear(host..host + 1, gap) {
            return Err(EntryProblem::Metadata);
        }
        Ok(Checked(word))
    }

    /// Offset and length of compressed data.
    fn descriptor(&self, word: u64) -> (u64, u64) {
        let sector_shift = 62 - (self.geometry.cluster_bits() - 8);
        let host = word & ((1 << sector_shift) - 1);
        let sectors = (word & (COMPRESSED - 1)) >> sector_shift;
        (host, (sectors + 1) * 512 - host % 512)
    }

    pub(super) fn decode(&self, checked: Checked, bitmap: Option<u64>) -> Entry {
        let word = checked.0;
        let host = ByteOffset(word & OFFSET);
        match (word >> 62, bitmap) {
            (0b01, _) => {
                let (host, len) = self.descriptor(word);
                Entry::Compressed { host: ByteOffset(host), len: ByteLen(len.min(self.file_len - host)) }
            }
            (0b10, None) => Entry::Data { host },
            (0b00, None) if word == 0 => Entry::Unallocated,
            (0b00, None) => Entry::Zero { host: (host.0 != 0).then_some(host) },
            (kind @ (0b00 | 0b10), Some(bitmap)) => {
                let host = (kind == 0b10).then_some(host);
                match (halves(bitmap), host) {
                    ((0, 0), _) => Entry::Unallocated,
                    ((0, u32::MAX), host) => Entry::Zero { host },
                    ((u32::MAX, 0), Some(host)) => Entry::Data { host },
                    ((allocated, zero), host) => Entry::Subclusters { host, allocated, zero },
                }
            }
            _ => Entry::Damaged,
        }
    }
}

/// A bitmap of subclusters: which are allocated, which are zeros.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn halves(bitmap: u64) -> (u32, u32) {
    (bitmap as u32, (bitmap >> 32) as u32)
}
