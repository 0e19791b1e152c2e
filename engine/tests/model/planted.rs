//! Bugs on purpose in the core, which random histories have to find. Those of whole disks are the crash lab's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bedplate_engine::planted::{Bug, Kind, plant};

use crate::random;

/// Histories within which a bug has to be found.
const SEEDS_MAX: u64 = 10_000;

/// The bugs that need no disk, no damaged map and no page cache.
const CORE: [Bug; 21] = [
    Bug::NoSync,
    Bug::RecordBeforeData,
    Bug::ZeroMarkForgotten,
    Bug::ZeroMarkUnrecorded,
    Bug::CopiedZeroForgotten,
    Bug::Unowned(Kind::Write, Kind::Fill),
    Bug::Unowned(Kind::Write, Kind::Zero),
    Bug::Unowned(Kind::Write, Kind::Merge),
    Bug::Unowned(Kind::Write, Kind::Flatten),
    Bug::Unowned(Kind::Fill, Kind::Fill),
    Bug::Unowned(Kind::Fill, Kind::Zero),
    Bug::Unowned(Kind::Fill, Kind::Merge),
    Bug::Unowned(Kind::Fill, Kind::Flatten),
    Bug::Unowned(Kind::Zero, Kind::Zero),
    Bug::Unowned(Kind::Zero, Kind::Merge),
    Bug::Unowned(Kind::Zero, Kind::Flatten),
    Bug::JoinedCommit,
    Bug::CutAfterSync,
    Bug::LatePunch,
    Bug::FuaIgnored,
    Bug::FillBeyondClient,
];

/// The first seed whose history breaks a promise. An assertion of the core is no finding: a release has none.
fn first_finding(bug: Bug) -> Option<(u64, String)> {
    let _planted = plant(bug);
    (0..SEEDS_MAX).find_map(|number| {
        let history = catch_unwind(AssertUnwindSafe(|| random::history(number, false)));
        Some((number, history.ok()?.err()?))
    })
}

#[test]
fn every_bug_planted_in_the_core_is_found_by_random_histories() {
    let mut missed = Vec::new();
    for bug in CORE {
        match first_finding(bug) {
            Some((number, error)) => println!("{bug}: seed {number}: {}", error.lines().next().unwrap_or("")),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "{missed:?} are not found within {SEEDS_MAX} seeds");
}
