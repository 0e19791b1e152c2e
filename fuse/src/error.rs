//! Why a mount could not be made or undone.
//!
//! Owns [`MountError`]. Errors of single requests are the engine's, translated by [`errno`](crate::errno).

use std::{io, path::PathBuf};

use crate::uring::NoRings;

pub type Result<T, E = MountError> = std::result::Result<T, E>;

/// Why there is no mount, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The operating system refused.
    #[error("{op} {}: {source}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    /// Something that is not ours is mounted there.
    #[error("{} holds a mount of {source_name} ({file_system}); unmount it or choose another directory", dir.display())]
    Foreign { dir: PathBuf, file_system: String, source_name: String },
    /// Another node that lives is mounted there.
    #[error("{} is served by the running process {pid}; stop it first or choose another directory", dir.display())]
    Held { dir: PathBuf, pid: u32 },
    /// The directory has files that the mount would hide.
    #[error("{} is not empty; a mount would hide its files", dir.display())]
    NotEmpty { dir: PathBuf },
    /// It is not a directory that can be mounted on.
    #[error("{} is not a directory", dir.display())]
    NotADirectory { dir: PathBuf },
    /// Too many dead mounts lie on top of one another.
    #[error("{} holds more than {max} dead mounts; unmount them by hand", dir.display())]
    TooManyStale { dir: PathBuf, max: usize },
    /// Rings were asked for and cannot be had.
    #[error(transparent)]
    NoRings(#[from] NoRings),
    /// A thread did not start.
    #[error("start a thread: {0}")]
    Thread(#[source] io::Error),
}

impl MountError {
    /// An operating system error with its place.
    pub(crate) fn io(op: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> MountError {
        MountError::Io { op, path: path.into(), source: source.into() }
    }
}
