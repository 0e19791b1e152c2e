//! The guest's disk: a log of what reached it, from which the disk after a cut at any point is made.
//!
//! Entries are in the order in which they were answered. A flush covers what was answered before it came. Of the rest a
//! cut keeps what the dice say: some writes whole, some not at all, some in part, sector by sector. Notes come over a
//! second disk of the guest, which loses nothing: a note's place in the log says what was known when.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bedplate_testkit::journal::Dice;

use crate::script::SECTOR;

/// The second sector of ext4's superblock: of the two, with a checksum over both, ext4 takes it that they are written
/// together, in place. With one of them lost it mounts no more, whatever is on it.
const EXT4_SUPERBLOCK_REST: u64 = 1536;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Write { at: u64, bytes: Vec<u8>, durable: bool },
    Flush,
    Note(String),
}

/// A disk that a guest uses: its content now, and the log of how it came to that.
pub struct Disk {
    /// For reads: a copy that the host's page cache holds.
    now: File,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    log: Vec<Entry>,
    /// The power is off: nothing is answered any more.
    off: bool,
}

/// What a cut keeps of the entries that are not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Keeps its word on flushes; loses a part of the rest.
    Honest,
    /// Loses the last entries whole, whatever was flushed.
    ForgetsLast(usize),
}

impl Disk {
    pub fn new(now: File) -> Disk {
        Disk { now, state: Mutex::default() }
    }

    pub fn len(&self) -> io::Result<u64> {
        Ok(self.now.metadata()?.len())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.now.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    pub fn add(&self, entry: Entry) -> io::Result<()> {
        let mut state = self.state();
        if state.off {
            return Err(io::Error::other("the power is off"));
        }
        if let Entry::Write { at, bytes, .. } = &entry {
            self.now.write_all_at(bytes, *at)?;
        }
        state.log.push(entry);
        Ok(())
    }

    /// What is found in a note of the log, the newest first.
    pub fn find_note<T>(&self, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.state().log.iter().rev().find_map(|entry| match entry {
            Entry::Note(text) => find(text),
            Entry::Write { .. } | Entry::Flush => None,
        })
    }

    /// The cut: what is under way is not answered, and the log ends here.
    pub fn cut(&self) -> Vec<Entry> {
        let mut state = self.state();
        state.off = true;
        std::mem::take(&mut state.log)
    }
}

/// Write onto `disk`, which holds what the log began with, what `log` leaves after a cut at its end.
pub fn materialise(log: &[Entry], medium: Medium, dice: &mut Dice, disk: &File) -> io::Result<()> {
    let (log, flushed) = match medium {
        Medium::Honest => (log, log.iter().rposition(|entry| *entry == Entry::Flush).unwrap_or(0)),
        Medium::ForgetsLast(count) => {
            let kept = log.len().saturating_sub(count);
            (&log[..kept], kept)
        }
    };
    for (index, entry) in log.iter().enumerate() {
        let Entry::Write { at, bytes, durable } = entry else { continue };
        if index < flushed || *durable {
            disk.write_all_at(bytes, *at)?;
            continue;
        }
        // 0: nothing of it, 1: all of it, 2: some sectors.
        let fate = dice.roll(3);
        let mut kept = false;
        for (sector_at, sector) in (*at..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
            if sector_at != EXT4_SUPERBLOCK_REST {
                kept = fate == 1 || (fate == 2 && dice.roll(2) == 0);
            }
            if kept {
                disk.write_all_at(sector, sector_at)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 16 * SECTOR;

    fn write(sector: u64, byte: u8, durable: bool) -> Entry {
        Entry::Write { at: sector * 512, bytes: vec![byte; 4 * SECTOR], durable }
    }

    fn left(log: &[Entry], medium: Medium, seed: u64) -> Vec<u8> {
        let disk = tempfile::tempfile().expect("a temporary file");
        disk.set_len(LEN as u64).expect("its length");
        materialise(log, medium, &mut Dice::new(seed), &disk).expect("it is written");
        let mut content = vec![0; LEN];
        disk.read_exact_at(&mut content, 0).expect("it is read");
        content
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_what_was_durable_by_itself() {
        let log = [write(0, 1, false), Entry::Flush, write(4, 2, false), write(8, 3, true)];
        for seed in 0..50 {
            let content = left(&log, Medium::Honest, seed);
            assert!(content[..4 * SECTOR].iter().all(|byte| *byte == 1));
            assert!(content[8 * SECTOR..12 * SECTOR].iter().all(|byte| *byte == 3));
        }
    }

    #[test]
    fn a_cut_loses_all_none_or_some_sectors_of_what_was_not_flushed() {
        let log = [Entry::Flush, write(0, 7, false)];
        let kept: std::collections::BTreeSet<usize> = (0..100)
            .map(|seed| left(&log, Medium::Honest, seed).iter().filter(|byte| **byte == 7).count() / SECTOR)
            .collect();
        assert!(kept.contains(&0) && kept.contains(&4) && kept.len() > 2, "{kept:?}");
    }

    #[test]
    fn the_two_sectors_of_an_ext4_superblock_have_one_fate() {
        let log = [Entry::Flush, write(0, 7, false)];
        for seed in 0..100 {
            let content = left(&log, Medium::Honest, seed);
            assert_eq!(content[2 * SECTOR], content[3 * SECTOR], "seed {seed}");
        }
    }

    #[test]
    fn a_medium_that_forgets_loses_what_was_flushed() {
        let log = [write(0, 1, false), Entry::Flush];
        assert_eq!(left(&log, Medium::ForgetsLast(2), 1), vec![0; LEN]);
    }
}
