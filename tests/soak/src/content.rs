//! What a volume holds, as far as anybody can know who saw what was acknowledged.
//!
//! A volume began as some bytes, has one region for each of its writers, with a journal, and zeros past both. A
//! snapshot, a clone, an export or an image of it is to hold the same, so each takes a copy along.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use bedplate_testkit::journal::{Journal, SECTOR};

/// Each volume has this many writers.
pub const WRITERS: usize = 2;

pub struct Content {
    base: Arc<Vec<u8>>,
    regions: [Mutex<Journal>; WRITERS],
}

impl Content {
    /// Just `base`, a whole number of sectors for each writer.
    pub fn over(base: Arc<Vec<u8>>) -> Content {
        Content { base, regions: Default::default() }
    }

    /// The part that a writer has to itself: its first sector and their count.
    pub fn region(&self, writer: usize) -> (u64, u64) {
        let count = self.base.len() as u64 / SECTOR / WRITERS as u64;
        (writer as u64 * count, count)
    }

    /// A writer's journal; held over a change and its acknowledgement.
    pub fn journal(&self, writer: usize) -> MutexGuard<'_, Journal> {
        self.regions[writer].lock().expect("a writer that panics ends the run")
    }

    /// A sector's bytes before anything was written.
    pub fn before(&self, sector: u64) -> Vec<u8> {
        let at = usize::try_from(sector * SECTOR).expect("volumes here are small");
        self.base[at..at + 512].to_vec()
    }

    /// A snapshot is about to be asked for.
    pub fn watch(&self) {
        (0..WRITERS).for_each(|writer| self.journal(writer).watch());
    }

    /// What a snapshot holds that was taken since [`Content::watch`].
    pub fn moment(&self) -> Content {
        Content { base: self.base.clone(), regions: [0, 1].map(|n| Mutex::new(self.journal(n).moment())) }
    }

    pub fn copy(&self) -> Content {
        Content { base: self.base.clone(), regions: [0, 1].map(|n| Mutex::new(self.journal(n).clone())) }
    }

    /// Compare all of a file after a crash, and take what is there as the truth from now on.
    pub fn check(&self, path: &Path) -> io::Result<()> {
        for writer in 0..WRITERS {
            self.journal(writer).check(path, self.region(writer), |sector| self.before(sector))?;
        }
        zeros_from(path, self.base.len() as u64)
    }

    /// A range of a writer's region holds what its newest changes left.
    pub fn read_back(&self, file: &File, writer: usize, range: (u64, u64)) -> io::Result<()> {
        self.journal(writer).read_back(file, range, |sector| self.before(sector))
    }
}

fn zeros_from(path: &Path, at: u64) -> io::Result<()> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(at))?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    assert_eq!(at + rest.len() as u64, len, "{} is cut off", path.display());
    assert!(rest.iter().all(|byte| *byte == 0), "{} holds something past its end", path.display());
    Ok(())
}
