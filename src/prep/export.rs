//! Exporting a block device: to a raw file with holes, or as a stream.
//!
//! A file appears under its name only when it is whole and durable. Until then it has no name where the file system can
//! do that, so that a killed node leaves nothing behind. Elsewhere it has a hidden name beside its own, and a lock that
//! dies with its process: the next export into that directory removes those that nobody holds. A stream gets every byte,
//! zeros too. Neither changes the device. The caller hands in a view that stands still (a snapshot, an image).

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use bedplate_engine::{
    device::{BlockDevice, ExtentKind, for_each_extent},
    error::{Error as Storage, Result as StorageResult},
    sparse::write_sparse,
    units::ByteRange,
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2},
    libc,
    unistd::linkat,
};
use uuid::Uuid;

use super::{
    failure::{Failure, Result},
    progress::{Meter, Phase},
    stop::Stop,
};
use crate::directory::DIRECTORY_ENTRIES_MAX;

/// Bytes of one read.
const READ_LEN: u64 = 1 << 20;
/// The hidden name of an unfinished export, around a uuid.
const DRAFT_PREFIX: &str = ".bedplate-export-";
const DRAFT_SUFFIX: &str = ".partial";

/// What happens when the file is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Replace,
}

/// Export to the raw file `path`. Its length is the device's size.
pub fn export_file(
    device: &dyn BlockDevice,
    path: &Path,
    existing: Existing,
    meter: &Meter,
    stop: &Stop,
) -> Result<()> {
    if path.file_name().is_none() {
        return Err(Storage::Invalid(format!("{} is not a file name", path.display())).into());
    }
    let taken = || Storage::Exists { kind: "file", name: path.display().to_string() };
    if existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        return Err(taken().into());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    clear_abandoned(directory);
    let draft = Draft::create(directory)?;
    let written = write_draft(device, &draft.file, path, meter, stop).and_then(|()| {
        meter.enter(Phase::Publishing);
        draft.publish(path, existing).map_err(|e| match e {
            Errno::EEXIST => taken(),
            e => Storage::io("publish", path, e.into()),
        })?;
        let directory_file = File::open(directory).map_err(|e| Storage::io("open", directory, e))?;
        directory_file.sync_all().map_err(|e| Storage::io("sync", directory, e))?;
        Ok(())
    });
    if written.is_err() {
        // The reason for the failure is what matters; that there is nothing to remove is fine.
        let _ = std::fs::remove_file(&draft.hidden);
    }
    written
}

/// A file that is not under its own name yet.
struct Draft {
    /// Locked for as long as it is open.
    file: File,
    naming: Naming,
    /// The name that it has, or gets on its way to its own.
    hidden: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// Gone with the process that has it open.
    Unnamed,
    /// The file system has no unnamed files.
    Hidden,
}

impl Draft {
    fn create(directory: &Path) -> StorageResult<Draft> {
        let hidden = directory.join(format!("{DRAFT_PREFIX}{}{DRAFT_SUFFIX}", Uuid::new_v4().simple()));
        let mut options = OpenOptions::new();
        options.write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
            Ok(file) => Draft { file, naming: Naming::Unnamed, hidden }.locked(),
            // EISDIR is what kernels say that do not know the flag.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                Draft::create_hidden(hidden)
            }
            Err(e) => Err(Storage::io("create a file in", directory, e)),
        }
    }

    fn create_hidden(hidden: PathBuf) -> StorageResult<Draft> {
        let mut options = OpenOptions::new();
        options.write(true).mode(0o600).create_new(true);
        let file = options.open(&hidden).map_err(|e| Storage::io("create", &hidden, e))?;
        Draft { file, naming: Naming::Hidden, hidden }.locked()
    }

    /// Nobody else takes it for abandoned from now on. One that was, in the moment before, fails when it is published.
    fn locked(self) -> StorageResult<Draft> {
        match self.file.try_lock() {
            Ok(()) => Ok(self),
            // What cannot be locked is not removed by others either: they cannot lock it themselves.
            Err(TryLockError::Error(_)) => Ok(self),
            Err(TryLockError::WouldBlock) => Err(Storage::InUse {
                kind: "file",
                name: self.hidden.display().to_string(),
                by: "another export".to_owned(),
            }),
        }
    }

    /// Give it its name.
    fn publish(&self, path: &Path, existing: Existing) -> nix::Result<()> {
        let rename = |flags| renameat2(AT_FDCWD, &self.hidden, AT_FDCWD, path, flags);
        match (self.naming, existing) {
            (Naming::Unnamed, Existing::Refuse) => link(&self.file, path),
            // A link replaces nothing, a rename does.
            (Naming::Unnamed, Existing::Replace) => {
                link(&self.file, &self.hidden)?;
                rename(RenameFlags::empty())
            }
            (Naming::Hidden, Existing::Refuse) => rename(RenameFlags::RENAME_NOREPLACE),
            (Naming::Hidden, Existing::Replace) => rename(RenameFlags::empty()),
        }
    }
}

/// Name an open file; refused where the name is taken.
fn link(file: &File, path: &Path) -> nix::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// Remove the drafts in a directory whose process is gone. What goes wrong is no reason not to export.
fn clear_abandoned(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.take(DIRECTORY_ENTRIES_MAX).flatten() {
        let is_draft = entry.file_type().is_ok_and(|kind| kind.is_file())
            && entry.file_name().to_str().is_some_and(|name| {
                let uuid = name.strip_prefix(DRAFT_PREFIX).and_then(|name| name.strip_suffix(DRAFT_SUFFIX));
                uuid.is_some_and(|uuid| Uuid::try_parse(uuid).is_ok())
            });
        if !is_draft {
            continue;
        }
        let path = entry.path();
        let abandoned = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .is_ok_and(|file| file.try_lock().is_ok() && std::fs::remove_file(&path).is_ok());
        if abandoned {
            tracing::info!(path = %path.display(), "removed what an interrupted export left");
        }
    }
}

/// Write every byte to `out`, zeros included, and flush it.
pub fn export_stream(
    device: &dyn BlockDevice,
    out: &mut dyn Write,
    meter: &Meter,
    stop: &Stop,
) -> Result<()> {
    let zeros = vec![0; usize::try_from(READ_LEN).unwrap_or(0)];
    let sink = |e: io::Error| Failure::from(Storage::io("write", "the output", e));
    copy(device, meter, stop, |piece| match piece {
        Piece::Data { bytes, .. } => out.write_all(bytes).map_err(sink),
        Piece::Zeros(range) => {
            let mut left = range.len.0;
            while left > 0 {
                stop.check()?;
                let part = left.min(READ_LEN);
                let part = usize::try_from(part).unwrap_or(zeros.len());
                out.write_all(zeros.get(..part).unwrap_or(&zeros)).map_err(sink)?;
                left -= part as u64;
            }
            Ok(())
        }
    })?;
    out.flush().map_err(sink)
}

/// `path` is the name that it will have.
fn write_draft(device: &dyn BlockDevice, file: &File, path: &Path, meter: &Meter, stop: &Stop) -> Result<()> {
    let io = |op| move |e| Storage::io(op, path, e);
    copy(device, meter, stop, |piece| match piece {
        // Data that is all zeros becomes a hole, too.
        Piece::Data { at, bytes } => Ok(write_sparse(file, bytes, at).map_err(io("write"))?),
        Piece::Zeros(_) => Ok(()),
    })?;
    meter.enter(Phase::Syncing);
    file.set_len(device.geometry().size.0).map_err(io("truncate"))?;
    file.sync_all().map_err(io("sync"))?;
    Ok(())
}

enum Piece<'a> {
    Data { at: u64, bytes: &'a [u8] },
    Zeros(ByteRange),
}

fn copy(
    device: &dyn BlockDevice,
    meter: &Meter,
    stop: &Stop,
    mut put: impl FnMut(Piece<'_>) -> Result<()>,
) -> Result<()> {
    let size = device.geometry().size.0;
    meter.begin(Phase::Transferring, 0, Some(size));
    let mut buffer = vec![0; usize::try_from(READ_LEN.min(size)).unwrap_or(0)];
    for_each_extent(device, |range, kind| {
        stop.check()?;
        match kind {
            ExtentKind::Zero => put(Piece::Zeros(range))?,
            ExtentKind::Data => {
                let mut at = range.start.0;
                while at < range.end().0 {
                    stop.check()?;
                    let len = usize::try_from((range.end().0 - at).min(READ_LEN)).unwrap_or(buffer.len());
                    let bytes = buffer.get_mut(..len).unwrap_or_default();
                    read(device, bytes, at)?;
                    put(Piece::Data { at, bytes })?;
                    at += bytes.len() as u64;
                    meter.advance_to(at);
                }
            }
        }
        meter.advance_to(range.end().0);
        Ok(())
    })
}

fn read(device: &dyn BlockDevice, bytes: &mut [u8], at: u64) -> StorageResult<()> {
    device.read_at(bytes, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_draft_whose_process_is_gone_is_removed_and_one_that_is_written_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = || dir.path().join(format!("{DRAFT_PREFIX}{}{DRAFT_SUFFIX}", Uuid::new_v4().simple()));
        let foreign = format!("{DRAFT_PREFIX}mine{DRAFT_SUFFIX}");
        std::fs::write(dir.path().join(&foreign), "x").unwrap();
        let (gone, going_on) = (hidden(), hidden());
        drop(Draft::create_hidden(gone.clone()).unwrap());
        let draft = Draft::create_hidden(going_on.clone()).unwrap();
        clear_abandoned(dir.path());
        assert!(!gone.exists() && going_on.exists());

        draft.publish(&dir.path().join("out"), Existing::Refuse).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [foreign, "out".to_owned()]);
        assert_eq!(draft.publish(&dir.path().join("out"), Existing::Refuse), Err(Errno::ENOENT));
    }

    #[test]
    fn a_draft_without_a_name_replaces_a_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::write(&out, "old").unwrap();
        let draft = Draft::create(dir.path()).unwrap();
        assert_eq!(draft.naming, Naming::Unnamed);
        assert_eq!(draft.publish(&out, Existing::Refuse), Err(Errno::EEXIST));
        draft.publish(&out, Existing::Replace).unwrap();
        assert_eq!((names(dir.path()), out.metadata().unwrap().len()), (vec!["out".to_owned()], 0));
    }
}
