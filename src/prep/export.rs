//! Exporting a block device: to a raw file with holes, or as a stream.
//!
//! A file appears under its name only when it is whole and durable: it is written without a name, synced, linked in, and
//! its directory synced, so that a node that is killed leaves nothing in a directory that it never looks at again. A stream gets every byte, zeros too. Neither changes the device. The caller hands in a view that
//! stands still (a snapshot, an image).

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
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

/// Bytes of one read.
const READ_LEN: u64 = 1 << 20;

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
    let name =
        path.file_name().ok_or_else(|| Storage::Invalid(format!("{} is not a file name", path.display())))?;
    let taken = || Storage::Exists { kind: "file", name: path.display().to_string() };
    if existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        return Err(taken().into());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let beside = directory.join(format!(".{}.{}.partial", name.to_string_lossy(), Uuid::new_v4().simple()));
    let draft = Draft::create(directory, &beside)?;
    let written = write_draft(device, draft.file(), path, meter, stop).and_then(|()| {
        meter.enter(Phase::Publishing);
        draft.publish(&beside, path, existing).map_err(|e| match e {
            Errno::EEXIST => taken(),
            e => Storage::io("publish", path, e.into()),
        })?;
        let directory_file = File::open(directory).map_err(|e| Storage::io("open", directory, e))?;
        directory_file.sync_all().map_err(|e| Storage::io("sync", directory, e))?;
        Ok(())
    });
    if written.is_err() {
        // The reason for the failure is what matters; that there is nothing to remove is fine.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

/// A file that is not under its own name yet.
enum Draft {
    /// Gone with the process that has it open.
    Unnamed(File),
    /// Under the name beside, where the file system has no unnamed files.
    Named(File),
}

impl Draft {
    fn create(directory: &Path, beside: &Path) -> StorageResult<Draft> {
        let mut options = OpenOptions::new();
        options.write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
            Ok(file) => return Ok(Draft::Unnamed(file)),
            // EISDIR is what kernels say that do not know the flag.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
            Err(e) => return Err(Storage::io("create a file in", directory, e)),
        }
        let file = options.create_new(true).open(beside).map_err(|e| Storage::io("create", beside, e))?;
        Ok(Draft::Named(file))
    }

    fn file(&self) -> &File {
        match self {
            Draft::Unnamed(file) | Draft::Named(file) => file,
        }
    }

    /// Give it its name.
    fn publish(&self, beside: &Path, path: &Path, existing: Existing) -> nix::Result<()> {
        let rename = |flags| renameat2(AT_FDCWD, beside, AT_FDCWD, path, flags);
        match (self, existing) {
            (Draft::Unnamed(file), Existing::Refuse) => link(file, path),
            // A link replaces nothing, a rename does.
            (Draft::Unnamed(file), Existing::Replace) => {
                link(file, beside)?;
                rename(RenameFlags::empty())
            }
            (Draft::Named(_), Existing::Refuse) => rename(RenameFlags::RENAME_NOREPLACE),
            (Draft::Named(_), Existing::Replace) => rename(RenameFlags::empty()),
        }
    }
}

/// Name an open file; refused where the name is taken.
fn link(file: &File, path: &Path) -> nix::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
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
