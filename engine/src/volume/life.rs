//! Operations that switch a record: create, delete, snapshot, clone, revert, resize, and views.
//!
//! Each has one moment at which it happened, the rename of a record; what is made before it is collected if it never
//! comes, what is left to do after it is done again at the next start (invariant 6). Those that change a head run
//! behind a barrier, while reads go on: sync early, stop admitting, wait, commit, make files, switch, admit again.

use std::sync::{Arc, PoisonError};

use uuid::Uuid;

use super::{
    device::{Backend, Snapshot, Volume, VolumeInfo},
    disk::{Disk, LayerParts, TEMPORARY, VOLUME_RECORD, VOLUMES, remove_volume_dir},
    layer::{self, Layer},
    record::{
        self, FORMAT_VERSION, ImageRef, LAYERS_MAX, LayerRef, Replaced, SnapshotRecord, VolumeRecord,
        check_user_name,
    },
    tree::Broken,
};
use crate::{
    cow::{
        core::Synced,
        head::HeadIndex,
        map::{checkpoint::LogLen, log::LogEnd},
    },
    error::{Error, Result},
    exec::{
        executor::{Barrier, Executor},
        head::publish_map,
        view::View,
    },
    sync::MutexGuard,
    units::{ByteLen, SECTOR_SIZE, VOLUME_SIZE_MAX},
};

/// Snapshots of one volume.
pub const SNAPSHOTS_MAX: usize = 1024;
/// Names of snapshots that exist only while something reads a volume.
const TEMPORARY_SNAPSHOT: &str = ".view-";

/// What a new volume starts as.
#[derive(Clone, Debug)]
pub enum Origin {
    Empty,
    Image(ImageRef),
}

/// The lock of life operations. Layers that were collected under it are removed once it is free: removing a large,
/// scattered file can take a file system minutes.
pub(super) struct Life<'a> {
    disk: &'a Disk,
    lock: Option<MutexGuard<'a, ()>>,
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.lock = None;
        self.disk.sweep();
    }
}

impl Disk {
    /// Create a volume: over an image at the image's virtual size or `size`, or empty at `size`. Sizes round up to 512.
    pub fn create_volume(&self, name: &str, origin: Origin, size: Option<ByteLen>) -> Result<VolumeInfo> {
        check_user_name(name)?;
        let _life = self.life();
        self.check_absent(name)?;
        let image = match origin {
            Origin::Empty => None,
            Origin::Image(image) => Some(image),
        };
        let base = self.open_base(image.as_ref())?;
        let least = base.as_ref().map_or(0, |base| base.len().0);
        let size = match size {
            Some(size) if size.0 < least => {
                return Err(Error::Invalid(format!(
                    "{} bytes are less than the image's {least}; a volume is at least as large",
                    size.0
                )));
            }
            Some(size) => size.0,
            None if base.is_some() => least,
            None => return Err(Error::Invalid("an empty volume needs a size".into())),
        };
        let size = round_size(size)?;
        let head = self.make_layer(size.blocks_ceil())?;
        let record =
            self.new_record(name, size, image, vec![LayerRef { uuid: head.uuid, parent: None }], head.uuid);
        self.add_volume(record, head)
    }

    /// Delete a volume and collect what only it needed. One that could not be opened goes too, as long as its record
    /// can be read; without that, nobody knows what it needed.
    pub fn delete_volume(&self, name: &str) -> Result<()> {
        let life = self.life();
        let open = self.tree().volumes.get(name).cloned();
        let claim = open.as_ref().map(|volume| volume.claim("it is being deleted")).transpose()?;
        let record = match &open {
            Some(volume) => volume.record(),
            None => self.broken_record(name)?,
        };
        let dir = format!("{VOLUMES}/{}", record.dir_name());
        let gone = format!("{VOLUMES}/{TEMPORARY}{}", self.storage.new_uuid());
        self.storage.rename(&dir, &gone)?;
        {
            // Until its going is durable, a crash may bring the record back, with every layer that it names.
            let mut tree = self.tree();
            tree.volumes.remove(name);
            tree.broken.retain(|broken| broken.name != name);
            let reason = "it was deleted, but it is not known whether that survives a crash".into();
            tree.broken.push(Broken { name: name.into(), reason, record: Some(record) });
        }
        drop(claim);
        drop(open);
        self.storage.sync_dir(VOLUMES)?;
        self.tree().broken.retain(|broken| broken.name != name);
        remove_volume_dir(&*self.storage, &gone)?;
        self.collect();
        drop(life);
        Ok(())
    }

    /// Name what the volume is now. Holds every write acknowledged before the call, and is itself a flush.
    pub fn create_snapshot(&self, volume: &str, name: &str) -> Result<VolumeInfo> {
        check_user_name(name)?;
        let _life = self.life();
        let volume = self.volume(volume)?;
        self.freeze(&volume, Some(name))?;
        Ok(volume.info())
    }

    /// A new volume that starts as `volume` is, or as its snapshot was. No data is copied.
    pub fn clone_volume(&self, volume: &str, snapshot: Option<&str>, new: &str) -> Result<VolumeInfo> {
        check_user_name(new)?;
        let _life = self.life();
        self.check_absent(new)?;
        let source = self.volume(volume)?;
        let (parent, size) = match snapshot {
            Some(name) => find_snapshot(&source, name)?,
            None => {
                let size = source.record().size_bytes;
                (self.freeze(&source, None)?, size)
            }
        };
        let record = source.record();
        let size = ByteLen(size);
        let head = self.make_layer(size.blocks_ceil())?;
        let mut layers = vec![LayerRef { uuid: head.uuid, parent: Some(parent) }];
        let chain = record.chain(parent);
        layers.extend(record.layers.iter().filter(|layer| chain.contains(&layer.uuid)).cloned());
        self.add_volume(self.new_record(new, size, record.image, layers, head.uuid), head)
    }

    /// Make the volume what its snapshot was: the head is dropped, every snapshot stays, the size is the larger of the
    /// two. `snapshot_first` names what would be lost. Refused while anything holds the volume.
    pub fn revert(&self, volume: &str, snapshot: &str, snapshot_first: Option<&str>) -> Result<VolumeInfo> {
        snapshot_first.map_or(Ok(()), check_user_name)?;
        let _life = self.life();
        let volume = self.volume(volume)?;
        let _claim = volume.claim("it is being reverted")?;
        let (target, snapshot_size) = find_snapshot(&volume, snapshot)?;
        if let Some(name) = snapshot_first {
            self.freeze(&volume, Some(name))?;
        }
        let executor = volume.live()?;
        let mut record = volume.record();
        let size = ByteLen(record.size_bytes.max(snapshot_size));
        let barrier = executor.barrier()?;
        let head = self.make_layer(size.blocks_ceil())?;
        record.layers.push(LayerRef { uuid: head.uuid, parent: Some(target) });
        record.head = head.uuid;
        record.size_bytes = size.0;
        record.prune();
        self.switch_head(&volume, executor, barrier, record, head)?;
        self.collect();
        Ok(volume.info())
    }

    /// Forget a snapshot's name. Its blocks go down into what stands on it, if that is one layer only:
    /// [`Disk::reclaim`].
    pub fn delete_snapshot(&self, volume: &str, name: &str) -> Result<VolumeInfo> {
        let _life = self.life();
        let volume = self.volume(volume)?;
        find_snapshot(&volume, name)?;
        let mut record = volume.record();
        record.snapshots.retain(|snapshot| snapshot.name != name);
        record.prune();
        self.switch_record(&volume, record)?;
        self.collect();
        Ok(volume.info())
    }

    /// Make the volume larger. The new part reads as zeros.
    pub fn resize(&self, volume: &str, size: ByteLen) -> Result<VolumeInfo> {
        let _life = self.life();
        let volume = self.volume(volume)?;
        let mut record = volume.record();
        let size = round_size(size.0)?;
        if size.0 < record.size_bytes {
            return Err(Error::Invalid(format!(
                "{} bytes are less than the volume's {}; a volume only grows",
                size.0, record.size_bytes
            )));
        }
        if size.0 == record.size_bytes {
            return Ok(volume.info());
        }
        let executor = volume.live()?;
        let barrier = executor.barrier()?;
        let view = executor.view();
        let files = executor.head();
        // A resize that a crash cut before its record leaves a map of more blocks than the volume has.
        let blocks = size.blocks_ceil().max(view.index.head.block_count());
        let index = view.index.head.grown(blocks);
        files.data.set_len(blocks.len().0)?;
        // A map of more blocks than the volume has is sound, so the record can follow it.
        let end = executor.log_end();
        let staged = layer::stage_map(&*self.storage, record.head, &end, &index, self.log_len)?;
        // From the rename on, the map on the disk may be another file than the one that is open.
        let published = publish_map(&*self.storage, &layer::dir(record.head)).map(|()| staged);
        let (header, map) = match published {
            Ok(published) => published,
            Err(error) => {
                barrier.poison(&error);
                return Err(error);
            }
        };
        record.size_bytes = size.0;
        let head = LayerParts {
            uuid: record.head,
            data: files.data.clone(),
            map,
            log: LogEnd::start(&header),
            log_offset: header.log_offset,
        };
        let replaced = self.replace_record(&volume, &record);
        if let Err(error @ Error::Uncertain { .. }) = replaced {
            barrier.poison(&error);
            return Err(error);
        }
        // The map is the new one in any case; without the record the volume keeps its size.
        let size = if replaced.is_ok() { size } else { ByteLen(volume.record().size_bytes) };
        let index = self.index(size, index, &view.index.frozen, view.base.as_ref());
        barrier.install(self.new_head(head, View { index, ..view }, Synced::Yes));
        replaced?;
        volume.set_record(record);
        Ok(volume.info())
    }

    /// A read-only device over a snapshot, or over the volume as it is now. What it reads stays as it is while it
    /// lives; a volume without a named snapshot is given a temporary one.
    pub fn view(&self, volume: &str, snapshot: Option<&str>) -> Result<Snapshot> {
        let life = self.life();
        let device = self.volume(volume)?;
        if let (None, Backend::ReadOnly { view, .. }) = (snapshot, &device.backend) {
            let hold = device.hold("a view of what can be read of it")?;
            return Ok(Snapshot { view: view.clone(), _hold: Some(hold) });
        }
        let (top, size, temporary) = match snapshot {
            Some(name) => {
                let (top, size) = find_snapshot(&device, name)?;
                (top, size, None)
            }
            None => {
                let name = format!("{TEMPORARY_SNAPSHOT}{}", self.storage.new_uuid().simple());
                let size = device.record().size_bytes;
                (self.freeze(&device, Some(&name))?, size, Some(name))
            }
        };
        let view = self.view_over(&device.record(), top, ByteLen(size));
        drop(life);
        // The view holds its files open and its epoch, so the name has done its work, and also when there is no view.
        if let Some(name) = temporary {
            let deleted = self.delete_snapshot(volume, &name);
            return view.and_then(|view| deleted.map(|_| Snapshot { view, _hold: None }));
        }
        Ok(Snapshot { view: view?, _hold: None })
    }

    /// What a frozen layer and everything below it read as.
    fn view_over(&self, record: &VolumeRecord, top: Uuid, size: ByteLen) -> Result<View> {
        let base = self.open_base(record.image.as_ref())?;
        let frozen = self.frozen(record, Some(top))?;
        let empty = HeadIndex::new(size.blocks_ceil());
        let index = self.index(size, empty, &frozen.index, base.as_ref());
        self.tree().add_view(&index, &frozen.files);
        Ok(View { index, head: None, layers: frozen.files, base })
    }

    /// Snapshots that a killed process left behind.
    pub(super) fn drop_temporary_snapshots(&self) {
        let volumes: Vec<Arc<Volume>> = self.tree().volumes.values().cloned().collect();
        for volume in volumes {
            let record = volume.record();
            for name in record.snapshots.iter().map(|s| &s.name).filter(|n| n.starts_with(TEMPORARY_SNAPSHOT))
            {
                if let Err(error) = self.delete_snapshot(&record.name, name) {
                    tracing::warn!(volume = %record.name, snapshot = %name, %error, "leftover not removed");
                }
            }
        }
    }

    pub(super) fn life(&self) -> Life<'_> {
        Life { disk: self, lock: Some(self.life.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    pub(super) fn check_absent(&self, name: &str) -> Result<()> {
        let tree = self.tree();
        if tree.volumes.contains_key(name) || tree.broken.iter().any(|broken| broken.name == name) {
            return Err(Error::Exists { kind: "volume", name: name.into() });
        }
        Ok(())
    }

    /// Freeze the head under a new one, with or without a name for it; returns the frozen layer.
    fn freeze(&self, volume: &Volume, name: Option<&str>) -> Result<Uuid> {
        let executor = volume.live()?;
        let mut record = volume.record();
        if let Some(name) = name
            && record.snapshot(name).is_some()
        {
            return Err(Error::Exists { kind: "snapshot", name: name.into() });
        }
        if record.snapshots.len() >= SNAPSHOTS_MAX {
            return Err(Error::Busy { limit: "SNAPSHOTS_MAX; delete a snapshot" });
        }
        if record.layers.len() >= LAYERS_MAX {
            return Err(Error::Busy { limit: "LAYERS_MAX; delete a snapshot" });
        }
        let frozen = record.head;
        let barrier = executor.barrier()?;
        let end = executor.log_end();
        let size = ByteLen(record.size_bytes);
        let head = self.make_layer(size.blocks_ceil())?;
        record.layers.push(LayerRef { uuid: head.uuid, parent: Some(frozen) });
        record.head = head.uuid;
        record.snapshots.extend(name.map(|name| SnapshotRecord {
            name: name.into(),
            layer: frozen,
            size_bytes: size.0,
            created_at: self.storage.now(),
        }));
        let index = self.switch_head(volume, executor, barrier, record, head)?;
        tracing::debug!(volume = %volume.name(), pause = ?executor.pauses().last, "frozen");
        // Its log is not needed any more. Failing leaves it as it is, which reads the same.
        if let Err(error) = layer::rewrite_map(&*self.storage, frozen, &end, &index, LogLen::Sealed) {
            tracing::warn!(layer = %frozen, %error, "the frozen layer keeps its log");
        }
        Ok(frozen)
    }

    /// Switch a volume to a new, empty head and its record; the moment of a snapshot and of a revert. Returns the index
    /// of the head that was.
    fn switch_head(
        &self,
        volume: &Volume,
        executor: &Executor,
        barrier: Barrier<'_>,
        record: VolumeRecord,
        head: Layer,
    ) -> Result<Arc<HeadIndex>> {
        let view = executor.view();
        let old = volume.record().head;
        let below = record.parent(record.head);
        let prepared = if below == Some(old) {
            let under = self.frozen(&record, record.parent(old));
            under.map(|under| self.freeze_over(&under, old, &view.index.head, &executor.head().data))
        } else {
            self.frozen(&record, below)
        };
        let size = ByteLen(record.size_bytes);
        let uuid = head.uuid;
        let switched = prepared.and_then(|frozen| self.replace_record(volume, &record).map(|()| frozen));
        let frozen = match switched {
            Ok(frozen) => frozen,
            Err(error) => {
                if matches!(error, Error::Uncertain { .. }) {
                    barrier.poison(&error);
                } else {
                    drop(barrier);
                    self.settle(uuid);
                    self.collect();
                }
                return Err(error);
            }
        };
        let index = self.index(size, head.index.grown(size.blocks_ceil()), &frozen.index, view.base.as_ref());
        let old_index = view.index.head.clone();
        let view = View { index, head: None, layers: frozen.files, base: view.base };
        barrier.install(self.new_head(LayerParts::of(&head), view, Synced::Yes));
        volume.set_record(record);
        self.settle(uuid);
        Ok(old_index)
    }

    /// Switch a record that leaves the head alone. If it is uncertain, nothing moves between the volume's layers before its
    /// record was written again: the disk's may name fewer of them.
    pub(super) fn switch_record(&self, volume: &Volume, record: VolumeRecord) -> Result<()> {
        let replaced = self.replace_record(volume, &record);
        if matches!(replaced, Err(Error::Uncertain { .. })) {
            volume.unsettle();
        }
        replaced?;
        volume.set_record(record);
        Ok(())
    }

    fn replace_record(&self, volume: &Volume, record: &VolumeRecord) -> Result<()> {
        debug_assert_eq!(volume.record().dir_name(), record.dir_name());
        self.write_record(record)
    }

    /// Make this the record of its volume on the disk. It is small: a full disk's reserve pays for it.
    pub(super) fn write_record(&self, record: &VolumeRecord) -> Result<()> {
        let dir = format!("{VOLUMES}/{}", record.dir_name());
        self.with_reserve(|| {
            record::replace(&*self.storage, &dir, VOLUME_RECORD, record).map_err(|replaced| match replaced {
                Replaced::Not(error) => error,
                Replaced::Perhaps(error) => Error::Uncertain { source: Box::new(error) },
            })
        })
    }

    /// Do what a full disk must still be able to do; its reserve is given up for it.
    pub(super) fn with_reserve<T>(&self, work: impl Fn() -> Result<T>) -> Result<T> {
        match work() {
            Err(Error::NoSpace { .. }) if self.reserve.give_up() => work(),
            other => other,
        }
    }

    /// The record of a volume that is new.
    pub(super) fn new_record(
        &self,
        name: &str,
        size: ByteLen,
        image: Option<ImageRef>,
        layers: Vec<LayerRef>,
        head: Uuid,
    ) -> VolumeRecord {
        VolumeRecord {
            format_version: FORMAT_VERSION,
            name: name.into(),
            uuid: self.storage.new_uuid(),
            size_bytes: size.0,
            image,
            head,
            layers,
            snapshots: Vec::new(),
            created_at: self.storage.now(),
        }
    }

    /// Give a new volume its record and serve it. The moment is the rename of its directory; before it, everything that
    /// was made goes again.
    pub(super) fn add_volume(&self, record: VolumeRecord, head: Layer) -> Result<VolumeInfo> {
        let uuid = head.uuid;
        let added = self.publish_volume(record, head);
        self.settle(uuid);
        if added.is_err() {
            self.collect();
        }
        added
    }

    fn publish_volume(&self, record: VolumeRecord, head: Layer) -> Result<VolumeInfo> {
        let size = ByteLen(record.size_bytes);
        let base = self.open_base(record.image.as_ref())?;
        let frozen = self.frozen(&record, record.parent(record.head))?;
        let temporary = format!("{VOLUMES}/{TEMPORARY}{}", self.storage.new_uuid());
        self.storage.create_dir(&temporary)?;
        let switched = record::write_new(&*self.storage, &temporary, VOLUME_RECORD, &record)
            .and_then(|()| self.storage.sync_dir(&temporary))
            .and_then(|()| self.storage.rename(&temporary, &format!("{VOLUMES}/{}", record.dir_name())));
        if let Err(error) = switched {
            let _ = remove_volume_dir(&*self.storage, &temporary);
            return Err(error);
        }
        let index = self.index(size, head.index.grown(size.blocks_ceil()), &frozen.index, base.as_ref());
        let view = View { index, head: None, layers: frozen.files, base };
        let new_head = self.new_head(LayerParts::of(&head), view, Synced::Yes);
        let backend = Backend::Live(self.executor(new_head));
        let volume = Volume::new(self.storage.clone(), self.workers.clone(), record.clone(), backend);
        self.tree().volumes.insert(record.name, volume.clone());
        // It exists by its name from here on; that it may be gone after a crash is an error all the same.
        self.storage.sync_dir(VOLUMES)?;
        Ok(volume.info())
    }
}

/// A snapshot's layer and size.
fn find_snapshot(volume: &Volume, name: &str) -> Result<(Uuid, u64)> {
    let record = volume.record();
    let snapshot = record.snapshot(name);
    let snapshot = snapshot.ok_or_else(|| Error::NotFound { kind: "snapshot", name: name.into() })?;
    Ok((snapshot.layer, snapshot.size_bytes))
}

/// Round up to whole sectors, within the limit.
pub(super) fn round_size(size: u64) -> Result<ByteLen> {
    match size.checked_next_multiple_of(SECTOR_SIZE) {
        Some(size) if size <= VOLUME_SIZE_MAX => Ok(ByteLen(size)),
        _ => Err(Error::Invalid(format!(
            "{size} bytes are more than {VOLUME_SIZE_MAX}, the most a volume has"
        ))),
    }
}
