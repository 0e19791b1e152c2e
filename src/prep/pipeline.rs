//! The threads behind an arrival: one hashes, one writes, one makes durable and records what is.
//!
//! Every piece goes to the hashing and to the writing thread, so the slower of the two decides. A [`Mark`] travels with
//! the pieces: the hasher answers it with its midstate, the writer hands it on once everything before it has been
//! written, and the syncing thread joins the two after a successful sync. So a record never claims bytes that were not
//! synced, nor a hash of other bytes. Queues are bounded; a thread that fails closes its queue, which ends the others.

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender},
    },
    thread::{self, Scope, ScopedJoinHandle},
};

use bedplate_engine::{
    error::{Error, Result},
    sparse::write_sparse,
};

use super::{
    checksum::{Expected, Hasher, Midstate},
    failure::Failure,
    partial::{Kept, PartialNames, Proof},
    room::Reserve,
    source::Validator,
};
use crate::directory::Directory;

/// Pieces that wait for the hasher, and for the writer.
pub(super) const PIECES_QUEUED_MAX: usize = 16;
/// Marks that wait for a sync; with the one being synced, this bounds how much is written and not durable.
pub(super) const SYNCS_QUEUED_MAX: usize = 1;
/// Midstates that wait for their sync. There is one for each mark on its way, so this is never what blocks the hasher.
pub(super) const MIDSTATES_QUEUED_MAX: usize = PIECES_QUEUED_MAX + SYNCS_QUEUED_MAX + 3;

/// Start a thread of a pass; a limit of the machine may refuse it.
pub(super) fn start<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn_scoped(scope, work).map_err(|e| Error::io("start", format!("thread {name}"), e))
}

/// What travels from the source to the hasher and the writer.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    Data(Arc<Vec<u8>>),
    /// So many zeros, which were never bytes.
    Zeros(u64),
    Mark(Mark),
    /// Everything so far was for nothing. The writer answers when the file is empty and its space free again.
    Restart(SyncSender<()>),
}

/// A place in the arrival where its state is worth keeping.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub position: u64,
    pub total: Option<u64>,
    pub validator: Validator,
}

/// What the writer asks of the syncing thread.
#[derive(Debug)]
pub(super) enum SyncTask {
    Keep(Mark),
    /// Forget what was kept, then answer.
    Forget(SyncSender<()>),
}

/// The file that arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub file: &'a File,
    pub path: &'a Path,
    pub dir: &'a Directory,
    pub names: PartialNames,
    pub reserve: Reserve,
}

/// Hash all pieces. Returns the state after the last one.
pub(super) fn hash_pieces(
    pieces: &Receiver<Piece>,
    midstates: &SyncSender<Midstate>,
    mut hasher: Hasher,
    expected: Option<&Expected>,
) -> Hasher {
    for piece in pieces {
        match piece {
            Piece::Data(bytes) => hasher.update(&bytes),
            Piece::Zeros(len) => hasher.zeros(len),
            // When nobody takes it, the syncing thread has failed and says so itself.
            Piece::Mark(_) => drop(midstates.send(hasher.midstate())),
            Piece::Restart(_) => hasher = Hasher::new(expected),
        }
    }
    hasher
}

/// Write all pieces from `position` on.
pub(super) fn write_pieces(
    pieces: &Receiver<Piece>,
    syncs: &SyncSender<SyncTask>,
    target: Target<'_>,
    mut position: u64,
) -> Result<(), Failure> {
    for piece in pieces {
        match piece {
            Piece::Data(bytes) => {
                target.reserve.check_kept(target.dir)?;
                write_sparse(target.file, &bytes, position)
                    .map_err(|e| Error::io("write", target.path, e))?;
                position += bytes.len() as u64;
            }
            Piece::Zeros(len) => position += len,
            Piece::Mark(mark) => {
                // The file is at least as long as what is kept of it, also when that ends in zeros.
                target.file.set_len(position).map_err(|e| Error::io("extend", target.path, e))?;
                if syncs.send(SyncTask::Keep(mark)).is_err() {
                    return Ok(());
                }
            }
            Piece::Restart(emptied) => {
                // The record goes first: it must not vouch for bytes that are being replaced.
                let (done, forgotten) = std::sync::mpsc::sync_channel(1);
                if syncs.send(SyncTask::Forget(done)).is_err() || forgotten.recv().is_err() {
                    return Ok(());
                }
                target.file.set_len(0).map_err(|e| Error::io("truncate", target.path, e))?;
                position = 0;
                // The source waits for this, unless it is gone.
                let _ = emptied.send(());
            }
        }
    }
    Ok(())
}

/// Make marks durable and record them. A sync that fails ends the arrival: what it should have covered is not trusted
/// again, whatever a later sync says.
pub(super) fn keep_synced(
    tasks: &Receiver<SyncTask>,
    midstates: &Receiver<Midstate>,
    target: Target<'_>,
) -> Result<()> {
    for task in tasks {
        match task {
            SyncTask::Keep(mark) => {
                // The hasher has seen this mark, or will; if it is gone, so is the arrival.
                let Ok(midstate) = midstates.recv() else { return Ok(()) };
                target.file.sync_data().map_err(|e| Error::io("sync", target.path, e))?;
                let Mark { position, total, validator } = mark;
                let (complete, proof) = (false, Proof::NotNeeded);
                Kept { position, total, complete, validator, proof, midstate }
                    .store(target.dir, target.names)?;
            }
            SyncTask::Forget(done) => {
                Kept::forget(target.dir, target.names)?;
                // The writer waits for this, unless it is gone.
                let _ = done.send(());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn a_sync_that_fails_leaves_the_record_of_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let held = Directory::open(dir.path()).unwrap();
        let names = PartialNames { data: "partial.data", record: "partial.json" };
        let good = tempfile::tempfile().unwrap();
        // A character device refuses to be synced.
        let bad = File::open("/dev/null").unwrap();
        let keep = |file: &File, position| {
            let (to_sync, tasks) = sync_channel(1);
            let (to_keep, midstates) = sync_channel(1);
            let mark = Mark { position, total: None, validator: Validator::None };
            to_sync.send(SyncTask::Keep(mark)).unwrap();
            to_keep.send(Hasher::new(None).midstate()).unwrap();
            drop((to_sync, to_keep));
            keep_synced(
                &tasks,
                &midstates,
                Target { file, path: dir.path(), dir: &held, names, reserve: Reserve::default() },
            )
        };
        keep(&good, 4096).unwrap();
        assert!(matches!(keep(&bad, 8192), Err(Error::Io { op: "sync", .. })));
        assert_eq!(Kept::load(&held, names).unwrap().position, 4096);
    }
}
