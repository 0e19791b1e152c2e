//! A medium that lies, at the end of a history: a flipped bit, a misdirected transfer, an older record.
//!
//! Data blocks have no checksums (`engine/docs/design.md`), so nothing is promised of what they hold then. Maps have,
//! and layers are identity-mapped. So whatever happens to a map or a record: the disk opens, volumes that do not stand
//! on it read as before (invariant 12), and those that do say so, or read in each cell something that was written
//! there, perhaps older. What lies before a map's log is never older without a word: it reads as before or fails by
//! name (7). Where a record cannot be followed, no layer goes (10).

use std::collections::{BTreeMap, BTreeSet};

use bedplate_engine::{
    cow::map::checkpoint::{HEADER_LEN, Header},
    device::{BlockDevice, Durability},
    exec::storage::Storage,
    volume::{device::VolumeState, disk::Disk},
};

use crate::{
    cells::{CELL, cell_bytes},
    faults::FaultKind,
    world::{World, index},
};

/// The kinds of lies.
pub const LIES: [FaultKind; 4] =
    [FaultKind::BitFlip, FaultKind::MisdirectedRead, FaultKind::MisdirectedWrite, FaultKind::OlderRecord];
/// Transfers of maps that go right before one is misdirected.
const RIGHT_MAX: u64 = 8;
/// Bytes that are read at once: what one block cannot tell is not the other's.
const PIECE: u64 = 4096;

/// What a volume was before.
struct Before {
    /// Parts of the paths of what it stands on.
    stands_on: BTreeSet<String>,
    /// None: it could not be read.
    pieces: Vec<Option<Vec<u8>>>,
}

/// What was lied about.
struct Touched {
    path: String,
    /// Damage there is noticed, always.
    checked: bool,
}

impl Before {
    fn is_touched(&self, touched: &Touched) -> bool {
        touched.path.split('/').any(|part| self.stands_on.contains(part))
    }
}

impl World {
    /// Let the medium lie as the script says, start once more, and check what is left. The process is gone afterwards.
    pub fn decay(&mut self) -> Result<(), String> {
        let Some(kind) = self.setup.decay else { return Ok(()) };
        if kind == FaultKind::MisdirectedWrite {
            self.medium.arm(kind, self.seed.below(RIGHT_MAX));
            self.write_everywhere();
        }
        let before = self.before()?;
        let layers = self.layers()?;
        let written = self.medium.take_misdirected();
        self.forget_process();
        let storage = self.medium.storage().kill();
        self.medium = self.medium.restarted(storage);
        let touched = match kind {
            FaultKind::BitFlip => self.flip()?,
            FaultKind::OlderRecord => self.bring_back()?,
            FaultKind::MisdirectedWrite => written.map(|path| Touched { path, checked: false }),
            _ => {
                self.medium.arm(kind, self.seed.below(RIGHT_MAX));
                None
            }
        };
        let disk = self
            .open()
            .map_err(|error| format!("after a {} the disk does not open: {error}", kind.name()))?;
        let read = self.medium.take_misdirected().map(|path| Touched { path, checked: false });
        let Some(touched) = touched.or(read) else { return Ok(()) };
        self.note(|| format!("{} of {}", kind.name(), touched.path));
        if kind == FaultKind::BitFlip || kind == FaultKind::OlderRecord {
            self.medium.count(kind);
        }
        let what = |error: String| format!("after a {} of {}: {error}", kind.name(), touched.path);
        let mut all_open = true;
        for (name, before) in &before {
            all_open &= disk.volume(name).is_ok();
            check(&disk, name, before, &touched).map_err(what)?;
        }
        if !all_open && touched.path.ends_with(".json") && !layers.is_subset(&self.layers()?) {
            return Err(what("layers were collected although a record cannot be followed".into()));
        }
        Ok(())
    }

    fn layers(&self) -> Result<BTreeSet<String>, String> {
        let layers = self.medium.storage().list("layers").map_err(|error| error.to_string())?;
        Ok(layers.into_iter().map(|(name, _)| name).collect())
    }

    fn before(&self) -> Result<BTreeMap<String, Before>, String> {
        let Some(disk) = &self.disk else { return Err("no disk is open".into()) };
        let mut all = BTreeMap::new();
        for name in self.known.keys() {
            let device = disk.volume(name).map_err(|error| format!("volume {name}: {error}"))?;
            let record = device.record();
            let layers = record.layers.iter().map(|layer| layer.uuid.to_string());
            let stands_on = layers.chain([record.dir_name()]).collect();
            all.insert(name.clone(), Before { stands_on, pieces: pieces(&*device) });
        }
        Ok(all)
    }

    /// Change something of every volume that takes it, durably: that appends to its map.
    fn write_everywhere(&mut self) {
        let Some(disk) = self.disk.clone() else { return };
        for name in self.volume_names() {
            let Ok(device) = disk.volume(&name) else { continue };
            for _ in 0..1 + self.seed.below(3) {
                let cell = self.seed.below(device.geometry().size.0 / CELL);
                let bytes = cell_bytes(self.fresh() << 24 | cell);
                // Refused by one that has failed.
                let written = device.write_at(&bytes, cell * CELL, Durability::Volatile);
                let _ = written.and_then(|()| device.flush());
            }
        }
    }

    /// Flip a bit of a map or a record.
    fn flip(&mut self) -> Result<Option<Touched>, String> {
        let mut paths: Vec<String> =
            self.layers()?.into_iter().map(|layer| format!("layers/{layer}/map")).collect();
        paths.extend(self.records()?);
        let path = paths.swap_remove(self.seed.index(paths.len()));
        let storage = self.medium.storage();
        let bytes = storage.bytes(&path).map_err(|error| error.to_string())?;
        let log_at =
            bytes.first_chunk::<HEADER_LEN>().and_then(|first| Header::parse(first, bytes.len() as u64).ok());
        let log_at = log_at.map_or(bytes.len(), |header| index(header.log_offset));
        // As often before the log as in it: that is the smaller part.
        let at = match self.seed.index(2) {
            0 => self.seed.index(log_at),
            _ => self.seed.index(bytes.len()),
        };
        let bit = self.seed.index(8);
        let damaged = self.medium.storage().damage(&path, |bytes| bytes[at] ^= 1 << bit);
        damaged.map_err(|error| error.to_string())?;
        let checked = path.ends_with("/map") && at < log_at;
        Ok(Some(Touched { path, checked }))
    }

    /// Put a record back to what it was at an earlier start.
    fn bring_back(&mut self) -> Result<Option<Touched>, String> {
        let now = self.records()?;
        let storage = self.medium.storage();
        let differs = |(path, bytes): &&(String, Vec<u8>)| {
            now.contains(path) && storage.bytes(path).is_ok_and(|newest| newest != *bytes)
        };
        let older: Vec<&(String, Vec<u8>)> = self.older_records.iter().filter(differs).collect();
        if older.is_empty() {
            return Ok(None);
        }
        let (path, bytes) = older[self.seed.index(older.len())].clone();
        storage.damage(&path, |newest| *newest = bytes).map_err(|error| error.to_string())?;
        Ok(Some(Touched { path, checked: false }))
    }

    /// Paths of the records of volumes.
    fn records(&self) -> Result<Vec<String>, String> {
        let volumes = self.medium.storage().list("volumes").map_err(|error| error.to_string())?;
        Ok(volumes.into_iter().map(|(name, _)| format!("volumes/{name}/volume.json")).collect())
    }

    /// Remember the records as they are now.
    pub fn remember_records(&mut self) -> Result<(), String> {
        if self.setup.decay == Some(FaultKind::OlderRecord) {
            for path in self.records()? {
                let bytes = self.medium.storage().bytes(&path).map_err(|error| error.to_string())?;
                self.older_records.push((path, bytes));
            }
        }
        Ok(())
    }
}

fn pieces(device: &dyn BlockDevice) -> Vec<Option<Vec<u8>>> {
    let size = device.geometry().size.0;
    let piece = |at: u64| {
        let mut bytes = vec![0; index(PIECE.min(size - at))];
        device.read_at(&mut bytes, at).ok().map(|()| bytes)
    };
    (0..size).step_by(index(PIECE)).map(piece).collect()
}

/// Check a volume after the medium lied.
fn check(disk: &Disk, name: &str, before: &Before, touched: &Touched) -> Result<(), String> {
    let is_touched = before.is_touched(touched);
    let device = match disk.volume(name) {
        Ok(device) => device,
        Err(_) if is_touched => return Ok(()),
        Err(error) => {
            return Err(format!("volume {name} does not open, which does not stand on it: {error}"));
        }
    };
    if !is_touched && matches!(device.state(), VolumeState::Failed { .. }) {
        return Err(format!("volume {name} failed, which does not stand on it"));
    }
    let now = pieces(&*device);
    if !is_touched && now.len() != before.pieces.len() {
        return Err(format!("volume {name} has another size, which does not stand on it"));
    }
    for ((old, new), number) in before.pieces.iter().zip(&now).zip(0u64..) {
        let Some(old) = old else { continue };
        let at = number * PIECE;
        match new {
            None if is_touched => {}
            None => return Err(format!("volume {name} is not read at {at}, which does not stand on it")),
            Some(new) if !is_touched || touched.checked => {
                if old != new {
                    return Err(format!("volume {name} reads something else at {at} without a word"));
                }
            }
            Some(new) => {
                for (bytes, cell) in new.chunks(index(CELL)).zip(at / CELL..) {
                    let (words, _) = bytes.as_chunks::<8>();
                    let value = u64::from_le_bytes(words[0]);
                    let whole = words.iter().all(|word| *word == words[0]);
                    if !whole || (value != 0 && value & 0xff_ffff != cell) {
                        return Err(format!("volume {name}: cell {cell} holds {value:#x}, of another place"));
                    }
                }
            }
        }
    }
    Ok(())
}
