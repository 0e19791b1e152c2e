//! The node's disks: taken, locked, and listed with the reason where one cannot be served.
//!
//! Owns which directories become disks. A disk that cannot be read stops neither the others nor the start; one that
//! another process holds does stop it, since two nodes with one configuration are a mistake. A directory where a disk
//! was before and that is empty now is a mount point without its disk, and is not made into a new one (invariant 11,
//! and the rule that an unmounted disk's mount point is never written to).

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    error::Error,
    exec::choice::{ExecutorChoice, ExecutorKind},
    image::BaseSource,
    volume::disk::{Disk, Held},
};
use uuid::Uuid;

use super::state::StateDir;
use crate::{
    api::types::{self, DiskState},
    images::DiskDir,
};

/// Which disk was last seen in which directory.
const RECORD: &str = "disks.json";
/// A disk's own record, in its directory.
const DISK_RECORD: &str = "bedplate.json";

/// A directory that the configuration names.
pub struct Slot {
    path: PathBuf,
    /// Kept also when the disk is not served, so that nobody else writes to what the image service has open.
    held: Option<Held>,
    state: State,
}

enum State {
    Taken,
    Ready(Arc<Disk>),
    Failed { reason: String },
}

/// The disks in the order of the configuration.
pub struct Disks(Vec<Slot>);

impl Disks {
    /// Lock all that can be locked. An error is a disk that another process holds.
    pub fn take(paths: &[PathBuf], state: &StateDir, executor: ExecutorChoice) -> Result<Disks, Error> {
        let mut known: BTreeMap<PathBuf, Uuid> = state.load(RECORD);
        let mut slots: Vec<Slot> = Vec::new();
        for path in paths {
            let slot = match take(path, known.get(path).copied(), executor) {
                Ok(held) => match slots.iter().find(|slot| slot.id() == Some(held.id())) {
                    Some(twin) => {
                        let reason =
                            format!("the same disk as {}, by its id {}", twin.path.display(), held.id());
                        Slot { path: path.clone(), held: None, state: State::Failed { reason } }
                    }
                    None => Slot { path: path.clone(), held: Some(held), state: State::Taken },
                },
                Err(error @ Error::InUse { .. }) => return Err(error),
                Err(error) => {
                    let state = State::Failed { reason: error.to_string() };
                    Slot { path: path.clone(), held: None, state }
                }
            };
            if let State::Failed { reason } = &slot.state {
                tracing::error!(disk = %path.display(), %reason, "disk not served");
            }
            known.extend(slot.id().map(|id| (path.clone(), id)));
            slots.push(slot);
        }
        if let Err(error) = state.store(RECORD, &known) {
            tracing::warn!(%error, "the disks are not recorded; an unmounted one will not be recognised");
        }
        Ok(Disks(slots))
    }

    /// For the image service: what is locked.
    pub fn image_dirs(&self) -> Vec<DiskDir> {
        let held = self.0.iter().filter_map(|slot| Some((slot.held.as_ref()?.id(), &slot.path)));
        held.filter_map(|(id, path)| {
            DiskDir::open(id, path)
                .inspect_err(|error| tracing::error!(disk = %path.display(), %error, "images not served"))
                .ok()
        })
        .collect()
    }

    /// Open the volumes of every disk that is locked, as far as `go_on` allows.
    pub fn serve(&mut self, bases: &Arc<dyn BaseSource>, go_on: impl Fn() -> bool) {
        for slot in &mut self.0 {
            let Some(held) = slot.held.as_ref().filter(|_| go_on()) else { continue };
            slot.state = match held.serve(bases.clone()) {
                Ok(disk) => State::Ready(disk),
                Err(error) => {
                    tracing::error!(disk = %slot.path.display(), %error, "volumes not served");
                    State::Failed { reason: error.to_string() }
                }
            };
        }
    }

    /// Those that are served.
    pub fn ready(&self) -> Vec<Arc<Disk>> {
        self.0.iter().filter_map(|slot| slot.ready().cloned()).collect()
    }

    /// The directories of all, in their order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|slot| slot.path.as_path())
    }

    /// Directories of those that are ours and cannot be served: nobody knows what their volumes stand on.
    pub fn unserved(&self) -> Vec<PathBuf> {
        let unserved = self.0.iter().filter(|slot| slot.held.is_some() && slot.ready().is_none());
        unserved.map(|slot| slot.path.clone()).collect()
    }

    /// The directory of a disk, or its id where it is none of ours.
    pub fn path_of(&self, id: Uuid) -> String {
        let slot = self.0.iter().find(|slot| slot.id() == Some(id));
        slot.map_or_else(|| id.to_string(), |slot| slot.path.display().to_string())
    }

    pub fn show(&self) -> Vec<types::Disk> {
        self.0.iter().map(Slot::show).collect()
    }
}

impl Slot {
    fn id(&self) -> Option<Uuid> {
        self.held.as_ref().map(Held::id)
    }

    fn ready(&self) -> Option<&Arc<Disk>> {
        match &self.state {
            State::Ready(disk) => Some(disk),
            State::Taken | State::Failed { .. } => None,
        }
    }

    fn show(&self) -> types::Disk {
        let space = self.ready().map(|disk| disk.space());
        let (state, message) = match (&self.state, &space) {
            (State::Failed { reason }, _) => (DiskState::Failed, Some(reason.clone())),
            (State::Taken, _) => (DiskState::Failed, Some("not open yet".to_owned())),
            (State::Ready(_), Some(Err(error))) => (DiskState::Failed, Some(error.to_string())),
            (State::Ready(_), _) => (DiskState::Ready, None),
        };
        let (free_bytes, size_bytes) = space.and_then(Result::ok).unwrap_or_default();
        types::Disk {
            id: self.id(),
            path: self.path.display().to_string(),
            state,
            message,
            size_bytes,
            free_bytes,
            executor: self.ready().map(|disk| match disk.executor_kind() {
                ExecutorKind::Ring => types::Executor::Ring,
                ExecutorKind::Blocking => types::Executor::Blocking,
            }),
        }
    }
}

/// Lock one directory; make it when nobody has seen a disk there yet.
fn take(path: &Path, known: Option<Uuid>, executor: ExecutorChoice) -> Result<Held, Error> {
    let is_disk = path.join(DISK_RECORD).exists();
    match (is_disk, known) {
        (false, Some(id)) => {
            return Err(Error::Invalid(format!(
                "the disk {id} was in {} and is not there now; mount it and restart the node, or take the directory \
                 out of {RECORD} in the state directory to begin a new disk there",
                path.display()
            )));
        }
        (false, None) => fs::create_dir_all(path).map_err(|e: io::Error| Error::io("create", path, e))?,
        (true, _) => {}
    }
    let held = Held::take(path)?.on_thread_start(bedplate_fuse::serve_io).executor(executor);
    if let Some(known) = known.filter(|known| *known != held.id()) {
        tracing::warn!(disk = %path.display(), was = %known, is = %held.id(), "another disk than last time");
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(disks: &Disks) -> Vec<Option<String>> {
        disks.show().into_iter().map(|disk| disk.message).collect()
    }

    #[test]
    fn an_empty_directory_where_a_disk_was_is_not_made_into_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let paths = [dir.path().join("a"), dir.path().join("b")];
        let disks = Disks::take(&paths, &state, ExecutorChoice::Auto).unwrap();
        assert_eq!(disks.image_dirs().len(), 2);
        drop(disks);
        fs::rename(&paths[0], dir.path().join("elsewhere")).unwrap();
        fs::create_dir(&paths[0]).unwrap();
        let disks = Disks::take(&paths, &state, ExecutorChoice::Auto).unwrap();
        assert!(failed(&disks)[0].as_ref().unwrap().contains("mount it"));
        assert_eq!(disks.image_dirs().len(), 1);
        assert_eq!(fs::read_dir(&paths[0]).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_that_is_held_stops_the_start_and_a_directory_that_is_no_disk_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let foreign = dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("letter.txt"), "dear").unwrap();
        let paths = [foreign, dir.path().join("a")];
        let disks = Disks::take(&paths, &state, ExecutorChoice::Auto).unwrap();
        assert!(failed(&disks)[0].as_ref().unwrap().contains("letter.txt"));
        assert!(matches!(Disks::take(&paths, &state, ExecutorChoice::Auto), Err(Error::InUse { .. })));
    }
}
