//! `bedplate-power`: cuts the power under a node in an emulated machine, and under emulated machines whose disk is a
//! volume, and judges what is left.
//!
//! `cuts` and `reboots` are the host's side, `volumes` and `files` the guest's: one program, so that both know what is
//! written. See README.md beside this directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use bedplate_testkit::node::program;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

mod cuts;
mod disk;
mod file_system;
mod files;
mod guest;
mod judge;
mod nbd;
mod node;
mod notes;
mod reboots;
mod script;
mod volumes;

use file_system::FileSystem;
use node::Executor;

#[derive(Parser)]
#[command(about = "Cuts the power of emulated machines, and judges what is left")]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Cut the power under a node in a guest, whose disk loses what was not flushed
    Cuts {
        /// Cuts that are judged
        #[arg(long, default_value_t = 200)]
        cuts: usize,
        /// Cuts at earlier points of a guest's log, for each kill of a guest
        #[arg(long, default_value_t = 9)]
        points: usize,
        #[command(flatten)]
        machine: Machine,
    },
    /// Kill a guest whose disk is a volume, and the node, and boot from what is left
    Reboots {
        /// Kills under load, for each file system and executor
        #[arg(long, default_value_t = 10)]
        kills: usize,
        #[command(flatten)]
        machine: Machine,
    },
    /// Within the guest: change the volumes of its node until the power is cut
    #[command(hide = true)]
    Volumes {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        volumes: PathBuf,
        #[arg(long)]
        notes: PathBuf,
    },
    /// Within the guest: look at the files of an earlier life, and change them until the power is cut
    #[command(hide = true)]
    Files {
        #[arg(long)]
        seed: u64,
        #[arg(long, value_enum)]
        fs: FileSystem,
        #[arg(long)]
        device: PathBuf,
        #[arg(long)]
        notes: PathBuf,
        #[arg(long, value_delimiter = ',')]
        durable: Vec<u64>,
    },
}

/// The machines of a run. As root; the program beside this one is tried, or the one that BEDPLATE_PROGRAM names.
#[derive(Args)]
struct Machine {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// An unpacked kernel, as `tests/power/kernel` makes it
    #[arg(long, default_value = "target/power/kernel")]
    kernel: PathBuf,
    #[arg(long, value_enum, default_values_t = [FileSystem::Ext4, FileSystem::Xfs])]
    fs: Vec<FileSystem>,
    #[arg(long, value_enum, default_values_t = [Executor::Blocking, Executor::Ring])]
    executor: Vec<Executor>,
    /// Where the figures go, as JSON, after each step
    #[arg(long)]
    report: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Verb::Cuts { cuts, points, machine } => cut(cuts, points, &machine),
        Verb::Reboots { kills, machine } => reboot(kills, &machine),
        Verb::Volumes { seed, volumes, notes } => match volumes::run(seed, &volumes, &notes)? {},
        Verb::Files { seed, fs, device, notes, durable } => {
            match (files::Life { seed, fs, device, notes, durable }).live()? {}
        }
    }
}

fn cut(cuts: usize, points_per_kill: usize, machine: &Machine) -> Result<ExitCode> {
    let dir = tempfile::Builder::new().prefix("bedplate-power-").tempdir()?;
    let image = machine.image(dir.path())?;
    let plan = cuts::Plan { cuts, points_per_kill, seed: machine.seed, combinations: machine.combinations() };
    let report = cuts::execute(&plan, &image, dir.path(), |report| {
        let run = report.runs.last().expect("it is told of a run");
        println!(
            "{} cuts, {} with faults; {} on {}, seed {}: {} durable changes, {} writes, {} flushes",
            report.cuts,
            report.cuts_with_faults,
            run.executor,
            run.fs,
            run.seed,
            run.durable_changes,
            run.log_writes,
            run.log_flushes
        );
        run.faults.iter().for_each(|fault| println!("  {fault}"));
        machine.report(report)
    })?;
    println!(
        "{} cuts: {} kills of a guest, {} points of a log; {} with faults; the disk that forgets was found {} of {} times",
        report.cuts,
        report.kills_of_the_guest,
        report.points_of_the_log,
        report.cuts_with_faults,
        report.control.found,
        report.control.cuts
    );
    let sound = report.cuts_with_faults == 0 && report.control.found == report.control.cuts;
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn reboot(kills: usize, machine: &Machine) -> Result<ExitCode> {
    let dir = tempfile::Builder::new().prefix("bedplate-power-").tempdir()?;
    let image = machine.image(dir.path())?;
    let plan = reboots::Plan { kills, seed: machine.seed, combinations: machine.combinations() };
    let report = reboots::execute(&plan, &image, dir.path(), |report| {
        let run = report.runs.last().expect("it is told of a run");
        println!(
            "{} kills; {} on {}, seed {}: {} boots, {} durable steps, {} files compared",
            report.kills, run.executor, run.fs, run.seed, run.boots, run.durable_steps, run.files_checked
        );
        machine.report(report)
    })?;
    println!("{} kills, and everything was right after each", report.kills);
    Ok(ExitCode::SUCCESS)
}

impl Machine {
    fn image(&self, dir: &Path) -> Result<guest::Image> {
        let mut programs = vec![program(), std::env::current_exe()?];
        programs.extend(["e2fsck", "xfs_repair"].map(|name| Path::new("/sbin").join(name)));
        guest::Image::build(&self.kernel, &programs, dir)
    }

    fn combinations(&self) -> Vec<(FileSystem, Executor)> {
        self.fs.iter().flat_map(|fs| self.executor.iter().map(|executor| (*fs, *executor))).collect()
    }

    fn report(&self, result: &impl Serialize) -> Result<()> {
        let Some(file) = &self.report else { return Ok(()) };
        let kernel = fs::read_to_string(self.kernel.join("version"))?;
        let command: Vec<String> = std::env::args().collect();
        let report =
            serde_json::json!({ "command": command.join(" "), "kernel": kernel.trim(), "result": result });
        fs::write(file, format!("{report:#}\n")).with_context(|| file.display().to_string())
    }
}
