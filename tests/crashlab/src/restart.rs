//! The ends of a process, with or without the machine, and what the next start finds.

use std::collections::BTreeSet;

use bedplate_engine::{
    device::BlockDevice,
    exec::{
        simulated::Seed,
        storage::memory::{Effect, MemoryStorage},
    },
    volume::{device::VolumeState, disk::Disk},
};

use crate::{
    cells::Cells,
    damage,
    faults::FaultKind,
    leftovers,
    script::Cut,
    world::{Images, Known, Perhaps, World, content},
};

/// Calls of a start that is cut itself.
const CALLS_OF_A_START: u64 = 60;

impl World {
    /// End the process, start the next one, and check what it finds.
    pub fn restart(&mut self) -> Result<(), String> {
        let end = if self.medium.was_killed() { Cut::Kill } else { Cut::Power };
        let cut = self.cut.take().unwrap_or(end);
        self.note(|| format!("restart: {cut:?}"));
        self.stats.restarts += 1;
        self.remember_what_is_kept();
        self.end_process(cut);
        if self.seed.one_in(4) {
            // The next start does not come to its end either.
            self.medium.stop_after(self.seed.below(CALLS_OF_A_START));
            let opened = self.open();
            if opened.is_ok() {
                self.begin_to_take_up_images();
            }
            drop(opened);
            let second = if self.seed.one_in(2) { Cut::Kill } else { Cut::Power };
            self.note(|| format!("restart cut: {second:?}"));
            self.end_process(second);
            return self.start(cut == Cut::Power || second == Cut::Power);
        }
        self.start(cut == Cut::Power)
    }

    fn end_process(&mut self, cut: Cut) {
        self.forget_process();
        let storage = match cut {
            Cut::Kill | Cut::Close => {
                self.medium.count(FaultKind::ProcessKill);
                self.medium.storage().kill()
            }
            Cut::Power => {
                self.medium.count(FaultKind::PowerCut);
                self.power_cut()
            }
        };
        self.medium = self.medium.restarted(storage);
    }

    fn power_cut(&mut self) -> MemoryStorage {
        let style = self.seed.below(4);
        let mut seed = Seed(self.seed.number());
        let holes = self.medium.storage().unsynced_holes();
        let mut lost = BTreeSet::new();
        let left = self.medium.storage().crash(|effect, outcomes| {
            let chosen = match style {
                0 => 0,
                1 => outcomes - 1,
                // One outcome for a whole file.
                2 => match effect {
                    Effect::Sector { file, .. } | Effect::Length { file } if file % 2 == 0 => 0,
                    Effect::Sector { .. } | Effect::Length { .. } => outcomes - 1,
                    Effect::Name { .. } => seed.index(outcomes),
                },
                _ => seed.index(outcomes),
            };
            if chosen + 1 < outcomes {
                lost.insert(match effect {
                    Effect::Sector { file, sector } if holes.contains(&(file, sector)) => {
                        FaultKind::LostPunch
                    }
                    Effect::Sector { .. } => FaultKind::LostData,
                    Effect::Length { .. } => FaultKind::LostSize,
                    Effect::Name { .. } => FaultKind::LostName,
                });
            }
            chosen
        });
        lost.into_iter().for_each(|kind| self.medium.count(kind));
        left
    }

    fn start(&mut self, power_lost: bool) -> Result<(), String> {
        let disk = self.open().map_err(|error| format!("the disk does not open: {error}"))?;
        self.disk = Some(disk.clone());
        let found: BTreeSet<String> = disk.volumes().into_iter().map(|info| info.name).collect();
        for perhaps in std::mem::take(&mut self.perhaps) {
            self.resolve(&disk, &found, perhaps)?;
        }
        let expected: BTreeSet<String> = self.known.keys().cloned().collect();
        if found != expected {
            return Err(format!("volumes are {found:?} instead of {expected:?}"));
        }
        for (name, known) in &mut self.known {
            check(&disk, name, known, power_lost)?;
        }
        self.remember_records()?;
        self.take_up_images()?;
        leftovers::check(self.medium.storage(), &["failed"])?;
        if self.seed.one_in(4) {
            self.medium.count(FaultKind::BitFlip);
            let images = Images(self.setup.image.into());
            damage::check(self.medium.storage(), images, &self.known, &mut self.seed)?;
        }
        Ok(())
    }

    /// What did a life operation come to of which nobody was told?
    fn resolve(&mut self, disk: &Disk, found: &BTreeSet<String>, perhaps: Perhaps) -> Result<(), String> {
        let snapshots = |volume: &str| -> BTreeSet<String> {
            let device = disk.volume(volume);
            device
                .map(|device| device.info().snapshots.into_iter().map(|s| s.name).collect())
                .unwrap_or_default()
        };
        match perhaps {
            Perhaps::Snapshot { volume, name, cells } if snapshots(&volume).contains(&name) => {
                self.known.entry(volume).and_modify(|known| drop(known.snapshots.insert(name, cells)));
            }
            Perhaps::Volume { name, cells } if found.contains(&name) => {
                self.known.insert(name, Known { cells, snapshots: Default::default() });
            }
            Perhaps::NoSnapshot { volume, name } if !snapshots(&volume).contains(&name) => {
                self.known.entry(volume).and_modify(|known| drop(known.snapshots.remove(&name)));
            }
            Perhaps::NoVolume { name } if !found.contains(&name) => drop(self.known.remove(&name)),
            Perhaps::Size { volume, size } => {
                let device = disk.volume(&volume).map_err(|error| format!("volume {volume}: {error}"))?;
                if device.geometry().size.0 == size {
                    self.cells(&volume).grow(size);
                }
            }
            Perhaps::Content { volume, cells } => {
                let device = disk.volume(&volume).map_err(|error| format!("volume {volume}: {error}"))?;
                let bytes = content(&*device).map_err(|error| format!("volume {volume}: {error}"))?;
                let old = &self.known[&volume].cells;
                if bytes.len() as u64 != old.size() || old.clone().crashed(&bytes).is_err() {
                    *self.cells(&volume) = cells;
                }
            }
            Perhaps::Snapshot { .. }
            | Perhaps::Volume { .. }
            | Perhaps::NoSnapshot { .. }
            | Perhaps::NoVolume { .. } => {}
        }
        Ok(())
    }

    /// The process flushes and closes, as at the end of a node.
    pub fn close(&mut self) {
        self.drain();
        let Some(disk) = &self.disk else { return };
        if self.medium.has_stopped() || !self.all_ready() {
            return;
        }
        let sinces: Vec<(String, u64)> =
            self.known.iter_mut().map(|(name, known)| (name.clone(), known.cells.now())).collect();
        let errors = self.medium.errors();
        match disk.flush() {
            Ok(()) => sinces.into_iter().for_each(|(name, since)| self.cells(&name).flushed(since)),
            Err(error) if self.medium.errors() == errors && !self.medium.has_stopped() => {
                self.found(format!("a flush at the end failed without a fault: {error}"));
            }
            Err(_) => {}
        }
    }
}

/// Check a volume and its snapshots after a start.
fn check(disk: &Disk, name: &str, known: &mut Known, power_lost: bool) -> Result<(), String> {
    let device = disk.volume(name).map_err(|error| format!("volume {name} does not open: {error}"))?;
    let info = device.info();
    let found: BTreeSet<&str> = info.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
    let expected: BTreeSet<&str> = known.snapshots.keys().map(String::as_str).collect();
    if found != expected {
        return Err(format!("volume {name}: snapshots are {found:?} instead of {expected:?}"));
    }
    check_content(&*device, &mut known.cells, power_lost)
        .map_err(|error| format!("volume {name}: {error}"))?;
    for (snapshot, cells) in &mut known.snapshots {
        let what = |error: String| format!("snapshot {name}@{snapshot}: {error}");
        let view = disk.view(name, Some(snapshot)).map_err(|error| what(error.to_string()))?;
        check_content(&view, cells, true).map_err(what)?;
    }
    if let VolumeState::Failed { reason } = info.state {
        return Err(format!("volume {name} is not served: {reason}"));
    }
    Ok(())
}

fn check_content(device: &dyn BlockDevice, cells: &mut Cells, power_lost: bool) -> Result<(), String> {
    let size = device.geometry().size.0;
    if size != cells.size() {
        return Err(format!("{size} bytes instead of {}", cells.size()));
    }
    let bytes = content(device).map_err(|error| error.to_string())?;
    if power_lost { cells.crashed(&bytes) } else { cells.killed(&bytes) }
}
