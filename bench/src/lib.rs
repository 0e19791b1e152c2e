//! `bedplate bench`: figures that a README line can rest on, and that anyone can repeat beside the peers.
//!
//! Owns the command line ([`Verb`]). `run` measures workloads (a table, `workload.rs`) on targets (a table, `target`)
//! in interleaved rounds and reports; `compare` tells two reports apart; `map`, `prepare`, `qcow2` and `scale` are suites
//! of their own, whose figures fit no such table. What is measured is the program that is running, driven as a user would.
//! `README.md` says how a run is repeated and what each lane is.

mod aim;
mod compare;
mod content;
mod engine;
mod failure;
pub mod figure;
mod fio;
mod interrupt;
mod machine;
mod map;
mod prepare;
mod process;
mod qcow2;
mod report;
mod run;
pub mod sample;
mod scale;
mod target;
mod workload;

use std::{io::Write, path::PathBuf};

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

pub use crate::failure::Failure;

/// Measure this machine's storage path, beside the peers
#[derive(Debug, Subcommand)]
pub enum Verb {
    Run(run::RunArgs),
    Compare(compare::CompareArgs),
    /// The map at full size: memory, open time, 200 layers, volume creation
    #[command(after_long_help = "Prints one JSON object.

Example:
  bedplate bench map --rounds 3")]
    Map {
        /// Directory on the disk to measure; a temporary one under it is used and removed
        #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
        dir: PathBuf,
        /// Directory of a memory file system, for what the lookup itself costs
        #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Rounds; the lanes of one round run one after another
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// An image arrives at a private node, is hashed and made durable; beside SHA-512 on one core
    #[command(after_long_help = "Prints one JSON object. Mounts, and so needs root.

Example:
  bedplate bench prepare --size-mib 512 --rounds 3")]
    Prepare {
        /// Directory on the disk to measure; a temporary one under it is used and removed
        #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
        dir: PathBuf,
        /// Directory of a memory file system with room for two images
        #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Size of the image
        #[arg(long, default_value_t = 2048)]
        size_mib: usize,
        /// Rounds; the lanes of one round run one after another
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// qcow2 files, read and written, beside `qemu-img` and the raw file
    #[command(after_long_help = "Prints one JSON object.

Example:
  bedplate bench qcow2 --size-mib 512")]
    Qcow2 {
        /// Directory of a memory file system with room for six images
        #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Size of the image
        #[arg(long, default_value_t = 1024)]
        size_mib: usize,
        /// Rounds; the lanes of one round run one after another
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Many volumes, images and records on one node: memory, start, listings
    #[command(after_long_help = "Prints one JSON object. Mounts, and so needs root.

Example:
  bedplate bench scale --records 1000 --rounds 1")]
    Scale {
        /// Directory on the disk to measure; a temporary one under it is used and removed
        #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
        dir: PathBuf,
        /// Volumes that are opened and written to
        #[arg(long, default_value_t = 1000)]
        volumes: usize,
        /// Images, and as many volumes, in the catalog
        #[arg(long, default_value_t = 10_000)]
        records: usize,
        /// Seconds of writing
        #[arg(long, default_value_t = 5)]
        seconds: usize,
        /// Rounds; the lanes of one round run one after another
        #[arg(long, default_value_t = 3)]
        rounds: usize,
    },
    /// One measurement in a process of its own, so that its memory is its own
    #[command(hide = true, after_long_help = "Used by `bedplate bench map`.")]
    MapLane {
        /// What is measured
        lane: map::Lane,
        /// The disk's directory
        disk: PathBuf,
    },
    /// The engine without a mount, in a process of its own
    #[command(hide = true, after_long_help = "Used by `bedplate bench run`.")]
    EngineLane {
        /// What is measured, as JSON
        spec: String,
    },
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

impl Verb {
    /// Do it, print the figures, and answer the exit code: a loss that was asked about is no failure.
    pub fn run(&self) -> Result<u8, Failure> {
        let done = |()| 0;
        match self {
            Verb::Run(args) => run::run(args).map(done),
            Verb::Compare(args) => Ok(compare::run(args)?),
            Verb::Map { dir, memory_dir, rounds } => Ok(map::run(dir, memory_dir, *rounds).map(done)?),
            Verb::Prepare { dir, memory_dir, size_mib, rounds } => {
                Ok(prepare::run(dir, memory_dir, *size_mib, *rounds).map(done)?)
            }
            Verb::Qcow2 { memory_dir, size_mib, rounds } => {
                Ok(qcow2::run(memory_dir, *size_mib, *rounds).map(done)?)
            }
            Verb::Scale { dir, volumes, records, seconds, rounds } => {
                let (volumes, records, seconds, rounds) = (*volumes, *records, *seconds, *rounds);
                Ok(scale::run(dir, &scale::Scale { volumes, records, seconds, rounds }).map(done)?)
            }
            Verb::MapLane { lane, disk } => Ok(map::run_lane(*lane, disk).map(done)?),
            Verb::EngineLane { spec } => Ok(engine::run(spec).map(done)?),
        }
    }

    /// What was tried, for errors.
    pub const fn describe(&self) -> &'static str {
        match self {
            Verb::Run(_) => "bench run",
            Verb::Compare(_) => "bench compare",
            Verb::Map { .. } => "bench map",
            Verb::Prepare { .. } => "bench prepare",
            Verb::Qcow2 { .. } => "bench qcow2",
            Verb::Scale { .. } => "bench scale",
            Verb::MapLane { .. } => "bench map-lane",
            Verb::EngineLane { .. } => "bench engine-lane",
        }
    }
}

/// A result on stdout.
fn print(format: Format, value: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(),
        Format::Json => serde_json::to_string_pretty(value)?,
    };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        _verb: super::Verb,
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
