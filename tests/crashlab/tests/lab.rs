//! The lab itself: seeds are clean, long enough and repeatable; failures become short; what is rare is named.

use bedplate_crashlab::{
    Failure, Trace,
    faults::FaultKind,
    history,
    operation::Operation,
    run_script, run_seed,
    script::{Ask, Life, Script, Step},
    shrink::shrink_by,
    stats::{LISTED_LEAST, OPERATIONS_LEAST, Stats},
};

/// Seeds of these tests; `bedplate-crashlab run` is for more.
const SEEDS: u64 = 200;

#[test]
fn some_hundred_seeds_are_clean_and_each_has_at_least_200_operations() {
    for seed in 0..SEEDS {
        let stats = run_seed(seed).unwrap_or_else(|failure| panic!("seed {seed}: {}", failure.what));
        let operations = stats.operation_count();
        assert!(operations >= OPERATIONS_LEAST, "seed {seed} has {operations} operations");
    }
}

#[test]
fn a_seed_is_the_same_history_each_time() {
    for seed in [3, 14, 15, 92, 65] {
        let script = Script::of(seed);
        let first = history(&script);
        assert!(!first.is_empty());
        assert_eq!(first, history(&script), "seed {seed}");
    }
    assert_ne!(history(&Script::of(3)), history(&Script::of(14)));
}

#[test]
fn images_arrive_while_clients_write_and_volumes_change() {
    let mut stats = Stats::default();
    for seed in 0..40 {
        stats.add(&run_seed(seed).unwrap_or_else(|failure| panic!("seed {seed}: {}", failure.what)));
    }
    for other in [Operation::Write, Operation::Flush, Operation::Snapshot, Operation::Merge] {
        assert!(stats.pairs_of(other, Operation::Arrive) > 0, "{other}");
    }
    assert!(stats.pairs_of(Operation::Arrive, Operation::DeleteImage) > 0);
}

#[test]
fn what_a_script_is_written_as_is_read_as_the_same_script() {
    for seed in 0..20 {
        let script = Script::of(seed);
        let text = script.to_text().expect("a script can be written");
        assert_eq!(Script::parse(&text), Ok(script.clone()));
        let commented = format!("# why\n\n{text}\n# the end\n");
        assert_eq!(Script::parse(&commented), Ok(script));
    }
    let broken = Script::of(1).to_text().expect("a script can be written") + "{}\n";
    let line = broken.lines().count();
    assert!(matches!(Script::parse(&broken), Err(error) if error.contains(&format!("line {line}"))));
}

#[test]
fn a_failure_becomes_the_two_steps_that_it_needs() {
    let is_flush = |step: &Step| matches!(step, Step::Client { ask: Ask::Flush, .. });
    let is_snapshot = |step: &Step| matches!(step, Step::Life { life: Life::Snapshot, .. });
    // Made up: a snapshot after a flush fails.
    let fails = |script: &Script| {
        let flush = script.steps.iter().position(is_flush)?;
        script.steps[flush..].iter().any(is_snapshot).then(|| failure("volume v: a snapshot fails"))
    };
    let mut scripts = (0..100).map(Script::of);
    let found = scripts.find_map(|script| fails(&script).map(|found| (script, found)));
    let (script, found) = found.expect("some seed has a snapshot after a flush");
    let (short, _) = shrink_by(&script, found, fails);
    assert_eq!(short.steps.len(), 2);
    assert!(is_flush(&short.steps[0]) && is_snapshot(&short.steps[1]));
    assert!(run_script(&short, Trace::Off).is_ok(), "nothing is wrong with it but what was made up");
}

#[test]
fn a_script_that_fails_in_another_way_is_not_the_same_failure_made_short() {
    let fails = |script: &Script| {
        let what = if script.steps.len() > 100 { "volume v loses data" } else { "volume v is not there" };
        Some(failure(what))
    };
    let script = Script::of(7);
    let (short, found) = shrink_by(&script, failure("volume w loses data"), fails);
    assert_eq!(short.steps.len(), 101);
    assert_eq!(found.what, "volume v loses data");
}

fn failure(what: &str) -> Failure {
    Failure { what: what.into(), history: Vec::new() }
}

#[test]
fn what_was_seen_fewer_than_100_times_is_named() {
    let mut stats = Stats::default();
    let all = FaultKind::ALL.len() + Operation::pairs().count();
    assert_eq!(stats.missing(LISTED_LEAST).len(), all);
    let named =
        |stats: &Stats, what: &str| stats.missing(LISTED_LEAST).iter().any(|line| line.starts_with(what));
    for _ in 1..LISTED_LEAST {
        stats.fault(FaultKind::PowerCut);
        stats.pair(Operation::Merge, Operation::Write);
    }
    assert!(named(&stats, "power cut: 99 times") && named(&stats, "write with merge: 99 times"));
    stats.fault(FaultKind::PowerCut);
    stats.pair(Operation::Write, Operation::Merge);
    assert!(!named(&stats, "power cut") && !named(&stats, "write with merge"));
    stats.fewest_operations = Some(OPERATIONS_LEAST - 1);
    assert!(named(&stats, "operations of one seed: 199"));
}

#[test]
fn every_kind_of_fault_says_what_it_threatens() {
    for kind in FaultKind::ALL {
        assert!(
            !kind.threatens().is_empty() && kind.threatens().iter().all(|number| *number <= 13),
            "{kind:?}"
        );
    }
}
