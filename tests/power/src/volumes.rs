//! The guest with a node: writers that change volumes as the script says, and a hand that snapshots and deletes
//! meanwhile. What is durable is noted before the next change begins. It all goes on until the power is cut, or something
//! fails.

use std::{
    convert::Infallible,
    fs::OpenOptions,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    libc::O_DSYNC,
};

use crate::{
    notes::Notes,
    script::{self, Kind, SECTOR, WRITERS},
};

/// An emulated machine is slow, and the host busy.
const START_DEADLINE: Duration = Duration::from_secs(300);
/// Snapshots of a volume that are there at once.
const SNAPSHOTS_MAX: u64 = 3;

/// Change the volumes `v0`, `v1`, ... beneath `volumes` until something fails.
pub fn run(seed: u64, volumes: &Path, notes: &Path) -> Result<Infallible> {
    let path = |writer: u64| volumes.join(format!("v{writer}"));
    let deadline = Instant::now() + START_DEADLINE;
    while !(0..WRITERS).all(|writer| path(writer).exists()) || bedplate(&["volume", "list"]).is_err() {
        ensure!(Instant::now() < deadline, "the node is not ready");
        thread::sleep(Duration::from_millis(20));
    }
    let hand = Notes::open(notes, WRITERS)?;
    hand.note("ready")?;
    for writer in 0..WRITERS {
        let (path, notes) = (path(writer), Notes::open(notes, writer)?);
        thread::spawn(move || {
            let error = write(seed, writer, &path, &notes).expect_err("it writes until it fails");
            notes.fail(&error.context(format!("writer {writer}")))
        });
    }
    for round in 0.. {
        live(&hand, round).unwrap_or_else(|error| hand.fail(&error));
    }
    unreachable!("rounds do not end")
}

fn write(seed: u64, writer: u64, volume: &Path, notes: &Notes) -> Result<Infallible> {
    let dsync = script::is_dsync(writer);
    let flags = if dsync { O_DSYNC } else { 0 };
    let file = OpenOptions::new().write(true).custom_flags(flags).open(volume)?;
    for number in 1.. {
        let change = script::change(seed, writer, number);
        let at = change.first * SECTOR as u64;
        match change.kind {
            Kind::Write => file.write_all_at(&script::bytes_of(writer, &change), at)?,
            Kind::Punch => {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let len = i64::try_from(change.count)? * i64::try_from(SECTOR)?;
                fallocate(file.as_fd(), punch, i64::try_from(at)?, len)?;
            }
        }
        if change.durable {
            if !dsync {
                file.sync_all()?;
            }
            notes.note(&format!("durable {writer} {number}"))?;
        }
    }
    unreachable!("numbers do not end")
}

/// One step of a volume's life: a snapshot, and once there are enough, the deletion of the oldest.
fn live(notes: &Notes, round: u64) -> Result<()> {
    let (volume, number) = (round % WRITERS, round / WRITERS);
    step(notes, "create", volume, number)?;
    match number.checked_sub(SNAPSHOTS_MAX) {
        Some(oldest) => step(notes, "delete", volume, oldest),
        None => Ok(()),
    }
}

fn step(notes: &Notes, verb: &str, volume: u64, number: u64) -> Result<()> {
    notes.note(&format!("begin {verb} {volume} {number}"))?;
    bedplate(&["snapshot", verb, &format!("v{volume}"), &format!("s{number}")])?;
    notes.note(&format!("done {verb} {volume} {number}"))
}

fn bedplate(words: &[&str]) -> Result<()> {
    let output = Command::new("bedplate").args(words).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "bedplate {}: {said}", words.join(" "));
    Ok(())
}
