//! How `bedplate bench` ends when it does not succeed.
//!
//! Owns [`Failure`] and its exit codes, which are those of the whole program: 1 failed, 2 usage.

use std::{fmt, io};

/// Why there is no result.
#[derive(Debug)]
pub enum Failure {
    /// The command makes no sense here.
    Usage(String),
    Failed(anyhow::Error),
}

impl Failure {
    pub const fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Failed(_) => 1,
        }
    }

    /// Whether the reader of our output has gone, which is its own affair.
    pub fn is_broken_pipe(&self) -> bool {
        match self {
            Failure::Usage(_) => false,
            Failure::Failed(error) => error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(text) => f.write_str(text),
            Failure::Failed(error) => write!(f, "{error:#}"),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_2_and_a_reader_that_has_gone_is_no_failure() {
        assert_eq!(Failure::Usage("no".to_owned()).exit_code(), 2);
        let gone = Failure::from(anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert!(gone.is_broken_pipe() && gone.exit_code() == 1);
    }
}
