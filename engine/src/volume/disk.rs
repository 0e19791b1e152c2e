//! A disk: one directory that Bedplate owns, opened by one node at a time.
//!
//! Owns [`Disk`]: opening and its repair work, the catalog of volumes, collection; `claim.rs` has its lock and record.
//! Upheld here: invariant 10 (what a record names exists; nothing is collected while any record is unreadable), 11 (one
//! writer per disk; the storage keeps the lock, so that it lasts as long as anything that can write) and 12 (one
//! volume's failure stops neither another nor the start).
//!
//! Locks, in this order: `maintenance` (one merge or flatten at a time), `life` (one record switch at a time), one of
//! `building` (an index over frozen layers is made once), `tree` (what is open; no file is read or written under it).

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    claim::{initialise, lock},
    device::{Backend, Volume, VolumeInfo, VolumeState},
    layer::{self, LAYERS, Layer},
    record::{self, DiskRecord, ImageRef, VolumeRecord},
    tree::{Broken, Tree},
};
use crate::{
    cow::{
        core::{HeadState, Synced},
        head::HeadIndex,
        map::{MAP_LOG_MIN, checkpoint::LogLen},
        plan::Index,
    },
    error::{Corruption, Error, Result},
    exec::{
        choice::{ExecutorChoice, ExecutorKind},
        executor::{Executor, NewHead},
        head::HeadFiles,
        pauses::Pauses,
        pool::{Pool, ThreadStart},
        reserve::Reserve,
        ring::{Taking, Workers},
        storage::{EntryKind, Storage, file::FileStorage},
        view::View,
    },
    image::{BaseImage, BaseSource},
    planted::{self, Bug},
    sync::{Mutex, MutexGuard},
    units::{BlockCount, ByteLen, ByteOffset},
};

pub(super) const VOLUMES: &str = "volumes";
pub(super) const VOLUME_RECORD: &str = "volume.json";
/// Threads of a disk for what no request waits for.
const HOUSEKEEPERS: usize = 2;
/// Workers of a disk.
const WORKERS_MAX: usize = 4;
/// Threads that open or flush all volumes of a real disk: mostly they wait for the medium.
const THREADS: usize = 8;
/// Locks of [`Disk::building`].
const BUILDERS: usize = 16;
/// Directories of volumes on their way in or out.
pub(super) const TEMPORARY: &str = ".new-";

/// A disk that this process serves.
pub struct Disk {
    pub(super) storage: Arc<dyn Storage>,
    record: DiskRecord,
    pub(super) bases: Arc<dyn BaseSource>,
    pub(super) reserve: Arc<Reserve>,
    housekeeper: Arc<Pool>,
    /// Of a new head.
    pub(super) log_len: LogLen,
    /// Who carries out what is submitted to volumes, if not whoever submits.
    pub(super) workers: Option<Arc<Workers>>,
    pub(super) maintenance: Mutex<()>,
    pub(super) life: Mutex<()>,
    /// By the layer on top of what is built.
    building: [Mutex<()>; BUILDERS],
    threads_max: usize,
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
    executor: ExecutorChoice,
    /// Threads of its own, if not these.
    housekeeper: Option<Arc<Pool>>,
    log_len: LogLen,
    threads_max: usize,
}

impl Held {
    /// Take the directory `path`. An empty one becomes a disk. Refused while another process holds it.
    pub fn take(path: &Path) -> Result<Held> {
        let lock = lock(path)?;
        Held::of(Arc::new(FileStorage::open(path)?.holding(lock)), THREADS)
    }

    /// The same over any storage, without a lock between processes; in one thread, so that a simulated disk sees
    /// the same each time.
    pub fn over(storage: Arc<dyn Storage>) -> Result<Held> {
        Held::of(storage, 1)
    }

    fn of(storage: Arc<dyn Storage>, threads_max: usize) -> Result<Held> {
        let record = initialise(&*storage)?;
        // What is read from here on is acted upon: files are written because a record names them, and removed because
        // none does. A crash must not bring an older record back then.
        storage.sync_names()?;
        let executor = ExecutorChoice::Blocking;
        Ok(Held {
            storage,
            record,
            on_thread_start: || {},
            executor,
            housekeeper: None,
            log_len: LogLen::LIVE,
            threads_max,
        })
    }

    /// Let every thread that carries out requests of this disk, and is not its caller's own, run `hook` first.
    #[must_use]
    pub fn on_thread_start(self, hook: ThreadStart) -> Held {
        Held { on_thread_start: hook, ..self }
    }

    /// Who carries out what is submitted to its volumes; whoever submits, if nobody says otherwise.
    #[must_use]
    pub fn executor(self, executor: ExecutorChoice) -> Held {
        Held { executor, ..self }
    }

    /// Let `pool` do what no request waits for.
    #[must_use]
    pub fn housekeeper(self, pool: Arc<Pool>) -> Held {
        Held { housekeeper: Some(pool), ..self }
    }

    /// Give new heads logs of at least so many bytes, at most [`MAP_LOG_MIN`]: a short log makes checkpoints frequent.
    #[must_use]
    pub fn log_len_min(self, least: u64) -> Held {
        Held { log_len: LogLen::Live { least: least.min(MAP_LOG_MIN) }, ..self }
    }

    fn start_housekeeper(&self) -> Result<Arc<Pool>> {
        match &self.housekeeper {
            Some(pool) => Ok(pool.clone()),
            None => Pool::start("housekeeper", HOUSEKEEPERS, self.on_thread_start).map(Arc::new),
        }
    }

    fn start_workers(&self) -> Result<Option<Arc<Workers>>> {
        let start = |taking| {
            let count = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(WORKERS_MAX);
            Workers::start(count, taking, self.on_thread_start).map(Arc::new)
        };
        match self.executor {
            ExecutorChoice::Blocking => Ok(None),
            ExecutorChoice::Ring => start(Taking::All).map(Some),
            ExecutorChoice::Auto => match start(Taking::Submissions) {
                Ok(workers) => Ok(Some(workers)),
                Err(error) => {
                    let disk = self.storage.full_path("");
                    tracing::warn!(disk = %disk.display(), %error, "no io_uring: requests run blocking");
                    Ok(None)
                }
            },
        }
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
            housekeeper: self.start_housekeeper()?,
            log_len: self.log_len,
            workers: self.start_workers()?,
            storage,
            record,
            bases,
            maintenance: Mutex::new(()),
            life: Mutex::new(()),
            building: Default::default(),
            threads_max: self.threads_max,
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

    /// The same over any storage: see [`Held::over`].
    pub fn open_storage(storage: Arc<dyn Storage>, bases: Arc<dyn BaseSource>) -> Result<Arc<Disk>> {
        Held::over(storage)?.serve(bases)
    }

    /// Who carries out what is submitted to its volumes.
    pub fn executor_kind(&self) -> ExecutorKind {
        if self.workers.is_some() { ExecutorKind::Ring } else { ExecutorKind::Blocking }
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
                tree.volumes.insert(record.name, opened);
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

    /// Held while the index over `top` is made, so that whoever needs the same one waits for it.
    pub(super) fn building(&self, top: Uuid) -> MutexGuard<'_, ()> {
        let number = usize::from(top.as_bytes()[0]) % BUILDERS;
        self.building[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every volume, in the order of names; those that could not be opened too.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let (volumes, broken) = {
            let tree = self.tree();
            (tree.volumes.values().cloned().collect::<Vec<_>>(), tree.broken.clone())
        };
        // What many volumes stand on is asked about once.
        let mut known = HashMap::new();
        let mut infos: Vec<VolumeInfo> = volumes.iter().map(|volume| volume.info_with(&mut known)).collect();
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
        let flush = |volume: &Arc<Volume>| match &volume.backend {
            Backend::Live(executor) if executor.failed().is_none() => {
                crate::device::BlockDevice::flush(executor)
                    .inspect_err(|error| tracing::error!(volume = %volume.name(), %error, "flush failed"))
            }
            Backend::Live(_) | Backend::ReadOnly { .. } => Ok(()),
        };
        // A file system syncs many files in about the time of one.
        self.each_at_once(&volumes, flush).into_iter().fold(Ok(()), Result::and)
    }

    fn open_volumes(&self) -> Result<()> {
        let mut names = Vec::new();
        for (dir_name, kind) in self.storage.list(VOLUMES)? {
            if dir_name.starts_with(TEMPORARY) && kind == EntryKind::Directory {
                remove_volume_dir(&*self.storage, &format!("{VOLUMES}/{dir_name}"))?;
            } else {
                names.push(dir_name);
            }
        }
        // Whoever comes second of two with one name is refused: the same one each time.
        names.sort();
        let records = self.each_at_once(&names, |name| self.read_volume_dir(name));
        let (mut sound, mut broken) = (BTreeMap::new(), Vec::new());
        for record in records {
            match record {
                Err(failed) => broken.push(*failed),
                Ok(record) => match sound.entry(record.name.clone()) {
                    btree_map::Entry::Vacant(free) => drop(free.insert(record)),
                    btree_map::Entry::Occupied(_) => broken.push(Broken {
                        name: record.dir_name(),
                        reason: format!("another volume is called {:?}", record.name),
                        record: Some(record),
                    }),
                },
            }
        }
        let sound: Vec<VolumeRecord> = sound.into_values().collect();
        let opened = self.each_at_once(&sound, |record| self.open_volume(record.clone()));
        let mut tree = self.tree();
        for (record, opened) in sound.into_iter().zip(opened) {
            match opened {
                Ok(volume) => drop(tree.volumes.insert(record.name, volume)),
                Err(error) => broken.push(Broken {
                    name: record.name.clone(),
                    reason: error.to_string(),
                    record: Some(record),
                }),
            }
        }
        for failed in &broken {
            tracing::error!(volume = %failed.name, reason = %failed.reason, "volume not served");
        }
        tree.broken = broken;
        Ok(())
    }

    /// What `work` makes of each item, in their order; several at once.
    fn each_at_once<T: Sync, R: Send>(&self, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
        let next = AtomicUsize::new(0);
        let take = || {
            let mut made = Vec::new();
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some(item) = items.get(number)
            {
                made.push((number, work(item)));
            }
            made
        };
        let mut made = thread::scope(|scope| {
            // With fewer threads it takes longer, and that is all.
            let spawn = |_| thread::Builder::new().spawn_scoped(scope, take).ok();
            let threads: Vec<_> = (1..self.threads_max.min(items.len())).map_while(spawn).collect();
            let mut made = take();
            for thread in threads {
                match thread.join() {
                    Ok(more) => made.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            made
        });
        made.sort_by_key(|(number, _)| *number);
        made.into_iter().map(|(_, result)| result).collect()
    }

    /// The record in a directory of volumes.
    fn read_volume_dir(&self, dir_name: &str) -> Result<VolumeRecord, Box<Broken>> {
        let failed = |reason: String| Box::new(Broken { name: dir_name.into(), reason, record: None });
        let path = format!("{VOLUMES}/{dir_name}/{VOLUME_RECORD}");
        let record: VolumeRecord = record::read(&*self.storage, &path).map_err(|e| failed(e.to_string()))?;
        if record.dir_name() != dir_name {
            return Err(failed(format!("its record belongs to a volume {:?}", record.name)));
        }
        // A leftover of a replacement that did not happen.
        let _ = self.storage.remove_file(&format!("{path}.new"));
        Ok(record)
    }

    /// Open what a record describes.
    pub(super) fn open_volume(&self, record: VolumeRecord) -> Result<Arc<Volume>> {
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
        Ok(Volume::new(self.storage.clone(), self.workers.clone(), record, backend))
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
        let uuid = self.storage.new_uuid();
        self.tree().pending.insert(uuid);
        let made = layer::create(&*self.storage, uuid, blocks, self.log_len);
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
        let there: HashSet<Uuid> = names
            .iter()
            .filter(|(_, kind)| *kind == EntryKind::Directory)
            .filter_map(|(name, _)| Uuid::try_parse(name).ok())
            .collect();
        // An older record, put back: what the newest one listed is all that there is of the volume.
        let lacks = |record: &VolumeRecord| record.layers.iter().any(|layer| !there.contains(&layer.uuid));
        let broken = tree.broken.iter().find(|broken| broken.record.as_ref().is_some_and(lacks));
        if let Some(broken) = broken {
            tracing::warn!(volume = %broken.name, "nothing is collected: its record names a layer that is missing");
            return;
        }
        tree.forget_unused();
        let records = tree.records();
        let counted = if planted::is(Bug::OverlookedReference) { 1 } else { records.len() };
        let listed =
            records.iter().take(counted).flat_map(|record| record.layers.iter().map(|layer| layer.uuid));
        let used: HashSet<Uuid> = listed.chain(tree.pending.iter().copied()).collect();
        tree.unused.extend(there.difference(&used));
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
