//! The end of a process in a random history, with or without the machine, and what the next start finds.

use std::sync::Arc;

use bedplate_engine::{cow::core::Synced, exec::storage::memory::Effect};

use super::{Faults, Life, World};
use crate::disk;

impl World {
    /// The end of a process, with or without the machine, and the next start.
    pub(super) fn restart(&mut self, killed: bool) -> Result<(), String> {
        self.crashes += 1;
        self.storage.clear_faults();
        self.stop_at = None;
        self.dropped = Arc::default();
        self.doomed.clear();
        self.indexes.clear();
        self.files.clear();
        let seed = &mut self.seed;
        let style = seed.below(4);
        let storage = if killed {
            self.storage.kill()
        } else {
            self.storage.crash(|effect, outcomes| match style {
                0 => 0,
                1 => outcomes - 1,
                // One outcome for a whole file.
                2 => match effect {
                    Effect::Sector { file, .. } | Effect::Length { file } if file % 2 == 0 => 0,
                    Effect::Sector { .. } | Effect::Length { .. } => outcomes - 1,
                    Effect::Name { .. } => seed.index(outcomes),
                },
                _ => seed.index(outcomes),
            })
        };
        self.note(|| format!("killed: {killed}, style {style}"));
        self.storage = Arc::new(storage);
        if self.faults == Faults::Full {
            self.storage.limit(self.storage.used_bytes() + (1 << 20));
        }
        for n in 0..self.volumes.len() {
            let stack = self.volumes[n].stack.clone();
            for &layer in &stack.frozen {
                if !self.files.contains_key(&layer) {
                    let found =
                        disk::open_layer(&*self.storage, layer).map_err(|e| format!("layer {layer}: {e}"))?;
                    self.indexes.insert(layer, Arc::new(found.index));
                    self.files.insert(layer, found.data);
                }
            }
            let (index, layers) = self.frozen(&stack.frozen);
            let sim = disk::open_over(&self.storage, &stack, index, layers, Synced::No)
                .map_err(|error| format!("volume {n} does not open: {error}"))?;
            let bytes = disk::content(sim.view()).map_err(|e| e.to_string())?;
            let volume = &mut self.volumes[n];
            let checked = if killed { volume.model.killed(&bytes) } else { volume.model.crashed(&bytes) };
            checked.map_err(|error| format!("volume {n}: {error}"))?;
            volume.sim = sim;
            volume.flights.clear();
            volume.life = Life::None;
        }
        self.check_snapshots()?;
        self.inject();
        Ok(())
    }

    fn check_snapshots(&mut self) -> Result<(), String> {
        for (n, (stack, model)) in self.snapshots.iter_mut().enumerate() {
            let view = disk::frozen_view(&self.storage, stack).map_err(|e| format!("snapshot {n}: {e}"))?;
            let bytes = disk::content(&view).map_err(|e| format!("snapshot {n}: {e}"))?;
            model.crashed(&bytes).map_err(|error| format!("snapshot {n}: {error}"))?;
        }
        Ok(())
    }
}
