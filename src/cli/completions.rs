//! `bedplate completions`: completion scripts for shells.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::{Cli, exit::Failure, output};

/// Print a completion script for a shell
#[derive(Args, Clone, Copy, Debug)]
#[command(after_long_help = "Examples:
  bedplate completions bash > /etc/bash_completion.d/bedplate
  bedplate completions zsh > \"${fpath[1]}/_bedplate\"
  bedplate completions fish > ~/.config/fish/completions/bedplate.fish")]
pub struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: Known,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Known {
    Bash,
    Zsh,
    Fish,
}

pub fn run(args: CompletionsArgs) -> Result<(), Failure> {
    let shell = match args.shell {
        Known::Bash => Shell::Bash,
        Known::Zsh => Shell::Zsh,
        Known::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "bedplate", &mut script);
    output::print(String::from_utf8_lossy(&script).trim_end())
}
