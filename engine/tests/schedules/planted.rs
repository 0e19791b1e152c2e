//! Bugs on purpose, each of which a test of this program has to find: what happens only when threads meet in one order.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::Once,
};

use bedplate_engine::planted::{Bug, Kind, plant};

use crate::{clients, readers, setting::each_schedule};

thread_local! {
    /// Where the first panic was. The scheduler's threads are all on the thread of their test.
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// That the tests fail with `bug`, by an assertion of their own: those of the core are in no release.
fn assert_found(bug: Bug, test: impl Fn() + Send + Sync + Copy + 'static) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let place = info.location().map(ToString::to_string);
            FIRST.with_borrow_mut(|first| *first = first.take().or(place));
            before(info);
        }));
    });
    FIRST.take();
    let planted = plant(bug);
    let found = catch_unwind(AssertUnwindSafe(|| each_schedule(test)));
    drop(planted);
    assert!(found.is_err(), "{bug} is found in no order of threads");
    let place = FIRST.take().expect("what is caught has panicked");
    assert!(place.contains("tests/schedules"), "{bug} is found at {place}, which is not in a test");
}

#[test]
fn a_commit_that_is_joined_is_found() {
    assert_found(Bug::JoinedCommit, clients::flushes_beside_writes);
}

#[test]
fn a_late_punch_is_found() {
    assert_found(Bug::LatePunch, clients::a_discard_beside_writes);
}

#[test]
fn fills_that_do_not_wait_for_each_other_are_found() {
    assert_found(Bug::Unowned(Kind::Fill, Kind::Fill), clients::two_fills_of_a_block);
}

#[test]
fn a_merge_in_the_wrong_order_is_found() {
    assert_found(Bug::MergeOlderWins, readers::a_merge_beside_readers);
}
