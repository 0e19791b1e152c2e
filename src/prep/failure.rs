//! Why a job of prep did not end with a verified copy.
//!
//! A caller can tell wrong bytes, no room, a source that refuses, time that ran out and its own cancelling apart by the
//! variant. Texts never hold what a URL keeps secret (user, password, query).

use std::path::PathBuf;

use bedplate_engine::error::Error as Storage;

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// How a job failed. `Clone`, because everyone who waits for the job is told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The bytes are not the ones that were asked for.
    #[error("checksum mismatch: expected {expected}, got {actual}")]
    Checksum { expected: String, actual: String },
    /// Bytes on this disk are not what they were.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// Known before the first byte was written, or found out in the middle (then 0 bytes are needed: any are too many).
    #[error("not enough space on {}: {needed_bytes} bytes are needed and {reserve_bytes} are left free for volumes (--image-reserve), \
             {free_bytes} are free", path.display())]
    NoSpace { path: PathBuf, needed_bytes: u64, reserve_bytes: u64, free_bytes: u64 },
    /// The disk is full, and nobody knows how much more would have come.
    #[error("not enough space on {}: {arrived_bytes} bytes had come from a source that does not say how many there \
             are; they are removed again", path.display())]
    NoSpaceForUnknown { path: PathBuf, arrived_bytes: u64 },
    /// Sound, but not something that this version takes in.
    #[error("{0}")]
    Unsupported(String),
    /// The source refuses, or is not what it should be; trying again the same way is of no use.
    #[error("{0}")]
    Source(String),
    /// A file was written to while it was read, so that what was read may never have been its content.
    #[error("{} changed while it was read", .0.display())]
    Changed(PathBuf),
    /// A bound in time has passed.
    #[error("timed out: {0}")]
    TimedOut(String),
    /// An upload ended before its last byte was durable. Nobody can be asked for the rest.
    #[error("{0}; nothing of an upload is kept, send it again")]
    Upload(Box<Failure>),
    /// Somebody cancelled the job.
    #[error("cancelled")]
    Cancelled,
    /// The node goes down; the job goes on when it is up again.
    #[error("the node is shutting down")]
    Stopped,
    /// The disk or a device refused.
    #[error(transparent)]
    Storage(#[from] Storage),
}

impl Failure {
    /// The same for an upload, of which nothing is kept.
    pub fn of_upload(self) -> Failure {
        if self.keeps_partial() { Failure::Upload(Box::new(self)) } else { self }
    }

    /// The same for an upload of which every byte has arrived: a node that goes down needs no sender to go on with it.
    pub fn of_whole_upload(self) -> Failure {
        if matches!(self, Failure::Stopped) { self } else { self.of_upload() }
    }

    /// Whether what has arrived is worth keeping for another try: not when it is known to be wrong or unwanted.
    pub fn keeps_partial(&self) -> bool {
        match self {
            // What fills a disk and may never end would leave no room for the volumes on it.
            Failure::Checksum { .. }
            | Failure::Corrupt(_)
            | Failure::NoSpaceForUnknown { .. }
            | Failure::Unsupported(_)
            | Failure::Storage(Storage::Corrupt { .. } | Storage::Unsupported { .. })
            | Failure::Changed(_)
            | Failure::Upload(_)
            | Failure::Cancelled => false,
            Failure::NoSpace { .. }
            | Failure::Source(_)
            | Failure::TimedOut(_)
            | Failure::Stopped
            | Failure::Storage(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_node_that_goes_down_keeps_an_upload_and_only_a_whole_one() {
        assert!(Failure::Stopped.of_whole_upload().keeps_partial());
        assert!(!Failure::Stopped.of_upload().keeps_partial());
        let failures =
            [Failure::Source("x".to_owned()), Failure::TimedOut("x".to_owned()), Failure::Cancelled];
        assert!(failures.into_iter().all(|failure| !failure.of_whole_upload().keeps_partial()));
    }
}
