//! The qcow2 reader against files that somebody made to hurt it, and against many readers at once.
//!
//! Whether it reads what qemu reads is judged by a corpus (`tests/qcow2_corpus`); here it is what any file at all may
//! cost: no panic, an end within a bound, memory within a bound. The images to start from are made by qemu-img.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod hostile;
mod images;
mod memory;
mod readers;
mod snapshots;
