//! Errors of the image service and of prep as refusals of the API.
//!
//! Owns these tables, so that neither the API nor prep knows the other. The engine's table is the API's own
//! ([`crate::api::problem::engine_code`]).

use crate::{
    api::problem::{Code, Refusal, engine_code},
    images::{Error, FailureCode},
    prep::failure::Failure,
};

/// The kind of refusal that a failed image is.
pub fn failure_code(code: FailureCode) -> Code {
    match code {
        FailureCode::Checksum => Code::ChecksumMismatch,
        FailureCode::Corrupt => Code::Corrupt,
        FailureCode::NoSpace => Code::NoSpace,
        FailureCode::Unsupported => Code::Unsupported,
        FailureCode::Source => Code::Source,
        FailureCode::TimedOut => Code::TimedOut,
        FailureCode::Cancelled => Code::Cancelled,
        FailureCode::Storage => Code::Storage,
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        let code = match &error {
            Error::Invalid(_) | Error::Name { .. } => Code::Invalid,
            Error::NotFound(_) | Error::DiskNotFound(_) => Code::NotFound,
            Error::Exists(_) => Code::Exists,
            Error::InUse { .. } => Code::InUse,
            Error::NotReady { .. } | Error::NotRunning(_) => Code::NotReady,
            Error::Failed { failure, .. } => failure_code(failure.code),
            Error::TimedOut { .. } => Code::TimedOut,
            Error::Busy(_) => Code::Busy,
            Error::ShuttingDown => Code::ShuttingDown,
            Error::Storage(error) => engine_code(error),
        };
        Refusal::new(code, error.to_string())
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let mut reason = &failure;
        while let Failure::Upload(inner) = reason {
            reason = inner;
        }
        let code = match reason {
            Failure::Checksum { .. } => Code::ChecksumMismatch,
            Failure::Corrupt(_) => Code::Corrupt,
            Failure::NoSpace { .. } | Failure::NoSpaceForUnknown { .. } => Code::NoSpace,
            Failure::Unsupported(_) => Code::Unsupported,
            // An upload's own reason is inside.
            Failure::Source(_) | Failure::Changed(_) | Failure::Upload(_) => Code::Source,
            Failure::TimedOut(_) => Code::TimedOut,
            Failure::Cancelled => Code::Cancelled,
            Failure::Stopped => Code::ShuttingDown,
            Failure::Storage(error) => engine_code(error),
        };
        Refusal::new(code, failure.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bedplate_engine::error::Error as Engine;
    use uuid::Uuid;

    use super::*;
    use crate::{catalog::name::NameError, images::FailureRecord};

    #[test]
    fn every_error_of_the_image_service_has_its_code() {
        let name = || "a".to_owned();
        let failure = FailureRecord { code: FailureCode::Checksum, message: name() };
        let table = [
            (Error::Invalid(name()), Code::Invalid),
            (Error::Name { name: name(), reason: NameError::Empty }, Code::Invalid),
            (Error::NotFound(name()), Code::NotFound),
            (Error::DiskNotFound(Uuid::nil()), Code::NotFound),
            (Error::Exists(name()), Code::Exists),
            (Error::InUse { name: name(), by: vec![name()] }, Code::InUse),
            (Error::NotReady { name: name(), state: name() }, Code::NotReady),
            (Error::NotRunning(name()), Code::NotReady),
            (Error::Failed { name: name(), failure }, Code::ChecksumMismatch),
            (Error::TimedOut { name: name(), after: Duration::ZERO }, Code::TimedOut),
            (Error::Busy("X_MAX"), Code::Busy),
            (Error::ShuttingDown, Code::ShuttingDown),
            (Error::Storage(Engine::Closed), Code::ShuttingDown),
        ];
        for (error, code) in table {
            let text = error.to_string();
            assert_eq!(Refusal::from(error), Refusal::new(code, text));
        }
    }

    #[test]
    fn every_failure_of_a_job_has_its_code() {
        let text = || "a".to_owned();
        let no_space =
            Failure::NoSpace { path: "/d".into(), needed_bytes: 2, reserve_bytes: 1, free_bytes: 1 };
        let no_end = Failure::NoSpaceForUnknown { path: "/d".into(), arrived_bytes: 1 };
        let table = [
            (Failure::Checksum { expected: text(), actual: text() }, Code::ChecksumMismatch),
            (Failure::Corrupt(text()), Code::Corrupt),
            (no_space, Code::NoSpace),
            (no_end, Code::NoSpace),
            (Failure::Unsupported(text()), Code::Unsupported),
            (Failure::Source(text()), Code::Source),
            (Failure::Changed("/d".into()), Code::Source),
            (Failure::TimedOut(text()).of_upload(), Code::TimedOut),
            (Failure::TimedOut(text()), Code::TimedOut),
            (Failure::Cancelled, Code::Cancelled),
            (Failure::Stopped, Code::ShuttingDown),
            (Failure::Storage(Engine::Closed), Code::ShuttingDown),
        ];
        for (failure, code) in table {
            assert_eq!(Refusal::from(failure).code, code);
        }
        let codes = [
            (FailureCode::Checksum, Code::ChecksumMismatch),
            (FailureCode::Corrupt, Code::Corrupt),
            (FailureCode::NoSpace, Code::NoSpace),
            (FailureCode::Unsupported, Code::Unsupported),
            (FailureCode::Source, Code::Source),
            (FailureCode::TimedOut, Code::TimedOut),
            (FailureCode::Cancelled, Code::Cancelled),
            (FailureCode::Storage, Code::Storage),
        ];
        for (word, code) in codes {
            assert_eq!(failure_code(word), code);
        }
    }
}
