//! `bedplate-crashlab`: the engine under seeds, from the command line.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> anyhow::Result<ExitCode> {
    cli::main(cli::Args::parse())
}
