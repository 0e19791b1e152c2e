//! The files that stacks are made of: raw ones, sparse ones and qcow2.
//!
//! Owns [`FileLayer`] and the view of a [`Qcow2Layer`] as a layer. In a raw image a hole is zeros; in a layer of a
//! Longhorn replica a hole means "look below", and so does everything past the end of its file. Regular files and
//! block devices only, opened for reading and without ever waiting for somebody at the other end.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom},
    ops::ControlFlow,
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bedplate_engine::{
    error::{Error, Result},
    image::qcow2::{Place, Qcow2Layer, Segment},
    units::{ByteLen, ByteOffset, ByteRange},
};
use nix::{
    errno::Errno,
    libc,
    unistd::{Whence, lseek64},
};

use crate::stack::Layer;

/// Open a regular file or a block device.
pub fn open_file(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = opened.map_err(|e| Error::io("open", path, e))?;
    check_kind(&file, path)?;
    Ok(file)
}

/// Refuse what is neither a regular file nor a block device.
pub fn check_kind(file: &File, path: &Path) -> Result<()> {
    let kind = file.metadata().map_err(|e| Error::io("stat", path, e))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a directory that is neither a Longhorn replica nor a volume of Bedplate"
    } else {
        "anything but a regular file or a block device"
    };
    Err(Error::Unsupported { path: path.to_owned(), what: what.to_owned() })
}

/// What a hole of a file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    Zero,
    Below,
}

/// A file whose bytes are at their own offsets.
#[derive(Debug)]
pub struct FileLayer {
    file: File,
    path: PathBuf,
    name: String,
    /// Bytes of the file.
    len: u64,
    /// Bytes that the layer answers for.
    size: u64,
    holes: Option<Holes>,
}

impl FileLayer {
    /// A raw image.
    pub fn raw(file: File, path: &Path) -> Result<FileLayer> {
        let len = len(&file, path)?;
        let is_file = file.metadata().map_err(|e| Error::io("stat", path, e))?.is_file();
        // A block device does not tell its holes.
        let holes = is_file.then_some(Holes::Zero);
        Ok(FileLayer { file, path: path.to_owned(), name: path.display().to_string(), len, size: len, holes })
    }

    /// A layer of a volume of `size` bytes; its file may be shorter.
    pub fn sparse(file: File, path: &Path, name: String, size: u64) -> Result<FileLayer> {
        let len = len(&file, path)?.min(size);
        Ok(FileLayer { file, path: path.to_owned(), name, len, size, holes: Some(Holes::Below) })
    }

    fn seek(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek64(&self.file, i64::try_from(at).unwrap_or(i64::MAX), whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(Error::io("seek", &self.path, errno.into())),
        }
    }

    fn hole(&self, at: u64, holes: Holes) -> Place {
        match holes {
            Holes::Zero => Place::Zero { host: Some(ByteOffset(at)) },
            Holes::Below => Place::Backing,
        }
    }

    /// The segments of a range within the file.
    fn each_of_file(
        &self,
        range: ByteRange,
        holes: Holes,
        found: &mut dyn FnMut(Segment) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let end = range.end().0;
        let mut at = range.start.0;
        while at < end {
            let data = self.seek(at, Whence::SeekData)?.map_or(end, |found| found.min(end));
            if data > at {
                let segment = Segment { range: ByteRange::new(at, data - at), place: self.hole(at, holes) };
                if found(segment).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            let after = if data < end {
                self.seek(data, Whence::SeekHole)?.map_or(end, |found| found.min(end))
            } else {
                end
            };
            if after > data {
                let place = Place::Data { host: ByteOffset(data) };
                if found(Segment { range: ByteRange::new(data, after - data), place }).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            // The file is being punched under us: the same place is data and a hole at once.
            if after == at {
                return Err(Error::Invalid(format!("{} changes while it is read", self.path.display())));
            }
            at = after;
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Length of a regular file or block device.
fn len(file: &File, path: &Path) -> Result<u64> {
    let mut file = file;
    file.seek(SeekFrom::End(0)).map_err(|e| Error::io("seek", path, e))
}

impl Layer for FileLayer {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn each(&self, range: ByteRange, found: &mut dyn FnMut(Segment) -> ControlFlow<()>) -> Result<()> {
        let flow = match (range.intersect(ByteRange::new(0, self.len)), self.holes) {
            (None, _) => ControlFlow::Continue(()),
            (Some(inside), None) => {
                found(Segment { range: inside, place: Place::Data { host: inside.start } })
            }
            (Some(inside), Some(holes)) => self.each_of_file(inside, holes, found)?,
        };
        let past = range.start.0.max(self.len);
        if flow.is_continue() && past < range.end().0 {
            let range = ByteRange::new(past, range.end().0 - past);
            let _ = found(Segment { range, place: Place::Backing });
        }
        Ok(())
    }

    /// Holes of a raw image are read like everything else.
    fn each_to_read(
        &self,
        range: ByteRange,
        found: &mut dyn FnMut(Segment) -> ControlFlow<()>,
    ) -> Result<()> {
        match self.holes {
            Some(Holes::Below) => self.each(range, found),
            Some(Holes::Zero) | None => {
                let _ = found(Segment { range, place: Place::Data { host: range.start } });
                Ok(())
            }
        }
    }

    fn read(&self, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        match segment.place {
            Place::Data { host } => {
                self.file.read_exact_at(buffer, host.0).map_err(|e| Error::io("read", &self.path, e))
            }
            Place::Zero { .. } | Place::Compressed { .. } | Place::Backing | Place::Damaged => {
                buffer.fill(0);
                Ok(())
            }
        }
    }

    fn files(&self) -> Vec<(&File, &Path)> {
        vec![(&self.file, &self.path)]
    }

    fn explain(&self, range: ByteRange) -> Error {
        Error::OutOfRange { start: range.start.0, len: range.len.0, size: self.size }
    }
}

/// A qcow2 file of a stack.
#[derive(Debug)]
pub struct QcowLayer {
    pub layer: Qcow2Layer,
    pub name: String,
}

impl Layer for QcowLayer {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.layer.size().0
    }

    fn each(&self, range: ByteRange, found: &mut dyn FnMut(Segment) -> ControlFlow<()>) -> Result<()> {
        self.layer.each(range, found)
    }

    fn read(&self, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        debug_assert_eq!(segment.range.len, ByteLen(buffer.len() as u64));
        self.layer.read_segment(segment, buffer)
    }

    fn explain(&self, range: ByteRange) -> Error {
        self.layer.explain(range)
    }

    fn files(&self) -> Vec<(&File, &Path)> {
        self.layer.sources().map(|source| (source.file(), source.path())).collect()
    }
}
