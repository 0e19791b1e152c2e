//! The three parts of a pass on one thread: somebody else says which of them goes on.
//!
//! What can happen is what could with threads: queues have the same bounds, a hand that fails takes nothing more, and the
//! others do what is left for them.

use std::collections::VecDeque;

use super::{
    Done, Hashing, Keeping, Mark, PIECES_QUEUED_MAX, Piece, Pipeline, SYNCS_QUEUED_MAX, Turns, Work, Writing,
    closed,
};
use crate::prep::{checksum::Midstate, failure::Failure};

/// What the hasher and the writer are told.
#[derive(Clone, Debug)]
enum Message {
    Piece(Piece),
    Restart,
}

/// What the writer asks of whoever syncs.
#[derive(Debug)]
enum SyncTask {
    Keep(Mark),
    Forget,
}

/// How far a restart is that the writer has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    No,
    /// What was kept is to be forgotten first.
    Asked,
    Forgotten,
}

/// A piece of work.
#[derive(Clone, Copy, Debug)]
enum Move {
    Hash,
    Write,
    Sync,
}

#[derive(Debug)]
struct InTurns<'a> {
    turns: &'a dyn Turns,
    hashing: Hashing<'a>,
    /// None: it takes nothing more.
    writing: Option<Writing<'a>>,
    keeping: Option<Keeping<'a>>,
    to_hash: VecDeque<Message>,
    to_write: VecDeque<Message>,
    to_sync: VecDeque<SyncTask>,
    midstates: VecDeque<Midstate>,
    restart: Restart,
    written: Result<(), Failure>,
    synced: Result<(), Failure>,
}

/// See [`super::carry_out`].
pub(super) fn carry_out<T>(
    work: Work<'_>,
    turns: &dyn Turns,
    deliver: impl FnOnce(&mut dyn Pipeline) -> T,
) -> (T, Done) {
    let Work { hashing, writing, keeping } = work;
    let mut all = InTurns {
        turns,
        hashing,
        writing: Some(writing),
        keeping: Some(keeping),
        to_hash: VecDeque::new(),
        to_write: VecDeque::new(),
        to_sync: VecDeque::new(),
        midstates: VecDeque::new(),
        restart: Restart::No,
        written: Ok(()),
        synced: Ok(()),
    };
    let delivered = deliver(&mut all);
    while all.go_on() {}
    (delivered, Done { hasher: Ok(all.hashing.hasher), written: all.written.and(all.synced) })
}

impl Pipeline for InTurns<'_> {
    fn hand_on(&mut self, piece: Piece) -> Result<(), Failure> {
        self.put(Message::Piece(piece))?;
        // The source goes on, sooner or later.
        loop {
            let moves = self.moves();
            let Some(chosen) = moves.get(self.turns.choose(moves.len() + 1)) else { return Ok(()) };
            self.make(*chosen);
        }
    }

    fn restart(&mut self) -> Result<(), Failure> {
        self.put(Message::Restart)?;
        while self.writing.is_some()
            && self.to_write.iter().any(|message| matches!(message, Message::Restart))
        {
            self.go_on();
        }
        if self.writing.is_some() { Ok(()) } else { Err(closed()) }
    }
}

impl InTurns<'_> {
    /// Queue a message, when there is a place for it.
    fn put(&mut self, message: Message) -> Result<(), Failure> {
        while self.to_hash.len() >= PIECES_QUEUED_MAX || self.to_write.len() >= PIECES_QUEUED_MAX {
            self.go_on();
        }
        self.to_hash.push_back(message.clone());
        if self.writing.is_none() {
            return Err(closed());
        }
        self.to_write.push_back(message);
        Ok(())
    }

    /// Do a piece of work. `false`: there is none.
    fn go_on(&mut self) -> bool {
        let moves = self.moves();
        if moves.is_empty() {
            return false;
        }
        if let Some(chosen) = moves.get(self.turns.choose(moves.len())) {
            self.make(*chosen);
        }
        true
    }

    fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        if !self.to_hash.is_empty() {
            moves.push(Move::Hash);
        }
        let has_place = self.keeping.is_none() || self.to_sync.len() < SYNCS_QUEUED_MAX;
        let writes = match self.to_write.front() {
            None => false,
            Some(Message::Piece(Piece::Data(_) | Piece::Zeros(_))) => true,
            Some(Message::Piece(Piece::Mark(_))) => has_place,
            Some(Message::Restart) => match self.restart {
                Restart::No => has_place,
                Restart::Asked => false,
                Restart::Forgotten => true,
            },
        };
        if writes {
            moves.push(Move::Write);
        }
        let syncs = match self.to_sync.front() {
            None => false,
            Some(SyncTask::Keep(_)) => !self.midstates.is_empty(),
            Some(SyncTask::Forget) => true,
        };
        if syncs {
            moves.push(Move::Sync);
        }
        moves
    }

    fn make(&mut self, chosen: Move) {
        match chosen {
            Move::Hash => self.hash(),
            Move::Write => {
                let result = self.write();
                if result.is_err() {
                    self.written = result;
                    self.end_writing();
                }
            }
            Move::Sync => {
                let result = self.sync();
                if result.is_err() {
                    self.synced = result;
                    self.keeping = None;
                    self.to_sync.clear();
                    if self.restart == Restart::Asked {
                        self.end_writing();
                    }
                }
            }
        }
    }

    fn end_writing(&mut self) {
        self.writing = None;
        self.to_write.clear();
    }

    fn hash(&mut self) {
        match self.to_hash.pop_front() {
            Some(Message::Piece(piece)) => self.midstates.extend(self.hashing.take(&piece)),
            Some(Message::Restart) => self.hashing.restart(),
            None => {}
        }
    }

    fn write(&mut self) -> Result<(), Failure> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let task = match (self.to_write.front(), self.restart) {
            (Some(Message::Restart), Restart::No | Restart::Asked) => {
                self.restart = Restart::Asked;
                SyncTask::Forget
            }
            (Some(Message::Restart), Restart::Forgotten) => {
                writing.restart()?;
                self.restart = Restart::No;
                self.to_write.pop_front();
                return Ok(());
            }
            (Some(Message::Piece(_)) | None, _) => {
                let Some(Message::Piece(piece)) = self.to_write.pop_front() else { return Ok(()) };
                let Some(mark) = writing.take(piece)? else { return Ok(()) };
                SyncTask::Keep(mark)
            }
        };
        if self.keeping.is_some() {
            self.to_sync.push_back(task);
        } else {
            self.end_writing();
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let Some(keeping) = &self.keeping else { return Ok(()) };
        match self.to_sync.pop_front() {
            Some(SyncTask::Keep(mark)) => {
                if let Some(midstate) = self.midstates.pop_front() {
                    keeping.keep(mark, midstate)?;
                }
            }
            Some(SyncTask::Forget) => {
                keeping.forget()?;
                self.restart = Restart::Forgotten;
            }
            None => {}
        }
        Ok(())
    }
}
