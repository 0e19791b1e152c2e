//! The codec of a layer's map file: bytes to index and back, no I/O. The bytes are described in `docs/format.md`.
//!
//! [`checkpoint`] is the part that is written whole, [`log`] the records that follow it. Invariant 3 (the map never
//! says *data* for a block whose data is not on disk) is upheld by the core's order of actions; what is upheld here is
//! that damage is told from a torn tail: only what nobody was told about is dropped.

pub mod checkpoint;
pub mod log;

use crate::error::Corruption;

/// Bytes of the shortest log that a head's map has.
pub const MAP_LOG_MIN: u64 = 256 << 10;
/// Bytes of the longest log.
pub const MAP_LOG_MAX: u64 = 8 << 20;

/// Takes little-endian fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Corruption> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(Corruption::Truncated(what))?;
        self.0 = rest;
        Ok(*field)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, Corruption> {
        self.take::<1>(what).map(|[byte]| byte)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, Corruption> {
        self.take(what).map(u16::from_le_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Corruption> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, Corruption> {
        self.take(what).map(u64::from_le_bytes)
    }
}

/// CRC-32C of `bytes` with the four bytes at `hole` taken as zero: a structure's checksum lies inside it.
fn checksum(bytes: &[u8], hole: usize) -> u32 {
    let (before, rest) = bytes.split_at(hole.min(bytes.len()));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}

/// Put the checksum of a finished structure into its field at `hole`.
fn seal(bytes: &mut [u8], hole: usize) -> u32 {
    let sum = checksum(bytes, hole);
    bytes[hole..hole + 4].copy_from_slice(&sum.to_le_bytes());
    sum
}
