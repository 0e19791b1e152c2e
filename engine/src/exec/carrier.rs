//! Who carries the actions of an operation out: whoever submitted it.
//!
//! Owns [`Carrier`]: a thread that waits in its mailbox, or a worker, which is sent to. A volume has one core whoever
//! uses it, so completions that one of them reports can set actions of another free.

use std::{collections::VecDeque, sync::Arc};

use super::{blocking::Mailbox, executor::Live, request::Buffers, ring::Post};
use crate::{
    cow::core::{Action, Output},
    error::Result,
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
    Worker { post: &'a Arc<Post>, messages: &'a mut VecDeque<(ChangeId, Message)> },
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
            (Carrier::Worker { post, change }, _) => post.tell(*change, message),
        }
    }
}
