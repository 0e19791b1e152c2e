//! A live volume: one core and one published view, whoever uses it.
//!
//! Owns [`Executor`]. The actions of an operation go to whoever submitted it, its carrier: a thread that may wait
//! carries them out itself (`blocking.rs`), a worker puts them onto its ring (`ring`). Actions of other operations that
//! a completion sets free go to those operations' carriers, and housekeeping to a [`Pool`]. The core is entered under a
//! short lock, never across I/O. Reads take no lock: they load the published [`View`] and follow it.

use std::{
    sync::{Arc, OnceLock, PoisonError, Weak},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use rustc_hash::FxHashMap;

use super::{
    asynchronous::{Asynchronous, Located, Pin},
    carrier::{Carrier, Message, Planned, Reporter},
    fair::{Key, key_of},
    head::HeadFiles,
    pauses::Pauses,
    pool::Pool,
    request::Buffers,
    reserve::Reserve,
    view::{View, uncertain_bytes},
};
use crate::{
    cow::{
        blocks::BlockSet,
        core::{ActionId, CopySource, Core, HeadState, Op, OpId, Output, Step},
        map::log::LogEnd,
        plan::Index,
    },
    device::{
        Access, BlockDevice, Complete, Durability, Extent, ExtentKind, Geometry, Reply, Request, check_length,
    },
    error::{Error, Result},
    sync::{Condvar, Mutex, MutexGuard},
    units::{BlockRange, ByteRange},
};

/// How long a volume that is dropped waits for its housekeeping; longer than that, its medium hangs.
pub const CLOSE_WAIT_MAX: Duration = Duration::from_secs(10);

/// A volume whose head takes writes. Dropping it waits for what it still has under way, so that the disk can be opened
/// again at once.
#[derive(Debug)]
pub struct Executor {
    shared: Arc<Shared>,
}

/// What every carrier of the volume's operations holds.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    live: ArcSwap<Live>,
    /// Indexes that were replaced; a reader may still follow one while it can be upgraded.
    epochs: Mutex<Vec<Weak<Index>>>,
    /// Set when the layer fails, before anybody is told of it: [`Core::uncertain`].
    uncertain: OnceLock<Arc<BlockSet>>,
    housekeeper: Arc<Pool>,
    housekeeping: Arc<Housekeeping>,
    pauses: Mutex<Pauses>,
}

/// Actions of this volume that the housekeeper has. Apart from [`Shared`], which each of them holds.
#[derive(Debug, Default)]
struct Housekeeping {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Housekeeping {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) -> Housework {
        *self.lock() += 1;
        Housework(self.clone())
    }
}

/// One such action, until this is dropped.
struct Housework(Arc<Housekeeping>);

impl Drop for Housework {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.changed.notify_all();
    }
}

/// What the volume is made of between two life operations.
#[derive(Debug)]
pub struct Live {
    pub(super) view: View,
    pub(super) head: Arc<HeadFiles>,
}

#[derive(Debug)]
struct State {
    core: Core,
    carriers: FxHashMap<OpId, Carrier>,
}

impl State {
    /// Hand out what came of a call; returns what nobody waits for, which is not put under a lock: its queue may block.
    #[must_use]
    fn dispatch(&mut self, step: Step, live: &Arc<Live>, reporter: &mut Reporter<'_>) -> Vec<Planned> {
        let mut housekeeping = Vec::new();
        for action in step.actions {
            let carrier = action.op.and_then(|op| self.carriers.get(&op));
            let planned = Planned { action, live: live.clone() };
            match carrier {
                Some(carrier) => carrier.tell(Message::Do(planned), reporter),
                None => housekeeping.push(planned),
            }
        }
        for (op, result) in step.finished {
            if let Some(carrier) = self.carriers.remove(&op) {
                carrier.tell(Message::Done(result), reporter);
            }
        }
        housekeeping
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let reads follow `live`. Whoever follows what was before holds its epoch.
    fn publish(&self, live: Live) {
        let old = self.live.swap(Arc::new(live));
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        epochs.retain(|epoch| epoch.strong_count() > 0);
        epochs.push(Arc::downgrade(&old.view.index));
    }

    fn keep_house(self: &Arc<Self>, actions: Vec<Planned>) {
        for planned in actions {
            let work = self.housekeeping.begin();
            let shared = self.clone();
            self.housekeeper.run(key_of(self), move || {
                // Dropped last: whoever waits for it finds nothing open that this action had.
                let _work = work;
                let (shared, planned) = (shared, planned);
                let result = planned.carry_out(&mut Buffers::default());
                shared.complete(planned.action.id, result, &mut Reporter::Thread);
            });
        }
    }

    /// Start an operation; an error means that it did not start. What it leads to comes to `carrier`.
    pub(super) fn submit(
        self: &Arc<Self>,
        op: Op,
        carrier: Carrier,
        reporter: &mut Reporter<'_>,
    ) -> Result<()> {
        let housekeeping = {
            let mut state = self.lock();
            let (id, step) = state.core.submit(op)?;
            state.carriers.insert(id, carrier);
            state.dispatch(step, &self.live.load(), reporter)
        };
        self.keep_house(housekeeping);
        Ok(())
    }

    /// An action has ended.
    pub(super) fn complete(
        self: &Arc<Self>,
        action: ActionId,
        result: Result<Output>,
        reporter: &mut Reporter<'_>,
    ) {
        let housekeeping = {
            let mut state = self.lock();
            let step = state.core.complete(action, result);
            if let Some(blocks) = state.core.uncertain() {
                self.uncertain.get_or_init(|| blocks.clone());
            }
            state.dispatch(step, &self.live.load(), reporter)
        };
        self.keep_house(housekeeping);
    }

    /// Take no more changes, as after a sync that failed with `error`. To be called before the actions of which nobody
    /// knows the end are reported.
    pub(super) fn fail(self: &Arc<Self>, error: &Error, reporter: &mut Reporter<'_>) {
        let housekeeping = {
            let mut state = self.lock();
            let step = state.core.lose(error);
            if let Some(blocks) = state.core.uncertain() {
                self.uncertain.get_or_init(|| blocks.clone());
            }
            state.dispatch(step, &self.live.load(), reporter)
        };
        self.keep_house(housekeeping);
    }

    pub(super) fn housekeeper(&self) -> &Pool {
        &self.housekeeper
    }

    /// The disk's reserve, which decides whether a change that takes space may start.
    pub(super) fn reserve(&self) -> Arc<Reserve> {
        self.live.load().head.reserve.clone()
    }

    /// The first bytes of `range` that cannot be read since the layer failed. Asked *after* the bytes were looked for: a
    /// failure that comes between the two then counts.
    pub(super) fn uncertain_in(&self, range: ByteRange) -> Option<ByteRange> {
        self.uncertain.get().and_then(|blocks| uncertain_bytes(blocks, range))
    }
}

/// A volume between a barrier and its switch: no change is admitted, everything that was is on disk. Dropping it goes
/// on with the same head.
#[derive(Debug)]
#[must_use = "changes queue until this is dropped"]
pub struct Barrier<'a> {
    executor: &'a Executor,
    since: Instant,
    ended: bool,
}

/// Another head for a volume, with its files.
#[derive(Debug)]
pub struct NewHead {
    pub state: HeadState,
    pub view: View,
    pub files: Arc<HeadFiles>,
}

impl Barrier<'_> {
    /// Go on with another head, whose record is on disk.
    pub fn install(mut self, head: NewHead) {
        self.ended = true;
        let shared = &self.executor.shared;
        let housekeeping = {
            let mut state = shared.lock();
            shared.publish(Live { view: head.view, head: head.files });
            let step = state.core.install(head.state);
            state.dispatch(step, &shared.live.load(), &mut Reporter::Thread)
        };
        shared.keep_house(housekeeping);
    }

    /// Nobody knows whether the switch happened: take no more writes, until the next opening finds out.
    pub fn poison(self, error: &Error) {
        let head = self.executor.head();
        let reason = format!("a life operation may or may not have happened: {error}");
        tracing::error!(layer = %head.dir, %reason, "the volume takes no more writes until it is opened again");
        self.executor.shared.lock().core.poison(reason.into());
    }
}

impl Drop for Barrier<'_> {
    fn drop(&mut self) {
        let shared = &self.executor.shared;
        shared.pauses.lock().unwrap_or_else(PoisonError::into_inner).add(self.since.elapsed());
        if self.ended {
            return;
        }
        let housekeeping = {
            let mut state = shared.lock();
            let step = state.core.resume();
            state.dispatch(step, &shared.live.load(), &mut Reporter::Thread)
        };
        shared.keep_house(housekeeping);
    }
}

impl Executor {
    pub fn new(head: NewHead, housekeeper: Arc<Pool>) -> Executor {
        let core = Core::new(head.state, head.files.data.write_align());
        let state = Mutex::new(State { core, carriers: FxHashMap::default() });
        let live = ArcSwap::from_pointee(Live { view: head.view, head: head.files });
        let (epochs, uncertain) = (Mutex::default(), OnceLock::new());
        let (housekeeping, pauses) = (Arc::default(), Mutex::default());
        let shared = Shared { state, live, epochs, uncertain, housekeeper, housekeeping, pauses };
        Executor { shared: Arc::new(shared) }
    }

    /// For whoever carries actions out step by step.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What reads follow now.
    pub fn view(&self) -> View {
        self.shared.live.load().view.clone()
    }

    /// The head's files.
    pub fn head(&self) -> Arc<HeadFiles> {
        self.shared.live.load().head.clone()
    }

    /// Why the volume takes no more writes, if so.
    pub fn failed(&self) -> Option<Arc<str>> {
        self.shared.lock().core.failed().cloned()
    }

    /// Once the volume takes no more writes: the blocks that changed since the last commit, which cannot be read.
    pub fn uncertain(&self) -> Option<&Arc<BlockSet>> {
        self.shared.uncertain.get()
    }

    /// Whether every action that was asked for has ended.
    pub fn is_quiet(&self) -> bool {
        self.shared.lock().core.is_quiet()
    }

    /// Where the head's log ends. Only steady behind a barrier.
    pub fn log_end(&self) -> LogEnd {
        self.shared.lock().core.log_end()
    }

    /// Stop admitting changes, wait for those under way, commit. The sync that comes first keeps the pause short.
    pub fn barrier(&self) -> Result<Barrier<'_>> {
        self.flush()?;
        let since = Instant::now();
        self.shared.run(Op::Barrier, &mut Buffers::default())?;
        Ok(Barrier { executor: self, since, ended: false })
    }

    /// How long changes had to wait for life operations so far.
    pub fn pauses(&self) -> Pauses {
        *self.shared.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bring blocks up into the head. At most [`COPY_BLOCKS_MAX`](crate::cow::core::COPY_BLOCKS_MAX) blocks.
    pub fn copy_up(&self, blocks: BlockRange, from: CopySource) -> Result<()> {
        self.shared.run(Op::CopyUp { blocks, from }, &mut Buffers::default())
    }

    /// Follow another view of the same head, which reads the same; the old one's epoch ends.
    pub fn republish(&self, change: impl FnOnce(&View) -> View) {
        let mut state = self.shared.lock();
        let live = self.shared.live.load_full();
        let view = change(&live.view);
        state.core.republish(&view.index);
        self.shared.publish(Live { view, head: live.head.clone() });
    }

    /// Whether nobody follows an index that was replaced, so that what only those name can be given back.
    pub fn no_old_readers(&self) -> bool {
        let mut epochs = self.shared.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        epochs.retain(|epoch| epoch.strong_count() > 0);
        epochs.is_empty()
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let housekeeping = &self.shared.housekeeping;
        if let Some(turns) = self.shared.housekeeper.turns() {
            while *housekeeping.lock() > 0 && turns.next() {}
            return;
        }
        let under_way = |count: &mut usize| *count > 0;
        let waited = housekeeping.changed.wait_timeout_while(housekeeping.lock(), CLOSE_WAIT_MAX, under_way);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *count > 0 {
            tracing::warn!(layer = %self.head().dir, "closed while its medium does not answer");
        }
    }
}

impl BlockDevice for Executor {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.live.load().view.size(), access: Access::ReadWrite }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let (result, buffer) = match request {
            Request::Read { offset, mut buffer } => (self.read_at(&mut buffer, offset), buffer),
            Request::Write { offset, data, durability } => (self.write_at(&data, offset, durability), data),
            Request::Zero { range, durability } => (self.zero(range, durability), Vec::new()),
            Request::Discard { range } => (self.discard(range), Vec::new()),
            Request::Flush => (self.flush(), Vec::new()),
        };
        complete(Reply { result, buffer });
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let extents = self.shared.live.load().view.extents(range)?;
        // What cannot be read counts as data, so that whoever wants it reads it and is told.
        match self.shared.uncertain_in(range) {
            None => Ok(extents),
            Some(part) if part.start == range.start => {
                Ok(vec![Extent { range: part, kind: ExtentKind::Data }])
            }
            Some(part) => {
                let certain = ByteRange { start: range.start, len: part.start.since(range.start) };
                let inside =
                    |extent: Extent| extent.range.intersect(certain).map(|range| Extent { range, ..extent });
                Ok(extents.into_iter().filter_map(inside).collect())
            }
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        check_length(buffer.len() as u64)?;
        self.shared.live.load().view.read_at(buffer, offset)?;
        self.confirm(ByteRange::new(offset, buffer.len() as u64))
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> Result<()> {
        check_length(data.len() as u64)?;
        self.shared.reserve().admit()?;
        let range = ByteRange::new(offset, data.len() as u64);
        self.shared.run(Op::Write { range, durability }, &mut Buffers::of_write(offset, data))
    }

    fn zero(&self, range: ByteRange, durability: Durability) -> Result<()> {
        self.shared.run(Op::Zero { range, durability }, &mut Buffers::default())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.zero(range, Durability::Volatile)
    }

    fn flush(&self) -> Result<()> {
        self.shared.run(Op::Flush, &mut Buffers::default())
    }

    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        Some(self)
    }
}

impl Asynchronous for Executor {
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<Pin> {
        let live = self.shared.live.load_full();
        live.view.locate(range, found)?;
        Ok(Pin::of(live))
    }

    fn confirm(&self, range: ByteRange) -> Result<()> {
        match self.shared.uncertain_in(range) {
            None => Ok(()),
            Some(part) => Err(Error::uncertain(part, self.failed())),
        }
    }

    fn waits_for(&self) -> Key {
        self.shared.live.load().view.waits_for()
    }

    fn changes(&self) -> Result<&Arc<Shared>> {
        Ok(&self.shared)
    }
}
