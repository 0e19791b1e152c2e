//! What a decoder finds wrong, before it is known in which file.
//!
//! Owns [`Fault`] and the big-endian fields that every decoder reads. Decoders work on bytes and never see a path; the
//! layer that read the bytes adds it.

use std::path::Path;

use crate::{
    error::{Corruption, EntryProblem, Error},
    units::{ByteOffset, ByteRange},
};

pub type Result<T> = std::result::Result<T, Fault>;

/// Why bytes are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// They contradict the format, at this offset of the file.
    Corrupt { what: Corruption, at: ByteOffset },
    /// They are sound, but nothing that is read here; names the feature.
    Unsupported(String),
}

impl Fault {
    pub(super) fn field(field: &'static str, value: impl Into<u64>, at: u64) -> Fault {
        Fault::Corrupt { what: Corruption::Field { field, value: value.into() }, at: ByteOffset(at) }
    }

    pub(super) fn truncated(what: &'static str, at: u64) -> Fault {
        Fault::Corrupt { what: Corruption::Truncated(what), at: ByteOffset(at) }
    }

    pub(super) fn entry(entry: EntryAt, problem: EntryProblem) -> Fault {
        let EntryAt { table, index, value, at } = entry;
        Fault::Corrupt { what: Corruption::Entry { table, index, value, problem }, at: ByteOffset(at) }
    }

    /// The same, saying which bytes of the image it makes unreadable.
    #[must_use]
    pub(super) fn losing(self, lost: ByteRange) -> Fault {
        match self {
            Fault::Corrupt { what, at } => {
                Fault::Corrupt { what: Corruption::Lost { what: Box::new(what), lost }, at }
            }
            Fault::Unsupported(what) => Fault::Unsupported(what),
        }
    }

    pub fn of(self, path: &Path) -> Error {
        match self {
            Fault::Corrupt { what, at } => Error::Corrupt { path: path.to_owned(), what, at },
            Fault::Unsupported(what) => Error::Unsupported { path: path.to_owned(), what },
        }
    }
}

/// An entry of a table: which, what it says, and where in the file it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryAt {
    pub table: &'static str,
    pub index: u64,
    pub value: u64,
    pub at: u64,
}

/// The two bytes at `at`.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// The four bytes at `at`.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// The eight bytes at `at`.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_be_bytes)
}
