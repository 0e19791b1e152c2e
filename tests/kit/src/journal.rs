//! The independent journal: what was written to a volume, what of it was flushed, and whether a volume holds that.
//!
//! Every 512-byte sector that is written says which sector it is and which change wrote it, and the rest of it follows
//! from these two, so that a torn, moved or older sector is told apart. After a crash a sector may hold what its last
//! flushed change left, or what a later change to that very sector would have left (invariant 2); without one, only
//! the newest.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use super::content::pattern;

pub const SECTOR: u64 = 512;
/// Sectors that are compared at a time.
const PIECE: u64 = 2048;

/// A change to one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// What was there before the journal began.
    Before,
    Write(u64),
    Zero,
}

/// What may be in a sector: the last durable change first, later ones after it.
type History = Vec<Change>;

/// The journal of a part of a volume that nobody else writes.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    sectors: BTreeMap<u64, History>,
    changes: u64,
    /// Sectors with changes that no flush covers yet.
    unflushed: BTreeSet<u64>,
    /// Since [`Journal::watch`]: what each changed sector held then, and every change since, whatever was flushed.
    watched: Option<BTreeMap<u64, History>>,
}

impl Journal {
    /// The bytes of a new change to `count` sectors; they may be on the volume from now on.
    pub fn write(&mut self, first: u64, count: u64) -> Vec<u8> {
        self.changes += 1;
        let change = self.changes;
        self.note(first, count, Change::Write(change));
        (first..first + count).flat_map(|sector| sector_bytes(sector, change)).collect()
    }

    /// The same for a range that is to read as zeros.
    pub fn zero(&mut self, first: u64, count: u64) {
        self.note(first, count, Change::Zero);
    }

    fn note(&mut self, first: u64, count: u64, change: Change) {
        for sector in first..first + count {
            let history = self.sectors.entry(sector).or_insert_with(|| vec![Change::Before]);
            if let Some(watched) = &mut self.watched {
                let newest = *history.last().expect("a history has its begin");
                watched.entry(sector).or_insert_with(|| vec![newest]).push(change);
            }
            history.push(change);
            self.unflushed.insert(sector);
        }
    }

    /// A flush was acknowledged: only the newest of each sector is left.
    pub fn flushed(&mut self) {
        for sector in std::mem::take(&mut self.unflushed) {
            self.settle(sector);
        }
    }

    /// A durable write of these sectors was acknowledged, which says nothing of others.
    pub fn durable(&mut self, first: u64, count: u64) {
        for sector in first..first + count {
            self.unflushed.remove(&sector);
            self.settle(sector);
        }
    }

    fn settle(&mut self, sector: u64) {
        let history = self.sectors.get_mut(&sector).expect("it is noted when it is changed");
        history.drain(..history.len() - 1);
    }

    /// A snapshot is about to be asked for; no change is under way at this moment.
    pub fn watch(&mut self) {
        self.watched = Some(BTreeMap::new());
    }

    /// What a snapshot holds that was taken since [`Journal::watch`]: of each sector what it held then or what any
    /// change since has left.
    pub fn moment(&mut self) -> Journal {
        let watched = self.watched.take().expect("it is watched");
        let mut sectors = self.sectors.clone();
        for history in sectors.values_mut() {
            history.drain(..history.len() - 1);
        }
        sectors.extend(watched);
        Journal { sectors, changes: self.changes, ..Journal::default() }
    }

    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    /// Compare every sector of `first..first + count` with `file` after a crash, and take what is there as the truth
    /// from now on. `before` says what a sector held before the journal began, and still holds where the journal knows
    /// of no change.
    pub fn check(
        &mut self,
        path: &Path,
        range: (u64, u64),
        before: impl Fn(u64) -> Vec<u8>,
    ) -> io::Result<()> {
        let held = self.compare(&File::open(path)?, range, before, Allowed::AfterCrash)?;
        for (sector, change) in held {
            self.sectors.insert(sector, vec![change]);
            self.unflushed.remove(&sector);
        }
        Ok(())
    }

    /// Compare them while the node lives and no change is under way: each holds its newest change.
    pub fn read_back(
        &self,
        file: &File,
        range: (u64, u64),
        before: impl Fn(u64) -> Vec<u8>,
    ) -> io::Result<()> {
        self.compare(file, range, before, Allowed::Newest).map(drop)
    }

    /// What each sector that the journal knows holds.
    fn compare(
        &self,
        file: &File,
        (first, count): (u64, u64),
        before: impl Fn(u64) -> Vec<u8>,
        allowed: Allowed,
    ) -> io::Result<Vec<(u64, Change)>> {
        let end = first + count;
        let (mut piece, mut held) = (Vec::new(), Vec::new());
        for start in (first..end).step_by(usize::try_from(PIECE).expect("small")) {
            let sectors = start..end.min(start + PIECE);
            piece.resize(usize::try_from((sectors.end - start) * SECTOR).expect("small"), 0);
            file.read_exact_at(&mut piece, start * SECTOR)?;
            for (sector, found) in sectors.zip(piece.chunks_exact(512)) {
                let is = |change: &Change| match change {
                    Change::Before => *found == *before(sector),
                    Change::Write(number) => *found == *sector_bytes(sector, *number),
                    Change::Zero => found.iter().all(|byte| *byte == 0),
                };
                let history = self.sectors.get(&sector).map(Vec::as_slice);
                let possible = match (history, allowed) {
                    (None, _) => &[Change::Before],
                    (Some(history), Allowed::AfterCrash) => history,
                    (Some(history), Allowed::Newest) => &history[history.len() - 1..],
                };
                let Some(change) = possible.iter().rev().copied().find(is) else {
                    panic!("sector {sector} holds {}, which is none of {possible:?}", describe(found));
                };
                if history.is_some() {
                    held.push((sector, change));
                }
            }
        }
        Ok(held)
    }
}

/// Which of a sector's changes it may hold.
#[derive(Clone, Copy)]
enum Allowed {
    Newest,
    AfterCrash,
}

fn sector_bytes(sector: u64, change: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes.extend_from_slice(&change.to_le_bytes());
    bytes.extend(pattern(512 - 16, (sector << 24) ^ change));
    bytes
}

fn describe(found: &[u8]) -> String {
    if found.iter().all(|byte| *byte == 0) {
        return "zeros".to_owned();
    }
    let number = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
    format!("sector {:#x} of change {:#x}, or something else", number(0), number(8))
}

/// A generator of small numbers, so that a test is the same every time.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `bound`.
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// How a writer makes its changes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// `fsync` after some changes.
    Fsync,
    /// Every write is one with O_DSYNC.
    Dsync,
}

/// Make one change to `first..first + count`, and sometimes a flush. Whether all changes are durable now.
pub fn write_once(
    file: &File,
    journal: &mut Journal,
    dice: &mut Dice,
    (first, count): (u64, u64),
    durability: Durability,
) -> io::Result<bool> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let len = 1 + match dice.roll(4) {
        0 => dice.roll(256),
        _ => dice.roll(16),
    };
    let at = first + dice.roll(count - len);
    match (dice.roll(8), durability) {
        (0, Durability::Fsync) => {
            journal.zero(at, len);
            let range = [at * SECTOR, len * SECTOR].map(|n| i64::try_from(n).expect("small"));
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, punch, range[0], range[1])?;
        }
        _ => {
            let bytes = journal.write(at, len);
            file.write_all_at(&bytes, at * SECTOR)?;
        }
    }
    match durability {
        Durability::Dsync => journal.durable(at, len),
        Durability::Fsync if dice.roll(6) > 0 => return Ok(false),
        Durability::Fsync => {
            file.sync_all()?;
            journal.flushed();
        }
    }
    Ok(true)
}

/// Change sectors of `region` until an error ends it or `enough` says so after a flush; `enough` is told how many
/// flushes were acknowledged.
pub fn write_until(
    file: &File,
    journal: &mut Journal,
    dice: &mut Dice,
    region: (u64, u64),
    durability: Durability,
    mut enough: impl FnMut(u64) -> bool,
) -> io::Result<()> {
    let mut flushes = 0;
    loop {
        if write_once(file, journal, dice, region, durability)? {
            flushes += 1;
            if enough(flushes) {
                return Ok(());
            }
        }
    }
}
