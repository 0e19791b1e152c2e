//! What a base is made of.
//!
//! Owns [`BaseImage`], the boundary between image formats and copy-on-write: immutable bytes of a known length, read
//! from any thread without a lock. The formats are [`raw`] and [`qcow2`]; [`Format::of`] tells them by their magic.

pub mod device;
pub mod file;
pub mod follow;
pub mod qcow2;
pub mod raw;
pub mod references;

use std::{fmt, fs::File, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use self::{
    qcow2::{Qcow2Image, View},
    raw::RawImage,
};
use crate::{
    device::Extent,
    error::{Error, Result},
    exec::asynchronous::Located,
    units::{ByteLen, ByteRange},
};

/// An opened image: what volumes read where no layer answers.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether an image is empty")]
pub trait BaseImage: Send + Sync + fmt::Debug {
    /// Virtual size. Past it volumes read zeros.
    fn len(&self) -> ByteLen;

    /// Fill `buffer` from `offset`; the range lies within [`BaseImage::len`]. Bytes that the file should have and does
    /// not are an error, never zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// Where `range`, within [`BaseImage::len`], holds data: runs in order, without gaps; at least one where the range is
    /// not empty, and maybe not all. Zeros may be called data.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>>;

    /// Call `found` with where the bytes of each part of `range`, within [`BaseImage::len`], are: in order, without
    /// gaps, and without waiting for anything.
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        found(range, Located::Waits);
    }

    /// Tells images apart: readers of one and the same share it.
    fn identity(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>().addr()
    }

    /// `range` is likely to be read soon: begin, and do not wait. A hint.
    fn read_ahead(&self, _range: ByteRange) {}
}

/// Bytes that [`Format::of`] wants to see.
pub const PROBE_LEN: usize = 4;

/// How an image's file is to be read. Told by its magic at import and then written in its record: a raw image whose
/// guest writes another format's magic later stays raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    /// The format of a file that starts with these bytes.
    pub fn of(start: &[u8]) -> Format {
        if start.starts_with(b"QFI\xfb") { Format::Qcow2 } else { Format::Raw }
    }
}

/// Open an image of `format` in `file`, which errors call `path`: of a qcow2 file, this content.
pub fn open(file: File, path: &Path, format: Format, view: &View) -> Result<Arc<dyn BaseImage>> {
    match format {
        Format::Raw => {
            let len = file.metadata().map_err(|e| Error::io("stat", path, e))?.len();
            Ok(Arc::new(RawImage::new(file, path.to_owned(), ByteLen(len))?))
        }
        Format::Qcow2 => Ok(Arc::new(Qcow2Image::open(file, path, view)?)),
    }
}

/// Opens the images that volumes stand on.
pub trait BaseSource: Send + Sync {
    /// The image with this uuid, ready and unchanged since it was verified; an error says why not.
    fn open_base(&self, image: &crate::volume::record::ImageRef) -> Result<Arc<dyn BaseImage>>;
}
