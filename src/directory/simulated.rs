//! A directory of a simulated machine: the operations of a [`Directory`](super::Directory) over the engine's trait of a
//! storage.
//!
//! It is held by its path, as such a medium has no descriptors. How a file lies in the page cache is nothing that it
//! tells apart.

use std::{path::PathBuf, sync::Arc};

use bedplate_engine::{
    error::Result,
    exec::storage::{Open as StorageOpen, Storage, StorageFile},
};

use super::{Open, Space};

/// A directory beneath the root of `storage`.
#[derive(Debug)]
pub(super) struct SimulatedDirectory {
    storage: Arc<dyn Storage>,
    path: String,
}

impl SimulatedDirectory {
    pub(super) fn root(storage: Arc<dyn Storage>) -> SimulatedDirectory {
        SimulatedDirectory { storage, path: String::new() }
    }

    fn below(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) }
    }

    /// For messages.
    pub(super) fn path(&self) -> PathBuf {
        self.storage.full_path(&self.path)
    }

    pub(super) fn open_dir(&self, name: &str) -> Result<SimulatedDirectory> {
        let path = self.below(name);
        // Whoever is not there has no list.
        self.storage.list(&path)?;
        Ok(SimulatedDirectory { storage: self.storage.clone(), path })
    }

    pub(super) fn create_dir(&self, name: &str) -> Result<()> {
        self.storage.create_dir(&self.below(name))
    }

    pub(super) fn open_file(&self, name: &str, how: Open) -> Result<Arc<dyn StorageFile>> {
        let path = self.below(name);
        match how {
            Open::Read | Open::ReadDirect => self.storage.open(&path, StorageOpen::Read),
            Open::Write => self.storage.open(&path, StorageOpen::ReadWrite),
            Open::CreateWrite => match self.storage.open(&path, StorageOpen::ReadWrite) {
                Err(e) if e.is_not_found() => self.storage.open(&path, StorageOpen::Create),
                opened => opened,
            },
        }
    }

    pub(super) fn names(&self) -> Result<Vec<String>> {
        Ok(self.storage.list(&self.path)?.into_iter().map(|(name, _)| name).collect())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.storage.rename(&self.below(from), &self.below(to))
    }

    pub(super) fn remove_file(&self, name: &str) -> Result<()> {
        self.storage.remove_file(&self.below(name))
    }

    pub(super) fn remove_dir(&self, name: &str) -> Result<()> {
        self.storage.remove_dir(&self.below(name))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.storage.sync_dir(&self.path)
    }

    pub(super) fn space(&self) -> Result<Space> {
        Ok(Space { free_bytes: self.storage.free_bytes()?, size_bytes: self.storage.total_bytes()? })
    }
}
