//! Who carries the core's actions out.
//!
//! [`storage`] is the operating system as the engine sees it; [`blocking`] a loop around the core in the calling thread.

pub mod blocking;
pub mod buffer;
pub mod storage;
