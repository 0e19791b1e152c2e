//! `bedplate-soak`: the command line of the soak and of the kills.

use std::process::ExitCode;

use bedplate_soak::{KillsArgs, SoakArgs, kills, soak};
use clap::Parser;

/// Load a node of the built program, kill it, and compare what it holds
#[derive(Debug, Parser)]
enum Command {
    Soak(SoakArgs),
    Kills(KillsArgs),
}

fn main() -> ExitCode {
    let good = match Command::parse() {
        Command::Soak(args) => soak(&args),
        Command::Kills(args) => kills(&args),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
