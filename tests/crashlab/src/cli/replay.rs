//! `replay`: one seed or script again, with its history.

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result, anyhow};
use bedplate_crashlab::{Trace, history, run_script, script::Script, shrink::shrink};

/// Run a seed or a script again and print what happened.
#[derive(clap::Args)]
pub struct Args {
    /// A seed's number, or a file with a script.
    what: String,
    /// Print the script alone, without what happened.
    #[arg(long)]
    script: bool,
}

pub fn replay(args: &Args) -> Result<ExitCode> {
    let script = match args.what.parse() {
        Ok(seed) => Script::of(seed),
        Err(_) => {
            let path = Path::new(&args.what);
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            Script::parse(&text).map_err(|e| anyhow!("{}: {e}", path.display()))?
        }
    };
    if args.script {
        print!("{}", script.to_text()?);
        return Ok(ExitCode::SUCCESS);
    }
    match run_script(&script, Trace::On) {
        Ok(stats) => {
            print!("{}", script.to_text()?);
            history(&script).iter().for_each(|line| println!("# {line}"));
            print!("\n{stats}");
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            let (script, failure) = shrink(&script, failure);
            print!("{}", script.to_text()?);
            let again = run_script(&script, Trace::On).err().unwrap_or(failure);
            for line in &again.history {
                println!("# {line}");
            }
            println!("# {}", again.what.replace('\n', "\n# "));
            Ok(ExitCode::FAILURE)
        }
    }
}
