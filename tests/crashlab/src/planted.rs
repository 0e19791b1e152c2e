//! The engine's planted bugs: how many seeds it takes until each is found.
//!
//! A thread that looks for a bug makes that mistake and no other, so several are looked for at once.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bedplate_engine::planted::{Bug, plant};

use crate::run_seed;

/// Seeds within which every bug has to be found.
pub const SEEDS_MAX: u64 = 10_000;

/// What looking for a bug came to.
#[derive(Clone, Debug)]
pub struct Search {
    pub bug: Bug,
    /// The first seed that found it, and what it said.
    pub found: Option<(u64, String)>,
    pub took: Duration,
}

/// Run seeds from 0 on with this mistake until one finds it.
pub fn search(bug: Bug, seeds: u64) -> Search {
    let began = Instant::now();
    let found = (0..seeds).find_map(|seed| finding(bug, seed).map(|what| (seed, what)));
    Search { bug, found, took: began.elapsed() }
}

/// Search for each of them in as many threads; `each` is told as they end, in any order.
pub fn search_all(bugs: &[Bug], seeds: u64, jobs: usize, each: impl Fn(Search) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(bug) = bugs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    each(search(*bug, seeds));
                }
            });
        }
    });
}

/// What a seed finds that it does not find without the mistake. A panic is no finding: most are assertions that a release
/// does not have, and a bug has to be found by what a client could see.
fn finding(bug: Bug, seed: u64) -> Option<String> {
    let failure = {
        let _planted = plant(bug);
        run_seed(seed).err()?
    };
    (!failure.is_panic() && run_seed(seed).is_ok()).then_some(failure.what)
}
