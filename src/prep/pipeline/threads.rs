//! A thread for each part of a pass.
//!
//! Queues are bounded; a thread that fails closes its queue, which ends the others.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, Scope, ScopedJoinHandle},
};

use bedplate_engine::error::{Error, Result};

use super::{
    Done, Hashing, Keeping, MIDSTATES_QUEUED_MAX, Mark, PIECES_QUEUED_MAX, Piece, Pipeline, SYNCS_QUEUED_MAX,
    Work, Writing, closed,
};
use crate::prep::{
    checksum::{Hasher, Midstate},
    failure::Failure,
    progress::{Meter, Phase},
};

/// Start a thread of a pass; a limit of the machine may refuse it.
pub(in crate::prep) fn start<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn_scoped(scope, work).map_err(|e| Error::io("start", format!("thread {name}"), e))
}

/// What the hasher and the writer are told.
#[derive(Clone, Debug)]
enum Message {
    Piece(Piece),
    /// Begin again. The writer answers when the file is empty.
    Restart(SyncSender<()>),
}

/// What the writer asks of the syncing thread.
#[derive(Debug)]
enum SyncTask {
    Keep(Mark),
    /// Forget what was kept, then answer.
    Forget(SyncSender<()>),
}

/// The ends of the queues at which an arrival puts its pieces in.
#[derive(Debug)]
struct Queues {
    to_hash: SyncSender<Message>,
    to_write: SyncSender<Message>,
}

impl Queues {
    fn send(&self, message: Message) -> Result<(), Failure> {
        self.to_hash.send(message.clone()).map_err(|_| closed())?;
        self.to_write.send(message).map_err(|_| closed())
    }
}

impl Pipeline for Queues {
    fn hand_on(&mut self, piece: Piece) -> Result<(), Failure> {
        self.send(Message::Piece(piece))
    }

    fn restart(&mut self) -> Result<(), Failure> {
        let (done, emptied) = sync_channel(1);
        self.send(Message::Restart(done))?;
        // Both threads let go of it, also when they fail, so that this ends.
        emptied.recv().map_err(|_| closed())
    }
}

/// See [`super::carry_out`].
pub(super) fn carry_out<T>(
    work: Work<'_>,
    meter: &Meter,
    deliver: impl FnOnce(&mut dyn Pipeline) -> T,
) -> Result<(T, Done)> {
    let Work { hashing, writing, keeping } = work;
    let (to_hash, hash_queue) = sync_channel(PIECES_QUEUED_MAX);
    let (to_write, write_queue) = sync_channel(PIECES_QUEUED_MAX);
    let (to_sync, sync_queue) = sync_channel(SYNCS_QUEUED_MAX);
    let (to_keep, midstates) = sync_channel(MIDSTATES_QUEUED_MAX);
    thread::scope(|scope| {
        // Queues move into their threads, so that a thread that ends closes them.
        let hashing = start(scope, "hash", move || hash_all(&hash_queue, &to_keep, hashing))?;
        let writing = start(scope, "write", move || write_all(&write_queue, &to_sync, writing))?;
        let syncing = start(scope, "sync", move || keep_all(&sync_queue, &midstates, &keeping))?;
        let mut queues = Queues { to_hash, to_write };
        let delivered = deliver(&mut queues);
        drop(queues);
        meter.enter(Phase::Hashing);
        let hasher = hashing.join();
        let hasher = hasher.map_err(|_| Failure::Source("the hashing thread ended unexpectedly".to_owned()));
        meter.enter(Phase::Syncing);
        let written = joined(writing.join()).and(joined(syncing.join().map(|synced| Ok(synced?))));
        Ok((delivered, Done { hasher, written }))
    })
}

fn joined(result: thread::Result<Result<(), Failure>>) -> Result<(), Failure> {
    result.unwrap_or_else(|_| Err(Failure::Source("a writing thread ended unexpectedly".to_owned())))
}

/// Hash all pieces. Returns the state after the last one.
fn hash_all(
    messages: &Receiver<Message>,
    midstates: &SyncSender<Midstate>,
    mut hashing: Hashing<'_>,
) -> Hasher {
    for message in messages {
        match message {
            Message::Piece(piece) => {
                if let Some(midstate) = hashing.take(&piece) {
                    // When nobody takes it, the syncing thread has failed and says so itself.
                    drop(midstates.send(midstate));
                }
            }
            Message::Restart(_) => hashing.restart(),
        }
    }
    hashing.hasher
}

/// Write all pieces.
fn write_all(
    messages: &Receiver<Message>,
    syncs: &SyncSender<SyncTask>,
    mut writing: Writing<'_>,
) -> Result<(), Failure> {
    for message in messages {
        match message {
            Message::Piece(piece) => {
                if let Some(mark) = writing.take(piece)?
                    && syncs.send(SyncTask::Keep(mark)).is_err()
                {
                    return Ok(());
                }
            }
            Message::Restart(emptied) => {
                let (done, forgotten) = sync_channel(1);
                if syncs.send(SyncTask::Forget(done)).is_err() || forgotten.recv().is_err() {
                    return Ok(());
                }
                writing.restart()?;
                // The source waits for this, unless it is gone.
                let _ = emptied.send(());
            }
        }
    }
    Ok(())
}

/// Make marks durable and record them.
fn keep_all(tasks: &Receiver<SyncTask>, midstates: &Receiver<Midstate>, keeping: &Keeping<'_>) -> Result<()> {
    for task in tasks {
        match task {
            SyncTask::Keep(mark) => {
                // The hasher has seen this mark, or will; if it is gone, so is the arrival.
                let Ok(midstate) = midstates.recv() else { return Ok(()) };
                keeping.keep(mark, midstate)?;
            }
            SyncTask::Forget(done) => {
                keeping.forget()?;
                // The writer waits for this, unless it is gone.
                let _ = done.send(());
            }
        }
    }
    Ok(())
}
