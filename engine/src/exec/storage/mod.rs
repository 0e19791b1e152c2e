//! The operating system as the engine sees it: one directory tree with files, names and syncs.
//!
//! Owns [`Storage`] and [`StorageFile`], the boundary between actions and the system. [`mod@file`] is a real disk; the
//! simulated one keeps what is not synced apart, so that a crash can drop it. What is assumed of a medium is in
//! `docs/design.md`, "Assumptions": 512-byte sectors are written whole, a data sync covers data, size and extents, a
//! new name needs a sync of its directory, a sync that failed cannot be repeated.

pub mod file;
pub mod memory;

use std::{fmt, fs::File, path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use uuid::Uuid;

use super::asynchronous::Descriptor;
use crate::{error::Result, units::ByteRange};

/// An open file.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
pub trait StorageFile: Send + Sync + fmt::Debug {
    /// For messages.
    fn path(&self) -> &Path;

    fn len(&self) -> Result<u64>;

    /// Fill `buffer` from `offset`. A file that ends before that is an error, not zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// Write all of `data` at `offset`; when it fails, any part of it may have been written.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()>;

    /// Set the length; what is added reads as zeros and takes no space.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Give back the space of `range`, which then reads as zeros; the length stays.
    fn punch(&self, range: ByteRange) -> Result<()>;

    /// Make data, size and extents survive a crash. After an error nobody knows what did.
    fn sync(&self) -> Result<()>;

    /// Forget what the system remembers of this file's synced bytes, so that reads come from the medium.
    fn drop_cache(&self) -> Result<()>;

    /// All of this file is about to be read in order: begin, and do not wait. A hint.
    fn read_ahead(&self) {}

    /// Writes at multiples of this, in multiples of this, change nothing beside their range: 512 or 4096.
    fn write_align(&self) -> u64;

    /// The file itself, for whoever carries reads and writes out without this trait's calls; none where there is no
    /// such file, or where something has to happen besides.
    fn descriptor(&self) -> Option<Descriptor<'_>> {
        None
    }

    /// Bytes that the file takes on the medium.
    fn allocated(&self) -> Result<u64>;

    /// The descriptor behind it, where there is one: for whoever must know that this very file did not change.
    fn os_file(&self) -> Option<&File> {
        None
    }

    /// Runs of data in `range`, by the file system's own knowledge. Only for repair, never to serve a read.
    fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>>;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// An existing file, through the page cache.
    Read,
    ReadWrite,
    /// An existing layer's data: past the page cache where the file system can.
    Direct,
    /// A new, empty file; [`Error::Exists`](crate::error::Error::Exists) if the name is taken.
    Create,
    /// A new, empty file like [`Open::Direct`].
    CreateDirect,
}

/// What a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Directory,
    Other,
}

/// A directory tree. Paths are relative to its root, with `/`, and never leave it; `""` is the root itself.
pub trait Storage: Send + Sync + fmt::Debug {
    /// For messages: the full name of a path.
    fn full_path(&self, path: &str) -> std::path::PathBuf;

    fn open(&self, path: &str, how: Open) -> Result<Arc<dyn StorageFile>>;

    fn create_dir(&self, path: &str) -> Result<()>;

    /// Names in a directory, in no order.
    fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>>;

    /// Rename, replacing a file (or an empty directory) of the new name, atomically; durable after
    /// [`Storage::sync_dir`] of both directories.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    fn remove_file(&self, path: &str) -> Result<()>;

    /// Remove an empty directory.
    fn remove_dir(&self, path: &str) -> Result<()>;

    /// Make the names in a directory survive a crash.
    fn sync_dir(&self, path: &str) -> Result<()>;

    /// Make every name survive a crash, whoever made it: a process that was killed has left some that it did not sync.
    fn sync_names(&self) -> Result<()>;

    /// Take `len` bytes of space for a file that is only there to be given up; replaces what it held.
    fn allocate(&self, path: &str, len: u64) -> Result<()>;

    /// Bytes that can still be written by anybody.
    fn free_bytes(&self) -> Result<u64>;

    /// All bytes of the medium.
    fn total_bytes(&self) -> Result<u64>;

    /// An id that nothing else has. This and the time are the system's, so that a simulated one repeats them.
    fn new_uuid(&self) -> Uuid {
        Uuid::new_v4()
    }

    /// The time, for records. Clocks jump: nothing is decided by it.
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    /// Let others go on for that long.
    fn rest(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
