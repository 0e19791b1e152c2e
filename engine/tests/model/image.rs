//! An image that says of each cell which one it is.

use bedplate_engine::{
    device::{Extent, ExtentKind},
    error::Result,
    image::BaseImage,
    units::{ByteLen, ByteRange},
};

use crate::cells::{CELL, cell_bytes, image_value};

/// An image of stamped cells.
#[derive(Clone, Debug)]
pub struct Image(pub u64);

impl BaseImage for Image {
    fn len(&self) -> ByteLen {
        ByteLen(self.0)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        ByteRange::within(offset, buffer.len() as u64, self.len())?;
        for (byte, at) in buffer.iter_mut().zip(offset..) {
            let bytes = cell_bytes(image_value(at / CELL));
            *byte = bytes[usize::try_from(at % CELL).expect("small")];
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }
}
