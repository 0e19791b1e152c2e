//! The read-only block device over a ready raw image.
//!
//! The file ends where its source ended; the device goes on to a whole sector, and what is missing reads as zeros. A
//! byte that *should* be in the file and is not means that somebody cut it: that is an error, never zeros. The
//! descriptor pins the file, so a device that is open still reads when the image is deleted.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Reply, Request, check_length},
    error::{Corruption, Error, Result},
    units::{ByteLen, ByteOffset, ByteRange},
};

use super::record::{Format, Published};
use crate::directory::next_data;

/// Most runs that one call of [`BlockDevice::extents`] looks for.
const EXTENTS_MAX: usize = 4096;

/// A raw image that is open.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    path: PathBuf,
    /// Bytes of the file.
    size: u64,
    virtual_size: u64,
}

impl RawImage {
    /// Over a file that was verified to be this.
    pub fn new(file: File, path: PathBuf, published: &Published) -> RawImage {
        let size = published.stamp.size_bytes;
        let virtual_size = match published.format {
            Format::Raw => Format::Raw.virtual_size_bytes(size),
        };
        RawImage { file, path, size, virtual_size }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        check_length(buffer.len() as u64)?;
        let range = ByteRange::within(offset, buffer.len() as u64, ByteLen(self.virtual_size))?;
        let in_file = range.end().0.min(self.size).saturating_sub(offset);
        let in_file = usize::try_from(in_file).unwrap_or(usize::MAX).min(buffer.len());
        let (data, past_end) = buffer.split_at_mut(in_file);
        self.file.read_exact_at(data, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::Corrupt {
                path: self.path.clone(),
                what: Corruption::Truncated("image"),
                at: ByteOffset(offset),
            },
            _ => Error::io("read", &self.path, e),
        })?;
        past_end.fill(0);
        Ok(())
    }
}

impl BlockDevice for RawImage {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.virtual_size), access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let read_only = || Err(Error::ReadOnly { what: self.path.display().to_string() });
        let reply = match request {
            Request::Read { offset, mut buffer } => {
                let result = self.read(&mut buffer, offset);
                Reply { result, buffer }
            }
            Request::Write { data, .. } => Reply { result: read_only(), buffer: data },
            Request::Zero { .. } | Request::Discard { .. } => {
                Reply { result: read_only(), buffer: Vec::new() }
            }
            // There is nothing that could be lost.
            Request::Flush => Reply { result: Ok(()), buffer: Vec::new() },
        };
        complete(reply);
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.read(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let range = ByteRange::within(range.start.0, range.len.0, ByteLen(self.virtual_size))?;
        let mut extents = Vec::new();
        let mut add = |start: u64, end: u64, kind| {
            if start < end {
                extents.push(Extent { range: ByteRange::new(start, end - start), kind });
            }
            extents.len() < EXTENTS_MAX
        };
        let mut at = range.start.0;
        let end = range.end().0.min(self.size);
        while at < end {
            let (data, hole) =
                next_data(&self.file, at, self.size).map_err(|e| Error::io("seek", &self.path, e.into()))?;
            let (data, hole) = (data.min(end), hole.min(end));
            let room = add(at, data, ExtentKind::Zero) && add(data, hole, ExtentKind::Data);
            if !room {
                return Ok(extents);
            }
            at = hole;
        }
        add(at, range.end().0, ExtentKind::Zero);
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::record::Stamp;

    fn image(content: &[u8], claimed: u64) -> RawImage {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        let stamp = Stamp { size_bytes: claimed, mtime_ns: 0, inode: 0 };
        RawImage::new(
            file,
            "image".into(),
            &Published { format: Format::Raw, sha512: "0".repeat(128), stamp },
        )
    }

    #[test]
    fn the_missing_bytes_of_the_last_sector_read_as_zeros() {
        let device = image(&[7; 1000], 1000);
        assert_eq!(device.geometry().size.0, 1024);
        let mut buffer = [1; 100];
        device.read_at(&mut buffer, 924).unwrap();
        assert!(buffer[..76].iter().all(|b| *b == 7) && buffer[76..].iter().all(|b| *b == 0));
        device.read_at(&mut buffer[..24], 1000).unwrap();
        assert!(matches!(device.read_at(&mut buffer, 1000), Err(Error::OutOfRange { .. })));
        assert!(matches!(
            device.write_at(&[0], 0, bedplate_engine::device::Durability::Volatile),
            Err(Error::ReadOnly { .. })
        ));
    }

    #[test]
    fn a_file_that_was_cut_gives_an_error_and_not_zeros() {
        let device = image(&[7; 4096], 8192);
        let mut buffer = [0; 512];
        device.read_at(&mut buffer, 3584).unwrap();
        assert!(matches!(device.read_at(&mut buffer, 3585), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn runs_cover_a_range_in_order_without_gaps() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.set_len((2 << 20) + 100).unwrap();
        let stamp = Stamp { size_bytes: (2 << 20) + 100, mtime_ns: 0, inode: 0 };
        let published = Published { format: Format::Raw, sha512: "0".repeat(128), stamp };
        let device = RawImage::new(file, "image".into(), &published);
        let size = device.geometry().size.0;
        for (start, len) in [(0, size), (1, size - 1), (1 << 20, 100), ((2 << 20) + 90, 20), (size, 0)] {
            let asked = ByteRange::new(start, len);
            let extents = device.extents(asked).unwrap();
            let mut at = start;
            for extent in &extents {
                assert_eq!(extent.range.start.0, at);
                at = extent.range.end().0;
            }
            assert_eq!(at, start + len);
            let data: u64 =
                extents.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.range.len.0).sum();
            assert_eq!(data, asked.intersect(ByteRange::new(1 << 20, 4096)).map_or(0, |r| r.len.0));
        }
    }
}
