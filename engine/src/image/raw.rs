//! A raw image: the file's bytes are the content.
//!
//! Read through the page cache, so that every volume over the image shares one copy of what is hot. The file is
//! immutable, so its holes may be asked of the file system: a hole of an image is zeros and stays zeros.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};

use super::BaseImage;
use crate::{
    device::{Extent, ExtentKind},
    error::{Corruption, Error, Result},
    units::{ByteLen, ByteOffset, ByteRange},
};

/// Runs of one [`BaseImage::extents`] answer.
const EXTENTS_MAX: usize = 1024;

#[derive(Debug)]
pub struct RawImage {
    file: File,
    path: PathBuf,
    len: ByteLen,
}

impl RawImage {
    /// Open `path`, which must be a regular file of exactly `len` bytes.
    pub fn open(path: &Path, len: ByteLen) -> Result<RawImage> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        if !meta.is_file() {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "anything but a regular file".into(),
            });
        }
        if meta.len() != len.0 {
            return Err(Error::Corrupt {
                path: path.to_owned(),
                what: Corruption::Field { field: "file length", value: meta.len() },
                at: ByteOffset(meta.len()),
            });
        }
        Ok(RawImage { file, path: path.to_owned(), len })
    }

    fn seek(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek64(&self.file, i64::try_from(at).unwrap_or(i64::MAX), whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(Error::io("seek", &self.path, errno.into())),
        }
    }
}

impl BaseImage for RawImage {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| Error::io("read", &self.path, e))
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        // The end of a file that was cut looks like a hole.
        let found = self.file.metadata().map_err(|e| Error::io("stat", &self.path, e))?.len();
        if found < self.len.0 {
            let what = Corruption::Truncated("image");
            return Err(Error::Corrupt { path: self.path.clone(), what, at: ByteOffset(found) });
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
}
