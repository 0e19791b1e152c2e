//! Making a volume independent of its image.
//!
//! The image's bytes go to the bottom layer, below every snapshot, where no layer hid them: what anything reads stays
//! the same, for this volume, its snapshots and other volumes that share the layer. The moment is the record that no
//! longer names the image; until then a crash leaves blocks in the bottom layer that read like the image's.

use std::sync::PoisonError;

use super::{
    device::{Volume, VolumeInfo},
    disk::Disk,
    layer,
};
use crate::{
    cow::{
        BlockState,
        core::{COPY_BLOCKS_MAX, CopySource},
        map::checkpoint::LogLen,
    },
    device::{BlockDevice, ExtentKind},
    error::{Error, Result},
    exec::buffer::{AlignedBuffer, is_zero},
    image::BaseImage,
    units::{BLOCK_BYTES, Block, BlockCount, BlockRange, ByteLen, ByteRange},
};

/// Blocks between two reports of progress: 16 MiB.
const BATCH_BLOCKS: u64 = 4096;

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
        self.switch_record(&device, record)?;
        self.tree().forget_indexes(bottom);
        self.refresh(&device)?;
        Ok(device.info())
    }

    fn flatten_head(
        &self,
        volume: &Volume,
        base: &dyn BaseImage,
        progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
    ) -> Result<bool> {
        let head = volume.record().head;
        for_each_batch(base, progress, |data| {
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
        let copied = for_each_batch(base, progress, |data| {
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
            absent.into_iter().try_for_each(|run| copy_base(base, &layer, run))
        });
        // Also when it was stopped or failed: what was copied is not copied again.
        layer.data.sync()?;
        let _life = self.life();
        layer::rewrite_map(&*self.storage, bottom, &layer.log, &layer.index, LogLen::Sealed)?;
        copied
    }
}

/// Call `work` for runs of blocks in which the image holds data, none longer than a batch; `false`: stopped.
fn for_each_batch(
    base: &dyn BaseImage,
    progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
    mut work: impl FnMut(BlockRange) -> Result<()>,
) -> Result<bool> {
    let len = base.len();
    let mut at = 0;
    while at < len.0 {
        for extent in base.extents(ByteRange::new(at, len.0 - at))? {
            at = extent.range.end().0;
            if extent.kind == ExtentKind::Zero {
                continue;
            }
            let blocks = extent.range.blocks_touched();
            let mut start = blocks.start;
            while start < blocks.end() {
                if !progress(ByteLen(start.offset().0), len) {
                    return Ok(false);
                }
                let count = blocks.end().since(start).min(BlockCount(BATCH_BLOCKS));
                work(BlockRange { start, count })?;
                start = start.plus(count);
            }
        }
    }
    progress(len, len);
    Ok(true)
}

/// Write the blocks of `run` that are not zeros into the layer's file, and mark them in memory.
fn copy_base(base: &dyn BaseImage, layer: &layer::Layer, run: BlockRange) -> Result<()> {
    let all = ByteRange { start: Block(0).offset(), len: base.len() };
    let mut start = run.start;
    while start < run.end() {
        let count = run.end().since(start).min(BlockCount(COPY_BLOCKS_MAX));
        let piece = BlockRange { start, count };
        let mut buffer = AlignedBuffer::new(count.len().as_usize());
        if let Some(inside) = piece.bytes().intersect(all) {
            base.read_at(&mut buffer[..inside.len.as_usize()], inside.start.0)?;
        }
        for (bytes, number) in buffer.chunks(BLOCK_BYTES).zip(start.0..) {
            if !is_zero(bytes) {
                let block = BlockRange::new(number, 1);
                layer.data.write_at(bytes, block.start.offset().0)?;
                layer.index.set(block, BlockState::Data);
            }
        }
        start = piece.end();
    }
    Ok(())
}
