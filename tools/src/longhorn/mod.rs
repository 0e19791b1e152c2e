//! Replica directories of Longhorn: a volume as sparse layers over an optional backing file.
//!
//! Owns [`Replica`]: what is in the directory, which head is the right one, and the chain of layers from there or from
//! a snapshot down. `volume.meta` is believed where it agrees with the files; where it is missing or stale the layers'
//! own records decide, and that is said. Head numbers mean nothing: they wrap. A file may be shorter than the volume,
//! which has grown since. The backing file is the one that the user names, never the path in a record.

mod checksum;
mod record;
mod report;

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bedplate_engine::{
    error::{Corruption, Error, Result},
    image::{qcow2::View, references::CHAIN_DEPTH_MAX},
    units::{ByteOffset, VOLUME_SIZE_MAX},
};
use rustix::fs::{Mode, OFlags};

use self::record::{LayerMeta, VolumeMeta};
pub use self::{
    checksum::verify as verify_checksums,
    report::{ReplicaInfo, check, info},
};
use crate::{
    layer::{FileLayer, open_file},
    source::{self, Chain, FileArgs, NO_BACKING},
    stack::{Floor, LAYERS_MAX, Layer, Stack},
};

/// Names of one directory.
pub const NAMES_MAX: usize = 100_000;

const VOLUME_META: &str = "volume.meta";
const HEAD_PREFIX: &str = "volume-head-";
const SNAPSHOT_PREFIX: &str = "volume-snap-";
const LAYER_SUFFIX: &str = ".img";
const META_SUFFIX: &str = ".meta";

/// A layer's file.
#[derive(Debug)]
struct Entry {
    len: u64,
    /// Bytes that it takes on disk.
    allocated: u64,
    inode: u64,
    /// What its record says, or why there is none.
    meta: Result<LayerMeta>,
}

/// A replica directory.
#[derive(Debug)]
pub struct Replica {
    path: PathBuf,
    directory: File,
    /// All heads and snapshots, by file name.
    entries: BTreeMap<String, Entry>,
    /// Names that belong to nothing.
    strangers: Vec<String>,
    meta: Result<VolumeMeta>,
    /// File name of the head, or why none can be told.
    head: Result<String>,
    size: u64,
    /// What was found wrong, and what was done about it.
    notes: Vec<String>,
}

/// Whether a directory with these names is a replica.
pub fn is_replica(names: &[String]) -> bool {
    names.iter().any(|name| name == VOLUME_META || is_layer(name))
}

impl Replica {
    /// Look at the directory `path`, which has these names.
    pub fn open(path: &Path, names: Vec<String>) -> Result<Replica> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty());
        let directory = File::from(directory.map_err(|e| Error::io("open", path, e.into()))?);
        let mut replica = Replica {
            path: path.to_owned(),
            directory,
            entries: BTreeMap::new(),
            strangers: Vec::new(),
            meta: Ok(VolumeMeta::default()),
            head: Ok(String::new()),
            size: 0,
            notes: Vec::new(),
        };
        replica.meta = replica.open_name(VOLUME_META).and_then(|(file, path)| record::read(file, &path));
        for name in names {
            if is_layer(&name) {
                let entry = replica.entry(&name)?;
                replica.entries.insert(name, entry);
            } else if !is_known(&name) {
                replica.strangers.push(name);
            }
        }
        replica.head = replica.find_head();
        replica.size = replica.find_size()?;
        if replica.meta.as_ref().is_ok_and(|meta| meta.rebuilding) {
            replica.notes.push("the replica was being rebuilt: some of its content is missing".to_owned());
        }
        Ok(replica)
    }

    /// The content of the head, or of `layer`: a snapshot's name, or a layer's file name.
    pub fn into_stack(self, layer: Option<&str>, args: &FileArgs) -> Result<Stack> {
        let top = match layer {
            None => self.head.clone()?,
            Some(wanted) => self.layer_named(wanted)?,
        };
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        for name in self.chain(&top)? {
            let (file, path) = self.open_name(&name)?;
            layers.push(Box::new(FileLayer::sparse(file, &path, name, self.size)?));
        }
        let (below, floor) = self.below(args)?;
        layers.extend(below);
        Ok(Stack::new(layers, floor, self.size).with_notes(self.notes))
    }

    /// `top` and everything below it. Each record names the layer below.
    fn chain(&self, top: &str) -> Result<Vec<String>> {
        let mut chain = Vec::new();
        let mut seen = HashSet::new();
        let mut next = top.to_owned();
        while !next.is_empty() {
            let name = std::mem::take(&mut next);
            if !seen.insert(name.clone()) {
                return Err(self.corrupt(&name, "it stands on itself".to_owned()));
            }
            if chain.len() == LAYERS_MAX - CHAIN_DEPTH_MAX {
                return Err(self.corrupt(&name, format!("more than {} layers are above it", chain.len())));
            }
            let Some(entry) = self.entries.get(&name) else {
                let above = chain.last().map_or("the volume", String::as_str);
                return Err(self.corrupt(&name, format!("{above:?} stands on it, and it is not there")));
            };
            next = match (&entry.meta, &self.meta) {
                (Ok(meta), _) => meta.parent.clone(),
                // What the volume's record says of its head is the same.
                (Err(_), Ok(volume)) if volume.head == name => volume.parent.clone(),
                (Err(error), _) => return Err(error.clone()),
            };
            chain.push(name);
        }
        Ok(chain)
    }

    /// The file name of a snapshot, or of the layer itself.
    fn layer_named(&self, wanted: &str) -> Result<String> {
        let snapshot = format!("{SNAPSHOT_PREFIX}{wanted}{LAYER_SUFFIX}");
        let known = [snapshot, wanted.to_owned()].into_iter().find(|name| self.entries.contains_key(name));
        known.ok_or_else(|| Error::NotFound { kind: "snapshot", name: wanted.to_owned() })
    }

    /// The backing file, as the user names it.
    fn below(&self, args: &FileArgs) -> Result<(Vec<Box<dyn Layer>>, Floor)> {
        if let Some(backing) = &args.backing {
            if backing.as_os_str() == NO_BACKING {
                return Ok((Vec::new(), Floor::Zeros));
            }
            let file = open_file(backing)?;
            let format = source::probe(&file, backing)?;
            let allowed = args.allowed()?;
            return Ok(Chain::open(file, backing, format, &View::Active, allowed.as_ref())?.into_layers());
        }
        let unopened = |name: &str, why: String| {
            let refusal = Error::Unsupported { path: self.path.clone(), what: why };
            Ok((Vec::new(), Floor::Unopened { name: name.to_owned(), refusal }))
        };
        match &self.meta {
            Ok(meta) if meta.backing_file_path.is_empty() => Ok((Vec::new(), Floor::Zeros)),
            Ok(meta) => {
                let name = &meta.backing_file_path;
                let what = format!("reading the volume without its backing file {name:?} (say where it is: --backing FILE)");
                unopened(name, what)
            }
            Err(_) => unopened(
                "a backing file, perhaps",
                "reading the volume without knowing its backing file, as volume.meta cannot be read (say where it is, or \
                 that there is none: --backing FILE, --backing none)"
                    .to_owned(),
            ),
        }
    }

    fn entry(&self, name: &str) -> Result<Entry> {
        let (file, path) = self.open_name(name)?;
        let stat = file.metadata().map_err(|e| Error::io("stat", &path, e))?;
        let meta = self
            .open_name(&format!("{name}{META_SUFFIX}"))
            .and_then(|(file, path)| record::read::<LayerMeta>(file, &path));
        Ok(Entry { len: stat.len(), allocated: stat.blocks() * 512, inode: stat.ino(), meta })
    }

    /// Open a regular file of the directory; links are not followed.
    fn open_name(&self, name: &str) -> Result<(File, PathBuf)> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.directory, name, flags, Mode::empty());
        let file = File::from(opened.map_err(|e| Error::io("open", &path, e.into()))?);
        let meta = file.metadata().map_err(|e| Error::io("stat", &path, e))?;
        if !meta.is_file() {
            return Err(Error::Unsupported { path, what: "anything but a regular file".to_owned() });
        }
        Ok((file, path))
    }

    /// The head that `volume.meta` names, if it is there; else the only one that can be it.
    fn find_head(&mut self) -> Result<String> {
        let heads: Vec<String> =
            self.entries.keys().filter(|name| name.starts_with(HEAD_PREFIX)).cloned().collect();
        let named = match &self.meta {
            Ok(meta) => Some(meta.head.clone()),
            Err(error) => {
                self.notes
                    .push(format!("volume.meta cannot be read ({error}); the layers' records are used"));
                None
            }
        };
        if let Some(named) = named {
            if self.entries.contains_key(&named) {
                for leftover in heads.iter().filter(|head| **head != named) {
                    self.notes
                        .push(format!("{leftover} is not the head of the volume: something left it behind"));
                }
                if let (Some(Entry { meta: Ok(layer), .. }), Ok(volume)) =
                    (self.entries.get(&named), &self.meta)
                    && layer.parent != volume.parent
                {
                    let (ours, theirs) = (&layer.parent, &volume.parent);
                    self.notes.push(format!(
                        "volume.meta says that the head stands on {theirs:?}, the head's record {ours:?}: the latter is used"
                    ));
                }
                return Ok(named);
            }
            self.notes.push(format!("volume.meta names the head {named:?}, which is not there: it is stale"));
        }
        self.guess_head(&heads)
    }

    /// The head among several that nothing names. One that is another name of a snapshot's file, or that stands on
    /// something that is not there, was left behind by an interrupted snapshot; so was one without data when another
    /// has some.
    fn guess_head(&mut self, heads: &[String]) -> Result<String> {
        let snapshots: HashSet<u64> = self
            .entries
            .iter()
            .filter(|(name, _)| name.starts_with(SNAPSHOT_PREFIX))
            .map(|(_, entry)| entry.inode)
            .collect();
        let whole = heads.iter().filter(|head| {
            self.entries.get(*head).is_some_and(|entry| !snapshots.contains(&entry.inode))
                && self.chain(head).is_ok()
        });
        let mut left: Vec<&String> = whole.collect();
        let has_data = |head: &String| self.entries.get(head).is_some_and(|entry| entry.allocated > 0);
        if left.len() > 1 && left.iter().any(|head| has_data(head)) {
            left.retain(|head| has_data(head));
        }
        match left.as_slice() {
            [head] => {
                let head = (*head).clone();
                self.notes.push(format!("{head} is taken for the head"));
                Ok(head)
            }
            [] => Err(self.corrupt(VOLUME_META, "no head can be told".to_owned())),
            several => Err(Error::Unsupported {
                path: self.path.clone(),
                what: format!("choosing among the heads {several:?} (name one: --snapshot FILE)"),
            }),
        }
    }

    /// The size of the volume: what its record says, unless the head is larger, which was made later then.
    fn find_size(&mut self) -> Result<u64> {
        let head = self.head.as_ref().ok().and_then(|head| self.entries.get(head));
        let of_head = head.map(|entry| entry.len);
        let of_files = self.entries.values().map(|entry| entry.len).max().unwrap_or(0);
        let size = match (&self.meta, of_head) {
            (Ok(meta), Some(len)) if meta.size < len => {
                let text =
                    format!("volume.meta has the size {}, the head {len}: the latter is used", meta.size);
                self.notes.push(text);
                len
            }
            (Ok(meta), _) => meta.size,
            (Err(_), len) => {
                let size = len.unwrap_or(of_files).max(of_files);
                self.notes.push(format!("the size of the volume is that of its largest file, {size}"));
                size
            }
        };
        if size > VOLUME_SIZE_MAX {
            let what = Corruption::Field { field: "Size", value: size };
            return Err(Error::Corrupt { path: self.path.join(VOLUME_META), what, at: ByteOffset(0) });
        }
        Ok(size)
    }

    fn corrupt(&self, name: &str, what: String) -> Error {
        let path = self.path.join(name);
        Error::Corrupt { path, what: Corruption::Record(what), at: ByteOffset(0) }
    }
}

/// Whether a name is that of a layer that volumes stand on.
fn is_layer(name: &str) -> bool {
    name.ends_with(LAYER_SUFFIX) && (name.starts_with(HEAD_PREFIX) || name.starts_with(SNAPSHOT_PREFIX))
}

/// Whether a name that is no layer belongs to a replica.
fn is_known(name: &str) -> bool {
    let of_layer = |suffix| name.strip_suffix(suffix).is_some_and(is_layer);
    name == VOLUME_META || name == "revision.counter" || of_layer(META_SUFFIX) || of_layer(".checksum")
}
