//! The blocking executor: a thread carries its own request's actions out, one after another, and waits in between.

use std::sync::{Arc, PoisonError};

use super::{
    carrier::{Carrier, Message, Planned, Reporter},
    executor::Shared,
    pool::Pool,
    request::Buffers,
};
use crate::{
    cow::core::Op,
    error::{Error, Result},
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
    /// The thread sleeps. Mostly it puts its messages here itself, and waking nobody is a system call too.
    waits: bool,
}

impl Messages {
    fn next(&mut self) -> Option<Message> {
        let action = self.actions.pop().map(Message::Do);
        action.or_else(|| self.result.take().map(Message::Done))
    }
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, message: Message) {
        let mut messages = self.lock();
        match message {
            Message::Do(planned) => messages.actions.push(planned),
            Message::Done(result) => messages.result = Some(result),
        }
        if messages.waits {
            self.arrived.notify_one();
        }
    }

    /// The next thing to do; the result only after the last action.
    fn take(&self, pool: &Pool) -> Message {
        match pool.turns() {
            None => {
                let mut messages = self.lock();
                loop {
                    match messages.next() {
                        Some(message) => return message,
                        None => {
                            messages.waits = true;
                            messages = self.arrived.wait(messages).unwrap_or_else(PoisonError::into_inner);
                            messages.waits = false;
                        }
                    }
                }
            }
            Some(turns) => loop {
                match self.poll() {
                    Some(message) => return message,
                    None if turns.next() => {}
                    None => return Message::Done(Err(Error::Closed)),
                }
            },
        }
    }

    /// The same, if there is anything.
    pub fn poll(&self) -> Option<Message> {
        self.lock().next()
    }
}

impl Shared {
    /// Run an operation to its end in this thread.
    pub(super) fn run(self: &Arc<Self>, op: Op, buffers: &mut Buffers<'_>) -> Result<()> {
        let mailbox = Arc::new(Mailbox::default());
        self.submit(op, Carrier::Thread(mailbox.clone()), &mut Reporter::Thread)?;
        loop {
            match mailbox.take(self.housekeeper()) {
                Message::Done(result) => return result,
                Message::Do(planned) => {
                    let result = planned.carry_out(buffers);
                    self.complete(planned.action.id, result, &mut Reporter::Thread);
                }
            }
        }
    }
}
