//! Copying blocks into a layer, and the full clone: a volume with its own bytes, which needs neither the source nor its
//! image.
//!
//! Owns `each_run` and `copy_run`, which full clones and flattening share, and `copy_blocks` between layers.

use uuid::Uuid;

use super::{
    device::VolumeInfo,
    disk::Disk,
    layer::{self, Layer},
    record::{LayerRef, check_user_name},
};
use crate::{
    cow::{BlockState, core::COPY_BLOCKS_MAX, map::log::LogEnd},
    device::{BlockDevice, ExtentKind, check_runs},
    error::{Error, Result},
    exec::{buffer::AlignedBuffer, request::nonzero_blocks, storage::StorageFile},
    image::BaseImage,
    units::{Block, BlockCount, BlockRange, ByteLen, ByteRange},
};

impl Disk {
    /// A new volume with a copy of what `volume`, or its snapshot, is now. Blocks of zeros take no space. `progress` is
    /// told how many bytes of how many are done, and says whether to go on. The new volume appears when it is whole.
    pub fn full_clone(
        &self,
        volume: &str,
        snapshot: Option<&str>,
        new: &str,
        mut progress: impl FnMut(ByteLen, ByteLen) -> bool,
    ) -> Result<VolumeInfo> {
        check_user_name(new)?;
        self.check_absent(new)?;
        let source = self.view(volume, snapshot)?;
        let size = source.geometry().size;
        let mut head = self.make_layer(size.blocks_ceil())?;
        let copied = copy_all(&source, &head, &mut progress).and_then(|whole| {
            if !whole {
                return Err(Error::Invalid("stopped".into()));
            }
            head.data.sync()?;
            let (header, map) =
                layer::stage_map(&*self.storage, head.uuid, &head.log, &head.index, self.log_len)?;
            crate::exec::head::publish_map(&*self.storage, &layer::dir(head.uuid))?;
            (head.log, head.log_offset, head.map) = (LogEnd::start(&header), header.log_offset, map);
            Ok(())
        });
        let uuid: Uuid = head.uuid;
        let added = copied.and_then(|()| {
            let _life = self.life();
            self.check_absent(new)?;
            let layers = vec![LayerRef { uuid, parent: None }];
            self.add_volume(self.new_record(new, size, None, layers, uuid), head)
        });
        if added.is_err() {
            self.settle(uuid);
            self.collect();
            self.sweep();
        }
        added
    }
}

/// Copy every block of `source` that is not zeros; `false`: stopped.
fn copy_all(
    source: &dyn BaseImage,
    to: &Layer,
    progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
) -> Result<bool> {
    let mut buffer = copy_buffer();
    each_run(source, COPY_BLOCKS_MAX, progress, |run| copy_run(source, to, run, &mut buffer))
}

/// Call `work` for runs of blocks in which `source` holds data, none longer than `run_max` blocks; `false`: stopped.
pub(super) fn each_run(
    source: &dyn BaseImage,
    run_max: u64,
    progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
    mut work: impl FnMut(BlockRange) -> Result<()>,
) -> Result<bool> {
    let len = source.len();
    let mut at = 0;
    while at < len.0 {
        let asked = ByteRange::new(at, len.0 - at);
        let extents = source.extents(asked)?;
        check_runs(asked, &extents)?;
        for extent in extents {
            at = extent.range.end().0;
            if extent.kind == ExtentKind::Zero {
                continue;
            }
            for run in pieces(extent.range.blocks_touched(), run_max) {
                if !progress(ByteLen(run.start.offset().0), len) {
                    return Ok(false);
                }
                work(run)?;
            }
        }
    }
    progress(len, len);
    Ok(true)
}

/// A buffer for [`copy_run`].
pub(super) fn copy_buffer() -> AlignedBuffer {
    AlignedBuffer::new(BlockCount(COPY_BLOCKS_MAX).len().as_usize())
}

/// Write the blocks of `run` that are not zeros into the layer's file, and mark them in memory.
pub(super) fn copy_run(source: &dyn BaseImage, to: &Layer, run: BlockRange, buffer: &mut [u8]) -> Result<()> {
    let all = ByteRange { start: Block(0).offset(), len: source.len() };
    for piece in pieces(run, COPY_BLOCKS_MAX) {
        let buffer = &mut buffer[..piece.count.len().as_usize()];
        // The last block of an image may be cut short; the rest of it is zeros.
        let inside = piece.bytes().intersect(all).map_or(0, |inside| inside.len.as_usize());
        source.read_at(&mut buffer[..inside], piece.start.offset().0)?;
        buffer[inside..].fill(0);
        let mut runs = Vec::new();
        nonzero_blocks(buffer, piece.start.offset(), piece.bytes(), &mut runs);
        for run in runs {
            let at = (run.start.offset().since(piece.start.offset())).as_usize();
            to.data.write_at(&buffer[at..at + run.count.len().as_usize()], run.start.offset().0)?;
            to.index.set(run, BlockState::Data);
        }
    }
    Ok(())
}

/// Copy blocks between the files of two layers, zeros too.
pub(super) fn copy_blocks(from: &dyn StorageFile, to: &dyn StorageFile, run: BlockRange) -> Result<()> {
    let mut buffer = AlignedBuffer::new(BlockCount(run.count.0.min(COPY_BLOCKS_MAX)).len().as_usize());
    for piece in pieces(run, COPY_BLOCKS_MAX) {
        let buffer = &mut buffer[..piece.count.len().as_usize()];
        from.read_at(buffer, piece.start.offset().0)?;
        to.write_at(buffer, piece.start.offset().0)?;
    }
    Ok(())
}

/// `run` in pieces of at most `blocks_max` blocks.
pub(super) fn pieces(run: BlockRange, blocks_max: u64) -> impl Iterator<Item = BlockRange> {
    let starts = (run.start.0..run.end().0).step_by(crate::units::to_usize(blocks_max));
    starts.map(move |start| BlockRange::new(start, blocks_max.min(run.end().0 - start)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Extent;

    /// An image that says nothing of its second half.
    #[derive(Debug)]
    struct Half;

    impl BaseImage for Half {
        fn len(&self) -> ByteLen {
            ByteLen(8192)
        }

        fn read_at(&self, buffer: &mut [u8], _: u64) -> Result<()> {
            buffer.fill(1);
            Ok(())
        }

        fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
            let first = ByteRange::new(0, 4096).intersect(range);
            Ok(first.map(|range| Extent { range, kind: ExtentKind::Data }).into_iter().collect())
        }
    }

    #[test]
    fn a_source_that_does_not_say_what_it_holds_is_refused_instead_of_being_asked_for_ever() {
        let mut runs = Vec::new();
        let work = |run| {
            runs.push(run);
            Ok(())
        };
        assert!(matches!(each_run(&Half, 16, &mut |_, _| true, work), Err(Error::Invalid(_))));
        assert_eq!(runs, [BlockRange::new(0, 1)]);
    }
}
