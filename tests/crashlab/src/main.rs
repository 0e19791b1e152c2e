//! `bedplate-crashlab`: the engine under seeds, from the command line.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use mimalloc::MiMalloc;

/// A third of a seed's time was the system's allocator.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<ExitCode> {
    cli::main(cli::Args::parse())
}
