//! The simulated medium behind the traits of a storage, and its open files.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    CallKind, Fault, MemoryStorage, Shared,
    file::{Cache, FileNode},
    names::{Node, NodeId},
};
use crate::{
    error::{Error, Result},
    exec::storage::{EntryKind, Open, Storage, StorageFile},
    units::{ByteRange, SECTOR_SIZE, to_usize},
};

impl Storage for MemoryStorage {
    fn full_path(&self, path: &str) -> PathBuf {
        Path::new("memory:").join(path)
    }

    fn open(&self, path: &str, how: Open) -> Result<Arc<dyn StorageFile>> {
        let (kind, cache) = match how {
            Open::Read | Open::ReadWrite => (CallKind::Open, Cache::Buffered),
            Open::Direct => (CallKind::Open, Cache::Direct),
            Open::Create => (CallKind::Create, Cache::Buffered),
            Open::CreateDirect => (CallKind::Create, Cache::Direct),
        };
        let node = self.named(kind, "open", path, |medium| {
            let node = match kind {
                CallKind::Create => medium.names.create(path, Node::File(FileNode::default()))?,
                _ => medium.names.find(path)?,
            };
            medium.names.file_mut(node)?.handles += 1;
            Ok(node)
        })?;
        Ok(Arc::new(MemoryFile {
            shared: self.shared.clone(),
            life: self.life,
            node,
            path: self.full_path(path),
            name: path.to_owned(),
            cache,
        }))
    }

    fn create_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::CreateDir, "create directory", path, |medium| {
            medium.names.create(path, Node::Directory).map(drop)
        })
    }

    fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>> {
        self.named(CallKind::List, "list", path, |medium| medium.names.list(path))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.named(CallKind::Rename, "rename", from, |medium| medium.names.rename(from, to))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        self.named(CallKind::Remove, "remove", path, |medium| medium.names.remove(path, EntryKind::File))
    }

    fn remove_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::Remove, "remove", path, |medium| medium.names.remove(path, EntryKind::Directory))
    }

    fn sync_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::SyncDir, "sync", path, |medium| medium.names.sync(path))
    }

    fn sync_names(&self) -> Result<()> {
        self.named(CallKind::SyncDir, "sync", "", |medium| {
            medium.names.sync_all();
            Ok(())
        })
    }

    fn allocate(&self, path: &str, len: u64) -> Result<()> {
        self.named(CallKind::Allocate, "allocate", path, |medium| {
            let node = match medium.names.find(path) {
                Ok(node) => node,
                Err(_) => medium.names.create(path, Node::File(FileNode::default()))?,
            };
            medium.names.file_mut(node)?.reserved = 0;
            if len > medium.free() {
                return Err(io::ErrorKind::StorageFull);
            }
            medium.names.file_mut(node)?.reserved = len;
            Ok(())
        })
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.lock().free())
    }

    fn total_bytes(&self) -> Result<u64> {
        Ok(self.lock().limit)
    }
}

#[derive(Debug)]
struct MemoryFile {
    shared: Arc<Shared>,
    life: u64,
    node: NodeId,
    path: PathBuf,
    name: String,
    cache: Cache,
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let mut medium = self.shared.lock();
        medium.names.close(self.node);
    }
}

impl MemoryFile {
    fn error(&self, op: &'static str, kind: io::ErrorKind) -> Error {
        Error::io(op, &self.path, kind.into())
    }

    /// Count a call and carry it out; `work` gets the file, the free bytes (of a write) and what is to go wrong.
    fn call<R>(
        &self,
        kind: CallKind,
        op: &'static str,
        work: impl FnOnce(&mut FileNode, u64, Option<Fault>) -> Result<R, io::ErrorKind>,
    ) -> Result<R> {
        let mut medium = self.shared.lock();
        let fault = medium.enter(self.life, kind, &self.name)?;
        if let Some(Fault::Error(kind)) = fault {
            return Err(self.error(op, kind));
        }
        let free = if kind == CallKind::Write { medium.free() } else { 0 };
        let file = medium.names.file_mut(self.node).map_err(|kind| self.error(op, kind))?;
        work(file, free, fault).map_err(|kind| self.error(op, kind))
    }

    fn check_alignment(&self, op: &'static str, offset: u64, len: usize) -> Result<()> {
        let align = self.write_align();
        if self.cache == Cache::Direct
            && (!offset.is_multiple_of(align) || !(len as u64).is_multiple_of(align))
        {
            return Err(self.error(op, io::ErrorKind::InvalidInput));
        }
        Ok(())
    }
}

impl StorageFile for MemoryFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> Result<u64> {
        let mut medium = self.shared.lock();
        medium.names.file_mut(self.node).map(|file| file.len()).map_err(|kind| self.error("stat", kind))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.call(CallKind::Read, "read", |file, _, _| file.read(buffer, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_alignment("write", offset, data.len())?;
        self.call(CallKind::Write, "write", |file, free, fault| match fault {
            Some(Fault::Torn { sectors }) => {
                let len = data.len().min(sectors * to_usize(SECTOR_SIZE));
                file.write(&data[..len], offset, free)?;
                Err(io::ErrorKind::Other)
            }
            _ => file.write(data, offset, free),
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.call(CallKind::SetLen, "set length", |file, _, _| {
            file.set_len(len);
            Ok(())
        })
    }

    fn punch(&self, range: ByteRange) -> Result<()> {
        self.call(CallKind::Punch, "punch", |file, _, _| {
            file.punch(range);
            Ok(())
        })
    }

    fn sync(&self) -> Result<()> {
        self.call(CallKind::Sync, "sync", |file, _, fault| {
            if fault.is_some() {
                file.drop_unsynced(self.cache);
                return Err(io::ErrorKind::Other);
            }
            file.sync();
            Ok(())
        })
    }

    fn drop_cache(&self) -> Result<()> {
        self.call(CallKind::DropCache, "drop cache", |file, _, _| {
            file.drop_cache();
            Ok(())
        })
    }

    fn write_align(&self) -> u64 {
        match self.cache {
            Cache::Buffered => SECTOR_SIZE,
            Cache::Direct => self.shared.write_align,
        }
    }

    fn allocated(&self) -> Result<u64> {
        let mut medium = self.shared.lock();
        medium
            .names
            .file_mut(self.node)
            .map(|file| file.used_bytes())
            .map_err(|kind| self.error("stat", kind))
    }

    fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let mut medium = self.shared.lock();
        let file = medium.names.file_mut(self.node).map_err(|kind| self.error("seek", kind))?;
        Ok(file.data_ranges(range))
    }
}
