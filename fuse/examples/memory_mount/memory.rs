//! Disks in memory, and a node that has nothing else: for tests and for the example.
//!
//! [`MemoryDevice`] models durability: what was written and not made durable is lost by [`MemoryDevice::crash`]. It
//! keeps a record of what it was asked, can hold requests back until a test lets them go, and can fail them.

use std::{
    collections::BTreeMap,
    fs::File,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Durability, Extent, ExtentKind, Geometry, Reply, Request},
    error::{Error, Result},
    units::{BLOCK_BYTES, BLOCK_SIZE, ByteLen, ByteRange, to_usize},
};
use bedplate_fuse::{FileEntry, FileId, Kind, ListedFile, Namespace, OpenFile};

/// How long a request that is held back waits at most.
const HOLD_MAX: Duration = Duration::from_secs(20);

/// What a device was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    Read { offset: u64, len: usize },
    Write { offset: u64, len: usize, durability: Durability },
    Zero { range: ByteRange, durability: Durability },
    Discard { range: ByteRange },
    Flush,
}

/// A sparse disk in memory.
pub struct MemoryDevice {
    state: Mutex<State>,
    access: Access,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
}

struct State {
    size: u64,
    live: Blocks,
    durable: Blocks,
    asked: Vec<Asked>,
    fault: Option<Error>,
    panic_at: Option<u64>,
}

type Blocks = BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>;

/// Holds requests back until as many as `needed` are inside at once.
#[derive(Default)]
struct Gate {
    needed: usize,
    inside: usize,
    most_inside: usize,
}

impl MemoryDevice {
    pub fn volume(size: u64) -> Arc<MemoryDevice> {
        MemoryDevice::new(size, Blocks::new(), Access::ReadWrite)
    }

    pub fn image(content: Vec<u8>) -> Arc<MemoryDevice> {
        let mut blocks = Blocks::new();
        store(&mut blocks, 0, &content);
        let size = content.len().try_into().unwrap_or(u64::MAX);
        MemoryDevice::new(size, blocks, Access::ReadOnly)
    }

    fn new(size: u64, blocks: Blocks, access: Access) -> Arc<MemoryDevice> {
        let state = State {
            size,
            durable: blocks.clone(),
            live: blocks,
            asked: Vec::new(),
            fault: None,
            panic_at: None,
        };
        Arc::new(MemoryDevice {
            state: Mutex::new(state),
            access,
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        assert!(state.panic_at != Some(offset), "a test asked for a panic here");
        state.admit(Asked::Read { offset, len: buffer.len() })?;
        load(&state.live, offset, buffer);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<()> {
        let _inside = self.pass_gate();
        let mut state = self.state();
        state.admit(Asked::Write { offset, len: data.len(), durability })?;
        store(&mut state.live, offset, data);
        match durability {
            Durability::Volatile => {}
            Durability::Fua => store(&mut state.durable, offset, data),
        }
        Ok(())
    }

    fn clear(&self, range: ByteRange, asked: Asked, durability: Durability) -> Result<()> {
        let mut state = self.state();
        state.admit(asked)?;
        clear(&mut state.live, range);
        match durability {
            Durability::Volatile => {}
            Durability::Fua => clear(&mut state.durable, range),
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.state();
        state.admit(Asked::Flush)?;
        state.durable = state.live.clone();
        Ok(())
    }

    /// Go in, and wait there until enough others are in as well.
    fn pass_gate(&self) -> Inside<'_> {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.inside += 1;
        gate.most_inside = gate.most_inside.max(gate.inside);
        self.gate_changed.notify_all();
        let waited =
            self.gate_changed.wait_timeout_while(gate, HOLD_MAX, |gate| gate.most_inside < gate.needed);
        let (mut gate, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            // They do not come; nobody else is to wait for them.
            gate.needed = 0;
            self.gate_changed.notify_all();
        }
        drop(gate);
        Inside(self)
    }
}

/// What only tests use.
#[allow(dead_code, reason = "the example uses a part of this file, each test another")]
impl MemoryDevice {
    /// Lose everything that was not made durable.
    pub fn crash(&self) {
        let mut state = self.state();
        state.live = state.durable.clone();
    }

    pub fn grow(&self, size: u64) {
        self.state().size = size;
    }

    /// Everything that it was asked since the last call.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    /// Fail every request from now on.
    pub fn fail_with(&self, fault: Error) {
        self.state().fault = Some(fault);
    }

    /// Panic at every read from this offset.
    pub fn panic_at(&self, offset: u64) {
        self.state().panic_at = Some(offset);
    }

    /// The content, without asking the device.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        load(&self.state().live, offset, &mut bytes);
        bytes
    }

    /// Put content there, durably and without a trace.
    pub fn poke(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        store(&mut state.live, offset, data);
        store(&mut state.durable, offset, data);
    }

    /// Hold writes back until `count` are inside at once.
    pub fn hold_writes_until(&self, count: usize) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        *gate = Gate { needed: count, inside: gate.inside, most_inside: gate.inside };
        self.gate_changed.notify_all();
    }

    /// The most writes that were inside at once.
    pub fn most_writes_inside(&self) -> usize {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).most_inside
    }
}

struct Inside<'d>(&'d MemoryDevice);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner).inside -= 1;
    }
}

impl State {
    /// Record what was asked; refuse what lies outside, and everything after a fault was set.
    fn admit(&mut self, asked: Asked) -> Result<()> {
        let range = match &asked {
            Asked::Read { offset, len } | Asked::Write { offset, len, .. } => {
                Some((*offset, u64::try_from(*len).unwrap_or(u64::MAX)))
            }
            Asked::Zero { range, .. } | Asked::Discard { range } => Some((range.start.0, range.len.0)),
            Asked::Flush => None,
        };
        self.asked.push(asked);
        if let Some((start, len)) = range {
            ByteRange::within(start, len, ByteLen(self.size))?;
        }
        self.fault.clone().map_or(Ok(()), Err)
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.state().size), access: self.access }
    }

    fn submit(&self, request: Request, complete: Complete) {
        complete(match request {
            Request::Read { offset, mut buffer } => Reply { result: self.read(offset, &mut buffer), buffer },
            Request::Write { offset, data, durability } => {
                Reply { result: self.write(offset, &data, durability), buffer: data }
            }
            Request::Zero { range, durability } => {
                Reply { result: self.zero(range, durability), buffer: Vec::new() }
            }
            Request::Discard { range } => Reply { result: self.discard(range), buffer: Vec::new() },
            Request::Flush => Reply { result: self.sync(), buffer: Vec::new() },
        });
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let state = self.state();
        let end = range.end().0;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start.0;
        while at < end {
            let block = at / BLOCK_SIZE;
            let (kind, next) = match state.live.range(block..).next() {
                Some((data, _)) if *data == block => (ExtentKind::Data, block + 1),
                Some((data, _)) => (ExtentKind::Zero, *data),
                None => (ExtentKind::Zero, end.div_ceil(BLOCK_SIZE)),
            };
            let next = (next * BLOCK_SIZE).min(end);
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.len.0 += next - at,
                _ => extents.push(Extent { range: ByteRange::new(at, next - at), kind }),
            }
            at = next;
        }
        Ok(extents)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.read(offset, buffer)
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> Result<()> {
        self.write(offset, data, durability)
    }

    fn zero(&self, range: ByteRange, durability: Durability) -> Result<()> {
        self.clear(range, Asked::Zero { range, durability }, durability)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.clear(range, Asked::Discard { range }, Durability::Volatile)
    }
}

/// Each block that a range touches: its number, where in it, and how far into the range.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = offset + u64::try_from(done).unwrap_or(u64::MAX);
        let start = to_usize(at % BLOCK_SIZE);
        let count = (BLOCK_BYTES - start).min(len - done);
        let part = (at / BLOCK_SIZE, start, done, count);
        done += count;
        Some(part)
    })
}

fn load(blocks: &Blocks, offset: u64, buffer: &mut [u8]) {
    for (block, start, done, count) in parts(offset, buffer.len()) {
        match blocks.get(&block) {
            Some(bytes) => buffer[done..done + count].copy_from_slice(&bytes[start..start + count]),
            None => buffer[done..done + count].fill(0),
        }
    }
}

fn store(blocks: &mut Blocks, offset: u64, data: &[u8]) {
    for (block, start, done, count) in parts(offset, data.len()) {
        let bytes = blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_BYTES]));
        bytes[start..start + count].copy_from_slice(&data[done..done + count]);
    }
}

fn clear(blocks: &mut Blocks, range: ByteRange) {
    let whole = range.start.0.div_ceil(BLOCK_SIZE)..range.end().0 / BLOCK_SIZE;
    for (block, start, _, count) in parts(range.start.0, to_usize(range.len.0)) {
        if let Some(bytes) = blocks.get_mut(&block) {
            bytes[start..start + count].fill(0);
        }
    }
    blocks.retain(|block, _| !whole.contains(block));
}

/// A node whose files are [`MemoryDevice`]s.
#[derive(Default)]
pub struct MemoryNamespace {
    files: Mutex<BTreeMap<FileId, MemoryFile>>,
}

#[derive(Clone)]
struct MemoryFile {
    name: String,
    device: Arc<MemoryDevice>,
    /// The image's own file, if it has one.
    backing: Option<PathBuf>,
    modified: SystemTime,
    opens: Arc<AtomicUsize>,
}

/// Counts an opening for as long as it lives.
struct Hold(Arc<AtomicUsize>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl MemoryNamespace {
    pub fn add(&self, file: FileId, name: &str, device: Arc<MemoryDevice>) {
        self.add_backed(file, name, device, None);
    }

    pub fn add_backed(&self, file: FileId, name: &str, device: Arc<MemoryDevice>, backing: Option<PathBuf>) {
        let entry = MemoryFile {
            name: name.into(),
            device,
            backing,
            modified: SystemTime::now(),
            opens: Arc::default(),
        };
        self.files().insert(file, entry);
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<FileId, MemoryFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What only tests use.
#[allow(dead_code, reason = "the example uses a part of this file, each test another")]
impl MemoryNamespace {
    pub fn remove(&self, file: FileId) {
        self.files().remove(&file);
    }

    /// How often a file is open.
    pub fn open_count(&self, file: FileId) -> usize {
        self.files().get(&file).map_or(0, |entry| entry.opens.load(Ordering::SeqCst))
    }
}

impl MemoryFile {
    fn entry(&self, id: FileId) -> FileEntry {
        let state = self.device.state();
        FileEntry {
            name: self.name.clone(),
            id,
            size: state.size,
            allocated_bytes: BLOCK_SIZE * u64::try_from(state.live.len()).unwrap_or(u64::MAX),
            modified: self.modified,
            access: self.device.access,
        }
    }
}

impl Namespace for MemoryNamespace {
    fn list(&self, kind: Kind) -> Vec<ListedFile> {
        let files = self.files();
        let of_kind = files.iter().filter(|(id, _)| id.kind == kind);
        of_kind.map(|(id, file)| ListedFile { name: file.name.clone(), id: *id }).collect()
    }

    fn lookup(&self, kind: Kind, name: &str) -> Option<FileEntry> {
        let files = self.files();
        let found = files.iter().find(|(id, file)| id.kind == kind && file.name == name);
        found.map(|(id, file)| file.entry(*id))
    }

    fn stat(&self, file: FileId) -> Option<FileEntry> {
        self.files().get(&file).map(|entry| entry.entry(file))
    }

    fn open(&self, file: FileId) -> Result<OpenFile> {
        let not_found = || Error::NotFound { kind: file.kind.directory(), name: file.uuid.to_string() };
        let entry = self.files().get(&file).cloned().ok_or_else(not_found)?;
        let open = |path: PathBuf| File::open(&path).map(Arc::new).map_err(|e| Error::io("open", path, e));
        let passthrough = entry.backing.map(open).transpose()?;
        entry.opens.fetch_add(1, Ordering::SeqCst);
        Ok(OpenFile { device: entry.device, passthrough, hold: Box::new(Hold(entry.opens)) })
    }
}
