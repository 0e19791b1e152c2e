//! `bedplate-bench`: figures that a README line can rest on.
//!
//! Three suites. `map`: what the map of a large volume costs in memory, time to open and time to look up. `prepare`: how
//! fast an image arrives, beside what one core hashes. `qcow2`: reading and writing qcow2 files, beside `qemu-img`. Run them from a release build; results are JSON, one object, and
//! are kept under `bench/results/`.

mod machine;
mod map;
mod prepare;
mod qcow2;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Measure Bedplate. Use a release build on a quiet machine; every figure is a median with its spread.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// The map at full size: memory, open time, 200 layers, volume creation.
    Map {
        /// Directory on the disk to measure; a temporary one under it is used and removed.
        #[arg(long, default_value = "/var/tmp")]
        dir: PathBuf,
        /// Directory of a memory file system, for what the lookup itself costs.
        #[arg(long, default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Rounds; the lanes of one round run one after another.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// An image arrives, is hashed and made durable; beside SHA-512 on one core.
    Prepare {
        /// Directory on the disk to measure; a temporary one under it is used and removed.
        #[arg(long, default_value = "/var/tmp")]
        dir: PathBuf,
        /// Directory of a memory file system with room for two images.
        #[arg(long, default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Size of the image.
        #[arg(long, default_value_t = 2048)]
        size_mib: usize,
        /// Rounds; the lanes of one round run one after another.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// qcow2 files, read and written, beside `qemu-img` and the raw file.
    Qcow2 {
        /// Directory of a memory file system with room for six images.
        #[arg(long, default_value = "/dev/shm")]
        memory_dir: PathBuf,
        /// Size of the image.
        #[arg(long, default_value_t = 1024)]
        size_mib: usize,
        /// Rounds; the lanes of one round run one after another.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// One measurement in a process of its own, so that its memory is its own. Used by `map`.
    #[command(hide = true)]
    MapLane { lane: map::Lane, disk: PathBuf },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().suite {
        Suite::Map { dir, memory_dir, rounds } => map::run(&dir, &memory_dir, rounds),
        Suite::Prepare { dir, memory_dir, size_mib, rounds } => {
            prepare::run(&dir, &memory_dir, size_mib, rounds)
        }
        Suite::Qcow2 { memory_dir, size_mib, rounds } => qcow2::run(&memory_dir, size_mib, rounds),
        Suite::MapLane { lane, disk } => map::run_lane(lane, &disk),
    }
}
