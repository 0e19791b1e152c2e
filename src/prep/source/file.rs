//! Bytes from a local file or block device.
//!
//! Holes of the file are not read. A file that changes while it is read is refused; one that is as it was when an
//! earlier run kept a prefix of it (device, inode, size, mtime) is read on from there. Nothing tells that of a block
//! device, which is read anew.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bedplate_engine::error::Error as Storage;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use super::{Source, Validator};
use crate::{
    directory::next_data,
    prep::{
        arrival::{Arrival, Opening},
        failure::{Failure, Result},
    },
};

/// Bytes of one read.
const READ_LEN: u64 = 1 << 20;

/// A file, by path or already open.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    opened: Option<File>,
}

impl FileSource {
    pub fn new(path: &Path) -> FileSource {
        FileSource { path: path.to_owned(), opened: None }
    }

    /// A file that the caller has opened; `path` is for messages.
    pub fn from_file(file: File, path: &Path) -> FileSource {
        FileSource { path: path.to_owned(), opened: Some(file) }
    }

    fn open(&mut self) -> Result<File> {
        if let Some(file) = self.opened.take() {
            return Ok(file);
        }
        // O_NONBLOCK: opening a pipe must not wait for its writer. It means nothing for what is accepted.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(&self.path)
            .map_err(|e| Storage::io("open", &self.path, e))?;
        Ok(file)
    }
}

impl Source for FileSource {
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        let mut file = self.open()?;
        let path = &self.path;
        let io = |op| move |e| Failure::from(Storage::io(op, path, e));
        let meta = file.metadata().map_err(io("stat"))?;
        let size = if meta.file_type().is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(io("seek"))?
        } else if meta.is_file() {
            meta.len()
        } else {
            let what = format!("{} is neither a regular file nor a block device", path.display());
            return Err(Failure::Unsupported(what));
        };
        let validator = identity(&meta);
        // A device has nothing that tells.
        let same = validator != Validator::None && *arrival.validator() == validator;
        if arrival.position() > 0 && (!same || arrival.position() > size) {
            arrival.restart()?;
        }
        arrival.proven();
        let needed_bytes = Some(data_bytes(&file, arrival, size).map_err(|e| io("seek")(e.into()))?);
        arrival.begin(Opening { total: Some(size), needed_bytes, validator: validator.clone() })?;
        // Advice only.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);

        let mut buffer = vec![0; usize::try_from(READ_LEN.min(size)).unwrap_or(0)];
        while arrival.position() < size {
            let at = arrival.position();
            let (data, end) = next_data(&file, at, size).map_err(|e| io("seek")(e.into()))?;
            arrival.zeros(data - at)?;
            while arrival.position() < end {
                let at = arrival.position();
                let len = usize::try_from((end - at).min(READ_LEN)).unwrap_or(buffer.len());
                let part = buffer.get_mut(..len).unwrap_or_default();
                file.read_exact_at(part, at).map_err(io("read"))?;
                arrival.bytes(part)?;
            }
        }
        if identity(&file.metadata().map_err(io("stat"))?) != validator {
            return Err(Failure::Changed(path.clone()));
        }
        Ok(())
    }
}

/// How much of the file from [`Arrival::position`] on is data; what arrived before has its space already.
fn data_bytes(file: &File, arrival: &Arrival<'_>, size: u64) -> nix::Result<u64> {
    let (mut at, mut sum) = (arrival.position(), 0);
    while at < size {
        let (data, end) = next_data(file, at, size)?;
        sum += end - data;
        at = end;
    }
    Ok(sum)
}

/// What tells that a file is still the same: nothing, of a block device.
pub fn identity(meta: &std::fs::Metadata) -> Validator {
    if meta.file_type().is_block_device() {
        // A device's inode says nothing about its content.
        return Validator::None;
    }
    let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
    Validator::File { device: meta.dev(), inode: meta.ino(), size_bytes: meta.len(), mtime_ns }
}
