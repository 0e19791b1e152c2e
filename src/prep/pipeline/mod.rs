//! The work below an arrival: one hand hashes, one writes, one makes durable and records what is.
//!
//! Every piece goes to the hashing and to the writing hand, so the slower of the two decides. A `Mark` travels with
//! the pieces: the hasher answers it with its midstate, the writer hands it on once everything before it has been
//! written, and the syncing hand joins the two after a successful sync. So a record never claims bytes that were not
//! synced, nor a hash of other bytes.
//!
//! Owns what each hand does. Who they are is [`Hands`]: three threads (`threads.rs`), or one thread that does a piece of
//! this and a piece of that (`turns.rs`), so that on a simulated machine a seed is a history.

mod threads;
mod turns;

use std::{fmt, sync::Arc};

use bedplate_engine::{
    error::Result,
    planted::{self, Bug},
};

pub(super) use self::threads::start;
use super::{
    checksum::{Expected, Hasher, Midstate},
    failure::Failure,
    partial::{Kept, PartialNames, Proof},
    progress::Meter,
    room::Reserve,
    source::Validator,
};
use crate::directory::{Directory, HeldFile};

/// Pieces that wait for the hasher, and for the writer.
const PIECES_QUEUED_MAX: usize = 16;
/// Marks that wait for a sync; with the one being synced, this bounds how much is written and not durable.
const SYNCS_QUEUED_MAX: usize = 1;
/// Midstates that wait for their sync. There is one for each mark on its way, so this is never what blocks the hasher.
const MIDSTATES_QUEUED_MAX: usize = PIECES_QUEUED_MAX + SYNCS_QUEUED_MAX + 3;

/// Who carries out the work of a pass.
#[derive(Clone, Debug)]
pub enum Hands {
    /// A thread for each part of it.
    Threads,
    /// Whoever delivers, in turns.
    Turns(Arc<dyn Turns>),
}

/// Decides in which order one thread does the work of three.
pub trait Turns: Send + Sync + fmt::Debug {
    /// Which of `count` things happens next; there is at least one.
    fn choose(&self, count: usize) -> usize;
}

/// The lower end of an arrival: where its pieces go.
pub(super) trait Pipeline: fmt::Debug {
    /// Hand a piece on, in order. An error says that the disk takes no more; why, is known at the end of the pass.
    fn hand_on(&mut self, piece: Piece) -> Result<(), Failure>;

    /// Everything so far was for nothing. On return the file is empty and its space free again.
    fn restart(&mut self) -> Result<(), Failure>;
}

/// Carry out a pass: `deliver` hands the pieces on, and everything that it has handed on is done on return.
pub(super) fn carry_out<T>(
    work: Work<'_>,
    hands: &Hands,
    meter: &Meter,
    deliver: impl FnOnce(&mut dyn Pipeline) -> T,
) -> Result<(T, Done)> {
    match hands {
        Hands::Threads => threads::carry_out(work, meter, deliver),
        Hands::Turns(turns) => Ok(turns::carry_out(work, &**turns, deliver)),
    }
}

/// The three parts of the work.
#[derive(Debug)]
pub(super) struct Work<'a> {
    hashing: Hashing<'a>,
    writing: Writing<'a>,
    keeping: Keeping<'a>,
}

impl<'a> Work<'a> {
    /// On `target`, of which everything before `position` is there and went through `hasher`.
    pub(super) fn new(
        target: Target<'a>,
        position: u64,
        hasher: Hasher,
        expected: Option<&'a Expected>,
    ) -> Work<'a> {
        Work {
            hashing: Hashing { hasher, expected },
            writing: Writing { target, position },
            keeping: Keeping { target },
        }
    }
}

/// What a pass came to.
#[derive(Debug)]
pub(super) struct Done {
    /// After the last piece.
    pub hasher: Result<Hasher, Failure>,
    /// Whether the disk took everything.
    pub written: Result<(), Failure>,
}

/// What travels from the source to the hasher and the writer.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    Data(Arc<Vec<u8>>),
    /// So many zeros, which were never bytes.
    Zeros(u64),
    Mark(Mark),
}

/// A place in the arrival where its state is worth keeping.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub position: u64,
    pub total: Option<u64>,
    pub validator: Validator,
}

/// The file that arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub file: &'a HeldFile,
    pub dir: &'a Directory,
    pub names: PartialNames,
    pub reserve: Reserve,
}

#[derive(Debug)]
struct Hashing<'a> {
    hasher: Hasher,
    expected: Option<&'a Expected>,
}

impl Hashing<'_> {
    /// Hash a piece; a mark is answered with the state there.
    fn take(&mut self, piece: &Piece) -> Option<Midstate> {
        match piece {
            Piece::Data(bytes) => self.hasher.update(bytes),
            Piece::Zeros(len) => self.hasher.zeros(*len),
            Piece::Mark(_) => return Some(self.hasher.midstate()),
        }
        None
    }

    fn restart(&mut self) {
        self.hasher = Hasher::new(self.expected);
    }
}

#[derive(Debug)]
struct Writing<'a> {
    target: Target<'a>,
    position: u64,
}

impl Writing<'_> {
    /// Write a piece; returns a mark once everything before it has been written.
    fn take(&mut self, piece: Piece) -> Result<Option<Mark>, Failure> {
        let Target { file, dir, reserve, .. } = self.target;
        match piece {
            Piece::Data(bytes) => {
                reserve.check_kept(dir)?;
                file.write_sparse(&bytes, self.position)?;
                self.position += bytes.len() as u64;
            }
            Piece::Zeros(len) => self.position += len,
            Piece::Mark(mark) => {
                // The file is at least as long as what is kept of it, also when that ends in zeros.
                file.set_len(self.position)?;
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }

    /// Give everything back that was written. What was kept has been forgotten before: a record must not vouch for bytes
    /// that are being replaced.
    fn restart(&mut self) -> Result<(), Failure> {
        self.target.file.set_len(0)?;
        self.position = 0;
        Ok(())
    }
}

#[derive(Debug)]
struct Keeping<'a> {
    target: Target<'a>,
}

impl Keeping<'_> {
    /// Make a mark durable and record it. A sync that fails ends the arrival: what it should have covered is not trusted
    /// again, whatever a later sync says.
    fn keep(&self, mark: Mark, midstate: Midstate) -> Result<()> {
        let Target { file, dir, names, .. } = self.target;
        let Mark { position, total, validator } = mark;
        let (complete, proof) = (false, Proof::NotNeeded);
        let kept = Kept { position, total, complete, validator, proof, midstate };
        if planted::is(Bug::KeptBeforeData) {
            kept.store(dir, names)?;
        }
        let synced = file.sync_data();
        if !planted::is(Bug::KeptAfterFailedSync) {
            synced.clone()?;
        }
        kept.store(dir, names)?;
        synced
    }

    /// Forget what was kept.
    fn forget(&self) -> Result<()> {
        Kept::forget(self.target.dir, self.target.names)
    }
}

/// Nothing is taken any more: the hand that has failed says why.
fn closed() -> Failure {
    Failure::Source("the disk does not take the bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use bedplate_engine::error::Error;

    use super::*;

    #[test]
    fn a_sync_that_fails_leaves_the_record_of_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let held = Directory::open(dir.path()).unwrap();
        let names = PartialNames { data: "partial.data", record: "partial.json" };
        let held_file = |file| HeldFile::new(file, dir.path().to_owned());
        let good = held_file(tempfile::tempfile().unwrap());
        // A character device refuses to be synced.
        let bad = held_file(File::open("/dev/null").unwrap());
        let keep = |file: &HeldFile, position| {
            let mark = Mark { position, total: None, validator: Validator::None };
            let target = Target { file, dir: &held, names, reserve: Reserve::default() };
            Keeping { target }.keep(mark, Hasher::new(None).midstate())
        };
        keep(&good, 4096).unwrap();
        assert!(matches!(keep(&bad, 8192), Err(Error::Io { op: "sync", .. })));
        assert_eq!(Kept::load(&held, names).unwrap().position, 4096);
    }
}
