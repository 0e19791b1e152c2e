//! Giving back what no name holds: a layer without a name and with one child becomes one with that child.
//!
//! Deleting a snapshot only takes its name away; this does the rest, in bounded batches, whenever it is called: a crash
//! in between loses nothing, because a block that was brought up reads the same from above. Bytes go the way on which
//! fewer have to be copied: up into the child, or down from a frozen child (`fold.rs`).
//!
//! Into a *head*, blocks come up through the core, so that they never run over a client's write (block ownership); a
//! layer that is much larger than the head over it stays where it is, and only what the head hides is given back. Into a
//! *frozen* layer they are written where its map does not name them, and its map is replaced after they were synced.
//!
//! On a full disk the batch that does not fit gives back what came up before it: the map that names it above is synced,
//! every reader of an older index has ended (or this waits `EPOCH_WAIT_MAX`, once a merge, and goes without), and then
//! the lower layer's blocks are punched.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use uuid::Uuid;

use super::{
    copy::{copy_blocks, pieces},
    device::{Backend, Volume},
    disk::Disk,
    layer::{self, Layer},
    life::Life,
    record::VolumeRecord,
    tree::Frozen,
};
use crate::{
    cow::{
        BlockState,
        core::{COPY_BLOCKS_MAX, CopySource},
        frozen::Slot,
        head::HeadIndex,
        map::checkpoint::LogLen,
        plan::Index,
    },
    device::BlockDevice,
    error::{Error, Result},
    exec::{executor::Executor, storage::StorageFile, view::View},
    planted::{self, Bug},
    units::{BLOCK_SIZE, Block, BlockCount, BlockRange, ByteLen},
};

/// Blocks that are brought up between two looks at what else wants to happen: 16 MiB.
pub(super) const BATCH_BLOCKS: u64 = 4096;
/// A layer of no more than this comes up into a head of any size: 16 MiB.
const SMALL_BLOCKS: u64 = 4096;
/// A full disk's steps are no smaller: each has two maps written and every map of the chain read again.
const STEP_BLOCKS_MIN: u64 = 64;
/// Runs that are given back below a head after one flush.
const GIVE_BACK_RUNS_MAX: usize = 65_536;
/// How long a full disk waits for readers of older indexes.
const EPOCH_WAIT_MAX: Duration = Duration::from_secs(10);
/// How often it looks.
const EPOCH_LOOK: Duration = Duration::from_millis(5);

/// A layer that can go, and what it goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub layer: Uuid,
    pub child: Uuid,
}

/// Whether a merge has run out of room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Enough,
    /// What moved is given back after every step.
    Short,
}

/// Whether a merge still waits for readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Whole,
    /// It waited in vain once, while no life operation could begin; from there on it only looks.
    Spent,
}

/// How far a merge got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// One layer less, or something else came in between: look again.
    Done,
    /// Nothing worth copying for now.
    Left,
    /// Asked to stop.
    Stopped,
}

impl Disk {
    /// Merge every layer that no name holds and that has one child. `go_on` is asked between batches; what is left is
    /// done by the next call. Blocks that moved are given back when this returns.
    pub fn reclaim(&self, mut go_on: impl FnMut() -> bool) -> Result<()> {
        let _one = self.maintenance.lock().unwrap_or_else(PoisonError::into_inner);
        // Layers that cannot be merged for now; the others still can.
        let mut left = HashSet::new();
        let mut result = self.settle_records();
        while let Some(candidate) = self.candidate(&left) {
            match self.merge(candidate, &mut go_on) {
                Ok(Progress::Done) => {}
                Ok(Progress::Stopped) => return result,
                Ok(Progress::Left) => {
                    left.insert(candidate.layer);
                }
                Err(error) => {
                    tracing::warn!(layer = %candidate.layer, %error, "not merged");
                    left.insert(candidate.layer);
                    result = Err(error);
                }
            }
        }
        result
    }

    /// Whether [`Disk::reclaim`] has anything to do.
    pub fn has_unnamed_layers(&self) -> bool {
        !self.tree().unsettled().is_empty() || self.candidate(&HashSet::new()).is_some()
    }

    /// Write the records again of which the disk may have later ones.
    fn settle_records(&self) -> Result<()> {
        if self.tree().unsettled().is_empty() {
            return Ok(());
        }
        let _life = self.life();
        let unsettled = self.tree().unsettled();
        let settled = unsettled.iter().map(|volume| self.switch_record(volume, volume.record()));
        settled.fold(Ok(()), Result::and)
    }

    fn candidate(&self, left: &HashSet<Uuid>) -> Option<Candidate> {
        self.candidates().into_iter().find(|candidate| !left.contains(&candidate.layer))
    }

    fn candidates(&self) -> Vec<Candidate> {
        let tree = self.tree();
        if !tree.is_whole() {
            return Vec::new();
        }
        // Only open volumes can be switched, and those whose record is known; a layer that another one lists stays.
        let broken = tree.broken.iter().filter_map(|broken| broken.record.clone());
        let unsettled = tree.unsettled().into_iter().map(|volume| volume.record());
        let fixed: HashSet<Uuid> =
            broken.chain(unsettled).flat_map(|record| record.layers).map(|layer| layer.uuid).collect();
        let records = tree.records();
        let named: HashSet<Uuid> = records
            .iter()
            .flat_map(|record| record.snapshots.iter().map(|snapshot| snapshot.layer).chain([record.head]))
            .collect();
        let mut children: BTreeMap<Uuid, BTreeSet<Uuid>> = BTreeMap::new();
        for layer in records.iter().flat_map(|record| &record.layers) {
            if let Some(parent) = layer.parent {
                children.entry(parent).or_default().insert(layer.uuid);
            }
        }
        let single = children.into_iter().filter(|(layer, children)| {
            children.len() == 1 && !named.contains(layer) && !fixed.contains(layer)
        });
        single
            .flat_map(|(layer, children)| children.into_iter().map(move |child| Candidate { layer, child }))
            .collect()
    }

    /// Whether a merge that was begun may go on. Asked under the `life` lock: a candidate is found without it, and a
    /// clone that was under way then has frozen a head and not yet put its own on it.
    fn is_candidate(&self, candidate: Candidate) -> bool {
        self.candidates().contains(&candidate)
    }

    /// The lock of life operations, unless one of them came in between that took the candidate away.
    pub(super) fn life_of(&self, candidate: Candidate) -> Option<Life<'_>> {
        let life = self.life();
        self.is_candidate(candidate).then_some(life)
    }

    fn merge(&self, candidate: Candidate, go_on: &mut impl FnMut() -> bool) -> Result<Progress> {
        let head_of =
            self.tree().volumes.values().find(|volume| volume.record().head == candidate.child).cloned();
        match head_of {
            Some(volume) => self.merge_into_head(&volume, candidate, go_on),
            None => self.merge_into_frozen(candidate, go_on),
        }
    }

    fn merge_into_head(
        &self,
        volume: &Volume,
        candidate: Candidate,
        go_on: &mut impl FnMut() -> bool,
    ) -> Result<Progress> {
        let Some(slot) = self.tree().known_slot(candidate.layer) else {
            return Err(Error::Invalid(format!("internal: layer {} is not open", candidate.layer)));
        };
        let mut patience = Patience::Whole;
        if !is_worth_it(&volume.live()?.view().index, slot) {
            let _life = self.life();
            if volume.record().head == candidate.child && self.is_candidate(candidate) {
                self.give_back_below_head(volume.live()?, slot, &mut patience)?;
            }
            return Ok(Progress::Left);
        }
        let mut at = Block(0);
        loop {
            if !go_on() {
                return Ok(Progress::Stopped);
            }
            let _life = self.life();
            if volume.record().head != candidate.child || !self.is_candidate(candidate) {
                // A snapshot, a clone or a revert came in between.
                return Ok(Progress::Done);
            }
            let executor = volume.live()?;
            let end = executor.view().index.head.block_count();
            if at.0 >= end.0 {
                self.finish_merge(candidate)?;
                return Ok(Progress::Done);
            }
            let batch = BlockRange { start: at, count: BlockCount(BATCH_BLOCKS.min(end.0 - at.0)) };
            // Looked up before the loop, which would hold the view to its end: nothing could be given back meanwhile.
            let wanted = wanted(&executor.view().index, slot, batch);
            for blocks in wanted {
                self.copy_up(executor, blocks, CopySource::Layer(slot), Some((slot, &mut patience)))?;
            }
            at = batch.end();
        }
    }

    /// Bring blocks up into a head. On a full disk, what came up from `reclaimed` before is given back once.
    pub(super) fn copy_up(
        &self,
        executor: &Executor,
        blocks: BlockRange,
        from: CopySource,
        mut reclaimed: Option<(Slot, &mut Patience)>,
    ) -> Result<()> {
        for piece in pieces(blocks, COPY_BLOCKS_MAX) {
            match (executor.copy_up(piece, from), &mut reclaimed) {
                (Err(Error::NoSpace { .. }), Some((slot, patience))) => {
                    self.give_back_below_head(executor, *slot, patience)?;
                    self.with_reserve(|| executor.copy_up(piece, from))?;
                }
                (other, _) => other?,
            }
        }
        Ok(())
    }

    /// Punch the blocks of a frozen layer that its child, a head, hides durably. What it hides is looked up first: what
    /// it comes to hide during the flush is not durable, and a reader may have planned with what lies below.
    fn give_back_below_head(&self, executor: &Executor, slot: Slot, patience: &mut Patience) -> Result<()> {
        let mut from = Block(0);
        loop {
            let hidden = hidden(&executor.view().index, slot, from);
            let Some(last) = hidden.last() else { return Ok(()) };
            from = last.end();
            // A head's block never becomes absent again: what is durably hidden now is hidden after a crash.
            executor.flush()?;
            let new_epoch = |view: &View| View { index: Arc::new(Index::clone(&view.index)), ..view.clone() };
            executor.republish(new_epoch);
            let Some(file) = executor.view().layers.get(slot).cloned() else { return Ok(()) };
            if !self.wait_for_readers(&[executor], &[slot], patience) {
                return Ok(());
            }
            hidden.into_iter().for_each(|run| punch(&*file, run));
        }
    }

    fn merge_into_frozen(&self, candidate: Candidate, go_on: &mut impl FnMut() -> bool) -> Result<Progress> {
        let (lower, mut upper) = {
            let Some(_life) = self.life_of(candidate) else { return Ok(Progress::Done) };
            (layer::open(&*self.storage, candidate.layer)?, layer::open(&*self.storage, candidate.child)?)
        };
        if let Some(fault) = lower.fault.as_ref().or(upper.fault.as_ref()) {
            return Err(Error::Failed { reason: fault.as_str().into() });
        }
        let all = BlockRange { start: Block(0), count: lower.index.block_count() };
        let smaller = data_blocks(&upper.index) < visible_blocks(&lower, &upper, all);
        if smaller && self.can_fold(candidate) {
            return self.fold(candidate, lower, upper, go_on);
        }
        let end = lower.index.block_count().0.min(upper.index.block_count().0);
        let (mut at, mut room, mut patience) = (0, self.room(), Patience::Whole);
        while at < end {
            if !go_on() {
                if let Some(_life) = self.life_of(candidate) {
                    self.replace_map(&mut upper)?;
                }
                return Ok(Progress::Stopped);
            }
            let batch = BlockRange::new(at, self.step_blocks(room).min(end - at));
            let merged = self
                .check_step(room, visible_blocks(&lower, &upper, batch))
                .and_then(|()| merge_batch(&lower, &upper, batch));
            match (merged, room) {
                (Ok(copied), room) => {
                    at = batch.end().0;
                    if copied && room == Room::Short {
                        self.give_back_below_frozen(candidate, &lower, &mut upper, batch, &mut patience)?;
                    }
                }
                (Err(Error::NoSpace { .. }), Room::Enough) => {
                    room = Room::Short;
                    let all = BlockRange::new(0, end);
                    self.give_back_below_frozen(candidate, &lower, &mut upper, all, &mut patience)?;
                    self.reserve.give_up();
                }
                (Err(error), _) => return Err(error),
            }
        }
        let Some(_life) = self.life_of(candidate) else { return Ok(Progress::Done) };
        self.replace_map(&mut upper)?;
        self.finish_merge(candidate)?;
        Ok(Progress::Done)
    }

    /// Whether every volume on the child has the layer right below it. Otherwise a fold was cut off between two records:
    /// some volumes stand on what took the layer's content, and do not list the layer. These would lose the child.
    fn can_fold(&self, candidate: Candidate) -> bool {
        let stands_on_it =
            |volume: &Arc<Volume>| volume.record().parent(candidate.child) == Some(candidate.layer);
        self.volumes_over(candidate.child).iter().all(stands_on_it)
    }

    /// Make what came up into a frozen layer durable, data first.
    pub(super) fn replace_map(&self, upper: &mut Layer) -> Result<()> {
        if !planted::is(Bug::MergeMapBeforeData) {
            upper.data.sync()?;
        }
        let rewrite =
            || layer::rewrite_map(&*self.storage, upper.uuid, &upper.log, &upper.index, LogLen::Sealed);
        upper.log = self.with_reserve(rewrite)?;
        Ok(())
    }

    /// Short from the start where the reserve was given up before: copying must not use up what maps and records need.
    pub(super) fn room(&self) -> Room {
        match self.reserve.admit() {
            Ok(()) => Room::Enough,
            Err(_) => Room::Short,
        }
    }

    /// Blocks of one step. On a full disk a part of what is free, so that the maps of the step find room as well; at
    /// least so many that it is worth it, see [`Disk::check_step`].
    pub(super) fn step_blocks(&self, room: Room) -> u64 {
        match room {
            Room::Enough => BATCH_BLOCKS,
            Room::Short => {
                let free = self.storage.free_bytes().unwrap_or(0);
                (free / 4 / BLOCK_SIZE).clamp(STEP_BLOCKS_MIN, BATCH_BLOCKS)
            }
        }
    }

    /// Whether a step that copies so many blocks may begin. On a full disk it leaves as much as it takes, for its maps.
    pub(super) fn check_step(&self, room: Room, copied: u64) -> Result<()> {
        let wanted = BlockCount(copied).len().0.saturating_mul(2);
        match room {
            Room::Short if copied > 0 && self.storage.free_bytes()? < wanted => {
                Err(Error::NoSpace { path: self.path() })
            }
            Room::Short | Room::Enough => Ok(()),
        }
    }

    /// Let every volume read from `upper` what came up into it, then punch these blocks below where it has them.
    fn give_back_below_frozen(
        &self,
        candidate: Candidate,
        lower: &Layer,
        upper: &mut Layer,
        blocks: BlockRange,
        patience: &mut Patience,
    ) -> Result<()> {
        let Some(_life) = self.life_of(candidate) else { return Ok(()) };
        self.replace_map(upper)?;
        self.rebuild_over(upper.uuid)?;
        let volumes: Vec<Arc<Volume>> = self.tree().volumes.values().cloned().collect();
        let executors: Vec<&Executor> = volumes.iter().filter_map(|volume| volume.executor()).collect();
        if self.wait_for_readers(&executors, &self.slots_of([lower, upper]), patience) {
            for (run, _) in upper.index.runs(blocks).filter(|(_, state)| *state != BlockState::Absent) {
                punch(&*lower.data, run);
            }
        }
        Ok(())
    }

    /// The merged layer leaves every record, then every index, then the disk.
    fn finish_merge(&self, candidate: Candidate) -> Result<()> {
        let over: Vec<Arc<Volume>> = self.volumes_over(candidate.layer);
        for volume in &over {
            if let Backend::Live(executor) = &volume.backend
                && !planted::is(Bug::MergeSwitchBeforeFlush)
            {
                executor.flush()?;
            }
        }
        self.tree().forget_indexes(candidate.layer);
        self.tree().forget_indexes(candidate.child);
        for volume in &over {
            let mut record = volume.record();
            record.splice(candidate.layer);
            self.switch_layers(volume, record)?;
        }
        self.collect();
        Ok(())
    }

    pub(super) fn volumes_over(&self, layer: Uuid) -> Vec<Arc<Volume>> {
        let lists = |record: &VolumeRecord| record.layers.iter().any(|known| known.uuid == layer);
        self.tree().volumes.values().filter(|volume| lists(&volume.record())).cloned().collect()
    }

    /// Build the indexes over a frozen layer anew, whose content moved.
    pub(super) fn rebuild_over(&self, layer: Uuid) -> Result<()> {
        self.tree().forget_indexes(layer);
        for volume in self.volumes_over(layer) {
            self.refresh(&volume)?;
        }
        Ok(())
    }

    /// Switch a volume to a record by which other layers, or other layers and no image, hold the same. What can fail is
    /// done first: a merge into the head goes by the volume's index, and what another record's index does not show would
    /// go with the layer.
    pub(super) fn switch_layers(&self, volume: &Volume, record: VolumeRecord) -> Result<()> {
        // One that only reads goes on as it was opened.
        let live = volume.executor();
        let frozen = live.map(|_| self.frozen(&record, record.parent(record.head))).transpose()?;
        let has_image = record.image.is_some();
        self.switch_record(volume, record)?;
        if let (Some(executor), Some(frozen)) = (live, frozen) {
            follow(executor, frozen, has_image);
        }
        Ok(())
    }

    /// Let a volume follow its layers as their maps say now.
    fn refresh(&self, volume: &Volume) -> Result<()> {
        let Some(executor) = volume.executor() else { return Ok(()) };
        let record = volume.record();
        let frozen = self.frozen(&record, record.parent(record.head))?;
        follow(executor, frozen, record.image.is_some());
        Ok(())
    }

    /// Whether nobody follows an older index of these volumes over these layers, or a snapshot that stands
    /// on them.
    pub(super) fn no_readers(&self, executors: &[&Executor], layers: &[Slot]) -> bool {
        // A volume that only reads follows the index that it was opened with; others go on beside it (invariant 12).
        let frozen_in_time = |volume: &Arc<Volume>| match &volume.backend {
            Backend::Live(_) => false,
            Backend::ReadOnly { view, .. } => layers.iter().any(|slot| view.layers.get(*slot).is_some()),
        };
        if self.tree().volumes.values().any(frozen_in_time) {
            return false;
        }
        planted::is(Bug::PunchBeforeReaders)
            || executors.iter().all(|executor| executor.no_old_readers()) && self.tree().no_views(layers)
    }

    /// What indexes call these layers; one that is not open nobody reads.
    pub(super) fn slots_of(&self, layers: [&Layer; 2]) -> Vec<Slot> {
        let tree = self.tree();
        layers.into_iter().filter_map(|layer| tree.known_slot(layer.uuid)).collect()
    }

    /// Wait until [`Disk::no_readers`]; `false`: there still are some.
    pub(super) fn wait_for_readers(
        &self,
        executors: &[&Executor],
        layers: &[Slot],
        patience: &mut Patience,
    ) -> bool {
        let mut waited = Duration::ZERO;
        loop {
            if self.no_readers(executors, layers) {
                return true;
            }
            if *patience == Patience::Spent {
                return false;
            }
            if waited >= EPOCH_WAIT_MAX {
                tracing::warn!("the disk is full, and a reader still follows what could be given back");
                *patience = Patience::Spent;
                return false;
            }
            self.storage.rest(EPOCH_LOOK);
            waited += EPOCH_LOOK;
        }
    }
}

/// Let reads go by an index over other layers, and no longer by the image where the record does not name it.
fn follow(executor: &Executor, frozen: Frozen, has_image: bool) {
    executor.republish(|view| {
        let base = view.base.clone().filter(|_| has_image);
        let base_len = base.as_ref().map_or(ByteLen(0), |base| base.len());
        let index = Index { frozen: frozen.index, base_len, ..Index::clone(&view.index) };
        // Changes under way may have been planned with the old index, so its files stay open with these.
        let layers = frozen.files.with(&view.layers);
        View { index: Arc::new(index), layers, base, head: view.head.clone() }
    });
}

/// Whether bringing this layer up into the head costs less than leaving it.
fn is_worth_it(index: &Index, slot: Slot) -> bool {
    let all = BlockRange { start: Block(0), count: index.head.block_count() };
    let up: u64 = wanted(index, slot, all).iter().map(|run| run.count.0).sum();
    up <= SMALL_BLOCKS.max(data_blocks(&index.head))
}

fn data_blocks(index: &HeadIndex) -> u64 {
    data_blocks_in(index, BlockRange { start: Block(0), count: index.block_count() })
}

pub(super) fn data_blocks_in(index: &HeadIndex, blocks: BlockRange) -> u64 {
    index.runs(blocks).filter(|(_, state)| *state == BlockState::Data).map(|(run, _)| run.count.0).sum()
}

/// Data blocks of `lower` in `blocks` that `upper` does not hide.
fn visible_blocks(lower: &Layer, upper: &Layer, blocks: BlockRange) -> u64 {
    let absent = upper.index.runs(blocks).filter(|(_, state)| *state == BlockState::Absent);
    let below = absent.flat_map(|(run, _)| lower.index.runs(run));
    below.filter(|(_, state)| *state == BlockState::Data).map(|(run, _)| run.count.0).sum()
}

/// Runs of `slot`'s blocks from `from` on that the head hides by now, at most [`GIVE_BACK_RUNS_MAX`].
fn hidden(index: &Index, slot: Slot, from: Block) -> Vec<BlockRange> {
    let all = BlockRange { start: from, count: Block(index.head.block_count().0).since(from) };
    let hidden = index.head.runs(all).filter(|(_, state)| *state != BlockState::Absent);
    let below = hidden.flat_map(|(run, _)| index.frozen.runs(run));
    let of_slot = below.filter(|(_, value)| value.slot() == Some(slot)).map(|(run, _)| run);
    of_slot.take(GIVE_BACK_RUNS_MAX).collect()
}

/// Runs of `batch` that the head does not know and `slot` answers for.
fn wanted(index: &Index, slot: Slot, batch: BlockRange) -> Vec<BlockRange> {
    let absent = index.head.runs(batch).filter(|(_, state)| *state == BlockState::Absent);
    absent
        .flat_map(|(run, _)| index.frozen.runs(run))
        .filter(|(_, value)| value.slot() == Some(slot))
        .map(|(run, _)| run)
        .collect()
}

/// Copy what `upper` does not know from `lower`, and mark it in memory. Whether that was anything.
fn merge_batch(lower: &Layer, upper: &Layer, batch: BlockRange) -> Result<bool> {
    let absent: Vec<BlockRange> = upper
        .index
        .runs(batch)
        .filter(|(_, state)| *state == BlockState::Absent || planted::is(Bug::MergeOlderWins))
        .map(|(run, _)| run)
        .collect();
    let mut copied = false;
    for (run, state) in absent.into_iter().flat_map(|run| lower.index.runs(run)) {
        if state == BlockState::Data {
            copy_blocks(&*lower.data, &*upper.data, run)?;
            copied = true;
        }
        upper.index.set(run, state);
    }
    Ok(copied)
}

/// Give space back; what cannot be given back is given back with the file.
pub(super) fn punch(file: &dyn StorageFile, run: BlockRange) {
    if let Err(error) = file.punch(run.bytes()) {
        tracing::debug!(%error, "not punched");
    }
}
