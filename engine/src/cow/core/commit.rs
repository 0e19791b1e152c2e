//! Group commit and checkpoints.
//!
//! A commit is `cut -> sync data -> append record -> sync map -> answer`. Its cut is taken at the moment its data sync
//! is asked for: it covers the changes that had landed by then and no others, and answers those who waited by then. A
//! flush that arrives later joins the next one.
//!
//! A checkpoint is made of the index as it stands at a commit's cut, when the index and what the commit makes durable
//! are the same. Once that commit is on disk the new file is staged, while further commits go to the old log; they are
//! written again into the new file's log when it is switched in, which no commit overlaps.

use super::{ActionKind, Admission, Core, OpId, Output, Pending, Step};
use crate::{
    cow::{
        BlockState,
        blocks::{BlockSet, Touched},
        changes::Changes,
        map::{
            checkpoint::{self, Header, LogLen},
            log::{self, LogEnd},
        },
    },
    error::Result,
    planted::{self, Bug},
};

/// Bytes of a log in which every change finds room when nothing else is in it: a short one grows at its checkpoint.
const LOG_LEN_LEAST: u64 = 16 << 10;
const _: () = assert!(
    LOG_LEN_LEAST / log::LOG_SECTOR_LEN as u64
        > 2 * super::COPY_BLOCKS_MAX / log::ENTRIES_PER_SECTOR as u64 + 2
);

#[derive(Debug)]
pub(super) enum Commit {
    Idle,
    Running {
        stage: Stage,
        cut: Changes,
        /// Blocks that were written in place before the cut.
        rewritten: Touched,
        waiters: Vec<OpId>,
        end: LogEnd,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Data,
    /// What a torn record left behind the end of the log is overwritten with zeros.
    Clear,
    /// Records that an earlier process appended may not be on disk; none may follow them before they are, or a crash
    /// could keep the later one alone, which reads as damage.
    Inherited,
    Append,
    Map,
}

#[derive(Debug)]
pub(super) enum Checkpoint {
    Idle,
    /// Encoded at the cut of the commit that is running.
    Cut {
        bytes: Vec<u8>,
        header: Header,
    },
    /// Being written; `tail` are the commits since its cut.
    Staging {
        header: Header,
        tail: Vec<Changes>,
    },
    /// Written; waits for a moment without a commit.
    Staged {
        header: Header,
        tail: Vec<Changes>,
    },
    Switching {
        header: Header,
        end: LogEnd,
    },
}

impl Commit {
    /// Log sectors that the running commit's record takes and the log's end does not count yet.
    pub(super) fn sectors(&self) -> u64 {
        match self {
            Commit::Idle => 0,
            Commit::Running { cut, .. } => super::sectors_of(cut.len() + super::SPLIT_ENTRIES_MAX),
        }
    }
}

impl Commit {
    /// Add the blocks of which the running commit was to make the newest bytes durable.
    pub(super) fn add_to(&self, uncertain: &mut BlockSet) {
        if let Commit::Running { cut, rewritten, .. } = self {
            let blocks = cut.iter().map(|(run, _)| run).chain(rewritten.set().iter());
            blocks.for_each(|run| uncertain.insert(run));
        }
    }
}

impl Checkpoint {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Checkpoint::Idle)
    }
}

impl Core {
    /// Start a commit if someone waits for one, or the log is filling up.
    pub(super) fn advance_commit(&mut self, step: &mut Step) -> bool {
        let free =
            matches!(self.commit, Commit::Idle) && !matches!(self.checkpoint, Checkpoint::Switching { .. });
        if !free {
            return false;
        }
        let checkpoint =
            self.checkpoint_wanted && self.checkpoint.is_idle() && self.admission == Admission::Open;
        let pressed = log::sectors_of(self.landed.len()) * 4 > self.log.sectors;
        if self.waiters.is_empty() && !checkpoint && !pressed {
            return false;
        }
        let waiters = std::mem::take(&mut self.waiters);
        let cut = std::mem::take(&mut self.landed);
        if checkpoint {
            self.checkpoint_wanted = false;
            let sequence = self.log.sequence + u64::from(!cut.is_empty());
            let generation = self.log.generation + 1;
            // No shorter than this one, or the records that follow the cut might not fit.
            let log_len = LogLen::Live { least: self.log.log_len().max(LOG_LEN_LEAST) };
            let (bytes, header) =
                checkpoint::encode(self.layer, generation, sequence, &self.index.head, log_len);
            self.checkpoint = Checkpoint::Cut { bytes, header };
        }
        // A change of several parts may land after a commit that has synced those which were written by then.
        let sync_data = std::mem::take(&mut self.data_dirty) || cut.any(BlockState::Data);
        let rewritten = std::mem::take(&mut self.rewritten);
        self.commit = Commit::Running { stage: Stage::Data, cut, rewritten, waiters, end: self.log };
        if sync_data && !planted::is(Bug::RecordBeforeData) {
            self.sync_data(step);
        } else {
            self.data_synced(step);
        }
        true
    }

    pub(super) fn commit_completed(&mut self, result: Result<Output>, step: &mut Step) {
        let Commit::Running { stage, .. } = self.commit else {
            debug_assert!(false, "no commit is running");
            return;
        };
        // What failed meanwhile was told to whoever asked: a commit does not go on as if nothing were uncertain.
        let result = if self.failed().is_some() { result.and(Err(self.failure())) } else { result };
        match (result, stage) {
            (Err(error), _) => {
                let waiters = match &mut self.commit {
                    Commit::Running { waiters, .. } => std::mem::take(waiters),
                    Commit::Idle => Vec::new(),
                };
                self.fail(step, &error, waiters);
                self.commit = Commit::Idle;
            }
            (Ok(_), Stage::Append) if planted::is(Bug::RecordBeforeData) => self.sync_data(step),
            (Ok(_), Stage::Data) if planted::is(Bug::RecordBeforeData) => self.sync_map(Stage::Map, step),
            (Ok(_), Stage::Data) => self.data_synced(step),
            (Ok(_), Stage::Clear) => {
                self.log.torn = 0;
                if let Commit::Running { end, .. } = &mut self.commit {
                    end.torn = 0;
                }
                self.sync_map(Stage::Inherited, step);
            }
            (Ok(_), Stage::Inherited) => {
                self.map_dirty = false;
                self.append(step);
            }
            (Ok(_), Stage::Append) => self.sync_map(Stage::Map, step),
            (Ok(_), Stage::Map) => self.end_commit(step),
        }
    }

    fn sync_data(&mut self, step: &mut Step) {
        let Commit::Running { stage, waiters, .. } = &mut self.commit else { return };
        *stage = Stage::Data;
        let owner = waiters.first().copied();
        self.act(step, owner, Pending::Commit, ActionKind::SyncData);
    }

    fn data_synced(&mut self, step: &mut Step) {
        if planted::is(Bug::CutAfterSync)
            && let Commit::Running { cut, .. } = &mut self.commit
        {
            std::mem::take(&mut self.landed).iter().for_each(|(run, state)| cut.set(run, state));
        }
        if self.log.torn > 0 {
            self.clear(step);
        } else if self.map_dirty {
            self.sync_map(Stage::Inherited, step);
        } else {
            self.append(step);
        }
    }

    fn clear(&mut self, step: &mut Step) {
        let Commit::Running { stage, waiters, .. } = &mut self.commit else { return };
        *stage = Stage::Clear;
        let owner = waiters.first().copied();
        let offset = self.log_offset + self.log.offset();
        let bytes = vec![0; log::LOG_SECTOR_LEN * crate::units::to_usize(self.log.torn)];
        self.act(step, owner, Pending::Commit, ActionKind::AppendLog { offset, bytes });
    }

    fn append(&mut self, step: &mut Step) {
        let Commit::Running { stage, cut, waiters, end, .. } = &mut self.commit else { return };
        if cut.is_empty() {
            return self.end_commit(step);
        }
        let (bytes, next) = log::encode(&self.log, cut);
        let offset = self.log_offset + self.log.offset();
        *stage = Stage::Append;
        *end = next;
        let owner = waiters.first().copied();
        self.act(step, owner, Pending::Commit, ActionKind::AppendLog { offset, bytes });
    }

    fn sync_map(&mut self, now: Stage, step: &mut Step) {
        let Commit::Running { stage, waiters, .. } = &mut self.commit else { return };
        *stage = now;
        let owner = waiters.first().copied();
        self.act(step, owner, Pending::Commit, ActionKind::SyncMap);
    }

    /// The record is on disk: answer.
    fn end_commit(&mut self, step: &mut Step) {
        let Commit::Running { cut, waiters, end, .. } = std::mem::replace(&mut self.commit, Commit::Idle)
        else {
            return;
        };
        self.log = end;
        self.inherited = false;
        // Only a record that was added asks anew: a full disk is not asked again and again for the same room.
        if !cut.is_empty() && self.log.used * 2 > self.log.sectors {
            self.checkpoint_wanted = true;
        }
        match std::mem::replace(&mut self.checkpoint, Checkpoint::Idle) {
            Checkpoint::Cut { bytes, header } => {
                let log_len = header.log_len;
                self.checkpoint = Checkpoint::Staging { header, tail: Vec::new() };
                self.act(step, None, Pending::Stage, ActionKind::StageMap { bytes, log_len });
            }
            mut other => {
                if let Checkpoint::Staging { tail, .. } | Checkpoint::Staged { tail, .. } = &mut other
                    && !cut.is_empty()
                {
                    tail.push(cut);
                }
                self.checkpoint = other;
            }
        }
        for op in waiters {
            self.committed(step, op, Ok(()));
        }
    }

    pub(super) fn stage_completed(&mut self, result: Result<Output>, step: &mut Step) {
        let checkpoint = std::mem::replace(&mut self.checkpoint, Checkpoint::Idle);
        match (result, checkpoint) {
            (Ok(_), Checkpoint::Staging { header, tail }) => {
                self.checkpoint = Checkpoint::Staged { header, tail };
            }
            // The old map is whole: nothing is lost but the room that was hoped for.
            (Err(error), _) => self.refuse_for_room(&error, step),
            (Ok(_), _) => {}
        }
    }

    /// Switch a staged checkpoint in, when no commit is running.
    pub(super) fn advance_checkpoint(&mut self, step: &mut Step) -> bool {
        if !matches!((&self.commit, &self.checkpoint), (Commit::Idle, Checkpoint::Staged { .. })) {
            return false;
        }
        if let Checkpoint::Staged { header, tail } = std::mem::replace(&mut self.checkpoint, Checkpoint::Idle)
        {
            let mut end = LogEnd::start(&header);
            let mut bytes = Vec::new();
            for changes in &tail {
                let (record, next) = log::encode(&end, changes);
                bytes.extend(record);
                end = next;
            }
            debug_assert_eq!(end.sequence, self.log.sequence);
            let kind = ActionKind::SwitchMap { offset: header.log_offset, log: bytes };
            self.checkpoint = Checkpoint::Switching { header, end };
            self.act(step, None, Pending::Switch, kind);
        }
        true
    }

    pub(super) fn switch_completed(&mut self, result: Result<Output>, step: &mut Step) {
        match (result, std::mem::replace(&mut self.checkpoint, Checkpoint::Idle)) {
            (Ok(_), Checkpoint::Switching { header, end }) => {
                self.log = end;
                self.log_offset = header.log_offset;
                self.map_dirty = false;
                // What wanted one while this was under way looks again.
                self.checkpoint_wanted = false;
            }
            // Nobody knows which of the two files the next opening finds, so no further commit may be answered.
            (Err(error), _) => self.fail(step, &error, Vec::new()),
            (Ok(_), _) => {}
        }
    }
}
