//! Bitmaps that the file keeps: the list of them.
//!
//! Owns [`Bitmap`] and [`list`]. Bitmaps say what changed since some time; nothing reads images through them, so a
//! damaged directory is said when it is listed and damages nothing else. The bits themselves are not read.

use super::{
    fault::{Fault, Result, be16, be32, be64},
    header::BitmapsRef,
};

/// Most bitmaps of one image.
pub const BITMAPS_MAX: u32 = 65535;
/// Longest directory of bitmaps that is read.
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 16 << 20;

const FIXED_LEN: usize = 24;
const FLAG_IN_USE: u32 = 1;
const FLAG_AUTO: u32 = 1 << 1;
const FLAGS_KNOWN: u32 = (1 << 3) - 1;
const TYPE_DIRTY: u8 = 1;

/// One bitmap, as its entry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    /// Bytes of the image for one bit.
    pub granularity: u64,
    flags: u32,
}

/// Parse `directory`, whole as the header has it, which lies at that offset of the file.
pub fn list(directory: &[u8], header: BitmapsRef) -> Result<Vec<Bitmap>> {
    let mut bitmaps = Vec::new();
    let mut start = 0;
    for _ in 0..header.count.min(BITMAPS_MAX) {
        let at = header.directory.saturating_add(start as u64);
        let bytes = directory.get(start..).unwrap_or_default();
        let cut = || Fault::truncated("bitmap directory", at);
        let (_table, _entries) = (be64(bytes, 0).ok_or_else(cut)?, be32(bytes, 8).ok_or_else(cut)?);
        let flags = be32(bytes, 12).ok_or_else(cut)?;
        if flags & !FLAGS_KNOWN != 0 {
            return Err(Fault::field("flags of a bitmap", flags, at + 12));
        }
        let (kind, bits) = match bytes.get(16..18) {
            Some([kind, bits]) => (*kind, *bits),
            Some(_) | None => return Err(cut()),
        };
        if kind != TYPE_DIRTY {
            return Err(Fault::field("type of a bitmap", kind, at + 16));
        }
        if bits > 63 {
            return Err(Fault::field("granularity_bits of a bitmap", bits, at + 17));
        }
        let name_len = usize::from(be16(bytes, 18).ok_or_else(cut)?);
        let extra_len = be32(bytes, 20).and_then(|len| usize::try_from(len).ok()).ok_or_else(cut)?;
        let name_at = FIXED_LEN + extra_len;
        let name = bytes.get(name_at..).and_then(|rest| rest.get(..name_len)).ok_or_else(cut)?;
        bitmaps.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity: 1 << bits,
            flags,
        });
        start += (name_at + name_len).next_multiple_of(8);
    }
    Ok(bitmaps)
}

impl Bitmap {
    /// Whether it was not written back when the image was last closed: what it says may be old.
    pub fn is_in_use(&self) -> bool {
        self.flags & FLAG_IN_USE != 0
    }

    /// Whether writers go on recording in it.
    pub fn is_recording(&self) -> bool {
        self.flags & FLAG_AUTO != 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

    use super::*;
    use crate::image::qcow2::header::BitmapsState;

    fn entry(name: &str, flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_LEN];
        bytes[12..16].copy_from_slice(&flags.to_be_bytes());
        bytes[16] = TYPE_DIRTY;
        bytes[17] = 16;
        bytes[18..20].copy_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn names_granularity_and_flags_are_listed() {
        let mut directory = entry("b0", FLAG_AUTO);
        directory.extend(entry("nightly", FLAG_IN_USE));
        let header =
            BitmapsRef { count: 2, directory: 0, directory_len: 64, state: BitmapsState::Consistent };
        let found = list(&directory, header).unwrap();
        assert_eq!((found[0].name.as_str(), found[0].granularity), ("b0", 65536));
        assert!(found[0].is_recording() && !found[0].is_in_use());
        assert!(found[1].is_in_use() && !found[1].is_recording());
        assert!(list(&directory[..30], header).is_err());
        assert!(list(&entry("b0", 1 << 9), header).is_err());
    }
}
