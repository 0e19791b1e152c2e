//! `bedplate-inspect`: the verbs of `bedplate inspect` as a program of their own, for machines without a node.

use std::process::ExitCode;

use bedplate_inspect::Verb;
use clap::Parser;

/// Look inside disk images and replica directories, read-only
#[derive(Debug, Parser)]
#[command(name = "bedplate-inspect", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.verb.run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bedplate-inspect: {}: {failure}", cli.verb.describe());
            ExitCode::from(failure.exit_code())
        }
    }
}
