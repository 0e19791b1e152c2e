//! How a command ends when it does not succeed: one line on stderr and an exit code.
//!
//! Owns [`Failure`] and the hints that say what to do. The codes are documented in `--help` ([`EXIT_CODES`]) and come
//! from one table ([`Code::exit_code`]); 2, for usage, is clap's.

use std::{fmt, io, time::Duration};

use crate::{
    api::{client, problem::Code},
    config::ConfigError,
};

/// For `--help`.
pub const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed
  2  usage: the command line makes no sense
  3  not found
  4  conflict: in use, exists already, not ready, held
  5  checksum mismatch, corruption, or bytes of a kind that is not served
  6  timed out";

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The node, or the way to it.
    Client(client::Error),
    /// An image or job ended badly, with the node's word for it.
    Ended {
        code: Code,
        detail: String,
    },
    /// A wait that was bounded is over.
    TimedOut {
        what: String,
        after: Duration,
    },
    Config(ConfigError),
    /// The node did not start or did not end well.
    Serve {
        code: Code,
        detail: String,
    },
    /// Something of this machine.
    Io {
        what: String,
        source: io::Error,
    },
    /// The command makes no sense here.
    Usage(String),
    /// An inspection, which has its own exit codes.
    Inspect(bedplate_inspect::Failure),
    Bench(bedplate_bench::Failure),
    /// A report with findings that are failures; the report itself has been printed.
    Findings {
        count: usize,
    },
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Client(error) => error.code().map_or(1, Code::exit_code),
            Failure::Ended { code, .. } | Failure::Serve { code, .. } => code.exit_code(),
            Failure::TimedOut { .. } => Code::TimedOut.exit_code(),
            Failure::Usage(_) => 2,
            Failure::Inspect(failure) => failure.exit_code(),
            Failure::Bench(failure) => failure.exit_code(),
            Failure::Config(_) | Failure::Io { .. } | Failure::Findings { .. } => 1,
        }
    }

    /// Whether the reader of our output has gone, which is its own affair.
    pub fn is_broken_pipe(&self) -> bool {
        match self {
            Failure::Io { source, .. } | Failure::Client(client::Error::Output(source)) => {
                source.kind() == io::ErrorKind::BrokenPipe
            }
            Failure::Inspect(failure) => failure.is_broken_pipe(),
            Failure::Bench(failure) => failure.is_broken_pipe(),
            _ => false,
        }
    }

    fn code(&self) -> Option<Code> {
        match self {
            Failure::Client(error) => error.code(),
            Failure::Ended { code, .. } => Some(*code),
            // What a starting node says is complete.
            Failure::Serve { .. }
            | Failure::TimedOut { .. }
            | Failure::Config(_)
            | Failure::Io { .. }
            | Failure::Usage(_)
            | Failure::Inspect(_)
            | Failure::Bench(_)
            | Failure::Findings { .. } => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Client(error) => write!(f, "{error}")?,
            Failure::Ended { detail, .. } | Failure::Serve { detail, .. } => f.write_str(detail)?,
            Failure::TimedOut { what, after } => {
                write!(f, "{what} after {} s; it goes on, and can be waited for again", after.as_secs())?;
            }
            Failure::Config(error) => write!(f, "{error}")?,
            Failure::Io { what, source } => write!(f, "{what}: {source}")?,
            Failure::Usage(text) => f.write_str(text)?,
            Failure::Inspect(failure) => write!(f, "{failure}")?,
            Failure::Bench(failure) => write!(f, "{failure}")?,
            Failure::Findings { count: 1 } => f.write_str("1 check failed")?,
            Failure::Findings { count } => write!(f, "{count} checks failed")?,
        }
        match self.code().and_then(hint) {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

/// What to do about it, where the detail does not say it anyway.
const fn hint(code: Code) -> Option<&'static str> {
    match code {
        Code::NotFound => Some("`list` shows what there is"),
        Code::Exists => Some("choose another name or delete that first"),
        Code::InUse => Some("end that use and try again"),
        Code::ChecksumMismatch => Some("compare the source with --checksum"),
        Code::NotReady
        | Code::Invalid
        | Code::Unsupported
        | Code::NoSuchRoute
        | Code::TooLarge
        | Code::Busy
        | Code::ReadOnly
        | Code::Faulted
        | Code::Corrupt
        | Code::NoSpace
        | Code::Storage
        | Code::Source
        | Code::TimedOut
        | Code::Cancelled
        | Code::ShuttingDown
        | Code::Internal => None,
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Failure {
        Failure::Client(error)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::Config(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_that_says_what_to_do() {
        let failure =
            Failure::Ended { code: Code::InUse, detail: "image \"a\" is in use by volume v".to_owned() };
        assert_eq!(failure.to_string(), "image \"a\" is in use by volume v; end that use and try again");
        assert_eq!(failure.exit_code(), 4);
        let failure =
            Failure::TimedOut { what: "image \"a\" is not ready".to_owned(), after: Duration::from_secs(3) };
        assert_eq!(failure.exit_code(), 6);
    }

    #[test]
    fn help_lists_every_exit_code_that_a_refusal_can_have() {
        for code in Code::ALL {
            assert!(EXIT_CODES.contains(&format!("\n  {}  ", code.exit_code())), "{code:?}");
        }
    }
}
