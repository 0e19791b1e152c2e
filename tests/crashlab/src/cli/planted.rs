//! `planted`: whether the bugs that the engine makes on purpose are found.

use std::{num::NonZero, process::ExitCode, sync::Mutex, thread::available_parallelism};

use anyhow::{Result, anyhow};
use bedplate_crashlab::planted::{SEEDS_MAX, search_all};
use bedplate_engine::planted::Bug;

/// Look for each planted bug; exit 1 if one is not found.
#[derive(clap::Args)]
pub struct Args {
    /// Seeds to try for each bug, from 0 on.
    #[arg(long, default_value_t = SEEDS_MAX)]
    seeds: u64,
    /// How many bugs to look for at once [default: the number of processors]
    #[arg(long)]
    jobs: Option<usize>,
    /// One bug by its name, for example "Unowned(Write, Zero)"; all of them without it.
    #[arg(value_parser = parse)]
    bug: Option<Bug>,
}

fn parse(name: &str) -> Result<Bug> {
    let names = || Bug::ALL.map(|bug| bug.to_string()).join("\n  ");
    let found = Bug::ALL.into_iter().find(|bug| bug.to_string() == name);
    found.ok_or_else(|| anyhow!("there is no such bug; there are\n  {}", names()))
}

pub fn planted(args: &Args) -> Result<ExitCode> {
    let bugs = args.bug.map_or(Bug::ALL.to_vec(), |bug| vec![bug]);
    let jobs = args.jobs.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
    let missed = Mutex::new(0);
    println!("{:<24} {:>6} {:>8}  the finding", "bug", "seed", "seconds");
    search_all(&bugs, args.seeds, jobs, |search| {
        let (seed, what) = match &search.found {
            Some((seed, what)) => (seed.to_string(), what.lines().next().unwrap_or_default()),
            None => ("-".to_owned(), "not found"),
        };
        println!("{:<24} {seed:>6} {:>8.1}  {what}", search.bug.to_string(), search.took.as_secs_f64());
        if search.found.is_none()
            && let Ok(mut missed) = missed.lock()
        {
            *missed += 1;
        }
    });
    let missed = missed.into_inner().map_err(|_| anyhow!("a search panicked"))?;
    println!("{} of {} found within {} seeds", bugs.len() - missed, bugs.len(), args.seeds);
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
