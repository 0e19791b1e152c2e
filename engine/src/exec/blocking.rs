//! The blocking executor: a thread carries its own request's actions out, one after another, and waits in between.

use std::sync::{Arc, PoisonError};

use super::{
    carrier::{Carrier, Message, Planned, Reporter},
    executor::Shared,
    request::Buffers,
};
use crate::{
    cow::core::Op,
    error::Result,
    sync::{Condvar, Mutex, MutexGuard},
};

/// Where the thread of an operation learns what to do.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    messages: Mutex<Messages>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Messages {
    actions: Vec<Planned>,
    result: Option<Result<()>>,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, message: Message) {
        match message {
            Message::Do(planned) => self.lock().actions.push(planned),
            Message::Done(result) => self.lock().result = Some(result),
        }
        self.arrived.notify_one();
    }

    /// The next thing to do; the result only after the last action.
    fn take(&self) -> Message {
        let mut messages = self.lock();
        loop {
            if let Some(action) = messages.actions.pop() {
                return Message::Do(action);
            }
            if let Some(result) = messages.result.take() {
                return Message::Done(result);
            }
            messages = self.arrived.wait(messages).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    /// Run an operation to its end in this thread.
    pub(super) fn run(self: &Arc<Self>, op: Op, buffers: &mut Buffers<'_>) -> Result<()> {
        let mailbox = Arc::new(Mailbox::default());
        self.submit(op, Carrier::Thread(mailbox.clone()), &mut Reporter::Thread)?;
        loop {
            match mailbox.take() {
                Message::Done(result) => return result,
                Message::Do(planned) => {
                    let result = planned.carry_out(buffers);
                    self.complete(planned.action.id, result, &mut Reporter::Thread);
                }
            }
        }
    }
}
