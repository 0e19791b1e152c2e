//! Images that are several files: backing chains and external data files.
//!
//! Owns [`Chain`] and [`AllowedDirectory`]. For looking into images and for flattening them, never for serving: what is
//! served is one file. A name in an image is bytes from outside. It is opened only beneath a directory that the
//! operator named, by the kernel's own rule (`RESOLVE_BENEATH`), only if it is a regular file, and never as a
//! protocol; a chain has at most [`CHAIN_DEPTH_MAX`] files and none of them twice.

use std::{
    collections::HashSet,
    fs::File,
    ops::ControlFlow,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

use super::{
    BaseImage, Format,
    qcow2::{Place, Qcow2Layer, Segment, Source, View},
};
use crate::{
    device::{Extent, ExtentKind},
    error::{Error, Result},
    units::{ByteLen, ByteRange},
};

/// Most files of one chain, without external data files.
pub const CHAIN_DEPTH_MAX: usize = 64;
/// Runs of one [`BaseImage::extents`] answer.
const EXTENTS_MAX: usize = 1024;
/// Bytes of a file's start that tell its format.
const MAGIC_LEN: u64 = 4;

/// A directory beneath which the names in images may be opened.
#[derive(Debug)]
pub struct AllowedDirectory {
    directory: OwnedFd,
    /// Without links in it.
    path: PathBuf,
}

/// An image and the files below it.
#[derive(Debug)]
pub struct Chain {
    /// From the image itself downwards; at least one.
    layers: Vec<Layer>,
}

/// One file of a chain.
#[derive(Debug)]
pub struct Layer {
    pub path: PathBuf,
    pub content: Content,
}

#[derive(Debug)]
pub enum Content {
    Raw(Source),
    Qcow2(Box<Qcow2Layer>),
}

/// Where a run of bytes is, and in which file of the chain. [`Place::Backing`] remains where no file has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainSegment {
    pub depth: usize,
    pub segment: Segment,
}

impl AllowedDirectory {
    pub fn open(path: &Path) -> Result<AllowedDirectory> {
        let path = path.canonicalize().map_err(|e| Error::io("open", path, e))?;
        let directory = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(AllowedDirectory { directory: directory.into(), path })
    }

    /// Open the file that an image in `directory` calls `name`. Returns it with its path.
    pub fn open_reference(&self, image: &Path, directory: &Path, name: &[u8]) -> Result<(File, PathBuf)> {
        let shown = String::from_utf8_lossy(name);
        let refuse = |why: &str| Error::Unsupported {
            path: image.to_owned(),
            what: format!("a reference to {shown:?} ({why})"),
        };
        let Ok(name) = std::str::from_utf8(name) else { return Err(refuse("not UTF-8")) };
        if name.is_empty() || name.contains('\0') {
            return Err(refuse("not a name"));
        }
        let first = name.split('/').next().unwrap_or_default();
        if first.contains(':') {
            return Err(refuse("only plain files are followed, no protocols"));
        }
        let wanted = directory.join(name);
        let beneath = match wanted.strip_prefix(&self.path) {
            Ok(beneath) => beneath.to_owned(),
            Err(_) => normal(&wanted)
                .strip_prefix(&self.path)
                .map(Path::to_owned)
                .map_err(|_| refuse("outside of the directory that is allowed"))?,
        };
        if beneath.as_os_str().is_empty() {
            return Err(refuse("not a regular file"));
        }
        // A device or a pipe may not even be opened, so what the name means is found out before.
        let how = |flags| {
            OpenHow::new()
                .flags(flags | OFlag::O_CLOEXEC)
                .mode(Mode::empty())
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
        };
        let found =
            openat2(&self.directory, beneath.as_os_str(), how(OFlag::O_PATH)).map_err(
                |errno| match errno {
                    nix::errno::Errno::EXDEV | nix::errno::Errno::ELOOP => {
                        refuse("outside of the directory that is allowed")
                    }
                    errno => Error::io("open", &wanted, errno.into()),
                },
            )?;
        let found = File::from(found);
        let meta = found.metadata().map_err(|e| Error::io("stat", &wanted, e))?;
        if !meta.is_file() {
            return Err(refuse("not a regular file"));
        }
        // The very file that was looked at, whatever its name means by now.
        let again = format!("/proc/self/fd/{}", found.as_raw_fd());
        let file = File::open(again).map_err(|e| Error::io("open", &wanted, e))?;
        Ok((file, self.path.join(beneath)))
    }
}

/// `path` without `.` and `..`. What the kernel then opens beneath the allowed directory is up to the kernel.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => normal.push(component),
        }
    }
    normal
}

impl Chain {
    /// Open `file`, called `path`, and what it names beneath `allowed`; without one, a file that names another is
    /// refused.
    pub fn open(
        file: File,
        path: &Path,
        format: Format,
        view: &View,
        allowed: Option<&AllowedDirectory>,
    ) -> Result<Chain> {
        let mut opening = Opening { allowed, seen: HashSet::new(), layers: Vec::new() };
        let mut next = Some(Next { file, path: path.to_owned(), format, view: view.clone() });
        while let Some(layer) = next {
            next = opening.add(layer)?;
        }
        Ok(Chain { layers: opening.layers })
    }

    /// The files, from the image itself downwards.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Call `found` for each segment of `range` in order, until it breaks.
    pub fn each(
        &self,
        range: ByteRange,
        mut found: impl FnMut(ChainSegment) -> ControlFlow<()>,
    ) -> Result<()> {
        let range = ByteRange::within(range.start.0, range.len.0, self.len())?;
        self.each_from(0, range, &mut found).map(drop)
    }

    fn each_from(
        &self,
        depth: usize,
        range: ByteRange,
        found: &mut dyn FnMut(ChainSegment) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let nobody = Segment { range, place: Place::Backing };
        let Some(layer) = self.layers.get(depth) else {
            return Ok(found(ChainSegment { depth: depth.saturating_sub(1), segment: nobody }));
        };
        let (held, rest) = split_at_len(range, layer.len());
        let mut flow = ControlFlow::Continue(());
        match &layer.content {
            _ if held.is_empty() => {}
            Content::Raw(_) => {
                let place = Place::Data { host: held.start };
                flow = found(ChainSegment { depth, segment: Segment { range: held, place } });
            }
            Content::Qcow2(layer) => {
                let mut result = Ok(());
                layer.each(held, |segment| {
                    flow = match segment.place {
                        Place::Backing => match self.each_from(depth + 1, segment.range, found) {
                            Ok(flow) => flow,
                            Err(error) => {
                                result = Err(error);
                                ControlFlow::Break(())
                            }
                        },
                        Place::Data { .. }
                        | Place::Zero { .. }
                        | Place::Compressed { .. }
                        | Place::Damaged => found(ChainSegment { depth, segment }),
                    };
                    flow
                })?;
                result?;
            }
        }
        if flow.is_break() || rest.is_empty() {
            return Ok(flow);
        }
        Ok(found(ChainSegment { depth, segment: Segment { range: rest, place: Place::Backing } }))
    }

    fn read_from(&self, depth: usize, buffer: &mut [u8], offset: u64) -> Result<()> {
        let Some(layer) = self.layers.get(depth) else {
            buffer.fill(0);
            return Ok(());
        };
        let (held, _) = split_at_len(ByteRange::new(offset, buffer.len() as u64), layer.len());
        let (held, rest) = buffer.split_at_mut(held.len.as_usize());
        rest.fill(0);
        if held.is_empty() {
            return Ok(());
        }
        match &layer.content {
            Content::Raw(source) => source.read(held, offset, "data"),
            Content::Qcow2(layer) => {
                layer.read_at(held, offset, |part, at| self.read_from(depth + 1, part, at))
            }
        }
    }
}

impl Layer {
    /// Bytes of content that it has; past them it reads as zeros.
    pub fn len(&self) -> ByteLen {
        match &self.content {
            Content::Raw(source) => ByteLen(source.len()),
            Content::Qcow2(layer) => layer.size(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len().0 == 0
    }
}

/// The part of `range` before `len`, and the part from there on.
fn split_at_len(range: ByteRange, len: ByteLen) -> (ByteRange, ByteRange) {
    let held = len.0.saturating_sub(range.start.0).min(range.len.0);
    let rest = ByteRange::new(range.start.0 + held, range.len.0 - held);
    (ByteRange { start: range.start, len: ByteLen(held) }, rest)
}

/// A chain while it is opened.
struct Opening<'a> {
    allowed: Option<&'a AllowedDirectory>,
    /// Device and inode of every file so far.
    seen: HashSet<(u64, u64)>,
    layers: Vec<Layer>,
}

struct Next {
    file: File,
    path: PathBuf,
    format: Format,
    view: View,
}

impl Opening<'_> {
    /// Open one file; returns the one below it.
    fn add(&mut self, next: Next) -> Result<Option<Next>> {
        let Next { file, path, format, view } = next;
        let refuse = |what: &str| Error::Unsupported { path: path.clone(), what: what.into() };
        if self.layers.len() == CHAIN_DEPTH_MAX {
            return Err(refuse("a backing chain of more than 64 files (CHAIN_DEPTH_MAX)"));
        }
        self.meet(&file, &path)?;
        let mut below = None;
        let content = match format {
            Format::Raw => Content::Raw(Source::new(file, &path)?),
            Format::Qcow2 => {
                let mut layer = Qcow2Layer::open(file, &path, &view)?;
                if let Some(name) = layer.header().data_file.clone() {
                    let name = name.name.ok_or_else(|| refuse("an external data file without a name"))?;
                    let (data, data_path) = self.reference(&path, &name)?;
                    self.meet(&data, &data_path)?;
                    layer.attach_data_file(Source::new(data, &data_path)?);
                }
                if let Some(backing) = layer.header().backing.clone() {
                    let (file, below_path) = self.reference(&path, &backing.name)?;
                    let format = format_of(&file, &below_path, backing.format.as_deref())?;
                    below = Some(Next { file, path: below_path, format, view: View::Active });
                }
                Content::Qcow2(Box::new(layer))
            }
        };
        self.layers.push(Layer { path, content });
        Ok(below)
    }

    /// No file takes part twice.
    fn meet(&mut self, file: &File, path: &Path) -> Result<()> {
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        if self.seen.insert((meta.dev(), meta.ino())) {
            return Ok(());
        }
        let what = "a chain of files that comes back to one it has already".into();
        Err(Error::Unsupported { path: path.to_owned(), what })
    }

    fn reference(&self, image: &Path, name: &[u8]) -> Result<(File, PathBuf)> {
        let Some(allowed) = self.allowed else {
            let name = String::from_utf8_lossy(name);
            let what = format!("a reference to {name:?} (no directory is allowed for references)");
            return Err(Error::Unsupported { path: image.to_owned(), what });
        };
        let parent = match image.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let directory = parent.canonicalize().map_err(|e| Error::io("open", parent, e))?;
        allowed.open_reference(image, &directory, name)
    }
}

/// What the header says, or else what the file's start says.
fn format_of(file: &File, path: &Path, told: Option<&str>) -> Result<Format> {
    match told {
        Some("raw") => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(other) => {
            let what = format!("a backing file of the format {other:?}");
            Err(Error::Unsupported { path: path.to_owned(), what })
        }
        None => {
            let source = Source::new(file.try_clone().map_err(|e| Error::io("open", path, e))?, path)?;
            Ok(Format::of(&source.bytes_up_to(0, MAGIC_LEN, "start")?))
        }
    }
}

impl BaseImage for Chain {
    fn len(&self) -> ByteLen {
        self.layers.first().map_or(ByteLen(0), Layer::len)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        ByteRange::within(offset, buffer.len() as u64, self.len())?;
        self.read_from(0, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        self.each(range, |ChainSegment { segment, .. }| {
            let kind = match segment.place {
                Place::Data { .. } | Place::Compressed { .. } | Place::Damaged => ExtentKind::Data,
                Place::Zero { .. } | Place::Backing => ExtentKind::Zero,
            };
            let full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.len.0 += segment.range.len.0,
                Some(_) | None if full => return ControlFlow::Break(()),
                Some(_) | None => extents.push(Extent { range: segment.range, kind }),
            }
            ControlFlow::Continue(())
        })?;
        Ok(extents)
    }
}
