//! Merging down: a frozen child's blocks go into the layer below it, which then stands in the child's place.
//!
//! For a large layer under a small child: after each export of a live volume, for one. What is overwritten below is
//! hidden by the child's own durable blocks, so whoever reads through the child sees no difference, before a crash and
//! after it. Only a reader that follows the lower layer itself would: there is none, because it has no name and no
//! other child, except those who began when it had (invariant 6). So this waits for them to end, and does not start
//! while there are any.

use std::sync::Arc;

use super::{
    copy::copy_blocks,
    device::Volume,
    disk::Disk,
    layer::Layer,
    merge::{BATCH_BLOCKS, Progress, punch},
};
use crate::{
    cow::BlockState,
    error::Result,
    exec::blocking::Executor,
    units::{BlockCount, BlockRange},
};

impl Disk {
    /// Fold `upper`, frozen, into `lower`, its parent, which nothing else stands on.
    pub(super) fn fold(
        &self,
        mut lower: Layer,
        upper: &Layer,
        go_on: &mut impl FnMut() -> bool,
    ) -> Result<Progress> {
        let volumes: Vec<Arc<Volume>> = self.volumes_over(upper.uuid);
        let executors: Vec<&Executor> = volumes.iter().filter_map(|volume| volume.executor()).collect();
        if !self.no_readers(&executors) {
            return Ok(Progress::Left);
        }
        let blocks = upper.index.block_count().max(lower.index.block_count());
        lower.index = lower.index.grown(blocks);
        if lower.data.len()? < blocks.len().0 {
            lower.data.set_len(blocks.len().0)?;
        }
        let end = upper.index.block_count().0;
        let mut at = 0;
        while at < end {
            if !go_on() {
                let _life = self.life();
                self.replace_map(&mut lower)?;
                return Ok(Progress::Stopped);
            }
            let batch =
                BlockRange { count: BlockCount(BATCH_BLOCKS.min(end - at)), ..BlockRange::new(at, 0) };
            for (run, state) in upper.index.runs(batch) {
                match state {
                    BlockState::Absent => {}
                    BlockState::Data => copy_blocks(&*upper.data, &*lower.data, run)?,
                    BlockState::Zero => punch(&*lower.data, run),
                }
                lower.index.set(run, state);
            }
            at = batch.end().0;
        }
        let _life = self.life();
        self.replace_map(&mut lower)?;
        let volumes = self.volumes_over(upper.uuid);
        for volume in &volumes {
            let mut record = volume.record();
            record.fold(upper.uuid, lower.uuid);
            self.switch_record(volume, record)?;
        }
        self.tree().forget_indexes(upper.uuid);
        self.tree().forget_indexes(lower.uuid);
        for volume in &volumes {
            self.refresh(volume)?;
        }
        self.collect();
        Ok(Progress::Done)
    }
}
