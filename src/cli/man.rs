//! `bedplate man`: the manual pages, made from the same words as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::{Cli, exit::Failure};

/// Write the manual pages into a directory
#[derive(Args, Debug)]
#[command(
    after_long_help = "One page for each command: bedplate.1, bedplate-volume.1, bedplate-volume-create.1 ...

Example:
  bedplate man /usr/local/share/man/man1 && man bedplate-volume-create"
)]
pub struct ManArgs {
    /// A directory that exists
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(args: &ManArgs) -> Result<(), Failure> {
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .map_err(|source| Failure::Io { what: format!("write pages into {}", args.dir.display()), source })
}
