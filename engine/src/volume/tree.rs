//! What a disk has open: its volumes, the frozen layers below them, and the indexes over those.
//!
//! A frozen index is built once per top layer and shared by every volume on it. Slots are given once and never again
//! while the disk is open, so that an old index never finds another layer's file in its place.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Weak},
};

use uuid::Uuid;

use super::{
    device::Volume,
    disk::Disk,
    layer::{self, Layer},
    record::VolumeRecord,
};
use crate::{
    cow::{
        frozen::{FrozenIndex, Slot},
        head::HeadIndex,
        plan::Index,
    },
    error::Result,
    exec::{storage::StorageFile, view::LayerFiles},
};

/// A stack of frozen layers.
#[derive(Clone, Debug)]
pub(super) struct Frozen {
    /// What it is over, the top first. Records that a merge switches one by one may disagree on what lies below a layer.
    chain: Vec<Uuid>,
    pub index: FrozenIndex,
    pub files: LayerFiles,
    /// Why some blocks are lost, if any are.
    pub fault: Option<String>,
}

/// A volume that could not be opened.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    pub name: String,
    pub reason: String,
    /// Its record, where that could be read.
    pub record: Option<VolumeRecord>,
}

#[derive(Debug, Default)]
pub(super) struct Tree {
    pub volumes: BTreeMap<String, Arc<Volume>>,
    pub broken: Vec<Broken>,
    /// Layers that are being made and that no record lists yet.
    pub pending: HashSet<Uuid>,
    /// Layers that no record lists and whose files are still there.
    pub unused: BTreeSet<Uuid>,
    slots: HashMap<Uuid, (Slot, Arc<dyn StorageFile>)>,
    next_slot: u32,
    frozen: HashMap<Uuid, Frozen>,
    /// Indexes that readers of snapshots follow, and the layers that these name.
    views: Vec<(Weak<Index>, Vec<Slot>)>,
}

impl Tree {
    /// The records of all volumes, those that could not be opened too.
    pub fn records(&self) -> Vec<VolumeRecord> {
        let open = self.volumes.values().map(|volume| volume.record());
        open.chain(self.broken.iter().filter_map(|broken| broken.record.clone())).collect()
    }

    /// Volumes of which the disk may have a later record.
    pub fn unsettled(&self) -> Vec<Arc<Volume>> {
        self.volumes.values().filter(|volume| volume.is_unsettled()).cloned().collect()
    }

    /// Whether every record on the disk could be read: nothing is collected otherwise.
    pub fn is_whole(&self) -> bool {
        self.broken.iter().all(|broken| broken.record.is_some())
    }

    /// The slot of a frozen layer.
    pub fn slot(&mut self, layer: Uuid, data: &Arc<dyn StorageFile>) -> Slot {
        let next = Slot(self.next_slot);
        let (slot, _) = self.slots.entry(layer).or_insert_with(|| {
            self.next_slot += 1;
            (next, data.clone())
        });
        *slot
    }

    /// The slot of a frozen layer that is open.
    pub fn known_slot(&self, layer: Uuid) -> Option<Slot> {
        self.slots.get(&layer).map(|(slot, _)| *slot)
    }

    /// Forget the indexes that know `layer`, because its content moved; those who follow them go on.
    pub fn forget_indexes(&mut self, layer: Uuid) {
        if let Some(slot) = self.known_slot(layer) {
            self.frozen.retain(|_, frozen| frozen.files.get(slot).is_none());
        }
    }

    /// Forget what no volume stands on any more.
    pub fn forget_unused(&mut self) {
        let records = self.records();
        let used: HashSet<Uuid> =
            records.iter().flat_map(|record| record.layers.iter().map(|layer| layer.uuid)).collect();
        let tops: HashSet<Uuid> = records
            .iter()
            .flat_map(|record| {
                let snapshots = record.snapshots.iter().map(|snapshot| snapshot.layer);
                snapshots.chain(record.parent(record.head))
            })
            .collect();
        self.slots.retain(|layer, _| used.contains(layer) || self.pending.contains(layer));
        self.frozen.retain(|top, _| tops.contains(top));
    }

    pub fn add_view(&mut self, index: &Arc<Index>, files: &LayerFiles) {
        self.views.retain(|(view, _)| view.strong_count() > 0);
        self.views.push((Arc::downgrade(index), files.slots().collect()));
    }

    /// Whether no reader of a snapshot is left that finds anything in these layers.
    pub fn no_views(&mut self, layers: &[Slot]) -> bool {
        self.views.retain(|(view, _)| view.strong_count() > 0);
        self.views.iter().all(|(_, slots)| layers.iter().all(|layer| !slots.contains(layer)))
    }
}

impl Disk {
    /// The index over `top` and everything below it; over nothing for `None`. Called under the `life` lock, or while the
    /// disk is opened, so that maps and records stay as they are; the tree is not locked while maps are read, so that whoever only looks a volume up
    /// does not wait for them.
    pub(super) fn frozen(&self, record: &VolumeRecord, top: Option<Uuid>) -> Result<Frozen> {
        let chain = top.map_or(Vec::new(), |top| record.chain(top));
        let (index, files) = (FrozenIndex::empty(), LayerFiles::default());
        let mut built = Frozen { chain, index, files, fault: None };
        let Some(top) = top else { return Ok(built) };
        // When a disk is opened, many threads open what stands on one layer.
        let _building = self.building(top);
        if let Some(known) = self.tree().frozen.get(&top).filter(|known| known.chain == built.chain) {
            return Ok(known.clone());
        }
        let mut files = Vec::new();
        for uuid in built.chain.iter().rev().copied() {
            let Layer { data, index, lost, fault, .. } = layer::open(&*self.storage, uuid)?;
            let slot = self.tree().slot(uuid, &data);
            built.index = built.index.overlaid(&index, slot, &lost);
            // A mark of a failed medium says nothing of a layer that was whole when it was frozen.
            built.fault = built.fault.or(fault.filter(|_| !lost.is_empty()));
            files.push((slot, data));
        }
        built.files = LayerFiles::new(files);
        self.tree().frozen.insert(top, built.clone());
        Ok(built)
    }

    /// The index after a head is frozen on top of `below`. The head must not change any more.
    pub(super) fn freeze_over(
        &self,
        below: &Frozen,
        head: Uuid,
        index: &HeadIndex,
        data: &Arc<dyn StorageFile>,
    ) -> Frozen {
        let slot = self.tree().slot(head, data);
        let frozen = Frozen {
            chain: [&[head], below.chain.as_slice()].concat(),
            index: below.index.overlaid(index, slot, &[]),
            files: below.files.with(&LayerFiles::new(vec![(slot, data.clone())])),
            fault: below.fault.clone(),
        };
        self.tree().frozen.insert(head, frozen.clone());
        frozen
    }
}
