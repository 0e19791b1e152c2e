//! Prep: bringing the bytes of an image onto a disk, verified, in one pass.
//!
//! Owns where bytes come from ([`source`]), the pass itself ([`arrival`]: hash, sparse write, sync and what is kept for
//! a resume), [`clone`](mod@clone), [`verify`], [`digest`] and [`export`]. It does not know names, records or the node:
//! it is given a directory, a source and what to expect, and returns sums and sizes. Upholds invariants 5 and 9 of the
//! design as far as one arrival goes; publishing is the business of its caller.

pub mod arrival;
pub mod checksum;
pub mod clone;
pub mod digest;
pub mod export;
pub mod failure;
pub mod partial;
pub mod pipeline;
pub mod probe;
pub mod progress;
pub mod room;
pub mod source;
pub mod stop;
#[cfg(test)]
pub mod testing;
pub mod verify;
