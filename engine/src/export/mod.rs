//! Writing a block device's content to a file: who watches it while that is done, and the formats.

pub mod qcow2;

use crate::error::Result;

/// Watches an export, in guest order. An error from it ends the export and is what the export answers.
pub trait Monitor: Send {
    /// Everything before this guest byte has been read.
    fn reached(&mut self, at: u64) -> Result<()>;

    /// The next part of the content; for digests.
    fn content(&mut self, _part: Content<'_>) -> Result<()> {
        Ok(())
    }
}

/// A part of the content.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    Data(&'a [u8]),
    /// So many zeros.
    Zeros(u64),
}
