//! How an inspection ends when it does not succeed.
//!
//! Owns [`Failure`] and the exit codes, which are those of the whole program: 1 failed, 2 usage, 3 not found, 4
//! conflict, 5 corruption. `check` and `compare` have `qemu-img`'s instead and say so in their help.

use std::{fmt, io};

use bedplate_engine::error::Error;

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    Engine(Error),
    /// The output did not get to its reader.
    Output(io::Error),
    /// The command makes no sense.
    Usage(String),
    /// A failure whose exit code the command has chosen.
    Coded(Box<Failure>, u8),
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Engine(error) => exit_code(error),
            Failure::Output(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Coded(_, code) => *code,
        }
    }

    /// The same failure with this exit code, unless one has been chosen.
    #[must_use]
    pub fn with_code(self, code: u8) -> Failure {
        match self {
            Failure::Coded(..) => self,
            Failure::Engine(_) | Failure::Output(_) | Failure::Usage(_) => {
                Failure::Coded(Box::new(self), code)
            }
        }
    }

    /// Whether the reader of our output has gone, which is its own affair.
    pub fn is_broken_pipe(&self) -> bool {
        match self {
            Failure::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            Failure::Coded(failure, _) => failure.is_broken_pipe(),
            Failure::Engine(_) | Failure::Usage(_) => false,
        }
    }
}

/// The program's exit code for an error of the engine.
pub fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Corrupt { .. } | Error::Lost { .. } => 5,
        Error::NotFound { .. } => 3,
        Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => 3,
        Error::Exists { .. } | Error::InUse { .. } | Error::Busy { .. } => 4,
        Error::Invalid(_) | Error::OutOfRange { .. } => 2,
        Error::Io { .. }
        | Error::NoSpace { .. }
        | Error::Unsupported { .. }
        | Error::Failed { .. }
        | Error::ReadOnly { .. }
        | Error::Uncertain { .. }
        | Error::Closed => 1,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Names in it may come from an image.
            Failure::Engine(error) => f.write_str(&crate::print::shown(&error.to_string())),
            Failure::Output(error) => write!(f, "write the output: {error}"),
            Failure::Usage(text) => f.write_str(text),
            Failure::Coded(failure, _) => failure.fmt(f),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Engine(error)
    }
}

#[cfg(test)]
mod tests {
    use bedplate_engine::{error::Corruption, units::ByteOffset};

    use super::*;

    #[test]
    fn corruption_is_5_and_what_is_not_there_is_3() {
        let corrupt =
            Error::Corrupt { path: "a".into(), what: Corruption::Truncated("L1 table"), at: ByteOffset(0) };
        assert_eq!(Failure::from(corrupt).exit_code(), 5);
        let missing = Error::io("open", "a", io::ErrorKind::NotFound.into());
        assert_eq!(Failure::from(missing.clone()).exit_code(), 3);
        assert_eq!(Failure::from(missing).with_code(2).exit_code(), 2);
    }
}
