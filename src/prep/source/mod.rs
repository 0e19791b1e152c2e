//! Where bytes come from: one trait, and one file for each kind of source.
//!
//! A [`Source`] delivers bytes from a position on, in order, into an [`Arrival`], and knows how to tell whether what was
//! kept of an earlier run is still a prefix of what it delivers ([`Validator`]). It runs on a thread of its own and may
//! block; it asks the arrival's stop between pieces. It neither hashes nor writes.

pub mod device;
pub mod file;
pub mod http;
pub mod upload;

use serde::{Deserialize, Serialize};

use super::{arrival::Arrival, failure::Result};

/// One source of bytes.
pub trait Source: Send {
    /// Deliver everything from [`Arrival::position`] on, or start the arrival again first. Returns when the last byte
    /// has been delivered, and the source knows that it was the last. Where [`Arrival::proof`] is needed, it goes on only
    /// if it serves the file that the validator is of.
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()>;
}

/// What tells that a source still delivers the same bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Validator {
    /// Nothing does; what was kept cannot be trusted to be a prefix.
    #[default]
    None,
    /// A strong entity tag, as the origin wrote it.
    Etag(String),
    /// A modification date that the origin's own clock makes strong, as the origin wrote it.
    LastModified(String),
    /// A local file.
    File { device: u64, inode: u64, size_bytes: u64, mtime_ns: i64 },
}
