//! The files of one layer: made, opened, sealed, removed.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    cow::{
        head::HeadIndex,
        map::{
            checkpoint::{self, Bitmaps, HEADER_LEN, Header, LogLen},
            log::{self, LogEnd},
        },
    },
    error::{Corruption, Error, Result},
    exec::{
        head::{data_path, failed_path, map_path, publish_map, staged_path, write_map},
        storage::{Open, Storage, StorageFile},
    },
    planted::{self, Bug},
    units::{BlockCount, BlockRange, ByteOffset, to_usize},
};

/// The directory of all layers.
pub const LAYERS: &str = "layers";
/// Bytes of a `failed` mark that are read.
const REASON_LEN_MAX: u64 = 4096;
/// Bytes of bitmaps that are read at once.
const READ_AHEAD: usize = 1 << 20;

/// The directory of a layer.
pub fn dir(layer: Uuid) -> String {
    format!("{LAYERS}/{layer}")
}

/// A layer as it lies on the disk.
#[derive(Debug)]
pub struct Layer {
    pub uuid: Uuid,
    pub data: Arc<dyn StorageFile>,
    pub map: Arc<dyn StorageFile>,
    pub index: HeadIndex,
    pub log: LogEnd,
    pub log_offset: u64,
    /// Blocks that the map, damaged, does not tell.
    pub lost: Vec<BlockRange>,
    /// Why the layer takes no writes: its map is damaged, or its medium failed earlier.
    pub fault: Option<String>,
}

/// Make an empty layer. Its files and names are on disk when this returns: three syncs.
pub fn create(storage: &dyn Storage, layer: Uuid, blocks: BlockCount, log_len: LogLen) -> Result<Layer> {
    let dir = dir(layer);
    storage.create_dir(&dir)?;
    let data = storage.open(&data_path(&dir), Open::CreateDirect)?;
    data.set_len(blocks.len().0)?;
    let index = HeadIndex::new(blocks);
    let (bytes, header) = checkpoint::encode(layer, 1, 0, &index, log_len);
    let map = write_map(storage, &dir, &bytes, header.log_len)?;
    publish_map(storage, &dir)?;
    storage.sync_dir(LAYERS)?;
    let (log, log_offset) = (LogEnd::start(&header), header.log_offset);
    Ok(Layer { uuid: layer, data, map, index, log, log_offset, lost: Vec::new(), fault: None })
}

/// Open a layer and read its map, from the medium: after a failed sync the page cache may hold what the disk does not.
pub fn open(storage: &dyn Storage, layer: Uuid) -> Result<Layer> {
    match storage.remove_file(&staged_path(&dir(layer))) {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let layer = load(storage, layer, Open::ReadWrite, Open::Direct)?;
    // The length is only made durable together with data.
    let wanted = layer.index.block_count().len().0;
    if layer.data.len()? < wanted {
        layer.data.set_len(wanted)?;
    }
    Ok(layer)
}

/// Look at a layer of a disk that nobody serves; nothing is changed.
pub fn inspect(storage: &dyn Storage, layer: Uuid) -> Result<Layer> {
    load(storage, layer, Open::Read, Open::Read)
}

fn load(storage: &dyn Storage, layer: Uuid, map: Open, data: Open) -> Result<Layer> {
    let dir = dir(layer);
    let map = storage.open(&map_path(&dir), map)?;
    if !planted::is(Bug::MapFromPageCache) {
        map.drop_cache()?;
    }
    // The medium works while what has come is decoded.
    map.read_ahead();
    let corrupt = |what, at: u64| Error::Corrupt { path: map.path().to_owned(), what, at: ByteOffset(at) };
    let len = map.len()?;
    let mut first = [0; HEADER_LEN];
    if len < HEADER_LEN as u64 {
        return Err(corrupt(Corruption::Truncated("map header"), len));
    }
    map.read_at(&mut first, 0)?;
    let header = Header::parse(&first, len).map_err(|what| corrupt(what, 0))?;
    if header.layer != layer {
        return Err(corrupt(Corruption::Record(format!("it belongs to layer {}", header.layer)), 16));
    }
    let mut directory = vec![0; header.directory_len()];
    map.read_at(&mut directory, HEADER_LEN as u64)?;
    let bitmaps_at = HEADER_LEN as u64 + directory.len() as u64;
    let mut ahead = ReadAhead::new(&*map, bitmaps_at, header.log_offset);
    let (index, lost) = checkpoint::decode(&header, &directory, &mut ahead).map_err(|fault| match fault {
        DecodeFault::Corrupt(what) => corrupt(what, HEADER_LEN as u64),
        DecodeFault::Storage(error) => error,
    })?;
    let mut log = vec![0; to_usize(header.log_len)];
    map.read_at(&mut log, header.log_offset)?;
    let damaged_leaf = lost.first().map(|range| format!("a bitmap of the map is damaged ({range})"));
    let replayed = log::replay(&header, &log, &index, lost);
    let damaged_log = replayed
        .damage
        .map(|(what, at)| format!("{what}, at byte {} of {}", header.log_offset + at, map.path().display()));
    let data = storage.open(&data_path(&dir), data)?;
    let marked = read_fault(storage, &dir)?;
    if marked.is_some() {
        // Where the file system cannot read past the page cache, that still holds what a failed sync did not write.
        data.drop_cache()?;
    }
    Ok(Layer {
        uuid: layer,
        data,
        index,
        log: replayed.end,
        log_offset: header.log_offset,
        lost: replayed.lost,
        fault: damaged_log.or(damaged_leaf).or(marked),
        map,
    })
}

/// Why the layer's medium failed earlier, if it did.
fn read_fault(storage: &dyn Storage, dir: &str) -> Result<Option<String>> {
    let file = match storage.open(&failed_path(dir), Open::Read) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let mut bytes = vec![0; to_usize(file.len()?.min(REASON_LEN_MAX))];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Write a checkpoint of `index` beside the map of a layer that nobody writes to.
pub fn stage_map(
    storage: &dyn Storage,
    layer: Uuid,
    end: &LogEnd,
    index: &HeadIndex,
    log_len: LogLen,
) -> Result<(Header, Arc<dyn StorageFile>)> {
    let dir = dir(layer);
    let (bytes, header) = checkpoint::encode(layer, end.generation + 1, end.sequence, index, log_len);
    let map = write_map(storage, &dir, &bytes, header.log_len)?;
    Ok((header, map))
}

/// Replace the map of a layer that nobody writes to by a checkpoint of `index`.
pub fn rewrite_map(
    storage: &dyn Storage,
    layer: Uuid,
    end: &LogEnd,
    index: &HeadIndex,
    log_len: LogLen,
) -> Result<LogEnd> {
    let (header, _) = stage_map(storage, layer, end, index, log_len)?;
    publish_map(storage, &dir(layer))?;
    Ok(LogEnd::start(&header))
}

/// Remove a layer's files. Nothing refers to it; what a crash leaves of it is collected at the next start.
pub fn remove(storage: &dyn Storage, layer_dir: &str) -> Result<()> {
    for (name, _) in storage.list(layer_dir)? {
        storage.remove_file(&format!("{layer_dir}/{name}"))?;
    }
    storage.remove_dir(layer_dir)
}

/// Gives a file's bytes in order, read in large pieces into one buffer: fresh memory for each costs as much as reading.
struct ReadAhead<'a> {
    file: &'a dyn StorageFile,
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    /// What of the buffer was read and not taken.
    ready: std::ops::Range<usize>,
}

impl<'a> ReadAhead<'a> {
    fn new(file: &'a dyn StorageFile, at: u64, end: u64) -> ReadAhead<'a> {
        let len = to_usize((end - at).min(READ_AHEAD as u64));
        ReadAhead { file, at, end, buffer: vec![0; len], ready: 0..0 }
    }
}

enum DecodeFault {
    Corrupt(Corruption),
    Storage(Error),
}

impl From<Corruption> for DecodeFault {
    fn from(what: Corruption) -> DecodeFault {
        DecodeFault::Corrupt(what)
    }
}

impl Bitmaps for ReadAhead<'_> {
    type Error = DecodeFault;

    fn take(&mut self, count: usize) -> Result<&[u8], DecodeFault> {
        if self.ready.len() < count {
            let kept = self.ready.len();
            self.buffer.copy_within(self.ready.clone(), 0);
            let more = to_usize((self.end - self.at).min((self.buffer.len() - kept) as u64));
            self.file.read_at(&mut self.buffer[kept..kept + more], self.at).map_err(DecodeFault::Storage)?;
            self.at += more as u64;
            self.ready = 0..kept + more;
        }
        if self.ready.len() < count {
            return Err(DecodeFault::Corrupt(Corruption::Truncated("map bitmaps")));
        }
        let start = self.ready.start;
        self.ready.start += count;
        Ok(&self.buffer[start..start + count])
    }
}
