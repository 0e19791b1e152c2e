//! Whose a directory is: the lock that one process has on a disk, and the record that makes a directory one.
//!
//! Upholds the first half of invariant 11: the lock is taken before any record is read. Who keeps it, and how long, is
//! `disk.rs` and the storage.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use nix::fcntl::{Flock, FlockArg};

use super::{
    disk::VOLUMES,
    layer::LAYERS,
    record::{self, DiskRecord, FORMAT_VERSION},
};
use crate::{
    error::{Error, Result},
    exec::storage::{Open, Storage},
};

const DISK_RECORD: &str = "bedplate.json";
const IMAGES: &str = "images";

/// Take the disk's exclusive lock, close-on-exec, before any record is read.
pub(super) fn lock(path: &Path) -> Result<Flock<File>> {
    let record = path.join(DISK_RECORD);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&record).map_err(|e| Error::io("open", &record, e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(file, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => {
            let by = holder_of(&file).unwrap_or_else(|| "another process".into());
            Error::InUse { kind: "disk", name: path.display().to_string(), by }
        }
        errno => Error::io("lock", &record, errno.into()),
    })
}

/// Who serves the disk `path`, if anybody does; the disk is left alone.
pub fn served_by(path: &Path) -> Result<Option<String>> {
    let record = path.join(DISK_RECORD);
    let file = File::open(&record).map_err(|e| Error::io("open", &record, e))?;
    // Files of other file systems may have the same number, so a holder's lock is felt for, shared and for a moment.
    let is_held = || matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock));
    Ok(holder_of(&file).filter(|_| is_held()))
}

/// Who holds the lock of this file, as far as the system tells.
fn holder_of(file: &File) -> Option<String> {
    let inode = file.metadata().ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let held = fields.get(1) == Some(&"FLOCK")
            && fields.get(5).is_some_and(|id| id.ends_with(&format!(":{inode}")));
        held.then(|| fields.get(4).map(|pid| (*pid).to_owned())).flatten()
    })?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim()))
}

/// The disk's record; made, with the directories, where there is nothing yet.
pub(super) fn initialise(storage: &dyn Storage) -> Result<DiskRecord> {
    let exists = match storage.open(DISK_RECORD, Open::Read) {
        Ok(file) => file.len()? > 0,
        Err(error) if error.is_not_found() => false,
        Err(error) => return Err(error),
    };
    let record = if exists {
        record::read(storage, DISK_RECORD)?
    } else {
        let foreign =
            storage.list("")?.into_iter().find(|(name, _)| name != DISK_RECORD && name != "lost+found");
        if let Some((name, _)) = foreign {
            return Err(Error::Invalid(format!(
                "{} is not a disk of Bedplate and not empty ({name:?} is in it); name an empty directory",
                storage.full_path("").display()
            )));
        }
        let record =
            DiskRecord { format_version: FORMAT_VERSION, id: storage.new_uuid(), created_at: storage.now() };
        // In place: the lock is held on this very file.
        let bytes =
            serde_json::to_vec_pretty(&record).map_err(|e| Error::Invalid(format!("internal: {e}")))?;
        let file = match storage.open(DISK_RECORD, Open::Create) {
            Ok(file) => file,
            Err(_) => storage.open(DISK_RECORD, Open::ReadWrite)?,
        };
        file.write_at(&bytes, 0)?;
        file.sync()?;
        record
    };
    let names: HashSet<String> = storage.list("")?.into_iter().map(|(name, _)| name).collect();
    for dir in [IMAGES, LAYERS, VOLUMES] {
        if !names.contains(dir) {
            storage.create_dir(dir)?;
        }
    }
    storage.sync_dir("")?;
    Ok(record)
}
