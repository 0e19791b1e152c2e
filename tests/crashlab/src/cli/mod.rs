//! The command line: one file per subcommand.

#[cfg(feature = "planted")]
mod planted;
mod replay;
mod run;
mod stats;

use std::process::ExitCode;

use anyhow::Result;
use bedplate_soak::{KillsArgs, SoakArgs, kills, soak};
use clap::{Parser, Subcommand};

/// The engine on a simulated machine, under seeds; and the built program under load, killed again and again.
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
    Soak(SoakArgs),
    Kills(KillsArgs),
}

pub fn main(args: Args) -> Result<ExitCode> {
    if !matches!(args.command, Command::Soak(_) | Command::Kills(_)) {
        // A panic of a seed is a finding, and is told as one.
        std::panic::set_hook(Box::new(|_| {}));
    }
    match args.command {
        Command::Run(args) => run::run(&args),
        Command::Replay(args) => replay::replay(&args),
        Command::Stats(args) => stats::stats(&args),
        #[cfg(feature = "planted")]
        Command::Planted(args) => planted::planted(&args),
        Command::Soak(args) => Ok(exit_code(soak(&args))),
        Command::Kills(args) => Ok(exit_code(kills(&args))),
    }
}

fn exit_code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
