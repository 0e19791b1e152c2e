//! Writing a block device's content as a raw file: its bytes, with a hole wherever a block holds only zeros.

use std::{fs::File, path::Path};

use super::{
    Monitor,
    pieces::{self, Piece},
};
use crate::{
    device::BlockDevice,
    error::{Error, Result},
    sparse::write_sparse,
    units::{BLOCK_SIZE, to_usize},
};

/// Write `device`, which does not change meanwhile, to the empty `file`; `path` is its name for errors. Not synced.
pub(super) fn write(
    device: &dyn BlockDevice,
    file: &File,
    path: &Path,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    file.set_len(device.geometry().size.0).map_err(|e| Error::io("truncate", path, e))?;
    pieces::for_each_piece(device, &Writer { file, path }, monitor)
}

struct Writer<'a> {
    file: &'a File,
    path: &'a Path,
}

impl pieces::Format for Writer<'_> {
    type Worker = ();

    fn worker(&self) -> Result<()> {
        Ok(())
    }

    fn unit(&self) -> u64 {
        BLOCK_SIZE
    }

    fn prepare(&self, (): &mut (), _piece: &Piece) {}

    fn place(&self, (): &mut (), _piece: &Piece) {}

    fn write(&self, (): &mut (), piece: &Piece) -> Result<()> {
        let content = piece.bytes.get(..to_usize(piece.range.len.0)).unwrap_or_default();
        write_sparse(self.file, content, piece.range.start.0).map_err(|e| Error::io("write", self.path, e))
    }
}
