//! One volume: a block device with a record, holders and a state.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    layer,
    record::{ImageRef, SnapshotRecord, VolumeRecord},
};
use crate::{
    cow::core::Op,
    device::{Access, BlockDevice, Complete, Durability, Extent, Geometry, Reply, Request, check_length},
    error::{Error, Result},
    exec::{
        asynchronous::{Asynchronous, Located, Pin},
        executor::{Executor, Shared},
        fair::Key,
        pauses::Pauses,
        ring::{Gate, Workers},
        simulated::{Planning, SteppedChange, SteppedRead},
        storage::Storage,
        view::View,
    },
    image::BaseImage,
    sync::{Condvar, Mutex, MutexGuard},
    units::{ByteLen, ByteRange},
};

/// A volume of a disk.
#[derive(Debug)]
pub struct Volume {
    /// For requests that outlive their submitter's call.
    me: Weak<Volume>,
    /// Who carries out what is submitted, if not whoever submits.
    workers: Option<Arc<Workers>>,
    gate: Arc<Gate>,
    pub(super) storage: Arc<dyn Storage>,
    record: Mutex<VolumeRecord>,
    /// The record on the disk may be a later one, with fewer layers: it was renamed into place and then not synced.
    unsettled: AtomicBool,
    pub(super) backend: Backend,
    usage: Mutex<Use>,
    /// A holder has let go.
    released: Condvar,
}

/// Who uses a volume.
#[derive(Debug, Default)]
struct Use {
    holders: BTreeMap<u64, String>,
    next: u64,
    /// What is being done that nobody may hold it for.
    claim: Option<&'static str>,
}

/// What serves a volume.
#[derive(Debug)]
pub(super) enum Backend {
    Live(Executor),
    /// The head takes no writes; what is sound is read.
    ReadOnly {
        view: View,
        reason: String,
    },
}

/// How a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeState {
    Ready,
    /// Reads only, and why; `volume recover` is the way out.
    ReadOnly {
        reason: String,
    },
    /// Not served at all, and why.
    Failed {
        reason: String,
    },
}

/// What there is to know of a volume.
#[derive(Clone, Debug)]
pub struct VolumeInfo {
    pub name: String,
    /// Nil where the record could not be read.
    pub uuid: Uuid,
    pub size: ByteLen,
    /// Bytes that the volume's layers take on the disk, those that it shares too.
    pub allocated: ByteLen,
    pub image: Option<ImageRef>,
    pub snapshots: Vec<SnapshotRecord>,
    pub state: VolumeState,
    pub layer_count: usize,
    /// Who holds it.
    pub holders: Vec<String>,
    /// How long life operations (snapshot, clone, revert, resize) made changes wait since the volume was opened.
    pub pauses: Pauses,
    pub created_at: Timestamp,
}

/// Someone uses the volume until this is dropped: it is not reverted or deleted meanwhile.
#[derive(Debug)]
pub struct Hold {
    volume: Arc<Volume>,
    id: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.volume.in_use().holders.remove(&self.id);
        self.volume.released.notify_all();
    }
}

/// Nobody can take hold of the volume until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    volume: &'a Volume,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.volume.in_use().claim = None;
    }
}

impl Volume {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        workers: Option<Arc<Workers>>,
        record: VolumeRecord,
        backend: Backend,
    ) -> Arc<Volume> {
        Arc::new_cyclic(|me| Volume {
            me: me.clone(),
            workers,
            gate: Arc::default(),
            storage,
            record: Mutex::new(record),
            unsettled: AtomicBool::new(false),
            backend,
            usage: Mutex::default(),
            released: Condvar::new(),
        })
    }

    fn in_use(&self) -> MutexGuard<'_, Use> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Use the volume; `who` is named when someone else wants it alone. Refused while it is reverted or deleted.
    pub fn hold(self: &Arc<Self>, who: impl Into<String>) -> Result<Hold> {
        let mut in_use = self.in_use();
        if let Some(claim) = in_use.claim {
            return Err(Error::InUse { kind: "volume", name: self.name(), by: claim.into() });
        }
        let id = in_use.next;
        in_use.next += 1;
        in_use.holders.insert(id, who.into());
        Ok(Hold { volume: self.clone(), id })
    }

    /// Wait until nobody holds it, but no longer than `patience`.
    pub fn wait_released(&self, patience: Duration) {
        let wait =
            self.released.wait_timeout_while(self.in_use(), patience, |usage| !usage.holders.is_empty());
        drop(wait);
    }

    /// Have the volume alone for `what`; an error names the holders, if there are any.
    pub(super) fn claim(&self, what: &'static str) -> Result<Claim<'_>> {
        let mut in_use = self.in_use();
        if in_use.holders.is_empty() && in_use.claim.is_none() {
            in_use.claim = Some(what);
            return Ok(Claim { volume: self });
        }
        let holders = in_use.holders.values().map(String::as_str).chain(in_use.claim);
        let by = holders.collect::<Vec<_>>().join(", ");
        Err(Error::InUse { kind: "volume", name: self.name(), by })
    }

    pub fn record(&self) -> VolumeRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// This is its record now, also on the disk.
    pub(super) fn set_record(&self, record: VolumeRecord) {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
        self.unsettled.store(false, Ordering::Relaxed);
    }

    /// The disk may have another record than this volume.
    pub(super) fn unsettle(&self) {
        self.unsettled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Relaxed)
    }

    pub fn name(&self) -> String {
        self.record().name
    }

    pub fn uuid(&self) -> Uuid {
        self.record().uuid
    }

    /// The executor, also when it takes no more writes.
    pub(super) fn executor(&self) -> Option<&Executor> {
        match &self.backend {
            Backend::Live(executor) => Some(executor),
            Backend::ReadOnly { .. } => None,
        }
    }

    /// The executor, if the volume takes writes.
    pub(super) fn live(&self) -> Result<&Executor> {
        match &self.backend {
            Backend::Live(executor) => match executor.failed() {
                None => Ok(executor),
                Some(reason) => Err(Error::Failed { reason }),
            },
            Backend::ReadOnly { reason, .. } => Err(Error::Failed { reason: reason.as_str().into() }),
        }
    }

    /// Whether nothing of it is being written: no request, commit or checkpoint is under way.
    pub(super) fn is_quiet(&self) -> bool {
        match &self.backend {
            Backend::Live(executor) => executor.failed().is_none() || executor.is_quiet(),
            Backend::ReadOnly { .. } => true,
        }
    }

    /// What reads follow now.
    pub(super) fn view(&self) -> View {
        match &self.backend {
            Backend::Live(executor) => executor.view(),
            Backend::ReadOnly { view, .. } => view.clone(),
        }
    }

    pub fn state(&self) -> VolumeState {
        match self.live() {
            Ok(_) => VolumeState::Ready,
            Err(Error::Failed { reason }) => VolumeState::ReadOnly { reason: reason.to_string() },
            Err(error) => VolumeState::ReadOnly { reason: error.to_string() },
        }
    }

    pub fn info(&self) -> VolumeInfo {
        self.info_with(&mut HashMap::new())
    }

    /// The same, with what is known of the space of layers, which it adds to.
    pub(super) fn info_with(&self, known: &mut HashMap<Uuid, u64>) -> VolumeInfo {
        let record = self.record();
        let allocated = record.layers.iter().map(|layer| layer.uuid);
        let allocated =
            allocated.map(|layer| *known.entry(layer).or_insert_with(|| self.allocated(layer))).sum();
        VolumeInfo {
            uuid: record.uuid,
            size: ByteLen(record.size_bytes),
            allocated: ByteLen(allocated),
            layer_count: record.layers.len(),
            state: self.state(),
            holders: self.in_use().holders.values().cloned().collect(),
            pauses: self.executor().map(Executor::pauses).unwrap_or_default(),
            created_at: record.created_at,
            name: record.name,
            image: record.image,
            // Names with a dot in front are Bedplate's own.
            snapshots: record.snapshots.into_iter().filter(|s| !s.name.starts_with('.')).collect(),
        }
    }

    /// Bytes that a layer takes; a layer that is going away just now takes none.
    fn allocated(&self, layer: Uuid) -> u64 {
        let dir = layer::dir(layer);
        if let Some(head) = self.executor().map(Executor::head).filter(|head| head.dir == dir) {
            return head.data.allocated().unwrap_or(0);
        }
        let path = crate::exec::head::data_path(&dir);
        let file = self.storage.open(&path, crate::exec::storage::Open::Read);
        file.and_then(|file| file.allocated()).unwrap_or(0)
    }
}

impl BlockDevice for Volume {
    fn geometry(&self) -> Geometry {
        match &self.backend {
            Backend::Live(executor) => executor.geometry(),
            Backend::ReadOnly { view, .. } => Geometry { size: view.size(), access: Access::ReadOnly },
        }
    }

    fn submit(&self, request: Request, complete: Complete) {
        if let (Some(workers), Some(me)) = (&self.workers, self.me.upgrade()) {
            return workers.submit(me, &self.gate, request, complete);
        }
        match (&self.backend, request) {
            (Backend::Live(executor), request) => executor.submit(request, complete),
            (Backend::ReadOnly { view, .. }, Request::Read { offset, mut buffer }) => {
                let result = view.read_at(&mut buffer, offset);
                complete(Reply { result, buffer });
            }
            (Backend::ReadOnly { .. }, _) => complete(Reply { result: self.refuse(), buffer: Vec::new() }),
        }
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        match &self.backend {
            Backend::Live(executor) => executor.extents(range),
            Backend::ReadOnly { view, .. } => view.extents(range),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if let Some((workers, me)) = self.calls_taken() {
            return workers.read(me, &self.gate, buffer, offset);
        }
        match &self.backend {
            Backend::Live(executor) => executor.read_at(buffer, offset),
            Backend::ReadOnly { view, .. } => {
                check_length(buffer.len() as u64)?;
                view.read_at(buffer, offset)
            }
        }
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> Result<()> {
        if let Some((workers, me)) = self.calls_taken() {
            return workers.write(me, &self.gate, data, offset, durability);
        }
        match &self.backend {
            Backend::Live(executor) => executor.write_at(data, offset, durability),
            Backend::ReadOnly { .. } => self.refuse(),
        }
    }

    fn zero(&self, range: ByteRange, durability: Durability) -> Result<()> {
        if let Some((workers, me)) = self.calls_taken() {
            return workers.zero(me, &self.gate, range, durability);
        }
        match &self.backend {
            Backend::Live(executor) => executor.zero(range, durability),
            Backend::ReadOnly { .. } => self.refuse(),
        }
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.zero(range, Durability::Volatile)
    }

    fn flush(&self) -> Result<()> {
        if let Some((workers, me)) = self.calls_taken() {
            return workers.flush(me, &self.gate);
        }
        match &self.backend {
            Backend::Live(executor) => executor.flush(),
            Backend::ReadOnly { .. } => self.refuse(),
        }
    }

    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        Some(self)
    }
}

impl Asynchronous for Volume {
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<Pin> {
        match &self.backend {
            Backend::Live(executor) => executor.locate(range, found),
            Backend::ReadOnly { view, .. } => view.locate(range, found).map(|()| Pin::DEVICE),
        }
    }

    fn confirm(&self, range: ByteRange) -> Result<()> {
        match &self.backend {
            Backend::Live(executor) => executor.confirm(range),
            Backend::ReadOnly { .. } => Ok(()),
        }
    }

    fn waits_for(&self) -> Key {
        match &self.backend {
            Backend::Live(executor) => executor.waits_for(),
            Backend::ReadOnly { view, .. } => view.waits_for(),
        }
    }

    fn changes(&self) -> Result<&Arc<Shared>> {
        match &self.backend {
            Backend::Live(executor) => executor.changes(),
            Backend::ReadOnly { reason, .. } => Err(Error::Failed { reason: reason.as_str().into() }),
        }
    }
}

/// For a simulated machine, which chooses every step.
impl Volume {
    /// Start a change or flush; `data` are a write's bytes.
    pub fn step_change(&self, op: Op, data: Option<Vec<u8>>) -> Result<SteppedChange> {
        SteppedChange::start(self.live()?, op, data)
    }

    /// Start a read of `range`, which lies within the volume.
    pub fn step_read(&self, range: ByteRange, planning: Planning) -> SteppedRead {
        SteppedRead::start(self.executor(), self.view(), range, planning)
    }
}

impl Volume {
    /// Who carries a call of this thread out, if not itself.
    fn calls_taken(&self) -> Option<(&Arc<Workers>, Arc<Volume>)> {
        let workers = self.workers.as_ref().filter(|workers| workers.take_calls())?;
        Some((workers, self.me.upgrade()?))
    }

    fn refuse(&self) -> Result<()> {
        self.live().map(|_| ())
    }
}

/// A snapshot, or a volume at one moment: reads only.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) view: View,
    /// On a volume that takes no writes, whose head is read itself: recovering it would have it written to.
    pub(super) _hold: Option<Hold>,
}

impl BlockDevice for Snapshot {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.view.size(), access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let (result, buffer) = match request {
            Request::Read { offset, mut buffer } => (BlockDevice::read_at(self, &mut buffer, offset), buffer),
            Request::Write { data: buffer, .. } => (Err(self.refusal()), buffer),
            Request::Zero { .. } | Request::Discard { .. } => (Err(self.refusal()), Vec::new()),
            Request::Flush => (Ok(()), Vec::new()),
        };
        complete(Reply { result, buffer });
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.view.extents(range)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        check_length(buffer.len() as u64)?;
        self.view.read_at(buffer, offset)
    }

    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        Some(self)
    }
}

impl Asynchronous for Snapshot {
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<Pin> {
        self.view.locate(range, found).map(|()| Pin::DEVICE)
    }

    fn confirm(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn waits_for(&self) -> Key {
        self.view.waits_for()
    }

    fn changes(&self) -> Result<&Arc<Shared>> {
        Err(self.refusal())
    }
}

/// What is copied: bytes that stay as they are.
impl BaseImage for Snapshot {
    fn len(&self) -> ByteLen {
        self.view.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        BlockDevice::read_at(self, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.view.extents(range)
    }
}

impl Snapshot {
    fn refusal(&self) -> Error {
        Error::ReadOnly { what: "a snapshot".into() }
    }
}
