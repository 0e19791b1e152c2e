//! Tests of the copy-on-write core over a simulated medium.
//!
//! [`cells`] is the reference: what each cell of a volume may hold. [`disk`] makes and opens layers on a simulated
//! medium. The other modules try to break invariants 0 to 4, 6 to 8 and 12 of `docs/design.md`: [`random`] by histories
//! of several clients and volumes, [`enumerated`] by all short workloads cut at every action, [`pairs`] by all
//! interleavings of two operations, [`life`] and [`races`] by life operations of a disk, [`damage`] by flipping bytes of
//! a map file, [`faults`] by errors of the medium, [`log`] by filling the log. With the feature `planted`, `planted` shows
//! that random histories find the core's planted bugs.
//!
//! `BEDPLATE_SEED` runs one seed, `BEDPLATE_SEEDS` a number of them. `BEDPLATE_DEPTH` and `BEDPLATE_LIFE_DEPTH` set the
//! length of enumerated workloads, `BEDPLATE_LIFE_CUTS=1` cuts the longer lives at every call instead of one in three,
//! `BEDPLATE_SUBSETS=1` tries every subset of up to 12 unsynced effects at each cut, and 4096 samples of more;
//! `BEDPLATE_SCHEDULES` bounds the interleavings of a pair. By default all of it takes about two minutes of one core.

mod cells;
mod crashes;
mod damage;
mod disk;
mod enumerated;
mod faults;
mod image;
mod leftovers;
mod life;
mod log;
mod pairs;
#[cfg(feature = "planted")]
mod planted;
mod races;
mod random;

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
        Err(_) => default,
    }
}
