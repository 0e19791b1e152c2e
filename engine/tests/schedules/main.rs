//! What ships, in orders of threads that a scheduler chooses: every lock is a place where it may go on with another.
//!
//! `cargo test -p bedplate-engine --features shuttle --test schedules`. `SCHEDULES` is how many orders each test tries;
//! one that fails prints its order, which `SCHEDULE` replays. The medium is the simulated one; the volume, its core, its
//! executor, its merges are those that serve. With the feature `planted`, too, `planted` shows what these tests find.

mod clients;
#[cfg(feature = "planted")]
mod planted;
mod readers;
mod setting;
