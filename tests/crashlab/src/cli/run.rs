//! `run`: many seeds, in several threads, and what they saw.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result};
use bedplate_crashlab::{
    Failure, run_seed,
    script::Script,
    shrink::shrink,
    stats::{LISTED_LEAST, LISTED_SEEDS, Stats},
};

/// Failing seeds after which a run gives up.
const FAILURES_MAX: usize = 10;

/// Run seeds; exit 1 if one fails, or if a run of many has not seen everything that is listed often enough.
#[derive(clap::Args)]
pub struct Args {
    /// How many.
    #[arg(long)]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// How many at once.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let next = AtomicU64::new(args.from);
    let end = args.from.checked_add(args.seeds).context("there are not so many seeds")?;
    let all = Mutex::new((Stats::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| work(&next, end, &all));
        }
    });
    let (stats, mut failures) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.sort_by_key(|(seed, _)| *seed);
    println!("{stats}");
    let seconds = started.elapsed().as_secs_f64();
    println!("{seconds:.0} s, {:.0} seeds a second", stats.seeds as f64 / seconds.max(0.001));
    for (seed, failure) in &failures {
        println!("seed {seed} fails: {}", failure.what);
    }
    if let Some((seed, failure)) = failures.first() {
        let (script, failure) = shrink(&Script::of(*seed), failure.clone());
        println!("\n# seed {seed}, for `bedplate-crashlab replay FILE`: {} steps", script.steps.len());
        println!("# {}\n{}", failure.what.replace('\n', "\n# "), script.to_text()?);
        return Ok(ExitCode::FAILURE);
    }
    let missing = if args.seeds >= LISTED_SEEDS { stats.missing(LISTED_LEAST) } else { Vec::new() };
    for rare in &missing {
        println!("too few: {rare}");
    }
    if args.seeds < LISTED_SEEDS {
        println!(
            "whether each fault and pair was seen {LISTED_LEAST} times is asked of {LISTED_SEEDS} seeds or more"
        );
    }
    Ok(if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn work(next: &AtomicU64, end: u64, all: &Mutex<(Stats, Vec<(u64, Failure)>)>) {
    let mut seen = Stats::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            break;
        }
        match run_seed(seed) {
            Ok(stats) => seen.add(&stats),
            Err(failure) => {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                all.1.push((seed, failure));
                if all.1.len() >= FAILURES_MAX {
                    next.store(end, Ordering::Relaxed);
                }
            }
        }
    }
    all.lock().unwrap_or_else(PoisonError::into_inner).0.add(&seen);
}
