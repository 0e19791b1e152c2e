//! Guests whose disk is a volume of a node on this machine: node and guest are killed, the node is started again, the
//! guest boots from what is left, looks at its files, checks its file system, and goes on until the next kill.

use std::{
    fs,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bedplate_testkit::{journal::Dice, node::Node};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::{
    disk::{Disk, Entry},
    file_system::FileSystem,
    files::{SOUND, WRITERS},
    guest::{Guest, Image},
    nbd,
    node::{self, Executor},
    script::dice,
};

/// The least that mkfs.xfs makes.
const VOLUME_LEN: u64 = 320 << 20;
/// Steps of the first writer before a kill, at most.
const STEPS_MAX: u64 = 30;

pub struct Plan {
    /// Kills under load, for each combination.
    pub kills: usize,
    pub seed: u64,
    pub combinations: Vec<(FileSystem, Executor)>,
}

/// What came of it; a run with a fault ends there, and says so by an error.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub seed: u64,
    pub seconds: u64,
    pub kills: usize,
    pub runs: Vec<Run>,
}

/// One volume, and the lives of its guest.
#[derive(Debug, Serialize)]
pub struct Run {
    pub seed: u64,
    pub fs: FileSystem,
    pub executor: Executor,
    /// Of the node and of the guest.
    pub kills: usize,
    /// Kills at which the node was gone before the guest.
    pub node_first: usize,
    pub durable_steps: u64,
    /// At which everything was right: one before the kills, and one after each.
    pub boots: usize,
    /// Files that were compared, all boots together.
    pub files_checked: u64,
}

pub fn execute(
    plan: &Plan,
    guest: &Image,
    dir: &Path,
    mut progress: impl FnMut(&Report) -> Result<()>,
) -> Result<Report> {
    let mut report = Report { seed: plan.seed, ..Report::default() };
    let started = Instant::now();
    for (number, &(fs, executor)) in (0..).zip(&plan.combinations) {
        let seed = dice(&[plan.seed, number]).roll(1 << 48);
        report.runs.push(Run {
            seed,
            fs,
            executor,
            kills: 0,
            node_first: 0,
            durable_steps: 0,
            boots: 0,
            files_checked: 0,
        });
        let mut series = Series::begin(guest, dir, fs, executor, seed)?;
        for boot in 0..=plan.kills {
            let run = report.runs.last_mut().expect("it has just been added");
            let context = || format!("boot {boot} of {fs} on {executor}, seed {seed}");
            let (mut running, notes) = series.boot(run).with_context(context)?;
            if boot < plan.kills {
                series.kill(running, &notes, run).with_context(context)?;
                report.kills += 1;
            } else {
                running.kill()?;
            }
            report.seconds = started.elapsed().as_secs();
            progress(&report)?;
        }
        let ended = series.node.stop(Signal::SIGTERM);
        ensure!(ended.success(), "the node stopped with {ended}: {}", series.node.log());
    }
    Ok(report)
}

struct Series<'a> {
    guest: &'a Image,
    dir: &'a Path,
    node: Node,
    dice: Dice,
    environment: String,
    /// The last step that each writer noted.
    durable: Vec<u64>,
}

impl<'a> Series<'a> {
    /// A volume over an image with a new file system.
    fn begin(
        guest: &'a Image,
        dir: &'a Path,
        fs: FileSystem,
        executor: Executor,
        seed: u64,
    ) -> Result<Series<'a>> {
        fs::create_dir_all(dir)?;
        let mut node = node::with(executor);
        fs.make(&node.scratch("base.raw"), VOLUME_LEN)?;
        node.restart();
        node.run("image create base --from base.raw --wait");
        node.run("volume create v --image base");
        let environment = format!("ROLE=files FS={fs} SEED={seed}");
        let durable = (0..WRITERS).map(|_| 0).collect();
        Ok(Series { guest, dir, node, dice: Dice::new(seed), environment, durable })
    }

    /// Boot from what is there, and have everything looked at.
    fn boot(&mut self, run: &mut Run) -> Result<(Guest, Arc<Disk>)> {
        let (socket, notes) = (self.dir.join("nbd.sock"), Arc::new(Disk::new(tempfile::tempfile()?)));
        nbd::serve(&socket, 1, notes.clone())?;
        let drives = [format!("file={}", self.node.volume("v").display()), nbd::drive(&socket, "notes")];
        let words: Vec<String> = self.durable.iter().map(u64::to_string).collect();
        let environment = format!("{} DURABLE={}", self.environment, words.join(","));
        let mut guest = Guest::start(self.guest, &drives, &environment, self.dir)?;
        let files = guest.wait(&notes, |text| text.strip_prefix(SOUND)?.trim().parse::<u64>().ok())?;
        run.boots += 1;
        run.files_checked += files;
        Ok((guest, notes))
    }

    /// Let it work for a while, then kill both; the node is started again.
    fn kill(&mut self, mut guest: Guest, notes: &Disk, run: &mut Run) -> Result<()> {
        let enough = self.durable[0] + 1 + self.dice.roll(STEPS_MAX);
        guest.wait(notes, |text| durable(text).filter(|(writer, step)| *writer == 0 && *step >= enough))?;
        thread::sleep(Duration::from_micros(self.dice.roll(200_000)));
        if self.dice.roll(2) == 0 {
            self.node.kill();
            thread::sleep(Duration::from_micros(self.dice.roll(50_000)));
            guest.kill()?;
            run.node_first += 1;
        } else {
            guest.kill()?;
            self.node.kill();
        }
        run.kills += 1;
        for entry in notes.cut() {
            let Entry::Note(text) = entry else { continue };
            if let Some((writer, step)) = durable(&text) {
                run.durable_steps += 1;
                *self.durable.get_mut(writer).context("a writer that there is")? = step;
            }
        }
        self.node.restart();
        Ok(())
    }
}

/// The writer and its step.
fn durable(note: &str) -> Option<(usize, u64)> {
    let (writer, step) = note.strip_prefix("durable ")?.split_once(' ')?;
    Some((writer.parse().ok()?, step.parse().ok()?))
}
