//! The record files of a disk: `bedplate.json` and `volume.json` (`docs/format.md`, "Records").
//!
//! Owns their types, the rules that a record must keep, and how a record is read and replaced: write-new, fsync,
//! rename, fsync of the directory. An unknown version or key is refused by name.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    error::{Corruption, Error, Result},
    exec::storage::{Open, Storage},
    units::{ByteOffset, SECTOR_SIZE, VOLUME_SIZE_MAX, to_usize},
};

pub const FORMAT_VERSION: u32 = 1;
/// Bytes of a record file.
pub const RECORD_LEN_MAX: u64 = 16 << 20;
/// Layers of one volume.
pub const LAYERS_MAX: usize = 4096;
/// Bytes of a volume, snapshot or image name.
pub const NAME_LEN_MAX: usize = 64;

/// `bedplate.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    pub format_version: u32,
    pub id: Uuid,
    pub created_at: Timestamp,
}

/// The image that a volume stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRef {
    pub name: String,
    pub uuid: Uuid,
    /// Lower-case hexadecimal, of the image's file as it is.
    pub sha512: String,
}

/// A layer and what lies below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRef {
    pub uuid: Uuid,
    pub parent: Option<Uuid>,
}

/// A named frozen layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    pub name: String,
    pub layer: Uuid,
    pub size_bytes: u64,
    pub created_at: Timestamp,
}

/// `volume.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    pub format_version: u32,
    pub name: String,
    pub uuid: Uuid,
    pub size_bytes: u64,
    pub image: Option<ImageRef>,
    pub head: Uuid,
    pub layers: Vec<LayerRef>,
    pub snapshots: Vec<SnapshotRecord>,
    pub created_at: Timestamp,
}

impl VolumeRecord {
    /// What lies below a layer; `None` for the bottom one and for a layer that is not listed.
    pub fn parent(&self, layer: Uuid) -> Option<Uuid> {
        self.layers.iter().find(|known| known.uuid == layer)?.parent
    }

    /// `layer` and everything below it, top first.
    pub fn chain(&self, layer: Uuid) -> Vec<Uuid> {
        std::iter::successors(Some(layer), |layer| self.parent(*layer)).take(LAYERS_MAX).collect()
    }

    pub fn snapshot(&self, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }

    /// Forget the layers that neither the head nor a snapshot stands on.
    pub fn prune(&mut self) {
        let tops = self.snapshots.iter().map(|snapshot| snapshot.layer).chain([self.head]);
        let needed: HashSet<Uuid> = tops.flat_map(|top| self.chain(top)).collect();
        self.layers.retain(|layer| needed.contains(&layer.uuid));
    }

    /// Take `layer` out from between its child and its parent.
    pub fn splice(&mut self, layer: Uuid) {
        let parent = self.parent(layer);
        self.layers.retain(|known| known.uuid != layer);
        for child in self.layers.iter_mut().filter(|known| known.parent == Some(layer)) {
            child.parent = parent;
        }
    }

    /// Let `lower` stand for `upper`, its child, whose content it has taken.
    pub fn fold(&mut self, upper: Uuid, lower: Uuid) {
        self.layers.retain(|known| known.uuid != upper);
        for child in self.layers.iter_mut().filter(|known| known.parent == Some(upper)) {
            child.parent = Some(lower);
        }
        for snapshot in self.snapshots.iter_mut().filter(|snapshot| snapshot.layer == upper) {
            snapshot.layer = lower;
        }
    }

    /// The name of the volume's directory.
    pub fn dir_name(&self) -> String {
        dir_name(&self.name, self.uuid)
    }

    fn check(&self) -> std::result::Result<(), String> {
        check_version(self.format_version)?;
        check_name(&self.name)?;
        if !self.size_bytes.is_multiple_of(SECTOR_SIZE) || self.size_bytes > VOLUME_SIZE_MAX {
            return Err(format!("size_bytes has the impossible value {}", self.size_bytes));
        }
        if self.layers.len() > LAYERS_MAX {
            return Err(format!("{} layers are more than {LAYERS_MAX}", self.layers.len()));
        }
        let known: HashSet<Uuid> = self.layers.iter().map(|layer| layer.uuid).collect();
        if known.len() != self.layers.len() {
            return Err("a layer is listed twice".into());
        }
        let named = self.snapshots.iter().map(|snapshot| snapshot.layer).chain([self.head]);
        let parents = self.layers.iter().filter_map(|layer| layer.parent);
        if let Some(missing) = named.chain(parents).find(|layer| !known.contains(layer)) {
            return Err(format!("layer {missing} is not listed"));
        }
        self.check_grounded()?;
        if self.layers.iter().any(|layer| layer.parent == Some(self.head)) {
            return Err("a layer stands on the head".into());
        }
        let mut names = HashSet::new();
        if let Some(twice) = self.snapshots.iter().find(|snapshot| !names.insert(&snapshot.name)) {
            return Err(format!("two snapshots are called {:?}", twice.name));
        }
        Ok(())
    }

    /// That what lies below each layer ends. All parents are listed. Each layer is gone through once: a record from
    /// outside may have [`LAYERS_MAX`] of them, and make any shape of them.
    fn check_grounded(&self) -> std::result::Result<(), String> {
        let parents: HashMap<Uuid, Option<Uuid>> =
            self.layers.iter().map(|layer| (layer.uuid, layer.parent)).collect();
        let mut grounded = HashSet::with_capacity(parents.len());
        for layer in &self.layers {
            let mut way = Vec::new();
            let mut next = Some(layer.uuid);
            while let Some(at) = next.filter(|at| !grounded.contains(at)) {
                if way.len() == parents.len() {
                    return Err(format!("layer {} stands on itself", layer.uuid));
                }
                way.push(at);
                next = parents.get(&at).copied().flatten();
            }
            grounded.extend(way);
        }
        Ok(())
    }
}

/// The directory of something with this name and uuid.
pub fn dir_name(name: &str, uuid: Uuid) -> String {
    let hex = uuid.simple().to_string();
    format!("{name}-{}", &hex[..8])
}

/// Letters, digits, `.`, `_` and `-`; at most [`NAME_LEN_MAX`]; no dot in front.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_LEN_MAX || !name.chars().all(fits) {
        return Err(format!(
            "{name:?} is not a name: 1 to {NAME_LEN_MAX} letters, digits, dots, underscores and dashes"
        ));
    }
    Ok(())
}

/// [`check_name`] for a name that a user gives: names with a dot in front are Bedplate's own.
pub fn check_user_name(name: &str) -> Result<()> {
    check_name(name).map_err(Error::Invalid)?;
    if name.starts_with('.') {
        return Err(Error::Invalid(format!("{name:?} starts with a dot; choose another name")));
    }
    Ok(())
}

fn check_version(version: u32) -> std::result::Result<(), String> {
    if version != FORMAT_VERSION {
        return Err(format!("format_version {version} is not known to this version of Bedplate"));
    }
    Ok(())
}

/// A record that knows its own rules.
pub trait Record: Serialize + for<'de> Deserialize<'de> {
    /// What is wrong with it.
    fn verify(&self) -> std::result::Result<(), String>;
}

impl Record for VolumeRecord {
    fn verify(&self) -> std::result::Result<(), String> {
        self.check()
    }
}

impl Record for DiskRecord {
    fn verify(&self) -> std::result::Result<(), String> {
        check_version(self.format_version)
    }
}

/// Read the record at `path`.
pub fn read<R: Record>(storage: &dyn Storage, path: &str) -> Result<R> {
    let corrupt = |why: String| Error::Corrupt {
        path: storage.full_path(path),
        what: Corruption::Record(why),
        at: ByteOffset(0),
    };
    let file = storage.open(path, Open::Read)?;
    let len = file.len()?;
    if len > RECORD_LEN_MAX {
        return Err(corrupt(format!("{len} bytes are more than {RECORD_LEN_MAX}")));
    }
    let mut bytes = vec![0; to_usize(len)];
    file.read_at(&mut bytes, 0)?;
    let record: R = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    record.verify().map_err(corrupt)?;
    Ok(record)
}

/// Write the record `name` into `dir`, under a name that nobody reads yet. Synced, its name is not. One that could not be
/// read again is a mistake of ours, and is not written.
pub fn write_new<R: Record>(storage: &dyn Storage, dir: &str, name: &str, record: &R) -> Result<()> {
    let internal = |what: String| Error::Invalid(format!("internal: {what}"));
    record.verify().map_err(internal)?;
    let bytes = serde_json::to_vec_pretty(record).map_err(|e| internal(e.to_string()))?;
    let path = format!("{dir}/{name}");
    match storage.remove_file(&path) {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let file = storage.open(&path, Open::Create)?;
    file.write_at(&bytes, 0)?;
    file.sync()
}

/// How far a replacement got that failed.
#[derive(Debug)]
pub enum Replaced {
    /// The old record stands.
    Not(Error),
    /// The new one has its name, but a crash may bring the old one back.
    Perhaps(Error),
}

/// Replace the record `name` in `dir`. The moment it happens is the rename; it is durable when this returns.
pub fn replace<R: Record>(storage: &dyn Storage, dir: &str, name: &str, record: &R) -> Result<(), Replaced> {
    let new = format!("{name}.new");
    let path = format!("{dir}/{new}");
    let switched =
        write_new(storage, dir, &new, record).and_then(|()| storage.rename(&path, &format!("{dir}/{name}")));
    if let Err(error) = switched {
        // A full disk needs the room.
        let _ = storage.remove_file(&path);
        return Err(Replaced::Not(error));
    }
    storage.sync_dir(dir).map_err(Replaced::Perhaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: usize) -> Uuid {
        Uuid::from_u128(number as u128 + 1)
    }

    /// `count` layers, each on the one before it, the last of them the head.
    fn volume(count: usize) -> VolumeRecord {
        let parent = |number: usize| number.checked_sub(1).map(layer);
        VolumeRecord {
            format_version: FORMAT_VERSION,
            name: "v".into(),
            uuid: Uuid::from_u128(9),
            size_bytes: 4096,
            image: None,
            head: layer(count - 1),
            layers: (0..count).map(|n| LayerRef { uuid: layer(n), parent: parent(n) }).collect(),
            snapshots: Vec::new(),
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    fn snapshot(name: &str, number: usize) -> SnapshotRecord {
        SnapshotRecord {
            name: name.into(),
            layer: layer(number),
            size_bytes: 4096,
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_record_that_cannot_be_is_refused_and_says_why() {
        type Change = fn(&mut VolumeRecord);
        let changes: [(&str, Change); 12] = [
            ("format_version 77", |record| record.format_version = 77),
            ("is not a name", |record| record.name.clear()),
            ("is not a name", |record| record.name = "n".repeat(NAME_LEN_MAX + 1)),
            ("is not a name", |record| record.name = "../v".into()),
            ("size_bytes", |record| record.size_bytes = 4097),
            ("size_bytes", |record| record.size_bytes = VOLUME_SIZE_MAX + SECTOR_SIZE),
            ("are more than", |record| *record = volume(LAYERS_MAX + 1)),
            ("listed twice", |record| record.layers[0].uuid = layer(1)),
            ("is not listed", |record| record.layers[0].parent = Some(layer(77))),
            ("stands on itself", |record| record.layers[0].parent = Some(layer(1))),
            ("stands on the head", |record| record.head = layer(1)),
            ("two snapshots", |record| record.snapshots = vec![snapshot("s", 0), snapshot("s", 1)]),
        ];
        for (why, change) in changes {
            let mut record = volume(3);
            assert_eq!(record.verify(), Ok(()));
            change(&mut record);
            assert!(record.verify().is_err_and(|error| error.contains(why)), "{why}: {:?}", record.verify());
        }
    }

    #[test]
    fn as_many_layers_as_there_can_be_are_taken_in_a_row_and_refused_in_a_circle() {
        let mut record = volume(LAYERS_MAX);
        assert_eq!(record.verify(), Ok(()));
        record.layers[0].parent = Some(layer(LAYERS_MAX - 2));
        assert!(record.verify().is_err_and(|error| error.contains("stands on itself")));
    }
}
