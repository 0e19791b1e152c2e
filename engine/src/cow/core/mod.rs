//! The state machine of a volume: what happens to changes, without I/O, time or threads.
//!
//! `submit(op)` and `complete(action, result)` return a [`Step`]: actions for an executor to carry out, in any order
//! and all at once, and operations that are finished. The core owns admission, block ownership, barriers, the commit
//! cut, group commit, checkpoints, and what happens when half of a request fails. Reads do not pass through it: they
//! follow the published [`Index`] on any thread.
//!
//! Upheld here (design.md, section 4):
//! - 1: a flush is answered by a commit whose cut was taken after the flush arrived (`commit.rs`);
//! - 2: a partial write of a block that is *data* writes only the sectors it touches; any other partial write writes the
//!   whole block before the map names it (`change.rs`);
//! - 3: a commit's record holds exactly the changes that had landed when its data sync was asked for;
//! - 7: after a failed sync every change and flush fails ([`Core::failed`]), and so does a read of a block that changed
//!   since the last commit ([`Core::uncertain`]; `failure.rs`);
//! - 8: a change is admitted only while the log has room for the record of everything that is under way.

mod change;
mod commit;
mod failure;
mod trespass;

use std::{collections::VecDeque, sync::Arc};

use rustc_hash::FxHashMap;
use uuid::Uuid;

use self::{
    change::Change,
    commit::{Checkpoint, Commit},
};
use super::{
    blocks::{BlockSet, Touched},
    changes::Changes,
    frozen::Slot,
    map::log::{LogEnd, sectors_of},
    ownership::Ownership,
    plan::{Index, Segment},
};
use crate::{
    device::Durability,
    error::{Error, Result},
    planted::{self, Bug},
    units::{Block, BlockRange, ByteOffset, ByteRange},
};

/// Operations of one volume at a time, under way or queued.
pub const OPS_MAX: usize = 1024;
/// Changes of one volume that are admitted at a time. Each may need a sector of the log, of which there are at least
/// four times as many.
pub const IN_FLIGHT_MAX: usize = 128;
/// Blocks of one [`Op::CopyUp`].
pub const COPY_BLOCKS_MAX: u64 = 256;
/// Runs over [`u32::MAX`] blocks take several log entries; 64 TiB take at most this many more.
const SPLIT_ENTRIES_MAX: usize = 4;

/// Names an operation between `submit` and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// Names an action between its [`Step`] and `complete`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActionId(pub u64);

/// What a client or a life operation asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Write {
        range: ByteRange,
        durability: Durability,
    },
    /// Write zeroes and discard alike: the range reads as zeros and its space is given back.
    Zero {
        range: ByteRange,
        durability: Durability,
    },
    Flush,
    /// Bring blocks that the head does not know up from below: merge and flatten.
    CopyUp {
        blocks: BlockRange,
        from: CopySource,
    },
    /// Admit no further change, wait until every admitted one has landed, commit. The end of this operation is the
    /// moment; changes queue until [`Core::resume`] or [`Core::install`].
    Barrier,
}

/// Which blocks a [`Op::CopyUp`] brings up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopySource {
    /// Those that this frozen layer answers for, its zeros too.
    Layer(Slot),
    /// Those that the image answers for, where they are not zeros.
    Base,
}

/// Something for an executor to do. `op` owns the buffers and the thread; without one it is housekeeping.
#[derive(Debug)]
pub struct Action {
    pub id: ActionId,
    pub op: Option<OpId>,
    pub kind: ActionKind,
}

/// The first or last block of a request, of which the request covers only a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    First,
    Last,
}

/// What to do. Offsets are the volume's, and so those of the head's data file.
#[derive(Debug)]
pub enum ActionKind {
    /// Read `segments` into the operation's buffer for this edge, a block; what no segment names is zero.
    ReadEdge { edge: Edge, block: Block, segments: Vec<Segment> },
    /// Read `segments` into the operation's copy buffer, which starts at `start`. Ends with [`Output::Nonzero`].
    ReadCopy { start: ByteOffset, segments: Vec<Segment> },
    /// Write to the head's data file at `range`.
    Write { range: ByteRange, payload: Payload },
    /// Give back the space of these blocks of the head's data file. Failing is not an error.
    Punch { blocks: BlockRange },
    /// Make everything written to the head's data file survive a crash.
    SyncData,
    /// Write at `offset` of the head's map file.
    AppendLog { offset: u64, bytes: Vec<u8> },
    /// Make everything written to the head's map file survive a crash.
    SyncMap,
    /// Write a new map file beside the head's: `bytes`, then `log_len` zeros; sync it.
    StageMap { bytes: Vec<u8>, log_len: u64 },
    /// Write `log` at `offset` of the staged file, sync it, rename it over the head's map, sync the directory; from now
    /// on it is the map file.
    SwitchMap { offset: u64, log: Vec<u8> },
    /// Leave a mark that the layer failed, for the next opening. Failing is not an error.
    MarkFailed { reason: Arc<str> },
}

/// Where the bytes of a write come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The client's bytes for exactly this range.
    Client,
    /// The edge's buffer, with the client's bytes (or zeros) laid over it at `client`.
    Edge {
        edge: Edge,
        client: ByteRange,
    },
    Zeros,
    /// The operation's copy buffer.
    Copy,
}

/// What a successful action found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Done,
    /// Of a [`ActionKind::ReadCopy`]: runs of blocks that hold anything but zeros, in order.
    Nonzero(Vec<BlockRange>),
}

/// What came of a call.
#[derive(Debug, Default)]
#[must_use = "actions that are not carried out never complete"]
pub struct Step {
    pub actions: Vec<Action>,
    pub finished: Vec<(OpId, Result<()>)>,
}

/// A head layer, as it is opened or made.
#[derive(Debug)]
pub struct HeadState {
    pub index: Arc<Index>,
    pub layer: Uuid,
    pub log: LogEnd,
    /// Offset of the log in the map file.
    pub log_offset: u64,
    /// Whether data and map are known to be on disk. After an opening they are not: what a killed process had written
    /// may be in caches only, and the first flush has to cover it.
    pub synced: Synced,
}

/// Whether a layer's files are known to have been synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synced {
    Yes,
    No,
}

#[derive(Debug)]
enum OpState {
    /// Waits for admission: room in the log, the end of a barrier.
    Queued(Op),
    Change(Change),
    /// Waits for a commit.
    Committing,
    Barrier,
}

impl OpState {
    /// What an admitted change may be changing.
    fn blocks(&self) -> Option<BlockRange> {
        match self {
            OpState::Change(change) => Some(change.blocks()),
            OpState::Queued(_) | OpState::Committing | OpState::Barrier => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Open,
    /// A barrier waits for changes to land.
    Closing(OpId),
    /// A barrier waits for its commit.
    Committing,
    /// Until `resume` or `install`.
    Closed,
}

#[derive(Debug)]
enum Pending {
    Change { op: OpId, step: change::Pending },
    Commit,
    Stage,
    Switch,
    Mark,
}

/// The state machine of one volume.
#[derive(Debug)]
pub struct Core {
    index: Arc<Index>,
    layer: Uuid,
    /// Writes are multiples of this: 512, or 4096 where the file's device has larger sectors.
    write_align: u64,
    log: LogEnd,
    log_offset: u64,
    // Keys of both tables are numbers that we count ourselves: nobody outside chooses them.
    ops: FxHashMap<OpId, OpState>,
    queue: VecDeque<OpId>,
    pending: FxHashMap<ActionId, Pending>,
    next_id: u64,
    ownership: Ownership,
    admission: Admission,
    /// Changes that were admitted and have not ended.
    in_flight: usize,
    /// Log sectors that those may still need.
    reserved_sectors: u64,
    /// Changes of the map that have landed and are in no commit yet.
    landed: Changes,
    /// Blocks that were written in place, which changes no map, since the last commit's cut.
    rewritten: Touched,
    /// Data was written since the last data sync was asked for.
    data_dirty: bool,
    /// The map file was not synced since it was opened.
    map_dirty: bool,
    /// No commit has succeeded since the layer was opened: what a killed process had written, nobody knows where, may be
    /// in caches only.
    inherited: bool,
    commit: Commit,
    /// Who is answered by the next commit.
    waiters: Vec<OpId>,
    checkpoint: Checkpoint,
    checkpoint_wanted: bool,
    health: Health,
}

/// Whether the layer takes writes.
#[derive(Debug)]
enum Health {
    Sound,
    /// The mark for the next opening is being left. Who waited for the commit that failed hears of it after that, so
    /// that no restart forgets what somebody was told.
    Marking {
        reason: Arc<str>,
        uncertain: Arc<BlockSet>,
        unanswered: Vec<(OpId, Error)>,
    },
    Failed {
        reason: Arc<str>,
        uncertain: Arc<BlockSet>,
    },
}

impl Core {
    pub fn new(head: HeadState, write_align: u64) -> Core {
        Core {
            index: head.index,
            layer: head.layer,
            write_align,
            log: head.log,
            log_offset: head.log_offset,
            ops: FxHashMap::default(),
            queue: VecDeque::new(),
            pending: FxHashMap::default(),
            next_id: 1,
            ownership: Ownership::default(),
            admission: Admission::Open,
            in_flight: 0,
            reserved_sectors: 0,
            landed: Changes::default(),
            rewritten: Touched::default(),
            data_dirty: head.synced == Synced::No,
            map_dirty: head.synced == Synced::No,
            inherited: head.synced == Synced::No,
            commit: Commit::Idle,
            waiters: Vec::new(),
            checkpoint: Checkpoint::Idle,
            checkpoint_wanted: false,
            health: Health::Sound,
        }
    }

    /// What reads follow. A new `Arc` after every life operation; a plan keeps the one that it was made from.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Whether every action that was asked for has completed.
    pub fn is_quiet(&self) -> bool {
        self.pending.is_empty()
    }

    /// Where the head's log ends now.
    pub fn log_end(&self) -> LogEnd {
        self.log
    }

    /// Why the layer takes no more writes, if so.
    pub fn failed(&self) -> Option<&Arc<str>> {
        match &self.health {
            Health::Sound => None,
            Health::Marking { reason, .. } | Health::Failed { reason, .. } => Some(reason),
        }
    }

    /// Once the layer has failed: the blocks that changed since the last commit that succeeded. Nobody knows what of
    /// them is on the medium, so a read of them has nothing true to show.
    pub fn uncertain(&self) -> Option<&Arc<BlockSet>> {
        match &self.health {
            Health::Sound => None,
            Health::Marking { uncertain, .. } | Health::Failed { uncertain, .. } => Some(uncertain),
        }
    }

    /// Start an operation. An error means that it did not start: out of range, too many, failed before.
    pub fn submit(&mut self, op: Op) -> Result<(OpId, Step)> {
        if let Some(reason) = self.failed() {
            return Err(Error::Failed { reason: reason.clone() });
        }
        if self.ops.len() >= OPS_MAX {
            return Err(Error::Busy { limit: "OPS_MAX" });
        }
        match op {
            Op::Write { range, .. } | Op::Zero { range, .. } => {
                ByteRange::within(range.start.0, range.len.0, self.index.size)?;
            }
            Op::CopyUp { blocks, .. } => {
                debug_assert!(
                    blocks.count.0 <= COPY_BLOCKS_MAX && blocks.end().0 <= self.index.head.block_count().0
                );
            }
            Op::Flush => {}
            Op::Barrier => {
                if self.admission != Admission::Open {
                    return Err(Error::Busy { limit: "one life operation at a time" });
                }
            }
        }
        let id = OpId(self.fresh_id());
        let mut step = Step::default();
        match op {
            Op::Flush => self.wait_for_commit(id),
            Op::Barrier => {
                self.ops.insert(id, OpState::Barrier);
                self.admission = Admission::Closing(id);
            }
            Op::Write { .. } | Op::Zero { .. } | Op::CopyUp { .. } => {
                self.ops.insert(id, OpState::Queued(op));
                self.queue.push_back(id);
            }
        }
        self.pump(&mut step);
        Ok((id, step))
    }

    /// Report how an action ended. Every action is reported exactly once.
    pub fn complete(&mut self, action: ActionId, result: Result<Output>) -> Step {
        let mut step = Step::default();
        match self.pending.remove(&action) {
            Some(Pending::Change { op, step: pending }) => {
                self.change_completed(op, pending, result, &mut step)
            }
            Some(Pending::Commit) => self.commit_completed(result, &mut step),
            Some(Pending::Stage) => self.stage_completed(result, &mut step),
            Some(Pending::Switch) => self.switch_completed(result, &mut step),
            Some(Pending::Mark) => self.marked(&mut step),
            None => debug_assert!(false, "{action:?} completed twice"),
        }
        self.pump(&mut step);
        step
    }

    /// After a barrier: go on with the same head.
    pub fn resume(&mut self) -> Step {
        debug_assert_eq!(self.admission, Admission::Closed);
        self.admission = Admission::Open;
        let mut step = Step::default();
        self.pump(&mut step);
        step
    }

    /// After a barrier: go on with this head, whose record is on disk.
    pub fn install(&mut self, head: HeadState) -> Step {
        debug_assert_eq!(self.admission, Admission::Closed);
        debug_assert!(self.in_flight == 0 && self.landed.is_empty() && self.ownership.is_empty());
        debug_assert!(self.rewritten.set().is_empty());
        self.index = head.index;
        self.layer = head.layer;
        self.log = head.log;
        self.log_offset = head.log_offset;
        self.data_dirty = head.synced == Synced::No;
        self.map_dirty = head.synced == Synced::No;
        self.inherited = head.synced == Synced::No;
        self.resume()
    }

    /// Follow another frozen index that reads the same (a merge or flatten has moved blocks), or begin a new epoch of
    /// this one. Operations under way keep the old one until they end.
    pub fn republish(&mut self, index: &Arc<Index>) {
        debug_assert!(Arc::ptr_eq(&index.head, &self.index.head));
        self.index = index.clone();
    }

    /// During a barrier: nobody knows whether its switch happened, so take no more writes. [`Core::resume`] then
    /// answers what waits.
    pub fn poison(&mut self, reason: Arc<str>) {
        debug_assert_eq!(self.admission, Admission::Closed);
        // The barrier's commit has made every change durable.
        self.health = Health::Failed { reason, uncertain: Arc::default() };
    }

    fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn act(&mut self, step: &mut Step, op: Option<OpId>, pending: Pending, kind: ActionKind) {
        let id = ActionId(self.fresh_id());
        self.pending.insert(id, pending);
        step.actions.push(Action { id, op, kind });
    }

    fn finish(&mut self, step: &mut Step, op: OpId, result: Result<()>) {
        let known = self.ops.remove(&op);
        debug_assert!(known.is_some(), "{op:?} ended twice");
        step.finished.push((op, result));
    }

    fn wait_for_commit(&mut self, op: OpId) {
        self.ops.insert(op, OpState::Committing);
        match &mut self.commit {
            Commit::Running { waiters, .. } if planted::is(Bug::JoinedCommit) => waiters.push(op),
            Commit::Running { .. } | Commit::Idle => self.waiters.push(op),
        }
    }

    /// Do whatever can be done now, until nothing can.
    fn pump(&mut self, step: &mut Step) {
        loop {
            let moved = match self.health {
                Health::Sound => {
                    self.admit(step)
                        | self.close()
                        | self.advance_checkpoint(step)
                        | self.advance_commit(step)
                }
                Health::Marking { .. } => false,
                Health::Failed { .. } => self.refuse_waiting(step),
            };
            if !moved {
                return;
            }
        }
    }

    /// Log sectors that a new change may still take.
    fn room(&self) -> u64 {
        let landed =
            if self.landed.is_empty() { 0 } else { sectors_of(self.landed.len() + SPLIT_ENTRIES_MAX) };
        self.log.room().saturating_sub(self.commit.sectors() + landed + self.reserved_sectors)
    }

    fn admit(&mut self, step: &mut Step) -> bool {
        let mut moved = false;
        while self.admission == Admission::Open
            && self.in_flight < IN_FLIGHT_MAX
            && let Some(&id) = self.queue.front()
            && let Some(OpState::Queued(op)) = self.ops.get(&id)
        {
            let op = *op;
            if change::sectors(op) > self.room() {
                self.checkpoint_wanted = true;
                return moved;
            }
            self.queue.pop_front();
            self.in_flight += 1;
            self.reserved_sectors += change::sectors(op);
            self.start_change(id, op, step);
            moved = true;
        }
        moved
    }

    /// There will be no more room for now: tell those who wait for it.
    fn refuse_for_room(&mut self, error: &Error, step: &mut Step) {
        while self.admission == Admission::Open
            && let Some(&id) = self.queue.front()
            && let Some(OpState::Queued(op)) = self.ops.get(&id)
            && change::sectors(*op) > self.room()
        {
            self.queue.pop_front();
            self.finish(step, id, Err(error.clone()));
        }
    }

    /// Move a barrier on.
    fn close(&mut self) -> bool {
        match self.admission {
            Admission::Closing(op) if self.in_flight == 0 && self.checkpoint.is_idle() => {
                self.admission = Admission::Committing;
                self.waiters.push(op);
                true
            }
            Admission::Open | Admission::Closing(_) | Admission::Committing | Admission::Closed => false,
        }
    }

    /// The end of an operation that waited for a commit.
    fn committed(&mut self, step: &mut Step, op: OpId, result: Result<()>) {
        if matches!(self.ops.get(&op), Some(OpState::Barrier)) {
            self.admission = if result.is_ok() { Admission::Closed } else { Admission::Open };
        }
        self.finish(step, op, result);
    }
}
