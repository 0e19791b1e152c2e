//! Layers on a simulated medium: made, opened, stacked.
//!
//! What a volume stands on is kept by the tests themselves ([`Stack`]), as its record would say it; the volume's own
//! code has tests of its own. An image is made of [`image_value`]s.

use std::sync::Arc;

use bedplate_engine::{
    cow::{
        core::{HeadState, Synced},
        frozen::{FrozenIndex, Slot},
        head::HeadIndex,
        map::{
            checkpoint::{self, HEADER_LEN, Header, LogLen},
            log::{self, LogEnd, Replayed},
        },
        plan::Index,
    },
    error::{Corruption, Error, Result},
    exec::{
        head::{HeadFiles, data_path, map_path, publish_map, staged_path, write_map},
        reserve::Reserve,
        simulated::Simulated,
        storage::{Open, Storage, StorageFile, memory::MemoryStorage},
        view::{LayerFiles, View},
    },
    image::BaseImage,
    units::{ByteLen, ByteOffset},
};
use uuid::Uuid;

pub use crate::image::Image;

/// What a volume's record would say.
#[derive(Clone, Debug)]
pub struct Stack {
    pub size: u64,
    /// Bytes of the image, 0 without one.
    pub image: u64,
    /// Frozen layers, the bottom first.
    pub frozen: Vec<u32>,
    pub head: u32,
}

pub fn dir_of(layer: u32) -> String {
    format!("layers/{layer}")
}

fn uuid_of(layer: u32) -> Uuid {
    Uuid::from_u128(u128::from(layer) + 1)
}

/// A medium with the directories that layers need.
pub fn format(write_align: u64) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new(write_align);
    storage.create_dir("layers").expect("an empty medium takes a directory");
    storage.sync_dir("").expect("a medium without faults");
    Arc::new(storage)
}

/// Make an empty layer, durably. A short log makes checkpoints frequent.
pub fn create_layer(storage: &dyn Storage, layer: u32, size: u64, log_len: u64) -> Result<()> {
    let dir = dir_of(layer);
    storage.create_dir(&dir)?;
    let blocks = ByteLen(size).blocks_ceil();
    let data = storage.open(&data_path(&dir), Open::CreateDirect)?;
    data.set_len(blocks.len().0)?;
    data.sync()?;
    let index = HeadIndex::new(blocks);
    let (bytes, header) = checkpoint::encode(uuid_of(layer), 1, 0, &index, LogLen::Live { least: log_len });
    write_map(storage, &dir, &bytes, header.log_len)?;
    publish_map(storage, &dir)?;
    storage.sync_dir("layers")
}

/// A layer as it was found.
pub struct Layer {
    pub header: Header,
    pub index: HeadIndex,
    pub replayed: Replayed,
    pub data: Arc<dyn StorageFile>,
    pub map: Arc<dyn StorageFile>,
}

fn corrupt(what: Corruption) -> Error {
    Error::Corrupt { path: "map".into(), what, at: ByteOffset(0) }
}

/// The index in the bytes of a map file.
pub fn decode_map(bytes: &[u8]) -> Result<(Header, HeadIndex, Replayed), Corruption> {
    let start = bytes.first_chunk::<HEADER_LEN>().ok_or(Corruption::Truncated("map header"))?;
    let header = Header::parse(start, bytes.len() as u64)?;
    let at = HEADER_LEN + header.directory_len();
    let directory = bytes.get(HEADER_LEN..at).ok_or(Corruption::Truncated("map directory"))?;
    let mut bitmaps = bytes.get(at..).ok_or(Corruption::Truncated("map bitmaps"))?;
    let (index, lost) = checkpoint::decode(&header, directory, &mut bitmaps)?;
    let log_at = usize::try_from(header.log_offset).expect("checked against the file");
    let log_end = log_at + usize::try_from(header.log_len).expect("checked against the file");
    let replayed = log::replay(&header, &bytes[log_at..log_end], &index, lost);
    Ok((header, index, replayed))
}

pub fn open_layer(storage: &dyn Storage, layer: u32) -> Result<Layer> {
    let dir = dir_of(layer);
    match storage.remove_file(&staged_path(&dir)) {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let map = storage.open(&map_path(&dir), Open::ReadWrite)?;
    // What a sync failed to write must not be believed.
    map.drop_cache()?;
    let mut bytes = vec![0; usize::try_from(map.len()?).expect("a small file")];
    map.read_at(&mut bytes, 0)?;
    let (header, index, replayed) = decode_map(&bytes).map_err(corrupt)?;
    if let Some((what, at)) = &replayed.damage {
        return Err(Error::Corrupt { path: "map".into(), what: what.clone(), at: ByteOffset(*at) });
    }
    if !replayed.lost.is_empty() {
        return Err(corrupt(Corruption::Checksum("leaf")));
    }
    let data = storage.open(&data_path(&dir), Open::Direct)?;
    Ok(Layer { header, index, replayed, data, map })
}

/// The state of a head that was just opened.
pub fn head_state(index: Arc<Index>, layer: u32, log: LogEnd, log_offset: u64, synced: Synced) -> HeadState {
    HeadState { index, layer: uuid_of(layer), log, log_offset, synced }
}

/// Open a volume.
pub fn open(storage: &Arc<MemoryStorage>, stack: &Stack, synced: Synced) -> Result<Simulated> {
    let mut frozen = FrozenIndex::empty();
    let mut files = Vec::new();
    for &number in &stack.frozen {
        let layer = open_layer(&**storage, number)?;
        frozen = frozen.overlaid(&layer.index, Slot(number), &layer.replayed.lost);
        files.push((Slot(number), layer.data));
    }
    open_over(storage, stack, frozen, LayerFiles::new(files), synced)
}

/// Open a volume's head over layers that are open already.
pub fn open_over(
    storage: &Arc<MemoryStorage>,
    stack: &Stack,
    frozen: FrozenIndex,
    layers: LayerFiles,
    synced: Synced,
) -> Result<Simulated> {
    let (state, view, files) = open_head(storage, stack, frozen, layers, synced)?;
    Ok(Simulated::new(state, view, files))
}

pub fn open_head(
    storage: &Arc<MemoryStorage>,
    stack: &Stack,
    frozen: FrozenIndex,
    layers: LayerFiles,
    synced: Synced,
) -> Result<(HeadState, View, Arc<HeadFiles>)> {
    let head = open_layer(&**storage, stack.head)?;
    assert_eq!(head.index.block_count(), ByteLen(stack.size).blocks_ceil());
    let index = Arc::new(Index {
        size: ByteLen(stack.size),
        head: Arc::new(head.index),
        frozen,
        base_len: ByteLen(stack.image),
    });
    let base: Option<Arc<dyn BaseImage>> = (stack.image > 0).then(|| Arc::new(Image(stack.image)) as _);
    let view = View { index: index.clone(), head: Some(head.data.clone()), layers, base };
    let reserve = Arc::new(Reserve::take(storage.clone())?);
    let dir = dir_of(stack.head);
    let files = HeadFiles::new(storage.clone(), dir, head.data, head.map, reserve);
    let state = head_state(index, stack.head, head.replayed.end, head.header.log_offset, synced);
    Ok((state, view, Arc::new(files)))
}

/// What a snapshot shows: the frozen layers of a volume.
pub fn frozen_view(storage: &Arc<MemoryStorage>, stack: &Stack) -> Result<View> {
    let mut frozen = FrozenIndex::empty();
    let mut files = Vec::new();
    for &number in &stack.frozen {
        let layer = open_layer(&**storage, number)?;
        frozen = frozen.overlaid(&layer.index, Slot(number), &layer.replayed.lost);
        files.push((Slot(number), layer.data));
    }
    let index = Arc::new(Index {
        size: ByteLen(stack.size),
        head: Arc::new(HeadIndex::new(ByteLen(stack.size).blocks_ceil())),
        frozen,
        base_len: ByteLen(stack.image),
    });
    let base: Option<Arc<dyn BaseImage>> = (stack.image > 0).then(|| Arc::new(Image(stack.image)) as _);
    Ok(View { index, head: None, layers: LayerFiles::new(files), base })
}

/// All bytes of a volume.
pub fn content(view: &View) -> Result<Vec<u8>> {
    let mut bytes = vec![0; view.size().as_usize()];
    view.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
