//! A file that was opened beneath a [`Directory`](super::Directory): of the file system, or of a simulated machine.
//!
//! Owns what an arrival does with its file. Errors name the file and what was done with it. A simulated file has neither
//! a mode nor times; whatever needs a descriptor asks for one, and is refused there.

use std::{
    fs::{File, Permissions},
    io::Read,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    error::{Error, Result},
    exec::storage::StorageFile,
    sparse,
};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

/// An open file, with its path for messages.
#[derive(Debug)]
pub struct HeldFile {
    kind: Kind,
    path: PathBuf,
}

#[derive(Debug)]
enum Kind {
    System(File),
    Simulated(Arc<dyn StorageFile>),
}

impl HeldFile {
    /// A file of the file system; `path` is for messages.
    pub fn new(file: File, path: PathBuf) -> HeldFile {
        HeldFile { kind: Kind::System(file), path }
    }

    pub(super) fn simulated(file: Arc<dyn StorageFile>) -> HeldFile {
        let path = file.path().to_owned();
        HeldFile { kind: Kind::Simulated(file), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor, which a simulated file does not have.
    pub fn system(&self) -> Option<&File> {
        match &self.kind {
            Kind::System(file) => Some(file),
            Kind::Simulated(_) => None,
        }
    }

    /// The same for whoever cannot do without.
    pub fn into_system(self) -> Result<File> {
        match self.kind {
            Kind::System(file) => Ok(file),
            Kind::Simulated(_) => {
                let what = "the descriptor of a simulated file".to_owned();
                Err(Error::Unsupported { path: self.path, what })
            }
        }
    }

    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
    pub fn len(&self) -> Result<u64> {
        match &self.kind {
            Kind::System(file) => Ok(file.metadata().map_err(|e| self.failed("stat", e))?.len()),
            Kind::Simulated(file) => file.len(),
        }
    }

    /// Fill `buffer` from `offset`.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::System(file) => file.read_exact_at(buffer, offset).map_err(|e| self.failed("read", e)),
            Kind::Simulated(file) => file.read_at(buffer, offset),
        }
    }

    /// Its bytes from the start, at most `limit` of them.
    pub fn read_from_start(&self, limit: u64) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        match &self.kind {
            Kind::System(file) => {
                file.take(limit).read_to_end(&mut content).map_err(|e| self.failed("read", e))?;
            }
            Kind::Simulated(file) => {
                content.resize(usize::try_from(file.len()?.min(limit)).unwrap_or(0), 0);
                file.read_at(&mut content, 0)?;
            }
        }
        Ok(content)
    }

    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        match &self.kind {
            Kind::System(file) => file.write_all_at(bytes, offset).map_err(|e| self.failed("write", e)),
            Kind::Simulated(file) => file.write_at(bytes, offset),
        }
    }

    /// Write where there still is a hole, leaving blocks of zeros out; see [`sparse`].
    pub fn write_sparse(&self, bytes: &[u8], offset: u64) -> Result<()> {
        sparse::for_each_run(bytes, offset, |data, at| self.write_all_at(data, at))
    }

    pub fn set_len(&self, len: u64) -> Result<()> {
        match &self.kind {
            Kind::System(file) => file.set_len(len).map_err(|e| self.failed("truncate", e)),
            Kind::Simulated(file) => file.set_len(len),
        }
    }

    /// Make its data and length durable.
    pub fn sync_data(&self) -> Result<()> {
        match &self.kind {
            Kind::System(file) => file.sync_data().map_err(|e| self.failed("sync", e)),
            Kind::Simulated(file) => file.sync(),
        }
    }

    /// The same, and its mode and times.
    pub fn sync_all(&self) -> Result<()> {
        match &self.kind {
            Kind::System(file) => file.sync_all().map_err(|e| self.failed("sync", e)),
            Kind::Simulated(file) => file.sync(),
        }
    }

    /// Who may read and write it.
    pub fn set_mode(&self, mode: u32) -> Result<()> {
        match &self.kind {
            Kind::System(file) => {
                file.set_permissions(Permissions::from_mode(mode)).map_err(|e| self.failed("chmod", e))
            }
            Kind::Simulated(_) => Ok(()),
        }
    }

    /// Bytes that it takes on the disk; 0 where that cannot be found out.
    pub fn allocated(&self) -> u64 {
        match &self.kind {
            Kind::System(file) => allocated(file),
            Kind::Simulated(file) => file.allocated().unwrap_or(0),
        }
    }

    fn failed(&self, op: &'static str, error: std::io::Error) -> Error {
        Error::io(op, &self.path, error)
    }
}

/// Bytes that an open file takes on the disk; 0 where that cannot be found out.
pub fn allocated(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.blocks().saturating_mul(512))
}

/// The next run with data at or after `at`: its start and end, both `size` when there is none.
pub fn next_data(file: &File, at: u64, size: u64) -> nix::Result<(u64, u64)> {
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, at, whence).map(|at| u64::try_from(at).unwrap_or(size))
    };
    let start = match seek(at, Whence::SeekData) {
        Ok(start) => start.min(size),
        // Nothing but a hole up to the end.
        Err(Errno::ENXIO) => return Ok((size, size)),
        // Neither devices nor every file system know holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok((at, size)),
        Err(e) => return Err(e),
    };
    if start == size {
        return Ok((size, size));
    }
    let end = seek(start, Whence::SeekHole)?.min(size);
    // A file that shrinks under us must not make the caller go round for ever.
    if end <= start { Err(Errno::EIO) } else { Ok((start, end)) }
}
