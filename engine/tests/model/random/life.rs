//! Life operations of a random history, in terms of the core: barriers, copies, and a switch of what a volume stands on.

use std::{collections::HashMap, sync::Arc};

use bedplate_engine::{
    cow::{
        core::{CopySource, Op, Synced},
        frozen::{FrozenIndex, Slot},
        plan::Index,
    },
    error::Error,
    exec::view::{LayerFiles, View},
    units::{BlockRange, ByteLen},
};

use super::{COPY_BLOCKS, Doomed, Faults, Flight, Life, SNAPSHOTS_MAX, Switch, VOLUMES_MAX, Volume, World};
use crate::disk::{self, Stack};

impl World {
    /// Whether volume `n` alone stands on this layer.
    pub(super) fn is_private(&self, n: usize, layer: u32) -> bool {
        let others = self.volumes.iter().enumerate().filter(|(other, _)| *other != n);
        let volumes = others.map(|(_, volume)| &volume.stack);
        !volumes
            .chain(self.snapshots.iter().map(|(stack, _)| stack))
            .any(|stack| stack.frozen.contains(&layer))
    }

    pub(super) fn begin_life(&mut self, n: usize) -> Result<(), String> {
        if self.volumes[n].life != Life::None || self.volumes[n].sim.core().failed().is_some() {
            return Ok(());
        }
        if !self.snapshots.is_empty() && self.seed.one_in(4) {
            self.forget_snapshot();
        }
        let choice = self.seed.below(4);
        let stack = self.volumes[n].stack.clone();
        let top = stack.frozen.last().copied();
        let switch = match choice {
            0 if self.snapshots.len() < SNAPSHOTS_MAX => Switch::Snapshot,
            1 if self.volumes.len() < VOLUMES_MAX => Switch::Clone,
            2 if top.is_some_and(|top| self.is_private(n, top)) => Switch::Merge,
            3 if stack.image > 0 && stack.frozen.is_empty() => Switch::Flatten,
            _ => return Ok(()),
        };
        self.note(|| format!("volume {n}: begins {switch:?}"));
        match switch {
            Switch::Snapshot | Switch::Clone => self.close(n, switch),
            Switch::Merge | Switch::Flatten => {
                self.volumes[n].life = Life::Copying { switch, next: 0, under_way: false };
                Ok(())
            }
        }
    }

    /// Without its snapshots a layer can be merged.
    fn forget_snapshot(&mut self) {
        let n = self.seed.index(self.snapshots.len());
        self.snapshots.swap_remove(n);
        self.note(|| format!("snapshot {n} is forgotten"));
    }

    fn close(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        match volume.sim.submit(Op::Barrier, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Barrier);
                volume.life = Life::Closing { switch };
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    /// Move the life operation of volume `n` on.
    pub(super) fn advance_life(&mut self, n: usize) -> Result<(), String> {
        match self.volumes[n].life {
            Life::None | Life::Closing { .. } | Life::Flushing { .. } => Ok(()),
            Life::Copying { under_way: true, .. } => Ok(()),
            Life::Copying { switch, next, under_way: false } => self.copy(n, switch, next),
            Life::Closed { switch } => self.switch(n, switch),
        }
    }

    fn copy(&mut self, n: usize, switch: Switch, next: u64) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        let end = volume.stack.size.div_ceil(4096);
        if next >= end {
            // Either inside a barrier or, because both views read the same, after a flush.
            return if self.seed.one_in(2) { self.close(n, switch) } else { self.flush_for(n, switch) };
        }
        let from = match (switch, volume.stack.frozen.last()) {
            (Switch::Merge, Some(top)) => CopySource::Layer(Slot(*top)),
            _ => CopySource::Base,
        };
        let count = COPY_BLOCKS.min(end - next);
        let op = Op::CopyUp { blocks: BlockRange::new(next, count), from };
        match volume.sim.submit(op, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Copy);
                volume.life = Life::Copying { switch, next: next + count, under_way: true };
                self.note(|| format!("volume {n}: {tag:?} {op:?}"));
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    fn flush_for(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let volume = &mut self.volumes[n];
        let since = volume.model.now();
        match volume.sim.submit(Op::Flush, None) {
            Ok(tag) => {
                volume.flights.insert(tag, Flight::Flush { since });
                volume.life = Life::Flushing { switch, tag };
                self.follow(n)
            }
            Err(error) => {
                volume.life = Life::None;
                self.refused(n, &error)
            }
        }
    }

    /// The moment of a life operation.
    pub(super) fn switch(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let closed = matches!(self.volumes[n].life, Life::Closed { .. });
        self.volumes[n].life = Life::None;
        self.note(|| format!("volume {n}: switches {switch:?}"));
        match switch {
            Switch::Snapshot | Switch::Clone => self.freeze(n, switch),
            Switch::Merge | Switch::Flatten => {
                let volume = &mut self.volumes[n];
                let old = volume.sim.view().clone();
                let gone = if switch == Switch::Merge { volume.stack.frozen.pop() } else { None };
                if switch == Switch::Flatten {
                    volume.stack.image = 0;
                }
                let stack = volume.stack.clone();
                let (frozen, layers) = self.frozen(&stack.frozen);
                let index = Index { frozen, base_len: ByteLen(stack.image), ..(*old.index).clone() };
                let base = if stack.image == 0 { None } else { old.base.clone() };
                let view = View { index: Arc::new(index), layers, base, ..old.clone() };
                drop(old);
                let volume = &mut self.volumes[n];
                let epoch = Arc::downgrade(&volume.sim.republish(view));
                if closed {
                    volume.sim.resume();
                }
                let data = gone.and_then(|gone| self.files.remove(&gone));
                self.doomed.extend(data.map(|data| Doomed { epoch, data }));
                self.follow(n)
            }
        }
    }

    pub(super) fn frozen(&self, layers: &[u32]) -> (FrozenIndex, LayerFiles) {
        let index = layers.iter().fold(FrozenIndex::empty(), |below, layer| {
            below.overlaid(&self.indexes[layer], Slot(*layer), &[])
        });
        let files = layers.iter().map(|layer| (Slot(*layer), self.files[layer].clone())).collect();
        (index, LayerFiles::new(files))
    }

    /// Snapshot or clone: the head is frozen, and new ones stand on it.
    fn freeze(&mut self, n: usize, switch: Switch) -> Result<(), String> {
        let old = self.volumes[n].stack.clone();
        let head = self.next_layer;
        let second = head + 1;
        self.next_layer += 2;
        let made = disk::create_layer(&*self.storage, head, old.size, self.log_len)
            .and_then(|()| disk::create_layer(&*self.storage, second, old.size, self.log_len));
        let view = self.volumes[n].sim.view().clone();
        let data = view.head.clone().ok_or("a volume has a head")?;
        let mut frozen = old.frozen.clone();
        frozen.push(old.head);
        let stack = Stack { frozen: frozen.clone(), head, ..old.clone() };
        self.indexes.insert(old.head, view.index.head.clone());
        self.files.insert(old.head, data);
        let (index, layers) = self.frozen(&frozen);
        let opened = made.and_then(|()| {
            disk::open_head(&self.storage, &stack, index.clone(), layers.clone(), Synced::Yes)
        });
        let salt = self.salt();
        let second_opened = match (&opened, switch) {
            (Ok(_), Switch::Clone) => {
                let stack = Stack { head: second, ..stack.clone() };
                Some(
                    disk::open_over(&self.storage, &stack, index, layers, Synced::Yes)
                        .map(|sim| (stack, sim)),
                )
            }
            _ => None,
        };
        let volume = &mut self.volumes[n];
        let (state, view, files) = match (opened, &second_opened) {
            (Ok(parts), None | Some(Ok(_))) => parts,
            (Err(error), _) => return self.stay(n, &error),
            (Ok(_), Some(Err(error))) => {
                let error = error.clone();
                return self.stay(n, &error);
            }
        };
        volume.stack = stack.clone();
        volume.sim.install(state, view, files);
        let model = volume.model.snapshot(salt);
        match second_opened {
            Some(Ok((stack, sim))) => {
                self.volumes.push(Volume { stack, sim, model, flights: HashMap::new(), life: Life::None });
            }
            _ => self.snapshots.push((stack, model)),
        }
        self.follow(n)
    }

    /// A switch did not happen.
    fn stay(&mut self, n: usize, error: &Error) -> Result<(), String> {
        if self.faults == Faults::None && !self.stopped() {
            return Err(format!("a switch failed without a fault: {error}"));
        }
        self.volumes[n].sim.resume();
        self.follow(n)
    }
}
