//! Open files and open directories.
//!
//! Owns the handle numbers that the kernel sends back with each request, and for each file that is open at least once
//! the one path that its bytes take ([`IoPath`]): the kernel refuses an inode that is cached for one handle and passed
//! through for another, or has two backing files, so the first opening decides and the last release forgets.
//! A backing id lives here as long as any handle of its file.

use std::{
    collections::HashMap,
    fs::File,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use bedplate_engine::device::{BlockDevice, Durability};
use fuser::{Errno, FileType, FopenFlags, INodeNo};

use crate::{
    backing::Backing,
    errno::Fault,
    namespace::{FileId, Kind, OpenFile},
};

/// Most files that are open at once through one mount.
pub(crate) const OPEN_FILES_MAX: usize = 1 << 16;
/// Most directories that are open at once.
pub(crate) const OPEN_DIRECTORIES_MAX: usize = 1 << 10;

/// Which way the bytes of an open file go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// The kernel reads the image's own file; we are not asked.
    Passthrough,
    /// Read through us once, then from the kernel's page cache.
    Cached,
    /// Every request comes to us.
    Direct,
}

/// Why a file was not opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany {
    pub(crate) limit: &'static str,
}

/// One opening of a file.
pub(crate) struct Handle {
    pub(crate) file: FileId,
    pub(crate) device: Arc<dyn BlockDevice>,
    /// What the open flags asked for; a single write may ask for more.
    pub(crate) durability: Durability,
    /// Whether a fault of this handle has been reported; a broken disk is not to fill the log.
    reported: AtomicBool,
    _hold: Box<dyn Send + Sync>,
}

/// How the bytes of a file that is open travel, with what the kernel needs for it.
#[derive(Clone)]
pub(crate) enum Route {
    Direct,
    Cached,
    Passthrough(Arc<Backing>),
}

/// One name in a directory, as it was when the directory was opened.
pub(crate) struct Listed {
    pub(crate) ino: INodeNo,
    pub(crate) kind: FileType,
    pub(crate) name: String,
}

/// Everything that is open through one mount.
#[derive(Default)]
pub(crate) struct Handles(RwLock<Tables>);

#[derive(Default)]
struct Tables {
    last: u64,
    files: HashMap<u64, Arc<Handle>>,
    inodes: HashMap<FileId, OpenInode>,
    directories: HashMap<u64, Arc<[Listed]>>,
}

/// A file with at least one handle.
struct OpenInode {
    route: Route,
    handle_count: usize,
}

impl Handle {
    /// The number that answers a request on this handle which failed. A fault of the device is logged the first time.
    pub(crate) fn report(&self, op: &'static str, fault: &Fault) -> Errno {
        if let Fault::Device(error) = fault
            && !self.reported.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(op, file = %self.file, %error, "a request failed; further ones of this opening are not logged");
        }
        fault.errno()
    }
}

impl Route {
    /// The flags of an open reply. A volume is never cached, and its writers are not made to wait for one another.
    pub(crate) fn open_flags(&self) -> FopenFlags {
        match self {
            Route::Direct => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            Route::Cached => FopenFlags::FOPEN_KEEP_CACHE,
            Route::Passthrough(_) => FopenFlags::FOPEN_PASSTHROUGH,
        }
    }

    pub(crate) fn io_path(&self) -> IoPath {
        match self {
            Route::Direct => IoPath::Direct,
            Route::Cached => IoPath::Cached,
            Route::Passthrough(_) => IoPath::Passthrough,
        }
    }
}

impl Handles {
    /// Enter an opening. `back` registers a file with the kernel; it is asked only at a file's first opening, and only
    /// if passing through would show the right bytes.
    pub(crate) fn open(
        &self,
        file: FileId,
        opened: OpenFile,
        durability: Durability,
        back: impl FnOnce(&File) -> Option<Backing>,
    ) -> Result<(u64, Route), TooMany> {
        let OpenFile { device, passthrough, hold } = opened;
        let mut tables = self.write();
        if tables.files.len() >= OPEN_FILES_MAX {
            return Err(TooMany { limit: "OPEN_FILES_MAX" });
        }
        let inode = tables.inodes.entry(file).or_insert_with(|| {
            let route = match file.kind {
                Kind::Volume => Route::Direct,
                Kind::Image => passthrough
                    .filter(|file| has_length(file, device.geometry().size.0))
                    .and_then(|file| back(&file))
                    .map_or(Route::Cached, |id| Route::Passthrough(Arc::new(id))),
            };
            OpenInode { route, handle_count: 0 }
        });
        inode.handle_count += 1;
        let route = inode.route.clone();
        let number = tables.next_number();
        let reported = AtomicBool::new(false);
        tables.files.insert(number, Arc::new(Handle { file, device, durability, reported, _hold: hold }));
        Ok((number, route))
    }

    pub(crate) fn file(&self, number: u64) -> Option<Arc<Handle>> {
        self.read().files.get(&number).cloned()
    }

    /// Forget an opening. What it held is dropped after the lock, by whoever is last to use it.
    pub(crate) fn release(&self, number: u64) {
        let mut tables = self.write();
        let handle = tables.files.remove(&number);
        let mut inode = None;
        if let Some(handle) = &handle
            && let Some(open) = tables.inodes.get_mut(&handle.file)
        {
            open.handle_count -= 1;
            if open.handle_count == 0 {
                inode = tables.inodes.remove(&handle.file);
            }
        }
        drop(tables);
        drop((handle, inode));
    }

    /// The path of a file while it is open.
    pub(crate) fn io_path(&self, file: FileId) -> Option<IoPath> {
        self.read().inodes.get(&file).map(|inode| inode.route.io_path())
    }

    /// Files with at least one handle, in a stable order.
    pub(crate) fn open_files(&self) -> Vec<FileId> {
        let mut files: Vec<FileId> = self.read().inodes.keys().copied().collect();
        files.sort_unstable();
        files
    }

    pub(crate) fn open_directory(&self, names: Vec<Listed>) -> Result<u64, TooMany> {
        let mut tables = self.write();
        if tables.directories.len() >= OPEN_DIRECTORIES_MAX {
            return Err(TooMany { limit: "OPEN_DIRECTORIES_MAX" });
        }
        let number = tables.next_number();
        tables.directories.insert(number, names.into());
        Ok(number)
    }

    pub(crate) fn directory(&self, number: u64) -> Option<Arc<[Listed]>> {
        self.read().directories.get(&number).cloned()
    }

    pub(crate) fn release_directory(&self, number: u64) {
        self.write().directories.remove(&number);
    }

    /// Forget everything: the kernel will send no more requests.
    pub(crate) fn clear(&self) {
        let tables = std::mem::take(&mut *self.write());
        drop(tables);
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    /// A number that no handle of this mount has had.
    fn next_number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

/// The kernel passes through up to the end of the backing file, not of ours: they must be one.
fn has_length(file: &File, len: u64) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == len)
}
