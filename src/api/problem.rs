//! Refusals: one stable word for each kind, and how it looks over HTTP and to a shell.
//!
//! Owns [`Code`] with its two tables, HTTP status and exit code, both exhaustive; [`Refusal`], what a node answers
//! instead of a result; and [`Problem`], the RFC 9457 document that it becomes. The words are part of the contract:
//! clients match on `code`, never on text.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bedplate_engine::error::Error as Engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of a problem document.
pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request makes no sense.
    Invalid,
    /// Sound, but not something that this version does.
    Unsupported,
    /// No such image, volume, snapshot or job.
    NotFound,
    /// No such path or method in this API.
    NoSuchRoute,
    /// The body is longer than any request is.
    TooLarge,
    /// The name is taken.
    Exists,
    /// Something holds it; the detail names who.
    InUse,
    /// An image that is not ready, or a job that is not running.
    NotReady,
    /// A limit is reached; try again.
    Busy,
    /// A write to something read-only.
    ReadOnly,
    /// The volume takes no more writes since a fault.
    Faulted,
    /// The bytes are not the expected ones.
    ChecksumMismatch,
    /// Bytes on a disk are not what was written.
    Corrupt,
    /// A disk is full.
    NoSpace,
    /// A disk refused.
    Storage,
    /// The source of an image refused, or is not what it should be.
    Source,
    /// A bound in time has passed.
    TimedOut,
    /// Somebody cancelled it.
    Cancelled,
    /// The node goes down.
    ShuttingDown,
    /// A fault of the program.
    Internal,
}

impl Code {
    /// Every code, for tables and documents.
    pub const ALL: [Code; 20] = [
        Code::Invalid,
        Code::Unsupported,
        Code::NotFound,
        Code::NoSuchRoute,
        Code::TooLarge,
        Code::Exists,
        Code::InUse,
        Code::NotReady,
        Code::Busy,
        Code::ReadOnly,
        Code::Faulted,
        Code::ChecksumMismatch,
        Code::Corrupt,
        Code::NoSpace,
        Code::Storage,
        Code::Source,
        Code::TimedOut,
        Code::Cancelled,
        Code::ShuttingDown,
        Code::Internal,
    ];

    /// As it is written in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Code::Invalid => "invalid",
            Code::Unsupported => "unsupported",
            Code::NotFound => "not_found",
            Code::NoSuchRoute => "no_such_route",
            Code::TooLarge => "too_large",
            Code::Exists => "exists",
            Code::InUse => "in_use",
            Code::NotReady => "not_ready",
            Code::Busy => "busy",
            Code::ReadOnly => "read_only",
            Code::Faulted => "faulted",
            Code::ChecksumMismatch => "checksum_mismatch",
            Code::Corrupt => "corrupt",
            Code::NoSpace => "no_space",
            Code::Storage => "storage",
            Code::Source => "source",
            Code::TimedOut => "timed_out",
            Code::Cancelled => "cancelled",
            Code::ShuttingDown => "shutting_down",
            Code::Internal => "internal",
        }
    }

    /// The kind in a few words for people.
    pub const fn title(self) -> &'static str {
        match self {
            Code::Invalid => "The request makes no sense",
            Code::Unsupported => "Not supported by this version",
            Code::NotFound => "Not found",
            Code::NoSuchRoute => "No such path or method",
            Code::TooLarge => "The request is too large",
            Code::Exists => "The name is taken",
            Code::InUse => "In use",
            Code::NotReady => "Not ready",
            Code::Busy => "Too many at once",
            Code::ReadOnly => "Read-only",
            Code::Faulted => "Takes no more writes since a fault",
            Code::ChecksumMismatch => "Checksum mismatch",
            Code::Corrupt => "Corrupt",
            Code::NoSpace => "No space left",
            Code::Storage => "The disk refused",
            Code::Source => "The source refused",
            Code::TimedOut => "Timed out",
            Code::Cancelled => "Cancelled",
            Code::ShuttingDown => "The node is shutting down",
            Code::Internal => "Internal fault",
        }
    }

    /// The HTTP status.
    pub const fn status(self) -> StatusCode {
        match self {
            Code::Invalid => StatusCode::BAD_REQUEST,
            Code::Unsupported => StatusCode::UNPROCESSABLE_ENTITY,
            Code::NotFound | Code::NoSuchRoute => StatusCode::NOT_FOUND,
            Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::Exists
            | Code::InUse
            | Code::NotReady
            | Code::ReadOnly
            | Code::Faulted
            | Code::Cancelled => StatusCode::CONFLICT,
            Code::Busy | Code::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Code::ChecksumMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Code::Corrupt | Code::Storage | Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Code::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Code::Source => StatusCode::BAD_GATEWAY,
            Code::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The exit code of the command line.
    pub const fn exit_code(self) -> u8 {
        match self {
            Code::Invalid
            | Code::NoSuchRoute
            | Code::TooLarge
            | Code::ReadOnly
            | Code::Faulted
            | Code::NoSpace
            | Code::Storage
            | Code::Source
            | Code::Cancelled
            | Code::ShuttingDown
            | Code::Internal => 1,
            Code::NotFound => 3,
            Code::Exists | Code::InUse | Code::NotReady | Code::Busy => 4,
            // Bytes that are not what they should be, or of a kind that is not served.
            Code::ChecksumMismatch | Code::Corrupt | Code::Unsupported => 5,
            Code::TimedOut => 6,
        }
    }
}

/// What a node answers instead of a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    pub code: Code,
    /// One line: what, on which object, why, and what to do.
    pub detail: String,
}

impl Refusal {
    pub fn new(code: Code, detail: impl Into<String>) -> Refusal {
        Refusal { code, detail: detail.into() }
    }

    /// As a document.
    pub fn problem(&self) -> Problem {
        Problem {
            kind: format!("urn:bedplate:problem:{}", self.code.word()),
            title: self.code.title().to_owned(),
            status: self.code.status().as_u16(),
            detail: self.detail.clone(),
            code: self.code,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.code.status(), Json(self.problem())).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_MEDIA_TYPE));
        if matches!(self.code, Code::Busy) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// A problem document (RFC 9457) with a stable `code`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URN that ends in the code.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    pub code: Code,
}

impl From<Engine> for Refusal {
    fn from(error: Engine) -> Refusal {
        Refusal::new(engine_code(&error), error.to_string())
    }
}

/// The kind of refusal that an error of the engine is.
pub fn engine_code(error: &Engine) -> Code {
    match error {
        Engine::Io { .. } if error.is_limit() => Code::Busy,
        Engine::Io { .. } | Engine::Uncertain { .. } => Code::Storage,
        Engine::NoSpace { .. } => Code::NoSpace,
        Engine::Corrupt { .. } | Engine::Lost { .. } => Code::Corrupt,
        Engine::Unsupported { .. } => Code::Unsupported,
        Engine::OutOfRange { .. } | Engine::Invalid(_) => Code::Invalid,
        Engine::Failed { .. } => Code::Faulted,
        Engine::ReadOnly { .. } => Code::ReadOnly,
        Engine::NotFound { .. } => Code::NotFound,
        Engine::Exists { .. } => Code::Exists,
        Engine::InUse { .. } => Code::InUse,
        Engine::Busy { .. } => Code::Busy,
        Engine::Closed => Code::ShuttingDown,
    }
}

#[cfg(test)]
mod tests {
    use std::{io, path::PathBuf, sync::Arc};

    use bedplate_engine::{error::Corruption, units::ByteOffset};

    use super::*;

    #[test]
    fn every_code_is_written_in_json_as_its_word() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("{:?}", code.word()));
        }
    }

    #[test]
    fn every_code_has_the_status_and_exit_code_of_the_documented_table() {
        let table = [
            (Code::Invalid, 400, 1),
            (Code::Unsupported, 422, 5),
            (Code::NotFound, 404, 3),
            (Code::NoSuchRoute, 404, 1),
            (Code::TooLarge, 413, 1),
            (Code::Exists, 409, 4),
            (Code::InUse, 409, 4),
            (Code::NotReady, 409, 4),
            (Code::Busy, 503, 4),
            (Code::ReadOnly, 409, 1),
            (Code::Faulted, 409, 1),
            (Code::ChecksumMismatch, 422, 5),
            (Code::Corrupt, 500, 5),
            (Code::NoSpace, 507, 1),
            (Code::Storage, 500, 1),
            (Code::Source, 502, 1),
            (Code::TimedOut, 504, 6),
            (Code::Cancelled, 409, 1),
            (Code::ShuttingDown, 503, 1),
            (Code::Internal, 500, 1),
        ];
        assert_eq!(table.map(|row| row.0), Code::ALL);
        for (code, status, exit) in table {
            assert_eq!((code.status().as_u16(), code.exit_code()), (status, exit), "{code:?}");
        }
    }

    #[test]
    fn every_error_of_the_engine_has_its_code() {
        let path = PathBuf::from("/d/data");
        let source = Arc::new(io::Error::from_raw_os_error(5));
        let name = String::from("a");
        let table = [
            (Engine::Io { op: "read", path: path.clone(), source }, Code::Storage),
            (Engine::NoSpace { path: path.clone() }, Code::NoSpace),
            (
                Engine::Corrupt { path: path.clone(), what: Corruption::Magic("map"), at: ByteOffset(0) },
                Code::Corrupt,
            ),
            (Engine::Unsupported { path, what: name.clone() }, Code::Unsupported),
            (Engine::OutOfRange { start: 1, len: 1, size: 1 }, Code::Invalid),
            (Engine::Failed { reason: "sync".into() }, Code::Faulted),
            (Engine::Lost { start: 0, len: 1, reason: "damage".into() }, Code::Corrupt),
            (Engine::ReadOnly { what: name.clone() }, Code::ReadOnly),
            (Engine::NotFound { kind: "volume", name: name.clone() }, Code::NotFound),
            (Engine::Exists { kind: "volume", name: name.clone() }, Code::Exists),
            (Engine::InUse { kind: "volume", name: name.clone(), by: name.clone() }, Code::InUse),
            (Engine::Invalid(name), Code::Invalid),
            (Engine::Busy { limit: "X_MAX" }, Code::Busy),
            (Engine::Uncertain { source: Box::new(Engine::Closed) }, Code::Storage),
            (Engine::Closed, Code::ShuttingDown),
        ];
        for (error, code) in table {
            assert_eq!(engine_code(&error), code, "{error}");
            assert_eq!(Refusal::from(error).code, code);
        }
    }

    #[test]
    fn a_problem_document_has_the_fields_of_rfc_9457_and_the_code() {
        let problem = Refusal::new(Code::InUse, "volume \"a\" is in use: mount").problem();
        let json = serde_json::to_value(problem).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "type": "urn:bedplate:problem:in_use", "title": "In use", "status": 409,
                "detail": "volume \"a\" is in use: mount", "code": "in_use",
            })
        );
    }
}
