//! What a guest lets the host know: notes on a second disk, which loses nothing. The write of a note returns when it is
//! in the host's log.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::exit,
};

use anyhow::{Context, Result, ensure};
use nix::libc::O_DIRECT;

use crate::script::SECTOR;

/// The first word of the note of a load that failed.
pub const FAILED: &str = "failed";

/// Where one thread writes its notes: a sector of its own, far from others', so that no two become one request.
pub struct Notes {
    file: File,
    at: u64,
}

impl Notes {
    pub fn open(path: &Path, slot: u64) -> Result<Notes> {
        let file = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(path)?;
        Ok(Notes { file, at: slot * 64 * SECTOR as u64 })
    }

    /// A text of less than a sector.
    pub fn note(&self, text: &str) -> Result<()> {
        // O_DIRECT wants an aligned buffer.
        let mut space = [0_u8; 2 * SECTOR];
        let from = space.as_ptr().align_offset(SECTOR);
        let sector = &mut space[from..from + SECTOR];
        ensure!(text.len() < SECTOR, "a note is one sector");
        sector[..text.len()].copy_from_slice(text.as_bytes());
        self.file.write_all_at(sector, self.at).context("a note")
    }

    /// The end of a load, with the first failure of any of its threads: noted before anything else can be.
    pub fn fail(&self, error: &anyhow::Error) -> ! {
        let text = format!("{FAILED} {error:#}");
        eprintln!("{text}");
        if let Err(error) = self.note(text.get(..SECTOR - 1).unwrap_or(&text)) {
            eprintln!("{error:#}");
        }
        exit(1)
    }
}
