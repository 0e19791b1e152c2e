//! A disk: one directory that Bedplate owns, opened by one node at a time.
//!
//! Owns [`Disk`]: the lock, opening and its repair work, the catalog of volumes, collection. Upheld here: invariant 10
//! (what a record names exists; nothing is collected while any record is unreadable), 11 (one writer per disk; the
//! storage keeps the lock, so that it lasts as long as anything that can write) and 12 (one volume's failure stops neither
//! another nor the start).
//!
//! Locks, in this order: `maintenance` (one merge or flatten at a time), `life` (one record switch at a time), `tree`
//! (what is open; no file is read or written under it).

use std::{
    collections::HashSet,
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

use super::{
    device::{Backend, Volume, VolumeInfo, VolumeState},
    layer::{self, LAYERS, Layer},
    record::{self, DiskRecord, FORMAT_VERSION, ImageRef, VolumeRecord},
    tree::{Broken, Tree},
};
use crate::{
    cow::{
        core::{HeadState, Synced},
        head::HeadIndex,
        plan::Index,
    },
    error::{Corruption, Error, Result},
    exec::{
        blocking::{Executor, NewHead},
        head::HeadFiles,
        housekeeper::{Housekeeper, ThreadStart},
        pauses::Pauses,
        reserve::Reserve,
        storage::{EntryKind, Open, Storage, file::FileStorage},
        view::View,
    },
    image::{BaseImage, BaseSource},
    units::{BlockCount, ByteLen, ByteOffset},
};

const DISK_RECORD: &str = "bedplate.json";
pub(super) const VOLUMES: &str = "volumes";
const IMAGES: &str = "images";
pub(super) const VOLUME_RECORD: &str = "volume.json";
/// Directories of volumes on their way in or out.
pub(super) const TEMPORARY: &str = ".new-";

/// A disk that this process serves.
pub struct Disk {
    pub(super) storage: Arc<dyn Storage>,
    record: DiskRecord,
    pub(super) bases: Arc<dyn BaseSource>,
    pub(super) reserve: Arc<Reserve>,
    housekeeper: Arc<Housekeeper>,
    pub(super) maintenance: Mutex<()>,
    pub(super) life: Mutex<()>,
    tree: Mutex<Tree>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("path", &self.path()).field("id", &self.id()).finish_non_exhaustive()
    }
}

/// A disk that this process has locked, and serves nothing of yet: its id is known before anything needs an image.
pub struct Held {
    storage: Arc<dyn Storage>,
    record: DiskRecord,
    on_thread_start: ThreadStart,
}

impl Held {
    /// Take the directory `path`. An empty one becomes a disk. Refused while another process holds it.
    pub fn take(path: &Path) -> Result<Held> {
        let lock = lock(path)?;
        Held::over(Arc::new(FileStorage::open(path)?.holding(lock)))
    }

    fn over(storage: Arc<dyn Storage>) -> Result<Held> {
        let record = initialise(&*storage)?;
        Ok(Held { storage, record, on_thread_start: || {} })
    }

    /// Let every thread that carries out requests of this disk, and is not its caller's own, run `hook` first.
    #[must_use]
    pub fn on_thread_start(self, hook: ThreadStart) -> Held {
        Held { on_thread_start: hook, ..self }
    }

    pub fn id(&self) -> Uuid {
        self.record.id
    }

    /// Open its volumes, over the images that `bases` has. The lock is held until this, the disk and every volume of it
    /// are dropped.
    pub fn serve(&self, bases: Arc<dyn BaseSource>) -> Result<Arc<Disk>> {
        let (storage, record) = (self.storage.clone(), self.record.clone());
        let disk = Arc::new(Disk {
            reserve: Arc::new(Reserve::take(storage.clone())?),
            housekeeper: Arc::new(Housekeeper::start(self.on_thread_start)?),
            storage,
            record,
            bases,
            maintenance: Mutex::new(()),
            life: Mutex::new(()),
            tree: Mutex::new(Tree::default()),
        });
        disk.open_volumes()?;
        disk.collect();
        disk.sweep();
        disk.drop_temporary_snapshots();
        Ok(disk)
    }
}

impl Disk {
    /// [`Held::take`] and [`Held::serve`] in one, for users whose images are at hand.
    pub fn open(path: &Path, bases: Arc<dyn BaseSource>) -> Result<Arc<Disk>> {
        Held::take(path)?.serve(bases)
    }

    /// The same over any storage, without a lock between processes.
    pub fn open_storage(storage: Arc<dyn Storage>, bases: Arc<dyn BaseSource>) -> Result<Arc<Disk>> {
        Held::over(storage)?.serve(bases)
    }

    /// Try again to open a volume that could not be opened, for a reason that may have passed. One that is open stays
    /// as it is.
    pub fn reopen(&self, volume: &str) -> Result<()> {
        let _life = self.life();
        if self.tree().volumes.contains_key(volume) {
            return Ok(());
        }
        let record = self.broken_record(volume)?;
        let opened = self.open_volume(record.clone());
        let mut tree = self.tree();
        match opened {
            Ok(opened) => {
                tree.broken.retain(|broken| broken.name != volume);
                tree.volumes.insert(record.name, Arc::new(opened));
                Ok(())
            }
            Err(error) => {
                let known = tree.broken.iter_mut().filter(|broken| broken.name == volume);
                known.for_each(|broken| broken.reason = error.to_string());
                Err(error)
            }
        }
    }

    /// The record of a volume that could not be opened.
    pub(super) fn broken_record(&self, volume: &str) -> Result<VolumeRecord> {
        let tree = self.tree();
        let broken = tree.broken.iter().find(|broken| broken.name == volume);
        let broken = broken.ok_or_else(|| Error::NotFound { kind: "volume", name: volume.into() })?;
        broken
            .record
            .clone()
            .ok_or_else(|| Error::Invalid(format!("{}; nothing tells its layers", broken.reason)))
    }

    pub fn id(&self) -> Uuid {
        self.record.id
    }

    pub fn path(&self) -> PathBuf {
        self.storage.full_path("")
    }

    /// Free bytes and all bytes of its file system.
    pub fn space(&self) -> Result<(u64, u64)> {
        Ok((self.storage.free_bytes()?, self.storage.total_bytes()?))
    }

    pub(super) fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every volume, in the order of names; those that could not be opened too.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let (volumes, broken) = {
            let tree = self.tree();
            (tree.volumes.values().cloned().collect::<Vec<_>>(), tree.broken.clone())
        };
        let mut infos: Vec<VolumeInfo> = volumes.iter().map(|volume| volume.info()).collect();
        infos.extend(broken.into_iter().map(broken_info));
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    pub fn volume(&self, name: &str) -> Result<Arc<Volume>> {
        let tree = self.tree();
        if let Some(volume) = tree.volumes.get(name) {
            return Ok(volume.clone());
        }
        match tree.broken.iter().find(|broken| broken.name == name) {
            Some(broken) => Err(Error::Failed { reason: broken.reason.as_str().into() }),
            None => Err(Error::NotFound { kind: "volume", name: name.into() }),
        }
    }

    /// Names of the volumes that stand on this image, or may: what a volume without a readable record stands on
    /// nobody knows.
    pub fn users_of(&self, image: Uuid) -> Vec<String> {
        let stands = |record: &VolumeRecord| record.image.as_ref().is_some_and(|known| known.uuid == image);
        let tree = self.tree();
        let unreadable = tree.broken.iter().filter(|broken| broken.record.is_none());
        let unreadable: Vec<String> = unreadable.map(|broken| broken.name.clone()).collect();
        let known = tree.records().into_iter().filter(stands).map(|record| record.name);
        known.chain(unreadable).collect()
    }

    /// Make every acknowledged change of every volume survive a crash.
    pub fn flush(&self) -> Result<()> {
        let volumes: Vec<Arc<Volume>> = self.tree().volumes.values().cloned().collect();
        let mut result = Ok(());
        for volume in volumes {
            if let Backend::Live(executor) = &volume.backend
                && executor.failed().is_none()
                && let Err(error) = crate::device::BlockDevice::flush(executor)
            {
                tracing::error!(volume = %volume.name(), %error, "flush failed");
                result = Err(error);
            }
        }
        result
    }

    fn open_volumes(&self) -> Result<()> {
        let mut broken = Vec::new();
        for (dir_name, kind) in self.storage.list(VOLUMES)? {
            let dir = format!("{VOLUMES}/{dir_name}");
            if dir_name.starts_with(TEMPORARY) && kind == EntryKind::Directory {
                remove_volume_dir(&*self.storage, &dir)?;
                continue;
            }
            if let Err(failed) = self.open_volume_dir(&dir_name, &dir) {
                tracing::error!(volume = %failed.name, reason = %failed.reason, "volume not served");
                broken.push(*failed);
            }
        }
        self.tree().broken = broken;
        Ok(())
    }

    fn open_volume_dir(&self, dir_name: &str, dir: &str) -> Result<(), Box<Broken>> {
        let failed = |reason: String, record| Box::new(Broken { name: dir_name.into(), reason, record });
        let path = format!("{dir}/{VOLUME_RECORD}");
        let record: VolumeRecord =
            record::read(&*self.storage, &path).map_err(|e| failed(e.to_string(), None))?;
        if record.dir_name() != dir_name {
            let reason = format!("its record belongs to a volume {:?}", record.name);
            return Err(failed(reason, None));
        }
        if self.tree().volumes.contains_key(&record.name) {
            let reason = format!("another volume is called {:?}", record.name);
            return Err(failed(reason, Some(record)));
        }
        // A leftover of a replacement that did not happen.
        let _ = self.storage.remove_file(&format!("{path}.new"));
        match self.open_volume(record.clone()) {
            Ok(volume) => {
                self.tree().volumes.insert(record.name, Arc::new(volume));
                Ok(())
            }
            Err(error) => {
                let name = record.name.clone();
                Err(Box::new(Broken { name, reason: error.to_string(), record: Some(record) }))
            }
        }
    }

    /// Open what a record describes.
    pub(super) fn open_volume(&self, record: VolumeRecord) -> Result<Volume> {
        let base = self.open_base(record.image.as_ref())?;
        let frozen = self.frozen(&record, record.parent(record.head))?;
        let head = layer::open(&*self.storage, record.head)?;
        let size = ByteLen(record.size_bytes);
        // More blocks than the volume has is what a crash leaves of a resize that did not happen.
        let blocks = head.index.block_count();
        if blocks < size.blocks_ceil() {
            let what = Corruption::Field { field: "block count", value: blocks.0 };
            return Err(Error::Corrupt { path: head.map.path().to_owned(), what, at: ByteOffset(40) });
        }
        let backend = match &head.fault {
            None => {
                let index = self.index(size, head.index.grown(blocks), &frozen.index, base.as_ref());
                let view = View { index, head: None, layers: frozen.files, base };
                Backend::Live(Executor::new(
                    self.new_head(LayerParts::of(&head), view, Synced::No),
                    self.housekeeper.clone(),
                ))
            }
            Some(reason) => {
                let slot = self.tree().slot(record.head, &head.data);
                let overlaid = frozen.index.overlaid(&head.index, slot, &head.lost);
                let empty = HeadIndex::new(size.blocks_ceil());
                let index = self.index(size, empty, &overlaid, base.as_ref());
                let files = crate::exec::view::LayerFiles::new(vec![(slot, head.data.clone())]);
                let layers = frozen.files.with(&files);
                let view = View { index, head: None, layers, base };
                Backend::ReadOnly { view, reason: reason.clone() }
            }
        };
        Ok(Volume::new(self.storage.clone(), record, backend))
    }

    pub(super) fn open_base(&self, image: Option<&ImageRef>) -> Result<Option<Arc<dyn BaseImage>>> {
        image.map(|image| self.bases.open_base(image)).transpose()
    }

    pub(super) fn index(
        &self,
        size: ByteLen,
        head: HeadIndex,
        frozen: &crate::cow::frozen::FrozenIndex,
        base: Option<&Arc<dyn BaseImage>>,
    ) -> Arc<Index> {
        let base_len = base.map_or(ByteLen(0), |base| base.len());
        Arc::new(Index { size, head: Arc::new(head), frozen: frozen.clone(), base_len })
    }

    /// A head over `view`, whose index has that head's states.
    pub(super) fn new_head(&self, layer: LayerParts, mut view: View, synced: Synced) -> NewHead {
        let files = HeadFiles::new(
            self.storage.clone(),
            layer::dir(layer.uuid),
            layer.data.clone(),
            layer.map,
            self.reserve.clone(),
        );
        view.head = Some(layer.data);
        let state = HeadState {
            index: view.index.clone(),
            layer: layer.uuid,
            log: layer.log,
            log_offset: layer.log_offset,
            synced,
        };
        NewHead { state, view, files: Arc::new(files) }
    }

    pub(super) fn executor(&self, head: NewHead) -> Executor {
        Executor::new(head, self.housekeeper.clone())
    }

    /// Make an empty layer that is not collected before a record lists it or [`Disk::settle`] is called.
    pub(super) fn make_layer(&self, blocks: BlockCount) -> Result<Layer> {
        let uuid = Uuid::new_v4();
        self.tree().pending.insert(uuid);
        let made = layer::create(&*self.storage, uuid, blocks);
        if made.is_err() {
            self.settle(uuid);
            self.collect();
        }
        made
    }

    /// A layer is on its own: listed by a record, or to be collected.
    pub(super) fn settle(&self, layer: Uuid) {
        self.tree().pending.remove(&layer);
    }

    /// Take the layers that no record lists out of use; [`Disk::sweep`] removes their files.
    pub(super) fn collect(&self) {
        let names = match self.storage.list(LAYERS) {
            Ok(names) => names,
            Err(error) => return tracing::warn!(%error, "nothing is collected"),
        };
        let mut tree = self.tree();
        if !tree.is_whole() {
            tracing::warn!(disk = %self.path().display(), "nothing is collected: a record is unreadable");
            return;
        }
        tree.forget_unused();
        let records = tree.records();
        let listed = records.iter().flat_map(|record| record.layers.iter().map(|layer| layer.uuid));
        let used: HashSet<Uuid> = listed.chain(tree.pending.iter().copied()).collect();
        let layers = names.into_iter().filter(|(_, kind)| *kind == EntryKind::Directory);
        let unused =
            layers.filter_map(|(name, _)| Uuid::try_parse(&name).ok().filter(|uuid| !used.contains(uuid)));
        tree.unused.extend(unused);
    }

    /// Remove what was collected. Errors are logged: the next start tries again.
    pub(super) fn sweep(&self) {
        let unused = std::mem::take(&mut self.tree().unused);
        for layer in unused {
            match layer::remove(&*self.storage, &layer::dir(layer)) {
                Ok(()) => tracing::info!(%layer, "collected: no record lists it"),
                // Another sweep was faster.
                Err(error) if error.is_not_found() => {}
                Err(error) => tracing::warn!(%layer, %error, "not collected"),
            }
        }
    }
}

/// What a new head needs of a layer.
pub(super) struct LayerParts {
    pub uuid: Uuid,
    pub data: Arc<dyn crate::exec::storage::StorageFile>,
    pub map: Arc<dyn crate::exec::storage::StorageFile>,
    pub log: crate::cow::map::log::LogEnd,
    pub log_offset: u64,
}

impl LayerParts {
    pub fn of(layer: &Layer) -> LayerParts {
        LayerParts {
            uuid: layer.uuid,
            data: layer.data.clone(),
            map: layer.map.clone(),
            log: layer.log,
            log_offset: layer.log_offset,
        }
    }
}

fn broken_info(broken: Broken) -> VolumeInfo {
    let record = broken.record;
    VolumeInfo {
        name: broken.name,
        uuid: record.as_ref().map_or(Uuid::nil(), |record| record.uuid),
        size: ByteLen(record.as_ref().map_or(0, |record| record.size_bytes)),
        allocated: ByteLen(0),
        layer_count: record.as_ref().map_or(0, |record| record.layers.len()),
        created_at: record.as_ref().map_or(Timestamp::UNIX_EPOCH, |record| record.created_at),
        snapshots: record.as_ref().map_or(Vec::new(), |record| record.snapshots.clone()),
        image: record.and_then(|record| record.image),
        state: VolumeState::Failed { reason: broken.reason },
        holders: Vec::new(),
        pauses: Pauses::default(),
    }
}

/// Remove a volume's directory with its record.
pub(super) fn remove_volume_dir(storage: &dyn Storage, dir: &str) -> Result<()> {
    for (name, _) in storage.list(dir)? {
        storage.remove_file(&format!("{dir}/{name}"))?;
    }
    storage.remove_dir(dir)
}

/// Take the disk's exclusive lock, close-on-exec, before any record is read.
fn lock(path: &Path) -> Result<Flock<File>> {
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
fn initialise(storage: &dyn Storage) -> Result<DiskRecord> {
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
            DiskRecord { format_version: FORMAT_VERSION, id: Uuid::new_v4(), created_at: Timestamp::now() };
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
