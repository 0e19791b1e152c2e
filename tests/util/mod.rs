//! What all subjects share: a node that leaves nothing behind, programs with deadlines, an HTTP origin, contents and
//! the journal that they are compared with.

pub mod content;
pub mod journal;
pub mod node;
pub mod origin;
pub mod run;

/// Whether the long version of a test is asked for.
pub fn long() -> bool {
    std::env::var_os("BEDPLATE_LONG").is_some_and(|value| value == "1")
}
