//! `bedplate-power`: cuts the power under a node in an emulated machine, and judges what is left.
//!
//! `run` is the host's side, `load` the guest's, one program so that both know what is written. See README.md beside
//! this directory.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

mod cuts;
mod disk;
mod guest;
mod judge;
mod load;
mod nbd;
mod node;
mod script;

#[derive(Parser)]
#[command(about = "Cuts the power under a node in an emulated machine, and judges what is left")]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FileSystem {
    Ext4,
    Xfs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Executor {
    Blocking,
    Ring,
}

#[derive(Subcommand)]
enum Verb {
    /// Cut the power again and again; as root
    Run {
        /// Cuts that are judged
        #[arg(long, default_value_t = 200)]
        cuts: usize,
        /// Cuts at earlier points of a run's log, for each kill of the guest
        #[arg(long, default_value_t = 9)]
        points: usize,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The built node
        #[arg(long, default_value = "target/release/bedplate")]
        program: PathBuf,
        /// An unpacked kernel, as `tests/power/kernel` makes it
        #[arg(long, default_value = "target/power/kernel")]
        kernel: PathBuf,
        /// Below the node
        #[arg(long, value_enum, default_values_t = [FileSystem::Ext4, FileSystem::Xfs])]
        fs: Vec<FileSystem>,
        #[arg(long, value_enum, default_values_t = [Executor::Blocking, Executor::Ring])]
        executor: Vec<Executor>,
        /// Where the figures go, as JSON, after each run
        #[arg(long)]
        report: Option<PathBuf>,
    },
    /// Within the guest: change the volumes until the power is cut
    Load {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        volumes: PathBuf,
        #[arg(long)]
        notes: PathBuf,
    },
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Verb::Load { seed, volumes, notes } => {
            load::run(seed, &volumes, &notes)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run { cuts, points, seed, program, kernel, fs, executor, report } => {
            let combinations =
                fs.iter().flat_map(|fs| executor.iter().map(move |executor| (name(fs), name(executor))));
            let plan = cuts::Plan {
                program: program.canonicalize().with_context(|| program.display().to_string())?,
                cuts,
                points_per_kill: points,
                seed,
                combinations: combinations.collect(),
            };
            run(&plan, &kernel, report)
        }
    }
}

fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn run(plan: &cuts::Plan, kernel: &std::path::Path, file: Option<PathBuf>) -> Result<ExitCode> {
    let dir = tempfile::Builder::new().prefix("bedplate-power-").tempdir()?;
    let own = std::env::current_exe()?;
    let image = guest::Image::build(kernel, &[&plan.program, &own], &dir.path().join("guest"))?;
    let version = fs::read_to_string(kernel.join("version"))?.trim().to_owned();
    let report = cuts::execute(plan, &image, &dir.path().join("run"), |report| {
        let last = report.runs.last().expect("it is told of a run");
        println!(
            "{} cuts, {} with faults; {} on {}, seed {}: {} durable changes, {} writes, {} flushes; control found {} of {}",
            report.cuts,
            report.cuts_with_faults,
            last.executor,
            last.fs,
            last.seed,
            last.durable_changes,
            last.log_writes,
            last.log_flushes,
            report.control.found,
            report.control.cuts
        );
        last.faults.iter().for_each(|fault| println!("  {fault}"));
        if let Some(file) = &file {
            let shown = serde_json::json!({ "kernel": version, "command": words(), "result": report });
            if let Err(error) = fs::write(file, format!("{shown:#}\n")) {
                eprintln!("{}: {error}", file.display());
            }
        }
    })?;
    let sound = report.cuts_with_faults == 0 && report.control.found > 0;
    println!(
        "{} cuts: {} kills of the guest, {} points of the log; {} with faults; the disk that forgets was found {} of {} times",
        report.cuts,
        report.kills_of_the_guest,
        report.points_of_the_log,
        report.cuts_with_faults,
        report.control.found,
        report.control.cuts
    );
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn words() -> String {
    let words: Vec<String> = std::env::args().collect();
    words.join(" ")
}
