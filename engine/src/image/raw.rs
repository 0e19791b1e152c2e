//! A raw image: the file's bytes are the content.
//!
//! Read through the page cache, so that every volume over the image shares one copy of what is hot, or past it where a
//! node's memory belongs to others ([`file`](super::file)). The file is immutable, so its holes may be asked of the file
//! system: a hole of an image is zeros and stays zeros.

use std::{fs::File, io, path::PathBuf};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};

use super::{BaseImage, file::ImageFile};
use crate::{
    device::{Extent, ExtentKind},
    error::{Corruption, Error, Result},
    exec::asynchronous::Located,
    units::{ByteLen, ByteOffset, ByteRange},
};

/// Runs of one [`BaseImage::extents`] answer.
const EXTENTS_MAX: usize = 1024;

#[derive(Debug)]
pub struct RawImage {
    file: ImageFile,
    len: ByteLen,
}

impl RawImage {
    /// Over `file`, which errors call `path`, and which must be a regular file of exactly `len` bytes.
    pub fn new(file: File, path: PathBuf, len: ByteLen) -> Result<RawImage> {
        let file = ImageFile::new(file, &path)?;
        let found = file.len();
        if found != len.0 {
            let what = Corruption::Field { field: "file length", value: found };
            return Err(Error::Corrupt { path, what, at: ByteOffset(found) });
        }
        Ok(RawImage { file, len })
    }

    /// The file behind it: byte n of the content is byte n of the file.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    fn seek(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek64(self.file.file(), i64::try_from(at).unwrap_or(i64::MAX), whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(Error::io("seek", self.file.path(), errno.into())),
        }
    }
}

impl BaseImage for RawImage {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
            // Somebody cut it.
            io::ErrorKind::UnexpectedEof => {
                let what = Corruption::Truncated("image");
                Error::Corrupt { path: self.file.path().to_owned(), what, at: ByteOffset(offset) }
            }
            _ => Error::io("read", self.file.path(), e),
        })
    }

    fn read_ahead(&self, range: ByteRange) {
        self.file.read_ahead(range);
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        // The end of a file that was cut looks like a hole.
        let meta = self.file.file().metadata();
        let found = meta.map_err(|e| Error::io("stat", self.file.path(), e))?.len();
        if found < self.len.0 {
            let what = Corruption::Truncated("image");
            return Err(Error::Corrupt { path: self.file.path().to_owned(), what, at: ByteOffset(found) });
        }
        let mut extents = Vec::new();
        let end = range.end().0;
        let mut at = range.start.0;
        while at < end && extents.len() < EXTENTS_MAX {
            let data = self.seek(at, Whence::SeekData)?.map_or(end, |found| found.min(end));
            if data > at {
                extents.push(Extent { range: ByteRange::new(at, data - at), kind: ExtentKind::Zero });
            }
            if data < end {
                let hole = self.seek(data, Whence::SeekHole)?.map_or(end, |found| found.min(end));
                extents.push(Extent { range: ByteRange::new(data, hole - data), kind: ExtentKind::Data });
                at = hole;
            } else {
                at = end;
            }
        }
        Ok(extents)
    }

    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        self.file.locate(range, range.start.0, found);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_that_was_cut_gives_an_error_and_not_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let writer = file.try_clone().unwrap();
        let image = RawImage::new(file, "image".into(), ByteLen(8192)).unwrap();
        writer.set_len(4096).unwrap();
        let mut buffer = [0; 512];
        image.read_at(&mut buffer, 3584).unwrap();
        assert!(matches!(image.read_at(&mut buffer, 3585), Err(Error::Corrupt { .. })));
        assert!(matches!(image.extents(ByteRange::new(0, 8192)), Err(Error::Corrupt { .. })));
    }
}
