//! The reader under judgement, with the questions that the corpus asks of it.
//!
//! Owns how an image is opened and how all of it is read: in pieces of several sizes that must agree, and beside the
//! extents, which must not call bytes zero that are not. What the answers should be is in `sound.rs` and `judge.rs`.

use std::{fs::File, path::Path};

use bedplate_engine::{
    device::ExtentKind,
    error::{Error, Result},
    image::{
        BaseImage,
        qcow2::{Qcow2Image, Qcow2Layer, View},
    },
    units::ByteRange,
};

/// Pieces that an image is read in: whole clusters at once, and borders of nothing.
const PIECE_LENS: [usize; 2] = [3 << 20, 4099];
/// Answers of [`BaseImage::extents`] for one image.
const ANSWERS_MAX: usize = 1 << 20;

/// What is opened for one image of a corpus.
pub trait Subject: BaseImage + Sized {
    /// Open `file` of the corpus in the directory `corpus`.
    fn open_in(corpus: &Path, file: &Path, view: &View) -> Result<Self>;

    /// The image's own file.
    fn layer(&self) -> &Qcow2Layer;
}

impl Subject for Qcow2Image {
    fn open_in(corpus: &Path, file: &Path, view: &View) -> Result<Self> {
        let path = corpus.join(file);
        let opened = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Qcow2Image::open(opened, &path, view)
    }

    fn layer(&self) -> &Qcow2Layer {
        self.layer()
    }
}

/// All extents, which must cover the image without a gap: (range, kind).
pub fn extents(image: &dyn BaseImage) -> Result<Vec<(ByteRange, ExtentKind)>, String> {
    let len = image.len().0;
    let mut all = Vec::new();
    let mut at = 0;
    for _ in 0..ANSWERS_MAX {
        if at == len {
            return Ok(all);
        }
        let answer =
            image.extents(ByteRange::new(at, len - at)).map_err(|e| format!("extents at {at}: {e}"))?;
        if answer.is_empty() {
            return Err(format!("no extents at {at}"));
        }
        for extent in answer {
            if extent.range.start.0 != at || extent.range.len.0 == 0 || extent.range.end().0 > len {
                return Err(format!("an extent {:?} where one from {at} on was due", extent.range));
            }
            at = extent.range.end().0;
            all.push((extent.range, extent.kind));
        }
    }
    Err(format!("still at {at} after {ANSWERS_MAX} answers"))
}

/// The whole content, read in pieces of every length.
pub fn content(image: &dyn BaseImage) -> Result<Vec<u8>, String> {
    let len = usize::try_from(image.len().0).map_err(|e| e.to_string())?;
    let mut readings = PIECE_LENS.iter().map(|piece_len| read(image, len, *piece_len));
    let first = readings.next().unwrap_or_else(|| Ok(Vec::new()))?;
    for (reading, piece_len) in readings.zip(&PIECE_LENS[1..]) {
        if let Some(at) = first_difference(&first, &reading?) {
            return Err(format!("pieces of {piece_len} bytes read otherwise at {at}"));
        }
    }
    for (range, kind) in extents(image)? {
        let bytes = part(&first, range);
        if kind == ExtentKind::Zero && bytes.iter().any(|byte| *byte != 0) {
            return Err(format!("{range} is not zero, whatever its extent says"));
        }
    }
    Ok(first)
}

fn read(image: &dyn BaseImage, len: usize, piece_len: usize) -> Result<Vec<u8>, String> {
    // What is not filled in shows.
    let mut content = vec![0xa5; len];
    let mut at = 0;
    for piece in content.chunks_mut(piece_len) {
        image.read_at(piece, at).map_err(|e| format!("reading {} bytes at {at}: {e}", piece.len()))?;
        at += piece.len() as u64;
    }
    Ok(content)
}

/// The bytes of `range`, which lies within `content`.
pub fn part(content: &[u8], range: ByteRange) -> &[u8] {
    let start = usize::try_from(range.start.0).unwrap_or(usize::MAX);
    let end = usize::try_from(range.end().0).unwrap_or(usize::MAX);
    &content[start..end]
}

pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Ids and names of the internal snapshots.
pub fn snapshots(layer: &Qcow2Layer) -> Result<Vec<(String, String)>> {
    Ok(layer.snapshots()?.into_iter().map(|snapshot| (snapshot.id, snapshot.name)).collect())
}

pub fn bitmaps(layer: &Qcow2Layer) -> Result<Vec<String>> {
    Ok(layer.bitmaps()?.into_iter().map(|bitmap| bitmap.name).collect())
}
