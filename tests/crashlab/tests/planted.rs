//! Every bug that the engine makes on purpose is found, by looking from seed 0 on: what finds it may change with the
//! lab, that it is found may not.

use std::{num::NonZero, sync::Mutex, thread::available_parallelism};

use bedplate_crashlab::planted::{SEEDS_MAX, search_all};
use bedplate_engine::planted::Bug;

#[test]
fn every_planted_bug_is_found() {
    // Panics of the searches are findings of debug assertions, which do not count.
    std::panic::set_hook(Box::new(|_| {}));
    let searches = Mutex::new(Vec::new());
    let jobs = available_parallelism().map_or(1, NonZero::get);
    search_all(&Bug::ALL, SEEDS_MAX, jobs, |search| searches.lock().unwrap().push(search));
    let _ = std::panic::take_hook();
    let searches = searches.into_inner().unwrap();
    assert_eq!(searches.len(), Bug::ALL.len());
    let missed: Vec<String> =
        searches.iter().filter(|s| s.found.is_none()).map(|s| s.bug.to_string()).collect();
    assert!(missed.is_empty(), "not found within {SEEDS_MAX} seeds: {missed:?}");
}
