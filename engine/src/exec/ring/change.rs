//! Carrying the actions of an operation out: writes, commits, punches, and the reads that fill blocks.
//!
//! The core says what to do, [`Buffers`] which bytes that is; here they go onto the ring, commits to a thread.
//! Everything that the core asks for at once is in flight at once. A change keeps its buffers until its last action has
//! ended, also if the core was through with it before.

use std::sync::Arc;

use super::{Worker, flight::TaskKind, read::Gathering, window::Lent, worker::Lease};
use crate::{
    cow::{core::Op, plan::Segment},
    device::{BlockDevice, check_length},
    error::{Error, Result},
    exec::{
        asynchronous::Pin,
        carrier::{Carrier, ChangeId, Message, Planned, Reporter, carry_commit},
        executor::Shared,
        fair::key_of,
        request::{Buffers, Work, run_procedure},
        storage::StorageFile,
    },
    units::{ByteOffset, ByteRange},
};

/// An operation that this worker has submitted.
#[derive(Debug)]
pub(super) struct Change {
    device: Arc<dyn BlockDevice>,
    shared: Arc<Shared>,
    token: u32,
    buffers: Buffers<'static>,
    /// Actions that have not ended.
    actions: usize,
    /// What the core says of it.
    done: Option<Result<()>>,
}

impl Change {
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn token(&self) -> u32 {
        self.token
    }

    pub fn has_actions(&self) -> bool {
        self.actions > 0
    }
}

impl Worker {
    pub(super) fn begin_change(&mut self, device: Arc<dyn BlockDevice>, lease: Lease, token: u32) {
        let changes = device.asynchronous().map(|device| device.changes().map(|shared| shared.reserve()));
        let refused = match (&lease, changes) {
            (_, None) => return self.leave_to_thread(device, lease, token),
            // There is nothing that could be lost.
            (Lease::Flush, Some(Err(Error::ReadOnly { .. }))) => Ok(()),
            (_, Some(Err(error))) => Err(error),
            (Lease::Write { data, .. }, Some(Ok(reserve))) => match check_length(data.len() as u64) {
                Ok(()) if reserve.is_spent() => {
                    let task = self.new_task(TaskKind::Admission { device, lease, token });
                    self.by_thread(task, key_of(&reserve), move || reserve.admit());
                    return self.part_ended(task, Ok(()));
                }
                Ok(()) => return self.submit_change(device, lease, token),
                Err(error) => Err(error),
            },
            (_, Some(Ok(_))) => return self.submit_change(device, lease, token),
        };
        self.end(device, token, refused);
    }

    pub(super) fn submit_change(&mut self, device: Arc<dyn BlockDevice>, lease: Lease, token: u32) {
        let shared = device.asynchronous().map(|device| device.changes().cloned());
        let shared = match shared {
            Some(Ok(shared)) => shared,
            Some(Err(error)) => return self.end(device, token, Err(error)),
            None => return self.leave_to_thread(device, lease, token),
        };
        let (op, buffers) = match lease {
            Lease::Write { offset, data, durability } => {
                let range = ByteRange::new(offset, data.len() as u64);
                // The slice is used as long as the change is in its table.
                (Op::Write { range, durability }, Buffers::of_write(offset, data.bytes()))
            }
            Lease::Zero { range, durability } => (Op::Zero { range, durability }, Buffers::default()),
            Lease::Flush | Lease::Read { .. } => (Op::Flush, Buffers::default()),
        };
        let change = Change { device, shared: shared.clone(), token, buffers, actions: 0, done: None };
        let id = ChangeId(self.changes.insert(change));
        let carrier = Carrier::Worker { post: self.post().clone(), change: id };
        let mut reporter = Reporter::Worker { post: self.handle.post(), messages: &mut self.messages };
        if let Err(error) = shared.submit(op, carrier, &mut reporter) {
            self.follow(id, Message::Done(Err(error)));
        }
    }

    /// Do what the core says.
    pub(super) fn follow(&mut self, id: ChangeId, message: Message) {
        match message {
            Message::Do(planned) => self.act(id, planned),
            Message::Done(result) => {
                if let Some(change) = self.changes.get_mut(id.0) {
                    change.done = Some(result);
                }
                self.end_change(id);
            }
        }
    }

    fn act(&mut self, id: ChangeId, planned: Planned) {
        let Some(change) = self.changes.get_mut(id.0) else {
            return debug_assert!(false, "{id:?} is told something after its end");
        };
        change.actions += 1;
        if planned.action.kind.is_of_commit() {
            return self.commit(id, planned);
        }
        if let Some(error) = &self.stranded {
            let error = error.clone();
            return self.action_ended(id, planned, Err(error));
        }
        let prepared = Prepared::of(change.buffers.begin(&planned.action.kind, &planned.live.head));
        let live = planned.live.clone();
        let task = self.new_task(TaskKind::Action { change: id, planned });
        let result = match prepared {
            Prepared::Read { segments, start, into } => {
                for segment in segments {
                    let mut gathering = Gathering::new(self, task, start, into, Some(segment.place));
                    live.view.locate_segment(segment, &mut |part, located| gathering.found(part, located));
                    gathering.end();
                }
                Ok(())
            }
            Prepared::Write { file, offset, bytes } => {
                self.fly_write(task, file, offset, bytes);
                Ok(())
            }
            Prepared::Punch { file, range } => {
                self.fly_punch(task, file, range);
                Ok(())
            }
            // Commits were seen to; procedures are housekeeping, which belongs to no operation.
            Prepared::Sync | Prepared::Procedure => match self.tasks.get_mut(task).map(|task| &task.kind) {
                Some(TaskKind::Action { planned, .. }) => run_procedure(&planned.action.kind, &live.head),
                _ => Ok(()),
            },
        };
        drop(live);
        self.part_ended(task, result);
    }

    /// Leave a commit to a thread. The ring would do no better: for what a sync, or a buffered write, waits the kernel
    /// has threads of its own, which change with each step.
    fn commit(&mut self, id: ChangeId, first: Planned) {
        let Some(change) = self.changes.get_mut(id.0) else { return };
        let (shared, post) = (change.shared.clone(), self.post().clone());
        let task = self.new_task(TaskKind::Commit { change: id });
        self.by_thread(task, key_of(&shared), move || {
            carry_commit(&shared, first, &post, id);
            Ok(())
        });
        self.part_ended(task, Ok(()));
    }

    /// The thread of a commit is through; what became of it, the core has told who waits.
    pub(super) fn commit_ended(&mut self, id: ChangeId) {
        if let Some(change) = self.changes.get_mut(id.0) {
            change.actions -= 1;
        }
        self.end_change(id);
    }

    pub(super) fn action_ended(&mut self, id: ChangeId, planned: Planned, result: Result<()>) {
        let Some(change) = self.changes.get_mut(id.0) else { return };
        change.actions -= 1;
        let Planned { action, live } = planned;
        let output = result.map(|()| change.buffers.end(&action.kind));
        let mut reporter = Reporter::Worker { post: self.handle.post(), messages: &mut self.messages };
        change.shared.complete(action.id, output, &mut reporter);
        self.unpin(Pin::of(live));
        self.end_change(id);
    }

    /// End a change that the core is through with and whose actions have ended.
    fn end_change(&mut self, id: ChangeId) {
        let Some(Change { actions: 0, done: Some(_), .. }) = self.changes.get_mut(id.0) else { return };
        let Some(change) = self.changes.remove(id.0) else { return };
        let Change { device, shared, token, buffers, done, .. } = change;
        drop((shared, buffers));
        self.end(device, token, done.unwrap_or(Ok(())));
    }
}

/// What an action asks for, apart from the change that its bytes belong to.
enum Prepared {
    Read { segments: Vec<Segment>, start: ByteOffset, into: Lent },
    Write { file: Arc<dyn StorageFile>, offset: u64, bytes: Lent },
    Sync,
    Punch { file: Arc<dyn StorageFile>, range: ByteRange },
    Procedure,
}

impl Prepared {
    fn of(work: Work<'_>) -> Prepared {
        match work {
            Work::Read { segments, start, buffer } => {
                #[expect(unsafe_code, reason = "the kernel fills a buffer of the change")]
                // SAFETY: the change keeps its buffers until its actions have ended, and uses none of them before.
                let into = unsafe { Lent::of(buffer) };
                Prepared::Read { segments: segments.to_vec(), start, into }
            }
            Work::Write { file, offset, bytes } => {
                #[expect(
                    unsafe_code,
                    reason = "the kernel reads from a buffer of the change, or of its client"
                )]
                // SAFETY: as above; the client's bytes are lent to the change, a record's belong to the action.
                let bytes = unsafe { Lent::of_source(bytes) };
                Prepared::Write { file, offset, bytes }
            }
            Work::Sync { .. } => Prepared::Sync,
            Work::Punch { file, range } => Prepared::Punch { file, range },
            Work::Procedure => Prepared::Procedure,
        }
    }
}
