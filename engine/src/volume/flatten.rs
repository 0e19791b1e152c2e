//! Making a volume independent of its image.
//!
//! The image's bytes go to the bottom layer, below every snapshot, where no layer hid them: what anything reads stays
//! the same, for this volume, its snapshots and other volumes that share the layer. The moment is the record that no
//! longer names the image; until then a crash leaves blocks in the bottom layer that read like the image's.

use std::sync::PoisonError;

use super::{
    copy::{copy_buffer, copy_run, each_run},
    device::{Volume, VolumeInfo},
    disk::Disk,
    layer,
    merge::BATCH_BLOCKS,
};
use crate::{
    cow::{BlockState, core::CopySource, map::checkpoint::LogLen},
    device::BlockDevice,
    error::{Error, Result},
    image::BaseImage,
    units::{Block, BlockRange, ByteLen},
};

impl Disk {
    /// Copy the image's bytes into the volume's bottom layer and let go of the image. `progress` is told how many bytes
    /// of how many are done, and says whether to go on; stopped, what was copied stays and is not copied again.
    pub fn flatten(
        &self,
        volume: &str,
        mut progress: impl FnMut(ByteLen, ByteLen) -> bool,
    ) -> Result<VolumeInfo> {
        let _one = self.maintenance.lock().unwrap_or_else(PoisonError::into_inner);
        let device = self.volume(volume)?;
        let record = device.record();
        if record.image.is_none() {
            return Ok(device.info());
        }
        let Some(base) = device.view().base else { return Ok(device.info()) };
        let bottom = record.chain(record.head).pop().unwrap_or(record.head);
        let done = if bottom == record.head {
            self.flatten_head(&device, &*base, &mut progress)?
        } else {
            self.flatten_frozen(bottom, &*base, &mut progress)?
        };
        if !done {
            return Err(Error::Invalid(
                "stopped; what was copied is kept, and flatten goes on from there".into(),
            ));
        }
        let _life = self.life();
        device.live()?.flush()?;
        let mut record = device.record();
        record.image = None;
        self.tree().forget_indexes(bottom);
        self.switch_layers(&device, record)?;
        Ok(device.info())
    }

    fn flatten_head(
        &self,
        volume: &Volume,
        base: &dyn BaseImage,
        progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
    ) -> Result<bool> {
        let head = volume.record().head;
        each_run(base, BATCH_BLOCKS, progress, |data| {
            let _life = self.life();
            if volume.record().head != head {
                let message = "a snapshot was taken meanwhile; run flatten again, it goes on from there";
                return Err(Error::Invalid(message.into()));
            }
            self.copy_up(volume.live()?, data, CopySource::Base, None)
        })
    }

    fn flatten_frozen(
        &self,
        bottom: uuid::Uuid,
        base: &dyn BaseImage,
        progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
    ) -> Result<bool> {
        let layer = {
            let _life = self.life();
            layer::open(&*self.storage, bottom)?
        };
        if let Some(fault) = &layer.fault {
            return Err(Error::Failed { reason: fault.as_str().into() });
        }
        let end = layer.index.block_count();
        let mut buffer = copy_buffer();
        let copied = each_run(base, BATCH_BLOCKS, progress, |data| {
            if data.start.0 >= end.0 {
                return Ok(());
            }
            let data = BlockRange { count: data.end().min(Block(end.0)).since(data.start), ..data };
            let absent: Vec<BlockRange> = layer
                .index
                .runs(data)
                .filter(|(_, state)| *state == BlockState::Absent)
                .map(|(run, _)| run)
                .collect();
            absent.into_iter().try_for_each(|run| copy_run(base, &layer, run, &mut buffer))
        });
        // Also when it was stopped or failed: what was copied is not copied again.
        layer.data.sync()?;
        let _life = self.life();
        layer::rewrite_map(&*self.storage, bottom, &layer.log, &layer.index, LogLen::Sealed)?;
        copied
    }
}
