//! Merging down: a frozen child's blocks go into the layer below it, which then stands in the child's place.
//!
//! For a large layer under a small child: after each export of a live volume, for one. What is overwritten below is
//! hidden by the child's own durable blocks, so whoever reads through the child sees no difference, before a crash and
//! after it. Only a reader that follows the lower layer itself would: there is none, because it has no name and no
//! other child, except those who began when it had (invariant 6). So this waits for them to end, and does not start
//! while there are any.
//!
//! On a full disk (invariant 8) it goes step by step: what went down so far is made durable below, then the child's map
//! forgets it, then every reader follows the new indexes, and then the child's blocks are punched. A crash between any
//! two of these finds the same bytes in one of the two layers, and the fold begins again with what the child still has.
//! The disk's reserve pays for the first step; each takes a part of it only, so that the maps find room too.

use std::sync::Arc;

use super::{
    copy::copy_blocks,
    device::Volume,
    disk::Disk,
    layer::Layer,
    merge::{Candidate, Patience, Progress, Room, data_blocks_in, punch},
};
use crate::{
    cow::{BlockState, head::HeadIndex},
    error::{Error, Result},
    exec::executor::Executor,
    units::{Block, BlockRange},
};

impl Disk {
    /// Fold `upper`, frozen, into `lower`, its parent, which nothing else stands on.
    pub(super) fn fold(
        &self,
        candidate: Candidate,
        mut lower: Layer,
        mut upper: Layer,
        go_on: &mut impl FnMut() -> bool,
    ) -> Result<Progress> {
        let volumes: Vec<Arc<Volume>> = self.volumes_over(upper.uuid);
        let executors: Vec<&Executor> = volumes.iter().filter_map(|volume| volume.executor()).collect();
        if !self.no_readers(&executors, &self.slots_of([&lower, &upper])) {
            return Ok(Progress::Left);
        }
        let blocks = upper.index.block_count().max(lower.index.block_count());
        lower.index = lower.index.grown(blocks);
        if lower.data.len()? < blocks.len().0 {
            lower.data.set_len(blocks.len().0)?;
        }
        let end = upper.index.block_count().0;
        let (mut at, mut room) = (0, self.room());
        while at < end {
            if !go_on() {
                if let Some(_life) = self.life_of(candidate) {
                    self.replace_map(&mut lower)?;
                }
                return Ok(Progress::Stopped);
            }
            let batch = BlockRange::new(at, self.step_blocks(room).min(end - at));
            let folded = self
                .check_step(room, data_blocks_in(&upper.index, batch))
                .and_then(|()| fold_batch(&lower, &upper, batch));
            match (folded, room) {
                (Ok(()), Room::Enough) => at = batch.end().0,
                (Ok(()), Room::Short) => {
                    at = batch.end().0;
                    self.give_back_above(candidate, &mut lower, &mut upper, batch.end())?;
                }
                (Err(Error::NoSpace { .. }), Room::Enough) => {
                    room = Room::Short;
                    self.give_back_above(candidate, &mut lower, &mut upper, batch.start)?;
                    self.reserve.give_up();
                }
                (Err(error), _) => return Err(error),
            }
        }
        let Some(_life) = self.life_of(candidate) else { return Ok(Progress::Done) };
        self.replace_map(&mut lower)?;
        self.tree().forget_indexes(upper.uuid);
        self.tree().forget_indexes(lower.uuid);
        for volume in self.volumes_over(upper.uuid) {
            let mut record = volume.record();
            record.fold(upper.uuid, lower.uuid);
            self.switch_layers(&volume, record)?;
        }
        self.collect();
        Ok(Progress::Done)
    }

    /// Give back what `upper` has before `end`, all of which went down into `lower`.
    fn give_back_above(
        &self,
        candidate: Candidate,
        lower: &mut Layer,
        upper: &mut Layer,
        end: Block,
    ) -> Result<()> {
        let Some(_life) = self.life_of(candidate) else { return Ok(()) };
        let blocks = upper.index.block_count();
        let before = BlockRange { start: Block(0), count: end.since(Block(0)) };
        let after = BlockRange { start: end, count: Block(blocks.0).since(end) };
        let data = upper.index.runs(before).filter(|(_, state)| *state == BlockState::Data);
        let moved: Vec<BlockRange> = data.map(|(run, _)| run).collect();
        if moved.is_empty() {
            return Ok(());
        }
        self.replace_map(lower)?;
        let left = HeadIndex::new(blocks);
        upper.index.runs(after).for_each(|(run, state)| left.set(run, state));
        upper.index = left;
        self.replace_map(upper)?;
        self.rebuild_over(upper.uuid)?;
        let volumes: Vec<Arc<Volume>> = self.volumes_over(upper.uuid);
        let executors: Vec<&Executor> = volumes.iter().filter_map(|volume| volume.executor()).collect();
        // In vain only once: the fold ends with that.
        if !self.wait_for_readers(&executors, &self.slots_of([lower, upper]), &mut Patience::Whole) {
            // They go on reading it above; it goes with the file when the fold is done.
            return Err(Error::NoSpace { path: self.path() });
        }
        moved.into_iter().for_each(|run| punch(&*upper.data, run));
        Ok(())
    }
}

/// Bring a batch down, and mark it in memory.
fn fold_batch(lower: &Layer, upper: &Layer, batch: BlockRange) -> Result<()> {
    for (run, state) in upper.index.runs(batch) {
        match state {
            BlockState::Absent => {}
            BlockState::Data => copy_blocks(&*upper.data, &*lower.data, run)?,
            BlockState::Zero => punch(&*lower.data, run),
        }
        lower.index.set(run, state);
    }
    Ok(())
}
