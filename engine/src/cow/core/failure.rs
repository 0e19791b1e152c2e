//! What a failed sync leads to: the mark that it leaves, what is uncertain from then on, and who is told.
//!
//! Upholds invariant 7: the layer takes no more writes, and blocks that changed since the last commit that succeeded are
//! not read. Whoever waited is answered once leaving the mark has ended, well or not.

use std::sync::Arc;

use super::{ActionKind, Admission, Checkpoint, Core, Health, OpId, OpState, Pending, Step};
use crate::{cow::blocks::BlockSet, error::Error};

impl Core {
    /// No more writes: data or map could not be synced, and a sync that failed cannot be repeated. `waiters` are
    /// answered once the mark is left.
    pub(super) fn fail(&mut self, step: &mut Step, error: &Error, waiters: Vec<OpId>) {
        let mut unanswered: Vec<(OpId, Error)> = waiters.into_iter().map(|op| (op, error.clone())).collect();
        match &mut self.health {
            Health::Sound => {
                let reason: Arc<str> = error.to_string().into();
                let uncertain = Arc::new(self.changed_since_commit());
                self.checkpoint = Checkpoint::Idle;
                self.health = Health::Marking { reason: reason.clone(), uncertain, unanswered };
                self.act(step, None, Pending::Mark, ActionKind::MarkFailed { reason });
            }
            Health::Marking { unanswered: others, .. } => others.append(&mut unanswered),
            Health::Failed { .. } => self.answer(step, unanswered),
        }
    }

    /// Fail as after a sync: nobody hears of the end of actions that an executor is about to report as failed.
    pub fn lose(&mut self, error: &Error) -> Step {
        let mut step = Step::default();
        self.fail(&mut step, error, Vec::new());
        self.pump(&mut step);
        step
    }

    /// What changed since the last commit that succeeded, or may be changing just now.
    fn changed_since_commit(&self) -> BlockSet {
        let mut blocks = BlockSet::default();
        self.commit.add_to(&mut blocks);
        let ended = self.landed.iter().map(|(run, _)| run).chain(self.rewritten.set().iter());
        ended.chain(self.ops.values().filter_map(OpState::blocks)).for_each(|run| blocks.insert(run));
        if self.inherited {
            self.index.head.written().set().iter().for_each(|run| blocks.insert(run));
        }
        blocks
    }

    pub(super) fn marked(&mut self, step: &mut Step) {
        if let Health::Marking { reason, uncertain, unanswered } = &mut self.health {
            let unanswered = std::mem::take(unanswered);
            self.health = Health::Failed { reason: reason.clone(), uncertain: uncertain.clone() };
            self.answer(step, unanswered);
        }
    }

    fn answer(&mut self, step: &mut Step, unanswered: Vec<(OpId, Error)>) {
        for (op, error) in unanswered {
            self.committed(step, op, Err(error));
        }
    }

    pub(super) fn failure(&self) -> Error {
        let reason = self.failed().cloned().unwrap_or_else(|| "unknown".into());
        Error::Failed { reason }
    }

    /// Answer everything that waits for admission, a commit or a barrier, after a failure.
    pub(super) fn refuse_waiting(&mut self, step: &mut Step) -> bool {
        let mut waiting: Vec<OpId> = self.queue.drain(..).collect();
        waiting.append(&mut self.waiters);
        if let Admission::Closing(op) = self.admission {
            waiting.push(op);
        }
        let moved = !waiting.is_empty();
        for op in waiting {
            let error = self.failure();
            self.committed(step, op, Err(error));
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        cow::{
            core::{HeadState, Op, Output, Synced},
            frozen::FrozenIndex,
            head::HeadIndex,
            map::{
                checkpoint::{self, LogLen},
                log::LogEnd,
            },
            plan::Index,
        },
        device::Durability,
        units::{BlockCount, ByteLen, ByteRange},
    };

    fn core() -> Core {
        let (layer, blocks) = (Uuid::from_u128(1), BlockCount(16));
        let head = HeadIndex::new(blocks);
        let (_, header) = checkpoint::encode(layer, 1, 0, &head, LogLen::Live { least: 16 << 10 });
        let (log, log_offset) = (LogEnd::start(&header), header.log_offset);
        let (frozen, base_len) = (FrozenIndex::empty(), ByteLen(0));
        let index = Arc::new(Index { size: blocks.len(), head: Arc::new(head), frozen, base_len });
        Core::new(HeadState { index, layer, log, log_offset, synced: Synced::Yes }, 512)
    }

    #[test]
    fn a_commit_under_way_when_the_layer_fails_otherwise_goes_no_further_and_its_flush_is_told_after_the_mark()
     {
        let mut core = core();
        let write = |at| Op::Write { range: ByteRange::new(at, 4096), durability: Durability::Volatile };
        let (_, written) = core.submit(write(0)).expect("admitted");
        let landed = core.complete(written.actions[0].id, Ok(Output::Done));
        assert!(matches!(landed.finished[..], [(_, Ok(()))]));
        let (lost, losing) = core.submit(write(4096)).expect("admitted");
        let (flush, commit) = core.submit(Op::Flush).expect("admitted");
        assert!(matches!(commit.actions[0].kind, ActionKind::SyncData));

        let error = Error::Invalid("the ring is gone".into());
        let failed = core.lose(&error);
        assert!(matches!(failed.actions[..], [_]) && failed.finished.is_empty());
        assert!(matches!(failed.actions[0].kind, ActionKind::MarkFailed { .. }));
        let synced = core.complete(commit.actions[0].id, Ok(Output::Done));
        assert!(synced.actions.is_empty() && synced.finished.is_empty(), "{synced:?}");
        let ended = core.complete(losing.actions[0].id, Err(error));
        assert!(matches!(ended.finished[..], [(op, Err(_))] if op == lost));
        let marked = core.complete(failed.actions[0].id, Ok(Output::Done));
        assert!(matches!(marked.finished[..], [(op, Err(Error::Failed { .. }))] if op == flush));
        assert!(core.is_quiet());
        assert_eq!(core.uncertain().expect("it has failed").iter().count(), 1, "both blocks, in one run");
    }
}
