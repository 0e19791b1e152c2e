//! `stats`: what is listed, and what some seeds see of it.

use std::process::ExitCode;

use anyhow::Result;
use bedplate_crashlab::{faults::FaultKind, run_seed, stats::Stats};

/// List the faults with what they threaten, and count what some seeds see.
#[derive(clap::Args)]
pub struct Args {
    /// How many seeds to count.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
}

pub fn stats(args: &Args) -> Result<ExitCode> {
    for kind in FaultKind::ALL {
        println!("{}: {}", kind.name(), kind.what());
    }
    let mut all = Stats::default();
    let mut clean = true;
    for seed in 0..args.seeds {
        match run_seed(seed) {
            Ok(stats) => all.add(&stats),
            Err(failure) => {
                println!("seed {seed} fails: {}", failure.what);
                clean = false;
            }
        }
    }
    println!("\n{all}");
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
