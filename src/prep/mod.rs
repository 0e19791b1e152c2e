//! Prep: bringing the bytes of an image onto a disk, verified, in one pass.

pub mod failure;
pub mod progress;
pub mod source;
