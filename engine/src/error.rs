//! The engine's one error type.
//!
//! Rules: a caller can tell corrupt, unsupported, no space, busy, refused and its own fault apart by the variant, never
//! by text. Errors are passed on, and logged where they are handled. Bytes from outside never panic: what cannot be
//! parsed becomes [`Error::Corrupt`] or [`Error::Unsupported`] and names what, where and which file.
//! Errors are `Clone`, because one failed sync answers every request that waited for it.

use std::{io, path::PathBuf, sync::Arc};

use nix::libc;

use crate::units::{ByteOffset, ByteRange};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation of the engine did not happen.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused. `op` is the verb ("write", "sync"), `path` the file.
    #[error("{op} {}: {source}{}", path.display(), advice(source))]
    Io { op: &'static str, path: PathBuf, source: Arc<io::Error> },
    /// The medium is full; nothing that was acknowledged is lost.
    #[error("no space left on {}; delete something on it and try again", path.display())]
    NoSpace { path: PathBuf },
    /// Bytes on disk are not what was written. `at` is the offset in `path`.
    #[error("{}: {what} at byte {}; nothing was changed", path.display(), at.0)]
    Corrupt { path: PathBuf, what: Corruption, at: ByteOffset },
    /// Sound, but not something that this version reads.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported { path: PathBuf, what: String },
    /// The range does not lie within the device.
    #[error("{len} bytes at {start} do not lie within the device's {size} bytes")]
    OutOfRange { start: u64, len: u64, size: u64 },
    /// The layer took an error from its medium earlier and takes no more writes.
    #[error("read-only since an earlier fault: {reason}; see `bedplate volume recover`")]
    Failed { reason: Arc<str> },
    /// The bytes of this range were lost to damage; other ranges are served.
    #[error("{len} bytes at {start} were lost: {reason}; see `bedplate volume recover`")]
    Lost { start: u64, len: u64, reason: Arc<str> },
    /// A write to something read-only.
    #[error("{what} is read-only")]
    ReadOnly { what: String },
    /// The name does not exist.
    #[error("{kind} {name:?} not found")]
    NotFound { kind: &'static str, name: String },
    /// The name is taken.
    #[error("{kind} {name:?} exists already")]
    Exists { kind: &'static str, name: String },
    /// Something holds it; `by` names who.
    #[error("{kind} {name:?} is in use: {by}")]
    InUse { kind: &'static str, name: String, by: String },
    /// What was asked for makes no sense, and why.
    #[error("{0}")]
    Invalid(String),
    /// A queue or table is full; the limit has this name.
    #[error("too many at once ({limit}); try again")]
    Busy { limit: &'static str },
    /// A record was replaced, but its directory could not be synced: a crash decides which of the two stays.
    #[error("it is not known whether this survives a crash: {source}")]
    Uncertain { source: Box<Error> },
    /// The device is closing down.
    #[error("the volume is closed")]
    Closed,
}

/// What is wrong with bytes that were read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    #[error("not a {0} file (wrong magic)")]
    Magic(&'static str),
    #[error("the checksum of the {0} does not agree")]
    Checksum(&'static str),
    #[error("the {0} is cut short")]
    Truncated(&'static str),
    #[error("{field} has the impossible value {value}")]
    Field { field: &'static str, value: u64 },
    #[error("a record in the middle of the log is damaged (sequence {sequence})")]
    LogGap { sequence: u64 },
    #[error("not a valid record: {0}")]
    Record(String),
    /// An entry of a table that says what it cannot say.
    #[error("{table} entry {index} ({value:#018x}) {problem}")]
    Entry { table: &'static str, index: u64, value: u64, problem: EntryProblem },
    /// Compressed bytes that do not become what they should.
    #[error("compressed data {0}")]
    Compressed(DecodeProblem),
    /// `what` is wrong, and that is where the bytes of the image's range `lost` would come from.
    #[error("{what}; the image's {lost} cannot be read")]
    Lost { what: Box<Corruption>, lost: ByteRange },
}

/// What is wrong with an entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryProblem {
    #[error("points past the end of the file")]
    PastEnd,
    #[error("points at something that the end of the file cuts off")]
    CutOff,
    #[error("is not aligned to a cluster")]
    Unaligned,
    #[error("has reserved bits set")]
    Reserved,
    #[error("points at the file's own metadata")]
    Metadata,
    #[error("points where an earlier entry points")]
    Shared,
    #[error("calls the same part allocated and zero")]
    Contradiction,
    #[error("calls a part allocated, but says not where")]
    Nowhere,
}

/// What is wrong with compressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeProblem {
    #[error("cannot be decoded")]
    Garbage,
    #[error("decodes to less than a cluster")]
    Short,
    #[error("decodes to more than a cluster")]
    Long,
}

impl Error {
    /// An operating system error with its place; a full disk gets its own variant.
    pub fn io(op: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Error {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::NoSpace { path },
            _ => Error::Io { op, path, source: Arc::new(source) },
        }
    }

    /// A read of bytes that changed after the last commit before a fault: the medium may hold something older.
    pub fn uncertain(range: ByteRange, fault: Option<Arc<str>>) -> Error {
        let fault = fault.unwrap_or_else(|| "unknown".into());
        let reason = format!("they changed after the last flush before a fault ({fault})");
        Error::Lost { start: range.start.0, len: range.len.0, reason: reason.into() }
    }

    /// Whether the cause is a limit of the process or the machine, which the text says how to raise.
    pub fn is_limit(&self) -> bool {
        matches!(self, Error::Io { source, .. } if !advice(source).is_empty())
    }

    /// Whether the cause is that a file or directory is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Error::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Error::NotFound { .. } => true,
            _ => false,
        }
    }
}

/// What to raise where the system refused because of a limit.
fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise the limit of open files (ulimit -Hn, LimitNOFILE= of the unit)",
        Some(libc::ENFILE) => "; raise the machine's limit of open files (sysctl fs.file-max)",
        // What blocks never answers this: it is a thread or a process that could not be started.
        Some(libc::EAGAIN) => "; raise the limit of threads (ulimit -u, TasksMax= of the unit, pids.max)",
        Some(libc::ENOMEM) => "; raise the limit of memory (ulimit -v and -l, MemoryMax= of the unit)",
        _ => "",
    }
}
