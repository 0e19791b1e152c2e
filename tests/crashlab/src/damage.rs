//! A bit of a map that flips while the machine is off.
//!
//! It happens to a copy of the medium, so that the history goes on with the sound one. What is promised of maps: damage is
//! found out and named. A disk opens all the same; what a volume over the damaged layer still shows is right, and the rest
//! is refused.

use std::{collections::BTreeMap, sync::Arc};

use bedplate_engine::{
    device::BlockDevice,
    error::{Error, Result},
    exec::{
        pool::{Job, Pool, Turns},
        simulated::Seed,
        storage::{Open, Storage, memory::MemoryStorage},
    },
    units::{ByteRange, SECTOR_SIZE},
    volume::disk::Held,
};

use crate::{
    cells::Cells,
    world::{Images, Known, index},
};

/// Housekeeping does not take place.
#[derive(Debug)]
struct Nobody;

impl Turns for Nobody {
    fn queue(&self, job: Job) {
        drop(job);
    }

    fn next(&self) -> bool {
        false
    }
}

/// Flip a bit of some map on a copy of `storage`, where `known` has just been found, and look at what a start makes of it.
pub fn check(
    storage: &MemoryStorage,
    images: Images,
    known: &BTreeMap<String, Known>,
    seed: &mut Seed,
) -> Result<(), String> {
    let copy = storage.crash(|_, outcomes| outcomes - 1);
    let what = flip(&copy, seed).map_err(|error| format!("a copy of the medium fails: {error}"))?;
    let Some(what) = what else { return Ok(()) };
    let held =
        Held::over(Arc::new(copy)).map(|held| held.housekeeper(Arc::new(Pool::in_turns(Arc::new(Nobody)))));
    let disk = held.and_then(|held| held.serve(Arc::new(images)));
    let disk = disk.map_err(|error| format!("{what}: the disk does not open: {error}"))?;
    for (name, known) in known {
        let Ok(volume) = disk.volume(name) else { continue };
        check_shown(&*volume, &known.cells).map_err(|error| format!("{what}: volume {name}: {error}"))?;
        for (snapshot, cells) in &known.snapshots {
            let Ok(view) = disk.view(name, Some(snapshot)) else { continue };
            check_shown(&view, cells)
                .map_err(|error| format!("{what}: snapshot {name}@{snapshot}: {error}"))?;
        }
    }
    Ok(())
}

/// Where it was, unless there is nothing to flip.
fn flip(storage: &MemoryStorage, seed: &mut Seed) -> Result<Option<String>> {
    let layers = storage.list("layers")?;
    if layers.is_empty() {
        return Ok(None);
    }
    let path = format!("layers/{}/map", layers[seed.index(layers.len())].0);
    let map = storage.open(&path, Open::ReadWrite)?;
    let mut bytes = vec![0; index(map.len()?)];
    map.read_at(&mut bytes, 0)?;
    // Most of a log is zeros: what says something is hit as often.
    let said: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    let at = if seed.one_in(4) { seed.index(bytes.len()) } else { said[seed.index(said.len())] };
    let bit = seed.index(8);
    map.write_at(&[bytes[at] ^ (1 << bit)], at as u64)?;
    Ok(Some(format!("bit {bit} of byte {at} of {path} flips")))
}

/// Each sector is right or refused.
fn check_shown(device: &dyn BlockDevice, cells: &Cells) -> Result<(), String> {
    let mut cells = cells.clone();
    let since = cells.now();
    for sector in 0..device.geometry().size.0.min(cells.size()) / SECTOR_SIZE {
        let range = ByteRange::new(sector * SECTOR_SIZE, SECTOR_SIZE);
        let mut bytes = [0; 512];
        match device.read_at(&mut bytes, range.start.0) {
            Ok(()) => cells.check_read(range, &bytes, since)?,
            Err(Error::Lost { .. }) => {}
            Err(error) => return Err(format!("a read failed in another way: {error}")),
        }
    }
    Ok(())
}
