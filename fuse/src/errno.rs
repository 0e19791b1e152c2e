//! The engine's errors as the numbers that a client of the mount sees.
//!
//! Owns the one table from [`Error`] to errno, and `Fault`, which keeps an error of the device apart from a request
//! that was refused before it reached the device: the first is logged, the second is the client's own affair.

use std::io;

use bedplate_engine::error::Error;
use fuser::Errno;
use nix::libc;

/// Why a request did not happen.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The device could not do it.
    Device(Error),
    /// A file of this kind does not do it.
    Refused(Errno),
}

impl Fault {
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Fault::Device(error) => errno(error),
            Fault::Refused(errno) => *errno,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Device(error)
    }
}

/// The table. A damaged or failed medium is always EIO, whatever the layer below called it: a client must not take an
/// ENOENT from a layer's file for one of its own.
pub(crate) fn errno(error: &Error) -> Errno {
    match error {
        Error::Io { source, .. } => resource_errno(source),
        Error::NoSpace { .. } => Errno::ENOSPC,
        Error::Corrupt { .. } => Errno::EIO,
        Error::Unsupported { .. } => Errno::EOPNOTSUPP,
        Error::OutOfRange { .. } => Errno::EINVAL,
        Error::Failed { .. } => Errno::EIO,
        Error::Lost { .. } => Errno::EIO,
        Error::ReadOnly { .. } => Errno::EROFS,
        Error::NotFound { .. } => Errno::ENOENT,
        Error::Exists { .. } => Errno::EEXIST,
        Error::InUse { .. } => Errno::EBUSY,
        Error::Invalid(_) => Errno::EINVAL,
        Error::Busy { .. } => Errno::EBUSY,
        Error::Uncertain { .. } => Errno::EIO,
        Error::Closed => Errno::ENODEV,
    }
}

/// The shortages that pass and that a client can do something about; everything else is EIO.
fn resource_errno(source: &io::Error) -> Errno {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => Errno::ENOMEM,
        Some(libc::EMFILE | libc::ENFILE) => Errno::ENFILE,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::Arc};

    use bedplate_engine::{error::Corruption, units::ByteOffset};

    use super::*;

    fn io_error(number: i32) -> Error {
        Error::Io { op: "read", path: PathBuf::new(), source: Arc::new(io::Error::from_raw_os_error(number)) }
    }

    #[test]
    fn every_error_has_the_number_that_a_client_expects_of_a_disk() {
        let path = PathBuf::from("data");
        let reason: Arc<str> = "a sync failed".into();
        let kind = "volume";
        let name = String::from("a");
        let what = String::from("zlib");
        let table = [
            (io_error(libc::EIO), Errno::EIO),
            (io_error(libc::ENOENT), Errno::EIO),
            (io_error(libc::ENOMEM), Errno::ENOMEM),
            (io_error(libc::EMFILE), Errno::ENFILE),
            (Error::NoSpace { path: path.clone() }, Errno::ENOSPC),
            (
                Error::Corrupt { path: path.clone(), what: Corruption::Checksum("map"), at: ByteOffset(0) },
                Errno::EIO,
            ),
            (Error::Unsupported { path, what: what.clone() }, Errno::EOPNOTSUPP),
            (Error::OutOfRange { start: 0, len: 1, size: 0 }, Errno::EINVAL),
            (Error::Failed { reason: reason.clone() }, Errno::EIO),
            (Error::Lost { start: 0, len: 1, reason }, Errno::EIO),
            (Error::ReadOnly { what: what.clone() }, Errno::EROFS),
            (Error::NotFound { kind, name: name.clone() }, Errno::ENOENT),
            (Error::Exists { kind, name: name.clone() }, Errno::EEXIST),
            (Error::InUse { kind, name, by: what.clone() }, Errno::EBUSY),
            (Error::Invalid(what), Errno::EINVAL),
            (Error::Busy { limit: "X_MAX" }, Errno::EBUSY),
            (Error::Uncertain { source: Box::new(Error::Closed) }, Errno::EIO),
            (Error::Closed, Errno::ENODEV),
        ];
        for (error, number) in table {
            assert_eq!(errno(&error), number, "{error}");
        }
    }
}
