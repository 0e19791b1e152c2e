//! Who carries the actions of an operation out: whoever submitted it.
//!
//! Owns [`Carrier`]: a thread that waits in its mailbox, or a worker, which is sent to. A volume has one core whoever
//! uses it, so completions that one of them reports can set actions of another free. A commit that is a worker's is
//! carried out by one thread from the first of its actions to the last ([`carry_commit`]).

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{
    blocking::Mailbox,
    executor::{Live, Shared},
    request::Buffers,
    ring::Post,
};
use crate::{
    cow::core::{Action, Output},
    error::{Error, Result},
};

/// An action with what was live when it was planned: a later view may not have the files that it names.
#[derive(Debug)]
pub(super) struct Planned {
    pub action: Action,
    pub live: Arc<Live>,
}

impl Planned {
    pub fn carry_out(&self, buffers: &mut Buffers<'_>) -> Result<Output> {
        buffers.carry_out(&self.action.kind, &self.live.head, &self.live.view)
    }
}

/// What an operation's carrier is told. The result comes after the last action.
#[derive(Debug)]
pub(super) enum Message {
    Do(Planned),
    Done(Result<()>),
}

/// Names a change on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChangeId(pub u32);

#[derive(Debug)]
pub(super) enum Carrier {
    Thread(Arc<Mailbox>),
    Worker { post: Arc<Post>, change: ChangeId },
}

/// Who reports something to a core: a worker keeps what is meant for itself.
#[derive(Debug)]
pub(super) enum Reporter<'a> {
    Thread,
    Worker {
        post: &'a Arc<Post>,
        messages: &'a mut VecDeque<(ChangeId, Message)>,
    },
    /// A thread that carries out a commit of this change: what comes next of that is its own.
    Commit {
        post: &'a Arc<Post>,
        change: ChangeId,
        next: &'a mut Option<Planned>,
    },
}

impl Carrier {
    pub fn tell(&self, message: Message, reporter: &mut Reporter<'_>) {
        match (self, reporter) {
            (Carrier::Thread(mailbox), _) => mailbox.put(message),
            (Carrier::Worker { post, change }, Reporter::Worker { post: own, messages })
                if Arc::ptr_eq(post, own) =>
            {
                messages.push_back((*change, message));
            }
            (Carrier::Worker { post, change }, Reporter::Commit { post: own, change: committing, next }) => {
                match message {
                    Message::Do(planned)
                        if Arc::ptr_eq(post, own)
                            && change == committing
                            && planned.action.kind.is_of_commit()
                            && next.is_none() =>
                    {
                        **next = Some(planned);
                    }
                    message => post.tell(*change, message),
                }
            }
            (Carrier::Worker { post, change }, _) => post.tell(*change, message),
        }
    }
}

/// Carry out a commit of a worker's `change` in this thread, from `first` on: each of its actions waits for the medium,
/// and none can begin before the one before it has ended.
pub(super) fn carry_commit(shared: &Arc<Shared>, first: Planned, post: &Arc<Post>, change: ChangeId) {
    let mut next = Some(first);
    while let Some(planned) = next.take() {
        let carried = catch_unwind(AssertUnwindSafe(|| planned.carry_out(&mut Buffers::default())));
        let panicked = |_| Err(Error::io("carry out", "a commit", io::Error::other("it panicked")));
        let result = carried.unwrap_or_else(panicked);
        shared.complete(planned.action.id, result, &mut Reporter::Commit { post, change, next: &mut next });
    }
}
