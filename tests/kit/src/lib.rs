//! Drives the built program as a user would: a node that leaves nothing behind, programs with deadlines, an HTTP origin,
//! contents and the journal that they are compared with.
//!
//! The black-box tests and the crash lab share it. Whatever is not as it should be ends it with a panic, which is what
//! both want.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

pub mod content;
pub mod disk;
pub mod group;
pub mod journal;
pub mod medium;
pub mod node;
pub mod origin;
pub mod run;

/// Whether the long version of a test is asked for.
pub fn long() -> bool {
    std::env::var_os("BEDPLATE_LONG").is_some_and(|value| value == "1")
}
