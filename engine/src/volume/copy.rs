//! A full clone: a volume with its own bytes, which needs neither the source nor its image.

use uuid::Uuid;

use super::{
    device::VolumeInfo,
    disk::Disk,
    layer,
    life::new_record,
    record::{LayerRef, check_user_name},
};
use crate::{
    cow::{
        BlockState,
        map::{checkpoint::LogLen, log::LogEnd},
    },
    device::{BlockDevice, ExtentKind},
    error::{Error, Result},
    exec::buffer::{AlignedBuffer, is_zero},
    units::{BLOCK_BYTES, Block, BlockCount, BlockRange, ByteLen, ByteRange},
};

/// Blocks that are copied at once: 1 MiB.
const PIECE_BLOCKS: u64 = 256;

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
        let copied = copy_all(&source, &head, &mut progress).and_then(|()| {
            head.data.sync()?;
            let (header, map) =
                layer::stage_map(&*self.storage, head.uuid, &head.log, &head.index, LogLen::LIVE)?;
            crate::exec::head::publish_map(&*self.storage, &layer::dir(head.uuid))?;
            (head.log, head.log_offset, head.map) = (LogEnd::start(&header), header.log_offset, map);
            Ok(())
        });
        let uuid: Uuid = head.uuid;
        let added = copied.and_then(|()| {
            let _life = self.life();
            self.check_absent(new)?;
            let layers = vec![LayerRef { uuid, parent: None }];
            self.add_volume(new_record(new, size, None, layers, uuid), head)
        });
        if added.is_err() {
            self.settle(uuid);
            self.collect();
            self.sweep();
        }
        added
    }
}

/// Copy every block of `source` that is not zeros.
fn copy_all(
    source: &dyn BlockDevice,
    to: &layer::Layer,
    progress: &mut impl FnMut(ByteLen, ByteLen) -> bool,
) -> Result<()> {
    let size = source.geometry().size;
    let mut buffer = AlignedBuffer::new(BlockCount(PIECE_BLOCKS).len().as_usize());
    let mut at = 0;
    while at < size.0 {
        for extent in source.extents(ByteRange::new(at, size.0 - at))? {
            at = extent.range.end().0;
            if extent.kind == ExtentKind::Zero {
                continue;
            }
            let blocks = extent.range.blocks_touched();
            let mut start = blocks.start;
            while start < blocks.end() {
                if !progress(ByteLen(start.offset().0), size) {
                    return Err(Error::Invalid("stopped".into()));
                }
                let count = blocks.end().since(start).min(BlockCount(PIECE_BLOCKS));
                copy_piece(source, to, BlockRange { start, count }, &mut buffer)?;
                start = start.plus(count);
            }
        }
    }
    progress(size, size);
    Ok(())
}

fn copy_piece(
    source: &dyn BlockDevice,
    to: &layer::Layer,
    piece: BlockRange,
    buffer: &mut [u8],
) -> Result<()> {
    let all = ByteRange { start: Block(0).offset(), len: source.geometry().size };
    let buffer = &mut buffer[..piece.count.len().as_usize()];
    buffer.fill(0);
    if let Some(inside) = piece.bytes().intersect(all) {
        source.read_at(&mut buffer[..inside.len.as_usize()], inside.start.0)?;
    }
    for (bytes, number) in buffer.chunks(BLOCK_BYTES).zip(piece.start.0..) {
        if !is_zero(bytes) {
            to.data.write_at(bytes, Block(number).offset().0)?;
            to.index.set(BlockRange::new(number, 1), BlockState::Data);
        }
    }
    Ok(())
}
