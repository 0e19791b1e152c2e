//! Images of the corpus that need other files of it, read as a caller of [`Qcow2Layer`] reads them.
//!
//! Owns how layers are laid over each other for a test. It opens what an image names without a question, which only
//! the corpus's own sound images deserve.

use std::{
    ffi::OsStr,
    fs::File,
    ops::ControlFlow,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
};

use bedplate_engine::{
    device::{Extent, ExtentKind},
    error::{Error, Result},
    image::{
        BaseImage, Format, PROBE_LEN,
        qcow2::{Place, Qcow2Layer, Source, View},
    },
    units::{ByteLen, ByteRange},
};

/// Layers of one image; the corpus has no more.
const DEPTH_MAX: usize = 8;

/// An image and what lies below it.
#[derive(Debug)]
pub struct Chain {
    layer: Qcow2Layer,
    below: Below,
}

#[derive(Debug)]
enum Below {
    Zeros,
    Raw { file: File, path: PathBuf, len: u64 },
    Chain(Box<Chain>),
}

impl Chain {
    pub fn open(path: &Path, view: &View) -> Result<Chain> {
        Chain::open_at_depth(path, view, DEPTH_MAX)
    }

    pub fn layer(&self) -> &Qcow2Layer {
        &self.layer
    }

    fn open_at_depth(path: &Path, view: &View, depth_left: usize) -> Result<Chain> {
        let mut layer = Qcow2Layer::open(open_file(path)?, path, view)?;
        let beside = |name: &[u8]| path.with_file_name("").join(OsStr::from_bytes(name));
        let data_file = layer.header().data_file.as_ref().and_then(|data| data.name.clone());
        if let Some(name) = data_file {
            let data = beside(&name);
            layer.attach_data_file(Source::new(open_file(&data)?, &data)?);
        }
        let below = match layer.header().backing.clone() {
            None => Below::Zeros,
            Some(_) if depth_left == 0 => {
                return Err(Error::Invalid(format!("more than {DEPTH_MAX} layers")));
            }
            Some(backing) => {
                let path = beside(&backing.name);
                let is_raw = match backing.format.as_deref() {
                    Some(format) => format == "raw",
                    None => probe(&path)? == Format::Raw,
                };
                if is_raw {
                    let file = open_file(&path)?;
                    let len = file.metadata().map_err(|e| Error::io("stat", &path, e))?.len();
                    Below::Raw { file, path, len }
                } else {
                    Below::Chain(Box::new(Chain::open_at_depth(&path, &View::Active, depth_left - 1)?))
                }
            }
        };
        Ok(Chain { layer, below })
    }
}

fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io("open", path, e))
}

fn probe(path: &Path) -> Result<Format> {
    let mut start = [0; PROBE_LEN];
    open_file(path)?.read_exact_at(&mut start, 0).map_err(|e| Error::io("read", path, e))?;
    Ok(Format::of(&start))
}

impl Below {
    fn len(&self) -> u64 {
        match self {
            Below::Zeros => 0,
            Below::Raw { len, .. } => *len,
            Below::Chain(chain) => chain.len().0,
        }
    }

    /// Fill `buffer` from `offset`; past the end are zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let there =
            usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (held, past) = buffer.split_at_mut(there);
        past.fill(0);
        match self {
            Below::Zeros => Ok(()),
            Below::Raw { file, path, .. } => {
                file.read_exact_at(held, offset).map_err(|e| Error::io("read", path, e))
            }
            Below::Chain(chain) if !held.is_empty() => chain.read_at(held, offset),
            Below::Chain(_) => Ok(()),
        }
    }
}

impl BaseImage for Chain {
    fn len(&self) -> ByteLen {
        self.layer.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.layer.read_at(buffer, offset, |part, at| self.below.read_at(part, at))
    }

    /// What lies below counts as data.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        self.layer.each(range, |segment| {
            let kind = match segment.place {
                Place::Zero { .. } => ExtentKind::Zero,
                Place::Data { .. } | Place::Compressed { .. } | Place::Backing | Place::Damaged => {
                    ExtentKind::Data
                }
            };
            extents.push(Extent { range: segment.range, kind });
            ControlFlow::Continue(())
        })?;
        Ok(extents)
    }
}
