//! Volume directories of Bedplate's own disks, offline.
//!
//! Owns [`VolumeDir`]: the record, the layers that it names, the image below them. Nothing is repaired, locked or
//! changed, so a disk that a node serves is refused: its maps change under whoever reads them. What the maps lost is
//! damage, as it is for the node. The files: the engine's `docs/format.md`.

use std::{
    fs::File,
    io::Read,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    cow::{BlockState, head::HeadIndex},
    error::{Corruption, Error, Result},
    exec::storage::{StorageFile, file::FileStorage},
    image::{
        Format,
        qcow2::{Place, Segment, View},
        references::AllowedDirectory,
    },
    units::{BlockRange, ByteOffset, ByteRange},
    volume::{
        claim::served_by,
        layer::{self, Layer as EngineLayer},
        record::{self, ImageRef, VolumeRecord},
    },
};
use serde::Deserialize;

use crate::{
    layer::open_file,
    source::{self, Chain, FileArgs, NO_BACKING},
    stack::{Floor, Layer, Stack},
};

/// Name of a volume's record.
pub const RECORD: &str = "volume.json";
const VOLUMES: &str = "volumes";
const IMAGES: &str = "images";
const IMAGE: &str = "image";

/// A volume's directory on a disk that nobody serves.
pub struct VolumeDir {
    pub path: PathBuf,
    /// The disk.
    root: PathBuf,
    storage: FileStorage,
    pub record: VolumeRecord,
}

impl VolumeDir {
    /// Open `DISK/volumes/NAME`.
    pub fn open(path: &Path) -> Result<VolumeDir> {
        let path = path.canonicalize().map_err(|e| Error::io("open", path, e))?;
        let misplaced = || Error::Unsupported {
            path: path.clone(),
            what: "a volume's directory that is not where a disk has it (DISK/volumes/NAME)".to_owned(),
        };
        let parent = path.parent().filter(|parent| parent.file_name().is_some_and(|name| name == VOLUMES));
        let root = parent.and_then(Path::parent).ok_or_else(misplaced)?.to_owned();
        if let Some(by) = served_by(&root)? {
            return Err(Error::InUse { kind: "disk", name: root.display().to_string(), by });
        }
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(misplaced)?;
        let storage = FileStorage::open(&root)?;
        let record = record::read(&storage, &format!("{VOLUMES}/{name}/{RECORD}"))?;
        Ok(VolumeDir { path, root, storage, record })
    }

    /// The content of the head, or of a snapshot.
    pub fn into_stack(self, snapshot: Option<&str>, args: &FileArgs) -> Result<Stack> {
        let (top, size) = match snapshot {
            None => (self.record.head, self.record.size_bytes),
            Some(name) => {
                let found = self.record.snapshot(name);
                let missing = || Error::NotFound { kind: "snapshot", name: name.to_owned() };
                found.map(|snapshot| (snapshot.layer, snapshot.size_bytes)).ok_or_else(missing)?
            }
        };
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        let mut notes = Vec::new();
        for uuid in self.record.chain(top) {
            let layer = layer::inspect(&self.storage, uuid)?;
            if let Some(fault) = &layer.fault {
                notes.push(format!("layer {uuid} is damaged: {fault}"));
            }
            layers.push(Box::new(BlockLayer::new(layer, size)));
        }
        let (below, floor) = self.below(args)?;
        layers.extend(below);
        Ok(Stack::new(layers, floor, size).with_notes(notes))
    }

    /// A layer that the record names.
    pub fn layer(&self, layer: &record::LayerRef) -> Result<EngineLayer> {
        layer::inspect(&self.storage, layer.uuid)
    }

    /// The image, from the disk unless the user names another file.
    fn below(&self, args: &FileArgs) -> Result<(Vec<Box<dyn Layer>>, Floor)> {
        let Some(image) = &self.record.image else { return Ok((Vec::new(), Floor::Zeros)) };
        if let Some(backing) = &args.backing {
            if backing.as_os_str() == NO_BACKING {
                let name = &image.name;
                return Err(Error::Invalid(format!(
                    "--backing none: the volume stands on the image {name:?}"
                )));
            }
            let file = open_file(backing)?;
            let format = source::probe(&file, backing)?;
            let allowed = args.allowed()?;
            return Ok(Chain::open(file, backing, format, &View::Active, allowed.as_ref())?.into_layers());
        }
        match self.image(image) {
            Ok(chain) => Ok(chain.into_layers()),
            Err(error) if error.is_not_found() => {
                let what =
                    format!("reading without the image {:?} (say where it is: --backing FILE)", image.name);
                let refusal = Error::Unsupported { path: self.path.clone(), what };
                Ok((Vec::new(), Floor::Unopened { name: image.name.clone(), refusal }))
            }
            Err(error) => Err(error),
        }
    }

    /// Open the image where this disk has it.
    pub fn image(&self, image: &ImageRef) -> Result<Chain> {
        let corrupt = |what: String| Error::Corrupt {
            path: self.path.join(RECORD),
            what: Corruption::Record(what),
            at: ByteOffset(0),
        };
        record::check_name(&image.name).map_err(corrupt)?;
        let dir = format!("{IMAGES}/{}", record::dir_name(&image.name, image.uuid));
        let own = self.path.join(RECORD);
        let disk = AllowedDirectory::open(&self.root)?;
        let (file, path) = disk.open_reference(&own, &self.root, format!("{dir}/{IMAGE}").as_bytes())?;
        let (text, record_path) =
            disk.open_reference(&own, &self.root, format!("{dir}/image.json").as_bytes())?;
        let unknown = |what: String| Error::Corrupt {
            path: record_path.clone(),
            what: Corruption::Record(what),
            at: ByteOffset(0),
        };
        let record = image_record(text).map_err(unknown)?;
        let format = match record.format.as_deref() {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => return Err(unknown(format!("the format {other:?} is not known"))),
            None => return Err(unknown("it does not say the image's format".to_owned())),
        };
        let view = record.internal_snapshot.map_or(View::Active, View::Snapshot);
        Chain::open(file, &path, format, &view, None)
    }
}

/// What is needed of `image.json`; the node reads it more strictly.
#[derive(Deserialize)]
struct ImageRecord {
    /// Only images that have arrived have one.
    format: Option<String>,
    internal_snapshot: Option<String>,
}

fn image_record(file: File) -> Result<ImageRecord, String> {
    let mut text = Vec::new();
    file.take(record::RECORD_LEN_MAX).read_to_end(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_slice(&text).map_err(|e| e.to_string())
}

/// A layer of a volume, by its map.
struct BlockLayer {
    name: String,
    data: Arc<dyn StorageFile>,
    map: Arc<dyn StorageFile>,
    index: HeadIndex,
    lost: Vec<BlockRange>,
    size: u64,
}

impl BlockLayer {
    fn new(layer: EngineLayer, size: u64) -> BlockLayer {
        let EngineLayer { uuid, data, map, index, lost, .. } = layer;
        BlockLayer { name: uuid.to_string(), data, map, index, lost, size }
    }

    /// The segments of blocks of which the map says something.
    fn each_of_map(
        &self,
        range: ByteRange,
        found: &mut dyn FnMut(Segment) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        for (blocks, state) in self.index.runs(range.blocks_touched()) {
            let Some(part) = blocks.bytes().intersect(range) else { continue };
            let place = match state {
                BlockState::Absent => Place::Backing,
                BlockState::Data => Place::Data { host: part.start },
                BlockState::Zero => Place::Zero { host: None },
            };
            found(Segment { range: part, place })?;
        }
        ControlFlow::Continue(())
    }

    /// The first lost range that touches `range`, and where it touches.
    fn first_lost(&self, range: ByteRange) -> Option<ByteRange> {
        self.lost.iter().filter_map(|blocks| blocks.bytes().intersect(range)).min_by_key(|part| part.start)
    }
}

impl Layer for BlockLayer {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn each(&self, range: ByteRange, found: &mut dyn FnMut(Segment) -> ControlFlow<()>) -> Result<()> {
        let mapped = ByteRange { start: ByteOffset(0), len: self.index.block_count().len() };
        let mut rest = range;
        while !rest.is_empty() {
            // Up to what is lost by the map, then what is lost, then on.
            let lost = self.first_lost(rest);
            let sound_end = lost.map_or(rest.end(), |lost| lost.start);
            let sound = ByteRange { start: rest.start, len: sound_end.since(rest.start) };
            let mut end = sound_end;
            let mut flow = match sound.intersect(mapped) {
                Some(inside) => self.each_of_map(inside, found),
                None => ControlFlow::Continue(()),
            };
            let past = sound.start.max(mapped.end());
            if flow.is_continue() && past < sound.end() {
                let range = ByteRange { start: past, len: sound.end().since(past) };
                flow = found(Segment { range, place: Place::Backing });
            }
            if let (Some(lost), ControlFlow::Continue(())) = (lost, flow) {
                flow = found(Segment { range: lost, place: Place::Damaged });
                end = lost.end();
            }
            if flow.is_break() {
                break;
            }
            rest = ByteRange { start: end, len: rest.end().since(end) };
        }
        Ok(())
    }

    fn read(&self, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        match segment.place {
            Place::Data { host } => self.data.read_at(buffer, host.0),
            Place::Zero { .. } | Place::Compressed { .. } | Place::Backing | Place::Damaged => {
                buffer.fill(0);
                Ok(())
            }
        }
    }

    fn files(&self) -> Vec<(&File, &Path)> {
        let files = [&self.data, &self.map];
        files.into_iter().filter_map(|file| Some((file.os_file()?, file.path()))).collect()
    }

    fn explain(&self, range: ByteRange) -> Error {
        let reason = format!("the map of layer {} was damaged", self.name);
        Error::Lost { start: range.start.0, len: range.len.0, reason: reason.into() }
    }
}
