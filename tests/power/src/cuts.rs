//! Runs of a guest, each ended by a cut, and the points of its log that are judged beside the cut itself.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bedplate_testkit::journal::Dice;
use serde::Serialize;

use crate::{
    disk::{Disk, Entry, Medium, materialise},
    file_system::FileSystem,
    guest::{Guest, Image, run},
    judge::{Bench, Promise, Verdict},
    nbd,
    node::{self, Executor},
    script::{WRITERS, dice, image},
};

const DISK_LEN: u64 = 320 << 20;
/// Durable changes of the first writer before a cut, at most.
const DURABLE_MAX: u64 = 200;
/// What the negative control's disk forgets.
const FORGOTTEN_ENTRIES: usize = 100;

/// What is tried.
pub struct Plan {
    pub cuts: usize,
    pub points_per_kill: usize,
    pub seed: u64,
    pub combinations: Vec<(FileSystem, Executor)>,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub seed: u64,
    pub seconds: u64,
    pub cuts: usize,
    /// Cuts at which the guest was killed at that moment.
    pub kills_of_the_guest: usize,
    /// Cuts at earlier points of the logs of the same runs.
    pub points_of_the_log: usize,
    pub cuts_with_faults: usize,
    pub durable_changes_checked: u64,
    pub snapshots_checked: usize,
    pub runs: Vec<Run>,
    /// The same judge over a disk that forgets what it reported as flushed: it has to find that.
    pub control: Control,
}

#[derive(Debug, Default, Serialize)]
pub struct Control {
    pub cuts: usize,
    pub found: usize,
    pub wrong_sectors: usize,
}

/// One life of a guest.
#[derive(Debug, Serialize)]
pub struct Run {
    pub seed: u64,
    pub fs: FileSystem,
    pub executor: Executor,
    pub log_writes: usize,
    pub log_flushes: usize,
    pub durable_changes: u64,
    pub cuts: usize,
    pub faults: Vec<String>,
}

/// Make runs until `plan.cuts` cuts are judged; `progress` is told of each run.
pub fn execute(
    plan: &Plan,
    guest: &Image,
    dir: &Path,
    mut progress: impl FnMut(&Report) -> Result<()>,
) -> Result<Report> {
    let mut report = Report { seed: plan.seed, ..Report::default() };
    let started = Instant::now();
    for (round, &(fs, executor)) in (0..).zip(plan.combinations.iter().cycle()) {
        if report.cuts >= plan.cuts {
            break;
        }
        let seed = dice(&[plan.seed, round]).roll(1 << 48);
        let points = plan.points_per_kill.min(plan.cuts - report.cuts - 1);
        let life = Life { guest, dir, fs, executor, seed };
        life.live(points, &mut report)
            .with_context(|| format!("run {round}: seed {seed}, {fs}, {executor}"))?;
        report.seconds = started.elapsed().as_secs();
        progress(&report)?;
    }
    Ok(report)
}

struct Life<'a> {
    guest: &'a Image,
    dir: &'a Path,
    fs: FileSystem,
    executor: Executor,
    seed: u64,
}

impl Life<'_> {
    fn live(&self, points: usize, report: &mut Report) -> Result<()> {
        let mut dice = Dice::new(self.seed);
        let content = image(self.seed);
        let base = self.prepare(&content)?;
        let log = self.run_guest(&base, &mut dice)?;
        let ready =
            log.iter().position(|entry| *entry == Entry::Note("ready".to_owned())).context("it was ready")?;
        let bench = Bench { executor: self.executor, fs: self.fs, seed: self.seed, image: &content };
        let mut faults = Vec::new();
        let mut ends = vec![log.len()];
        ends.extend((0..points).map(|_| ready + below(&mut dice, log.len() - ready)));
        for (index, end) in ends.iter().enumerate() {
            let promise = Promise::of(&log[..*end]);
            let verdict = self.cut(&base, &log[..*end], Medium::Honest, &promise, &bench, &mut dice)?;
            report.cuts += 1;
            *(if index == 0 { &mut report.kills_of_the_guest } else { &mut report.points_of_the_log }) += 1;
            report.cuts_with_faults += usize::from(!verdict.complaints.is_empty());
            report.durable_changes_checked += promise.durable_changes();
            report.snapshots_checked += verdict.snapshots_checked;
            faults.extend(verdict.complaints.into_iter().map(|said| format!("cut at entry {end}: {said}")));
        }
        let promise = Promise::of(&log);
        let forgetful = Medium::ForgetsLast(FORGOTTEN_ENTRIES);
        let verdict = self.cut(&base, &log, forgetful, &promise, &bench, &mut dice)?;
        report.control.cuts += 1;
        report.control.found += usize::from(!verdict.complaints.is_empty());
        report.control.wrong_sectors += verdict.wrong_sectors;
        report.runs.push(Run {
            seed: self.seed,
            fs: self.fs,
            executor: self.executor,
            log_writes: log.iter().filter(|entry| matches!(entry, Entry::Write { .. })).count(),
            log_flushes: log.iter().filter(|entry| **entry == Entry::Flush).count(),
            durable_changes: promise.durable_changes(),
            cuts: ends.len(),
            faults,
        });
        Ok(())
    }

    /// A disk with a file system, an image and volumes, as an orderly end of a node leaves it.
    fn prepare(&self, content: &[u8]) -> Result<PathBuf> {
        let (base, source) = (self.dir.join("base.img"), self.dir.join("source.raw"));
        self.fs.make(&base, DISK_LEN)?;
        fs::write(&source, content)?;
        let node = node::over(&base, Executor::Blocking);
        node.run(&format!("image create base --from {} --wait", source.display()));
        for writer in 0..WRITERS {
            node.run(&format!("volume create v{writer} --image base"));
        }
        node::end(node);
        Ok(base)
    }

    /// Let it work for a while, and cut its power in the middle.
    fn run_guest(&self, base: &Path, dice: &mut Dice) -> Result<Vec<Entry>> {
        let (now, socket) = (self.dir.join("now.img"), self.dir.join("nbd.sock"));
        copy(base, &now)?;
        let disk = Arc::new(Disk::new(File::options().read(true).write(true).open(&now)?));
        nbd::serve(&socket, 2, disk.clone())?;
        let drives = ["disk", "notes"].map(|export| nbd::drive(&socket, export));
        let environment = format!("ROLE=node FS={} EXECUTOR={} SEED={}", self.fs, self.executor, self.seed);
        let mut guest = Guest::start(self.guest, &drives, &environment, self.dir)?;
        // Between a few changes and some seconds of them.
        let enough = 2 + dice.roll(DURABLE_MAX);
        guest.wait(&disk, |text| {
            let number = text.strip_prefix("durable 0 ").and_then(|number| number.parse::<u64>().ok());
            number.filter(|number| *number >= enough)
        })?;
        thread::sleep(Duration::from_micros(dice.roll(200_000)));
        guest.kill()?;
        Ok(disk.cut())
    }

    fn cut(
        &self,
        base: &Path,
        log: &[Entry],
        medium: Medium,
        promise: &Promise,
        bench: &Bench<'_>,
        dice: &mut Dice,
    ) -> Result<Verdict> {
        let file = self.dir.join("cut.img");
        copy(base, &file)?;
        let disk = File::options().write(true).open(&file)?;
        materialise(log, medium, dice, &disk)?;
        drop(disk);
        Ok(bench.judge(&file, promise))
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to))?;
    Ok(())
}

fn below(dice: &mut Dice, bound: usize) -> usize {
    usize::try_from(dice.roll(bound.max(1) as u64)).expect("it is below a length")
}
