//! Bedplate's engine: storage, image formats, the copy-on-write core and its executors.
//!
//! Nothing here knows HTTP, tokio, clap or FUSE. Start with `docs/design.md` (why it is right) and `docs/format.md`
//! (the bytes on disk); then [`device`], the boundary to front ends.

pub mod buffer;
pub mod cow;
pub mod device;
pub mod error;
pub mod exec;
pub mod export;
pub mod image;
pub mod planted;
pub mod sparse;
mod sync;
pub mod units;
pub mod volume;
