//! The read-only block device over an image.
//!
//! An image ends where its file or its header says; the device goes on to a whole sector, and what is missing reads as
//! zeros.

use std::sync::Arc;

use super::BaseImage;
use crate::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Reply, Request, check_length},
    error::{Error, Result},
    exec::{
        asynchronous::{Asynchronous, Located, Pin},
        executor::Shared,
        fair::Key,
    },
    units::{ByteLen, ByteOffset, ByteRange, SECTOR_SIZE, to_usize},
};

/// An image that is open.
#[derive(Debug)]
pub struct ImageDevice {
    image: Arc<dyn BaseImage>,
    size: ByteLen,
}

impl ImageDevice {
    pub fn new(image: Arc<dyn BaseImage>) -> ImageDevice {
        let size = sectors(image.len());
        ImageDevice { image, size }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        check_length(buffer.len() as u64)?;
        let range = ByteRange::within(offset, buffer.len() as u64, self.size)?;
        let held = range.end().0.min(self.image.len().0).saturating_sub(offset);
        let (content, past_end) = buffer.split_at_mut(to_usize(held));
        past_end.fill(0);
        if content.is_empty() { Ok(()) } else { self.image.read_at(content, offset) }
    }
}

/// The size of the device over an image of `len`: whole sectors.
pub const fn sectors(len: ByteLen) -> ByteLen {
    ByteLen(len.0.next_multiple_of(SECTOR_SIZE))
}

impl BlockDevice for ImageDevice {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let read_only = || Err(Error::ReadOnly { what: "an image".into() });
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
        let range = ByteRange::within(range.start.0, range.len.0, self.size)?;
        let held = range.end().0.min(self.image.len().0).saturating_sub(range.start.0);
        let mut extents = match held {
            0 => Vec::new(),
            held => self.image.extents(ByteRange::new(range.start.0, held))?,
        };
        let at = extents.last().map_or(range.start, |last| last.range.end());
        // An answer may end early; what is past the image's end follows only a whole one.
        if at.0 == range.start.0 + held && at < range.end() {
            let past_end = ByteRange::new(at.0, range.end().0 - at.0);
            extents.push(Extent { range: past_end, kind: ExtentKind::Zero });
        }
        Ok(extents)
    }

    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        Some(self)
    }
}

impl Asynchronous for ImageDevice {
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<Pin> {
        let range = ByteRange::within(range.start.0, range.len.0, self.size)?;
        let content = ByteRange { start: ByteOffset(0), len: self.image.len() };
        let held = range.intersect(content);
        if let Some(held) = held {
            self.image.locate(held, found);
        }
        let start = held.map_or(range.start, ByteRange::end);
        let past_end = ByteRange { start, len: range.end().since(start) };
        if !past_end.is_empty() {
            found(past_end, Located::Zeros);
        }
        Ok(Pin::DEVICE)
    }

    fn confirm(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn waits_for(&self) -> Key {
        self.image.identity()
    }

    fn changes(&self) -> Result<&Arc<Shared>> {
        Err(Error::ReadOnly { what: "an image".into() })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::{device::Durability, image::raw::RawImage};

    fn image(content: &[u8]) -> ImageDevice {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        let raw = RawImage::new(file, "image".into(), ByteLen(content.len() as u64)).unwrap();
        ImageDevice::new(Arc::new(raw))
    }

    #[test]
    fn the_missing_bytes_of_the_last_sector_read_as_zeros() {
        let device = image(&[7; 1000]);
        assert_eq!(device.geometry().size.0, 1024);
        let mut buffer = [1; 100];
        device.read_at(&mut buffer, 924).unwrap();
        assert!(buffer[..76].iter().all(|b| *b == 7) && buffer[76..].iter().all(|b| *b == 0));
        device.read_at(&mut buffer[..24], 1000).unwrap();
        assert!(buffer[..24].iter().all(|b| *b == 0));
        assert!(matches!(device.read_at(&mut buffer, 1000), Err(Error::OutOfRange { .. })));
        assert!(matches!(device.write_at(&[0], 0, Durability::Volatile), Err(Error::ReadOnly { .. })));
    }

    #[test]
    fn runs_cover_a_range_in_order_without_gaps() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.set_len((2 << 20) + 100).unwrap();
        let raw = RawImage::new(file, "image".into(), ByteLen((2 << 20) + 100)).unwrap();
        let device = ImageDevice::new(Arc::new(raw));
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
