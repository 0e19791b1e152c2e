//! The command line: one file per subcommand.

#[cfg(feature = "planted")]
mod planted;
mod replay;
mod run;
mod stats;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The engine on a simulated machine, under seeds.
#[derive(Parser)]
#[command(version)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    Replay(replay::Args),
    Stats(stats::Args),
    #[cfg(feature = "planted")]
    Planted(planted::Args),
}

pub fn main(args: Args) -> Result<ExitCode> {
    // A panic of a seed is a finding, and is told as one.
    std::panic::set_hook(Box::new(|_| {}));
    match args.command {
        Command::Run(args) => run::run(&args),
        Command::Replay(args) => replay::replay(&args),
        Command::Stats(args) => stats::stats(&args),
        #[cfg(feature = "planted")]
        Command::Planted(args) => planted::planted(&args),
    }
}
