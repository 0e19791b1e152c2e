//! The checksums of a map file (`engine/docs/format.md`), put right after a mutation.
//!
//! Without this nothing but the checks of checksums would ever be reached.

use crc32c::{crc32c, crc32c_append};

const HEADER_LEN: usize = 512;
const SECTOR_LEN: usize = 512;
const BITMAP_LEN: usize = 4096;
const ENTRY_LEN: usize = 16;
const LOG_MAGIC: &[u8] = b"BLOG";

/// Make every checksum of `bytes` agree, and every log sector that says that it is one name the sector before it.
pub fn seal(bytes: &mut [u8]) {
    if bytes.len() < HEADER_LEN {
        return;
    }
    bytes[..12].copy_from_slice(b"BEDPMAP\0\x01\0\0\0");
    let directory_len = (number(bytes, 56, 4) as usize).saturating_mul(ENTRY_LEN);
    if let Some(directory_end) = HEADER_LEN.checked_add(directory_len).filter(|end| *end <= bytes.len()) {
        let mut at = directory_end;
        for entry in (HEADER_LEN..directory_end).step_by(ENTRY_LEN) {
            let len = bytes[entry + 4..entry + 6].iter().filter(|kind| **kind == 2).count() * BITMAP_LEN;
            let Some(bitmaps) = bytes.get(at..at + len) else { break };
            let sum = crc32c(bitmaps);
            bytes[entry + 8..entry + 12].copy_from_slice(&sum.to_le_bytes());
            at += len;
        }
        let sum = crc32c(&bytes[HEADER_LEN..directory_end]);
        bytes[60..64].copy_from_slice(&sum.to_le_bytes());
    }
    let mut previous = seal_at(&mut bytes[..HEADER_LEN], 12);
    let log = usize::try_from(number(bytes, 64, 8)).unwrap_or(usize::MAX);
    for sector in bytes.get_mut(log..).unwrap_or_default().chunks_exact_mut(SECTOR_LEN) {
        if sector.starts_with(LOG_MAGIC) {
            sector[28..32].copy_from_slice(&previous.to_le_bytes());
            previous = seal_at(sector, 4);
        }
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(wide)
}

fn seal_at(bytes: &mut [u8], hole: usize) -> u32 {
    let sum = crc32c_append(crc32c_append(crc32c(&bytes[..hole]), &[0; 4]), &bytes[hole + 4..]);
    bytes[hole..hole + 4].copy_from_slice(&sum.to_le_bytes());
    sum
}
