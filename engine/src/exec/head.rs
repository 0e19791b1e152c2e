//! The files of a head layer, and the actions on them that are whole procedures: staging and switching its map.

use std::sync::{Arc, PoisonError};

use super::{
    reserve::Reserve,
    storage::{Open, Storage, StorageFile},
};
use crate::{
    error::{Error, Result},
    sync::Mutex,
};

/// A layer's open files.
#[derive(Debug)]
pub struct HeadFiles {
    pub storage: Arc<dyn Storage>,
    /// The layer's directory.
    pub dir: String,
    pub data: Arc<dyn StorageFile>,
    map: Mutex<Arc<dyn StorageFile>>,
    staged: Mutex<Option<Arc<dyn StorageFile>>>,
    pub reserve: Arc<Reserve>,
}

impl HeadFiles {
    pub fn new(
        storage: Arc<dyn Storage>,
        dir: String,
        data: Arc<dyn StorageFile>,
        map: Arc<dyn StorageFile>,
        reserve: Arc<Reserve>,
    ) -> HeadFiles {
        HeadFiles { storage, dir, data, map: Mutex::new(map), staged: Mutex::new(None), reserve }
    }

    /// The map file as it is now.
    pub fn map(&self) -> Arc<dyn StorageFile> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Write a new map beside the old one; a full disk's reserve pays for it if it must.
    pub fn stage_map(&self, bytes: &[u8], log_len: u64) -> Result<()> {
        let staged = match write_map(&*self.storage, &self.dir, bytes, log_len) {
            Err(Error::NoSpace { .. }) if self.reserve.give_up() => {
                write_map(&*self.storage, &self.dir, bytes, log_len)?
            }
            other => other?,
        };
        *self.staged.lock().unwrap_or_else(PoisonError::into_inner) = Some(staged);
        Ok(())
    }

    /// Give the staged map its log so far, and its name.
    pub fn switch_map(&self, offset: u64, log: &[u8]) -> Result<()> {
        let staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner).take();
        let staged = staged.ok_or_else(|| Error::Invalid("internal: no map is staged".into()))?;
        if !log.is_empty() {
            staged.write_at(log, offset)?;
            staged.sync()?;
        }
        publish_map(&*self.storage, &self.dir)?;
        *self.map.lock().unwrap_or_else(PoisonError::into_inner) = staged;
        Ok(())
    }

    /// Leave the reason why this layer takes no more writes, for the next opening. Best effort: its medium fails.
    pub fn mark_failed(&self, reason: &str) {
        let path = failed_path(&self.dir);
        let written = self.storage.open(&path, Open::Create).and_then(|file| {
            file.write_at(reason.as_bytes(), 0)?;
            file.sync()?;
            self.storage.sync_dir(&self.dir)
        });
        if let Err(error) = written {
            tracing::error!(layer = %self.dir, %error, "could not mark the layer as failed");
        }
    }
}

pub fn map_path(dir: &str) -> String {
    format!("{dir}/map")
}

pub fn staged_path(dir: &str) -> String {
    format!("{dir}/map.new")
}

pub fn data_path(dir: &str) -> String {
    format!("{dir}/data")
}

pub fn failed_path(dir: &str) -> String {
    format!("{dir}/failed")
}

/// Write `map.new`: a checkpoint and an empty log of zeros, so that a commit changes no size or extent. Synced.
pub fn write_map(
    storage: &dyn Storage,
    dir: &str,
    bytes: &[u8],
    log_len: u64,
) -> Result<Arc<dyn StorageFile>> {
    let path = staged_path(dir);
    match storage.remove_file(&path) {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let file = storage.open(&path, Open::Create)?;
    let write = || {
        file.write_at(bytes, 0)?;
        let zeros = vec![0; crate::units::to_usize(log_len)];
        file.write_at(&zeros, bytes.len() as u64)?;
        file.sync()
    };
    if let Err(error) = write() {
        // Do not leave a part of it on a full disk; if even that fails, the next opening removes it.
        let _ = storage.remove_file(&path);
        return Err(error);
    }
    Ok(file)
}

/// Rename `map.new` over `map`, durably.
pub fn publish_map(storage: &dyn Storage, dir: &str) -> Result<()> {
    storage.rename(&staged_path(dir), &map_path(dir))?;
    storage.sync_dir(dir)
}
