//! The medium under a simulated machine: the engine's own simulated storage, and what goes wrong with it.
//!
//! Owns [`Medium`], which the engine is given. Faults are armed by kind; the matching call after so many others of that kind has
//! it. Between two calls of a life operation everybody else gets a turn ([`crate::turns`]), so that it can be cut, and
//! met, anywhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bedplate_engine::{
    error::{Error, Result},
    exec::{
        simulated::Seed,
        storage::{
            EntryKind, Open, Storage, StorageFile,
            memory::{CallKind, Fault, MemoryStorage},
        },
    },
    units::{ByteRange, SECTOR_SIZE},
};
use jiff::Timestamp;
use uuid::Uuid;

use crate::{faults::FaultKind, stats::Stats, turns};

/// Where the clock of a machine starts: 2026-01-01.
const CLOCK_START: i64 = 1_767_225_600;
/// Seconds that a clock may show, so that records can say it.
const CLOCK_MAX: i64 = 253_000_000_000;
/// The file that takes up room.
const FILLER: &str = "filler";

/// A fault to come.
#[derive(Clone, Copy, Debug)]
struct Armed {
    kind: FaultKind,
    after: u64,
}

/// What of the machine outlives its restarts.
#[derive(Debug)]
struct State {
    seed: Seed,
    armed: Vec<Armed>,
    stats: Stats,
    /// Faults since the last start for which an operation may fail.
    errors: u64,
    /// Those of them that were armed, by the path of the call.
    errors_at: BTreeMap<String, u64>,
    /// Files whose unsynced bytes the medium has dropped, which whoever reads may see before the sync's error.
    dropped: BTreeSet<String>,
    clock: i64,
    ids: u64,
    stop_at: Option<u64>,
    /// The stop is the process's end, and not the machine's.
    killed: bool,
    /// The file of which a transfer went to another place.
    misdirected: Option<String>,
}

/// A machine's medium, as one process sees it.
#[derive(Clone, Debug)]
pub struct Medium {
    storage: Arc<MemoryStorage>,
    state: Arc<Mutex<State>>,
}

impl Medium {
    pub fn new(write_align: u64, seed: u64) -> Medium {
        let state = State {
            seed: Seed(seed),
            armed: Vec::new(),
            stats: Stats::default(),
            errors: 0,
            errors_at: BTreeMap::new(),
            dropped: BTreeSet::new(),
            clock: CLOCK_START,
            ids: 0,
            stop_at: None,
            killed: false,
            misdirected: None,
        };
        Medium { storage: Arc::new(MemoryStorage::new(write_align)), state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The storage that the next process finds.
    #[must_use]
    pub fn restarted(&self, storage: MemoryStorage) -> Medium {
        let mut state = self.state();
        state.armed.clear();
        state.errors = 0;
        state.errors_at.clear();
        state.dropped.clear();
        state.stop_at = None;
        state.killed = false;
        state.misdirected = None;
        drop(state);
        Medium { storage: Arc::new(storage), state: self.state.clone() }
    }

    pub fn storage(&self) -> &MemoryStorage {
        &self.storage
    }

    pub fn stats(&self) -> Stats {
        self.state().stats.clone()
    }

    /// Count a fault that happened.
    pub fn count(&self, kind: FaultKind) {
        self.state().stats.fault(kind);
    }

    pub fn arm(&self, kind: FaultKind, after: u64) {
        self.state().armed.push(Armed { kind, after });
    }

    /// Take a fault of this kind that is due.
    pub fn take(&self, kind: FaultKind) -> bool {
        self.state().due(|armed| armed == kind).is_some()
    }

    /// Faults since the last start for which an operation may fail.
    pub fn errors(&self) -> u64 {
        self.state().errors
    }

    pub fn was_dropped(&self, path: &str) -> bool {
        self.state().dropped.contains(path)
    }

    /// What is left of this file is known.
    pub fn is_known_again(&self, path: &str) {
        self.state().dropped.remove(path);
    }

    /// Faults since the last start in what lies below this directory.
    pub fn errors_below(&self, directory: &str) -> u64 {
        let state = self.state();
        let below = state.errors_at.iter().filter(|(path, _)| path.starts_with(directory));
        below.map(|(_, errors)| errors).sum()
    }

    /// The file of which a transfer went to another place since this was last asked.
    pub fn take_misdirected(&self) -> Option<String> {
        self.state().misdirected.take()
    }

    /// Let the machine stop after so many calls.
    pub fn stop_after(&self, calls: u64) {
        let at = self.storage.calls() + calls;
        self.storage.stop_at(at);
        self.state().stop_at = Some(at);
    }

    pub fn has_stopped(&self) -> bool {
        let at = self.state().stop_at;
        at.is_some_and(|at| self.storage.calls() >= at)
    }

    /// Whether a fault has killed the process.
    pub fn was_killed(&self) -> bool {
        self.state().killed
    }

    pub fn will_stop(&self) -> bool {
        self.state().stop_at.is_some()
    }

    /// Leave so many bytes of room.
    pub fn leave(&self, bytes: u64) {
        let _ = self.storage.allocate(FILLER, 0);
        let free = self.storage.free_bytes().unwrap_or(0);
        let _ = self.storage.allocate(FILLER, free.saturating_sub(bytes));
    }

    /// The fault of a call, if it has one.
    fn enter(&self, kind: CallKind, path: &str) -> Option<FaultKind> {
        if self.has_stopped() {
            return None;
        }
        let mut state = self.state();
        let fault = state.due(|armed| strikes(armed, kind, path))?;
        state.strike(fault);
        if fault.is_error() {
            *state.errors_at.entry(path.to_owned()).or_default() += 1;
        }
        Some(fault)
    }

    fn error(&self, op: &'static str, path: &str, kind: ErrorKind) -> Error {
        Error::io(op, self.full_path(path), kind.into())
    }

    /// A call on a name.
    fn named<R>(&self, kind: CallKind, path: &str, call: impl FnOnce() -> Result<R>) -> Result<R> {
        turns::others_go_on();
        match self.enter(kind, path) {
            None => self.note(call()),
            Some(FaultKind::NoSpace) => Err(self.error("make", path, ErrorKind::StorageFull)),
            Some(_) => Err(self.error("reach", path, ErrorKind::Other)),
        }
    }

    /// A medium that is full says so by itself.
    fn note<R>(&self, result: Result<R>) -> Result<R> {
        if let Err(Error::NoSpace { .. }) = &result {
            self.state().strike(FaultKind::NoSpace);
        }
        result
    }
}

impl State {
    /// Let the armed faults that match this call come nearer; returns the first that is there.
    fn due(&mut self, matches: impl Fn(FaultKind) -> bool) -> Option<FaultKind> {
        let mut found = None;
        for (n, armed) in self.armed.iter_mut().enumerate() {
            if !matches(armed.kind) {
                continue;
            }
            if armed.after > 0 {
                armed.after -= 1;
            } else if found.is_none() {
                found = Some(n);
            }
        }
        found.map(|n| self.armed.remove(n).kind)
    }

    fn strike(&mut self, kind: FaultKind) {
        self.stats.fault(kind);
        self.errors += u64::from(kind.is_error());
    }
}

/// Whether a fault can happen to a call.
fn strikes(fault: FaultKind, call: CallKind, path: &str) -> bool {
    match fault {
        FaultKind::ShortTransfer | FaultKind::Interrupted => matches!(call, CallKind::Read | CallKind::Write),
        FaultKind::TornTransfer => call == CallKind::Write,
        FaultKind::ReadError => call == CallKind::Read,
        FaultKind::WriteError => matches!(call, CallKind::Write | CallKind::Punch),
        FaultKind::FailedSync | FaultKind::DroppedSync => call == CallKind::Sync,
        // Data has no checksums: nothing is promised of it, and records are read and written whole.
        FaultKind::MisdirectedRead => call == CallKind::Read && path.ends_with("/map"),
        FaultKind::MisdirectedWrite => call == CallKind::Write && path.ends_with("/map"),
        FaultKind::NameError => {
            use CallKind::*;
            matches!(call, Create | CreateDir | Rename | Remove | SyncDir | List)
        }
        // A log is written ahead: it takes no room.
        FaultKind::NoSpace => {
            let data =
                call == CallKind::Write && (path.ends_with("/data") || path.ends_with("/partial.data"));
            data || matches!(call, CallKind::Create | CallKind::CreateDir)
        }
        _ => false,
    }
}

impl Storage for Medium {
    fn full_path(&self, path: &str) -> PathBuf {
        self.storage.full_path(path)
    }

    fn open(&self, path: &str, how: Open) -> Result<Arc<dyn StorageFile>> {
        let kind = match how {
            Open::Read | Open::ReadWrite | Open::Direct => CallKind::Open,
            Open::Create | Open::CreateDirect => CallKind::Create,
        };
        let file = self.named(kind, path, || self.storage.open(path, how))?;
        Ok(Arc::new(MediumFile { medium: self.clone(), file, name: path.to_owned() }))
    }

    fn create_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::CreateDir, path, || self.storage.create_dir(path))
    }

    fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>> {
        self.named(CallKind::List, path, || self.storage.list(path))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.named(CallKind::Rename, from, || self.storage.rename(from, to))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        self.named(CallKind::Remove, path, || self.storage.remove_file(path))
    }

    fn remove_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::Remove, path, || self.storage.remove_dir(path))
    }

    fn sync_dir(&self, path: &str) -> Result<()> {
        self.named(CallKind::SyncDir, path, || self.storage.sync_dir(path))
    }

    fn sync_names(&self) -> Result<()> {
        self.named(CallKind::SyncDir, "", || self.storage.sync_names())
    }

    /// Others do not get a turn: whoever takes the reserve holds its lock.
    fn allocate(&self, path: &str, len: u64) -> Result<()> {
        self.storage.allocate(path, len)
    }

    fn free_bytes(&self) -> Result<u64> {
        self.storage.free_bytes()
    }

    fn total_bytes(&self) -> Result<u64> {
        self.storage.total_bytes()
    }

    fn new_uuid(&self) -> Uuid {
        let mut state = self.state();
        state.ids += 1;
        let high = Seed(state.ids).number();
        Uuid::from_u64_pair(high, state.ids)
    }

    fn now(&self) -> Timestamp {
        let mut state = self.state();
        if let Some(kind) = state.due(|armed| armed == FaultKind::ClockJump) {
            state.clock = i64::try_from(state.seed.below(CLOCK_MAX.unsigned_abs())).unwrap_or(CLOCK_MAX);
            state.strike(kind);
        }
        state.clock += 1;
        Timestamp::from_second(state.clock).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    fn rest(&self, _: Duration) {
        turns::others_go_on();
    }
}

/// An open file of a [`Medium`].
#[derive(Debug)]
struct MediumFile {
    medium: Medium,
    file: Arc<dyn StorageFile>,
    name: String,
}

impl MediumFile {
    fn error(&self, op: &'static str, kind: ErrorKind) -> Error {
        Error::io(op, self.file.path(), kind.into())
    }

    /// Where a transfer of `len` bytes is cut in two: at a multiple of what writes are aligned to.
    fn part(&self, len: usize) -> usize {
        let unit = usize::try_from(self.file.write_align()).unwrap_or(512);
        let units = (len / unit) as u64;
        match units {
            0 | 1 => 0,
            _ => self.medium.state().seed.index(len / unit) * unit,
        }
    }

    /// Another place of the file for a transfer of `len` bytes at `offset`, if it is long enough to have one.
    fn elsewhere(&self, len: usize, offset: u64) -> Result<u64> {
        let places = (self.file.len()?.saturating_sub(len as u64)) / SECTOR_SIZE + 1;
        if places < 2 {
            return Ok(offset);
        }
        let mut state = self.medium.state();
        state.misdirected = Some(self.name.clone());
        let further = 1 + state.seed.below(places - 1);
        Ok((offset / SECTOR_SIZE + further) % places * SECTOR_SIZE)
    }

    fn sync_dropping(&self) -> Result<()> {
        self.medium.state().dropped.insert(self.name.clone());
        let storage = &self.medium.storage;
        storage.set_faults(|call| (call.kind == CallKind::Sync).then_some(Fault::Dropped));
        let result = self.file.sync();
        storage.clear_faults();
        // Often it is a bad time: the process dies before it can leave a mark, and the next one has to find out itself.
        let dies = self.medium.state().seed.one_in(3);
        if dies && !self.medium.will_stop() {
            self.medium.stop_after(0);
            self.medium.state().killed = true;
        }
        result
    }
}

impl StorageFile for MediumFile {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        turns::others_go_on();
        match self.medium.enter(CallKind::Read, &self.name) {
            None => self.file.read_at(buffer, offset),
            Some(FaultKind::MisdirectedRead) => {
                self.file.read_at(buffer, self.elsewhere(buffer.len(), offset)?)
            }
            Some(FaultKind::ReadError) => Err(self.error("read", ErrorKind::Other)),
            // What the system's loops make of these: they go on where it ended.
            Some(_) => {
                let at = self.part(buffer.len());
                let (first, rest) = buffer.split_at_mut(at);
                self.file.read_at(first, offset)?;
                turns::others_go_on();
                self.file.read_at(rest, offset + at as u64)
            }
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        turns::others_go_on();
        let fault = self.medium.enter(CallKind::Write, &self.name);
        match fault {
            None => self.medium.note(self.file.write_at(data, offset)),
            Some(FaultKind::NoSpace) => Err(self.error("write", ErrorKind::StorageFull)),
            Some(FaultKind::WriteError) => Err(self.error("write", ErrorKind::Other)),
            Some(FaultKind::MisdirectedWrite) => {
                self.file.write_at(data, self.elsewhere(data.len(), offset)?)
            }
            Some(FaultKind::TornTransfer) => {
                let first = &data
                    [..self.part(data.len() + usize::try_from(SECTOR_SIZE).unwrap_or(0)).min(data.len())];
                self.file.write_at(first, offset)?;
                Err(self.error("write", ErrorKind::Other))
            }
            Some(_) => {
                let (first, rest) = data.split_at(self.part(data.len()));
                self.medium.note(self.file.write_at(first, offset))?;
                turns::others_go_on();
                self.medium.note(self.file.write_at(rest, offset + first.len() as u64))
            }
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        turns::others_go_on();
        self.file.set_len(len)
    }

    fn punch(&self, range: ByteRange) -> Result<()> {
        turns::others_go_on();
        match self.medium.enter(CallKind::Punch, &self.name) {
            None => self.file.punch(range),
            Some(_) => Err(self.error("punch", ErrorKind::Other)),
        }
    }

    fn sync(&self) -> Result<()> {
        turns::others_go_on();
        match self.medium.enter(CallKind::Sync, &self.name) {
            None => self.file.sync(),
            Some(FaultKind::DroppedSync) => self.sync_dropping(),
            Some(_) => Err(self.error("sync", ErrorKind::Other)),
        }
    }

    fn drop_cache(&self) -> Result<()> {
        self.file.drop_cache()
    }

    fn write_align(&self) -> u64 {
        self.file.write_align()
    }

    fn allocated(&self) -> Result<u64> {
        self.file.allocated()
    }

    fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        self.file.data_ranges(range)
    }
}
