//! A simulated medium: files and names with a volatile and a durable state.
//!
//! Owns [`MemoryStorage`]. What is not synced is kept apart from what is: each unsynced sector value, length and name is
//! an [`Effect`] of its own, and [`MemoryStorage::crash`] lets its caller choose which of them survive, in any subset,
//! as `docs/design.md` assumes of a medium. [`MemoryStorage::kill`] is the death of the process alone: everything stays
//! (also what a later crash may drop), open files die. Faults are injected by a hook that sees every call ([`Call`]);
//! [`MemoryStorage::stop_at`] makes every call from a given one on fail, so that blocking code can be cut anywhere.
//! `file.rs` is the content of one file, `names.rs` the directory tree, `open.rs` both behind the traits.

mod file;
mod names;
mod open;

use std::{
    collections::HashSet,
    fmt, io,
    sync::{Arc, PoisonError},
};

use self::names::Names;
use super::{EntryKind, Storage};
use crate::{
    error::{Error, Result},
    sync::{Mutex, MutexGuard},
};

/// Bytes of the medium unless [`MemoryStorage::limit`] says less.
const CAPACITY: u64 = 1 << 40;

/// What a call of the storage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallKind {
    Open,
    Create,
    Read,
    Write,
    SetLen,
    Punch,
    Sync,
    DropCache,
    List,
    CreateDir,
    Rename,
    Remove,
    SyncDir,
    Allocate,
}

impl CallKind {
    /// Whether a full medium may refuse it.
    pub fn takes_space(self) -> bool {
        matches!(self, CallKind::Create | CallKind::Write | CallKind::CreateDir | CallKind::Allocate)
    }

    /// Whether a crash before it may leave something else than a crash after it.
    fn is_change(self) -> bool {
        !matches!(self, CallKind::Open | CallKind::Read | CallKind::DropCache | CallKind::List)
    }
}

/// One call, before it is carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub kind: CallKind,
    pub path: String,
    /// Counted from 0 over the life of the medium.
    pub number: u64,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens, and this error.
    Error(io::ErrorKind),
    /// Of a write: this many sectors of it happen, then EIO.
    Torn { sectors: usize },
    /// Of a sync: what was not synced is dropped from the medium. A buffered file goes on showing it until
    /// [`drop_cache`](super::StorageFile::drop_cache), and its next sync succeeds.
    Dropped,
}

/// Sees every call and may make it fail.
pub type FaultHook = Box<dyn FnMut(&Call) -> Option<Fault> + Send>;

/// Something that a crash may keep or lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// The newer values of a sector.
    Sector { file: u64, sector: u64 },
    /// The newer lengths of a file.
    Length { file: u64 },
    /// A name that was made, removed or renamed.
    Name { number: u64 },
}

/// A directory tree in memory.
#[derive(Debug)]
pub struct MemoryStorage {
    shared: Arc<Shared>,
    /// The process that opened this, see [`MemoryStorage::kill`].
    life: u64,
}

#[derive(Debug)]
struct Shared {
    medium: Mutex<Medium>,
    /// Write alignment of files past the page cache.
    write_align: u64,
}

struct Medium {
    names: Names,
    life: u64,
    calls: u64,
    stop_at: Option<u64>,
    /// The medium before each call that changes it, while that is recorded.
    cuts: Option<Vec<Names>>,
    limit: u64,
    hook: Option<FaultHook>,
}

impl fmt::Debug for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Medium").field("life", &self.life).field("calls", &self.calls).finish_non_exhaustive()
    }
}

/// The inner error of calls after [`MemoryStorage::stop_at`] or of a process that was killed.
#[derive(Debug, thiserror::Error)]
#[error("the simulated machine has stopped")]
pub struct Stopped;

/// Whether this is what a stopped machine answers.
pub fn is_stopped(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.get_ref().is_some_and(|inner| inner.is::<Stopped>()))
}

impl MemoryStorage {
    /// An empty medium whose direct files take writes at multiples of `write_align`: 512 or 4096.
    pub fn new(write_align: u64) -> MemoryStorage {
        MemoryStorage::over(Names::new(), write_align, CAPACITY)
    }

    fn over(names: Names, write_align: u64, limit: u64) -> MemoryStorage {
        let medium = Medium { names, life: 0, calls: 0, stop_at: None, cuts: None, limit, hook: None };
        MemoryStorage { shared: Arc::new(Shared { medium: Mutex::new(medium), write_align }), life: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Medium> {
        self.shared.lock()
    }

    /// The machine as it starts again after a power cut: of each unsynced [`Effect`] `choose(effect, n)` picks one of
    /// `n` outcomes, 0 for the durable one, `n - 1` for the newest. This medium stays as it is, so that one history can
    /// be cut many ways.
    #[must_use]
    pub fn crash(&self, mut choose: impl FnMut(Effect, usize) -> usize) -> MemoryStorage {
        let medium = self.lock();
        MemoryStorage::over(medium.names.survivors(&mut choose), self.shared.write_align, medium.limit)
    }

    /// A crash that loses everything that was not synced.
    #[must_use]
    pub fn crash_losing_all(&self) -> MemoryStorage {
        self.crash(|_, _| 0)
    }

    /// A copy of the medium as it is, with nothing unsynced lost and nothing synced by that.
    #[must_use]
    pub fn fork(&self) -> MemoryStorage {
        let medium = self.lock();
        MemoryStorage::over(medium.names.clone(), self.shared.write_align, medium.limit)
    }

    /// The same medium after the process was killed: what it had open fails from now on.
    #[must_use]
    pub fn kill(&self) -> MemoryStorage {
        let mut medium = self.lock();
        medium.life += 1;
        medium.stop_at = None;
        MemoryStorage { shared: self.shared.clone(), life: medium.life }
    }

    /// The effects that a crash may be asked about, with their numbers of outcomes. Files that only some outcomes give
    /// a name are among them.
    pub fn unsynced(&self) -> Vec<(Effect, usize)> {
        let mut found: Vec<(Effect, usize)> = Vec::new();
        let mut known = HashSet::new();
        for newest in [false, true] {
            drop(self.crash(|effect, outcomes| {
                if known.insert(effect) {
                    found.push((effect, outcomes));
                }
                if newest { outcomes - 1 } else { 0 }
            }));
        }
        found
    }

    /// Sectors, by file and number, that were given back and would not be after a crash that loses all.
    pub fn unsynced_holes(&self) -> HashSet<(u64, u64)> {
        self.lock().names.unsynced_holes()
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Let the call with this number and every later one fail as on a machine that has stopped.
    pub fn stop_at(&self, number: u64) {
        self.lock().stop_at = Some(number);
    }

    /// Remember the medium before each call that changes it from now on.
    pub fn record_cuts(&self) {
        self.lock().cuts = Some(Vec::new());
    }

    /// The media that were recorded, the last being this one as it is now; recording ends.
    pub fn take_cuts(&self) -> Vec<MemoryStorage> {
        let mut medium = self.lock();
        let (align, limit) = (self.shared.write_align, medium.limit);
        let cuts = medium.cuts.take().unwrap_or_default();
        let all = cuts.into_iter().chain([medium.names.clone()]);
        all.map(|names| MemoryStorage::over(names, align, limit)).collect()
    }

    /// Let `hook` see every call from now on.
    pub fn set_faults(&self, hook: impl FnMut(&Call) -> Option<Fault> + Send + 'static) {
        self.lock().hook = Some(Box::new(hook));
    }

    /// No more faults.
    pub fn clear_faults(&self) {
        self.lock().hook = None;
    }

    /// Bytes that the medium has.
    pub fn limit(&self, bytes: u64) {
        self.lock().limit = bytes;
    }

    /// Bytes taken.
    pub fn used_bytes(&self) -> u64 {
        self.lock().names.used_bytes()
    }

    /// Change the durable bytes of a file, as a decaying medium does.
    pub fn damage(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut medium = self.lock();
        let node = medium.names.find(path).map_err(|kind| self.error("damage", path, kind))?;
        let file = medium.names.file_mut(node).map_err(|kind| self.error("damage", path, kind))?;
        let mut bytes = file.bytes();
        change(&mut bytes);
        file.replace(&bytes);
        Ok(())
    }

    /// The bytes of a file as reads show them.
    pub fn bytes(&self, path: &str) -> Result<Vec<u8>> {
        let mut medium = self.lock();
        let node = medium.names.find(path).map_err(|kind| self.error("read", path, kind))?;
        Ok(medium.names.file_mut(node).map_err(|kind| self.error("read", path, kind))?.bytes())
    }

    fn error(&self, op: &'static str, path: &str, kind: io::ErrorKind) -> Error {
        Error::io(op, self.full_path(path), kind.into())
    }

    /// Count a call of a name operation and carry it out.
    fn named<R>(
        &self,
        kind: CallKind,
        op: &'static str,
        path: &str,
        work: impl FnOnce(&mut Medium) -> Result<R, io::ErrorKind>,
    ) -> Result<R> {
        let mut medium = self.lock();
        match medium.enter(self.life, kind, path)? {
            Some(Fault::Error(error)) => Err(self.error(op, path, error)),
            Some(Fault::Torn { .. } | Fault::Dropped) => Err(self.error(op, path, io::ErrorKind::Other)),
            None => work(&mut medium).map_err(|kind| self.error(op, path, kind)),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Medium {
    /// Count a call and ask the hook.
    fn enter(&mut self, life: u64, kind: CallKind, path: &str) -> Result<Option<Fault>> {
        let number = self.calls;
        if life != self.life || self.stop_at.is_some_and(|at| number >= at) {
            return Err(Error::io("reach", path, io::Error::other(Stopped)));
        }
        self.calls += 1;
        if kind.is_change()
            && let Some(cuts) = &mut self.cuts
        {
            cuts.push(self.names.clone());
        }
        let Some(hook) = &mut self.hook else { return Ok(None) };
        Ok(hook(&Call { kind, path: path.to_owned(), number }))
    }

    fn free(&self) -> u64 {
        match self.limit {
            // There is no end to it: nothing is counted.
            CAPACITY => CAPACITY,
            limit => limit.saturating_sub(self.names.used_bytes()),
        }
    }
}
