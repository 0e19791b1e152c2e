//! Writing a block device's content to a file.
//!
//! Owns [`to_file`]: the file appears under its name only when it is whole and durable. The caller hands in a device
//! that stands still (a snapshot, an image). What is written is the format's: [`Format`].

mod draft;
mod pieces;
pub mod qcow2;
mod raw;

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use nix::errno::Errno;

use self::draft::{Draft, clear_abandoned};
use crate::{
    device::BlockDevice,
    error::{Error, Result},
};

/// What a file is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2(qcow2::Options),
}

/// What happens when the file is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    /// Only a regular file; a link to one is replaced itself.
    Replace,
}

/// Watches an export, in the order of the content. An error from it ends the export and is what the export answers.
pub trait Monitor: Send {
    /// Everything before this byte of the content has been read.
    fn reached(&mut self, at: u64) -> Result<()>;

    /// The next part of the content; for digests.
    fn content(&mut self, _part: Content<'_>) -> Result<()> {
        Ok(())
    }

    /// Every byte is in the file, which may be read; what is left is to make it durable and give it its name.
    fn complete(&mut self, _file: &File) -> Result<()> {
        Ok(())
    }
}

/// A part of the content.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    Data(&'a [u8]),
    /// So many zeros.
    Zeros(u64),
}

/// Export to the file `path`.
pub fn to_file(
    device: &dyn BlockDevice,
    path: &Path,
    existing: Existing,
    format: Format,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    if path.file_name().is_none() {
        return Err(Error::Invalid(format!("{} is not a file name", path.display())));
    }
    let taken = || Error::Exists { kind: "file", name: path.display().to_string() };
    match existing {
        Existing::Refuse if path.symlink_metadata().is_ok() => return Err(taken()),
        // A device or a pipe would be taken away and a file put in its place; a directory refuses that, but late.
        Existing::Replace if path.metadata().is_ok_and(|target| !target.is_file()) => {
            return Err(Error::Invalid(format!("{} is not a regular file", path.display())));
        }
        Existing::Refuse | Existing::Replace => {}
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    clear_abandoned(directory);
    let draft = Draft::create(directory)?;
    match format {
        Format::Raw => raw::write(device, &draft.file, path, monitor)?,
        Format::Qcow2(options) => qcow2::write(device, &draft.file, path, options, monitor)?,
    }
    monitor.complete(&draft.file)?;
    draft.file.sync_all().map_err(|e| Error::io("sync", path, e))?;
    draft.publish(path, existing).map_err(|e| match e {
        Errno::EEXIST => taken(),
        e => Error::io("publish", path, e.into()),
    })?;
    let directory_file = File::open(directory).map_err(|e| Error::io("open", directory, e))?;
    directory_file.sync_all().map_err(|e| Error::io("sync", directory, e))
}

fn put(file: &File, path: &Path, at: u64, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, at).map_err(|e| Error::io("write", path, e))
}
