//! What `info` and `check` say of a volume directory.
//!
//! Owns the keys below `format-specific` and the findings of a check: layers that are not there or whose maps are
//! damaged, data that a map names and the file does not have, an image that is not there.

use bedplate_engine::{
    cow::BlockState,
    error::Result,
    units::{BlockCount, BlockRange},
    volume::layer::Layer,
};
use serde::Serialize;

use crate::{
    info::{FormatSpecific, Info},
    print, size,
    volume::VolumeDir,
};

/// The keys below `format-specific`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeReport {
    name: String,
    uuid: String,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageInfo>,
    head: String,
    layers: Vec<LayerInfo>,
    snapshots: Vec<VolumeSnapshot>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    name: String,
    uuid: String,
    sha512: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct LayerInfo {
    uuid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    /// Bytes that it has, that it made zeros, and that it takes on disk.
    data: u64,
    zero: u64,
    actual_size: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct VolumeSnapshot {
    name: String,
    layer: String,
    size: u64,
    created_at: String,
}

/// Fill in what the directory says.
pub fn info(volume: &VolumeDir, info: &mut Info) {
    let record = &volume.record;
    info.format = "bedplate-volume";
    info.virtual_size = Some(record.size_bytes);
    info.backing_filename = record.image.as_ref().map(|image| image.name.clone());
    let mut layers = Vec::new();
    for layer in &record.layers {
        let mut shown = LayerInfo {
            uuid: layer.uuid.to_string(),
            parent: layer.parent.map(|parent| parent.to_string()),
            data: 0,
            zero: 0,
            actual_size: 0,
        };
        match volume.layer(layer) {
            Ok(opened) => {
                shown.data = bytes(&opened, BlockState::Data);
                shown.zero = bytes(&opened, BlockState::Zero);
                shown.actual_size = opened.data.allocated().unwrap_or(0);
                info.actual_size += shown.actual_size;
                info.damage.extend(opened.fault.map(|fault| format!("layer {}: {fault}", layer.uuid)));
            }
            Err(error) => info.damage.push(error.to_string()),
        }
        layers.push(shown);
    }
    let snapshots = record.snapshots.iter().map(|snapshot| VolumeSnapshot {
        name: snapshot.name.clone(),
        layer: snapshot.layer.to_string(),
        size: snapshot.size_bytes,
        created_at: snapshot.created_at.to_string(),
    });
    info.format_specific = Some(FormatSpecific::BedplateVolume(VolumeReport {
        name: record.name.clone(),
        uuid: record.uuid.to_string(),
        created_at: record.created_at.to_string(),
        image: record.image.as_ref().map(|image| ImageInfo {
            name: image.name.clone(),
            uuid: image.uuid.to_string(),
            sha512: image.sha512.clone(),
        }),
        head: record.head.to_string(),
        layers,
        snapshots: snapshots.collect(),
    }));
}

/// Bytes of the blocks in a state.
fn bytes(layer: &Layer, state: BlockState) -> u64 {
    let all = BlockRange::new(0, layer.index.block_count().0);
    let runs = layer.index.runs(all).filter(|(_, found)| *found == state);
    runs.map(|(range, _)| range.count.len().0).sum()
}

impl VolumeReport {
    /// For people.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = vec![("volume".to_owned(), self.name.clone()), ("uuid".to_owned(), self.uuid.clone())];
        rows.extend(self.image.as_ref().map(|image| ("image sha512".to_owned(), image.sha512.clone())));
        rows.push(("created".to_owned(), self.created_at.clone()));
        rows
    }

    /// For people: layers, and snapshots.
    pub fn tables(&self) -> Vec<(&'static str, String)> {
        let rows = self.layers.iter().map(|layer| {
            let is_head = if layer.uuid == self.head { "head" } else { "" };
            [
                layer.uuid.clone(),
                layer.parent.clone().unwrap_or_else(|| "-".to_owned()),
                size::show(layer.data),
                size::show(layer.zero),
                size::show(layer.actual_size),
                is_head.to_owned(),
            ]
        });
        let mut tables =
            vec![("Layers", print::listing(["LAYER", "PARENT", "DATA", "ZEROS", "ON DISK", ""], rows))];
        if !self.snapshots.is_empty() {
            let rows = self.snapshots.iter().map(|snapshot| {
                let VolumeSnapshot { name, layer, size, created_at } = snapshot;
                [name.clone(), layer.clone(), size::show(*size), created_at.clone()]
            });
            tables.push(("Snapshots", print::listing(["NAME", "LAYER", "SIZE", "CREATED"], rows)));
        }
        tables
    }
}

/// What is wrong with the volume.
pub fn check(volume: &VolumeDir) -> Vec<String> {
    let mut corruptions = Vec::new();
    for layer in &volume.record.layers {
        match volume.layer(layer) {
            Ok(opened) => {
                corruptions
                    .extend(opened.fault.as_ref().map(|fault| format!("layer {}: {fault}", layer.uuid)));
                if let Err(what) = check_data(&opened) {
                    corruptions.push(what);
                }
            }
            Err(error) => corruptions.push(error.to_string()),
        }
    }
    if let Some(image) = &volume.record.image
        && let Err(error) = volume.image(image)
    {
        corruptions.push(error.to_string());
    }
    corruptions
}

/// Whether the file has the blocks that the map calls data.
fn check_data(layer: &Layer) -> Result<(), String> {
    let len = layer.data.len().map_err(|e| e.to_string())?;
    let there = BlockCount(len / bedplate_engine::units::BLOCK_SIZE);
    let all = layer.index.block_count();
    let past = BlockRange::new(there.0, all.0.saturating_sub(there.0));
    match layer.index.runs(past).find(|(_, state)| *state == BlockState::Data) {
        Some((range, _)) => {
            Err(format!("layer {}: the map has data at {range}, past the file's end", layer.uuid))
        }
        None => Ok(()),
    }
}
