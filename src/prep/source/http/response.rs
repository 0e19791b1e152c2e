//! What an answer of an origin means for a download, decided from its status and headers alone.
//!
//! Owns [`judge`], a pure function: given what was asked, is this answer the whole, the part that was asked for, the
//! word that nothing is missing, or a reason to begin again, try later or give up. Rules: RFC 9110, sections 8.8
//! (validators), 13.1.5 (If-Range), 14.4 (Content-Range), 15.5.17 (416). Nothing that an origin says is believed
//! without a check: a part must begin where it was asked to, and belong to a whole of the known length.

use std::time::{Duration, SystemTime};

use reqwest::{
    StatusCode,
    header::{
        CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, HeaderMap, LAST_MODIFIED, RETRY_AFTER,
        TRANSFER_ENCODING,
    },
};

use crate::prep::source::Validator;

/// The longest pause that an origin may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);
/// A modification date is a strong validator when the origin's own clock was at least this much past it.
const DATE_STRONG_AFTER: Duration = Duration::from_secs(1);

/// What the request asked for.
#[derive(Clone, Debug)]
pub struct Asked<'a> {
    /// The first byte that is wanted; not 0 when a range was asked for.
    pub position: u64,
    pub total: Option<u64>,
    /// What the bytes before `position` belong to.
    pub validator: &'a Validator,
    /// Whether the whole will be compared with a checksum that somebody gave.
    pub checksum: Checksum,
}

/// Whether there is something that the whole will be compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    Given,
    NotGiven,
}

/// What an answer means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The body is everything, from byte 0.
    Whole { total: Option<u64>, validator: Validator },
    /// The body begins at the byte that was asked for.
    Part { total: u64 },
    /// There is nothing after the byte that was asked for.
    Complete,
    /// What has arrived is of no use: ask anew, from byte 0.
    StartAgain { reason: String },
    /// Try again, after at least this long.
    TryLater { reason: String, after: Duration },
    /// Of no use to try again.
    Refused { reason: String },
}

/// What this answer means.
pub fn judge(status: StatusCode, headers: &HeaderMap, asked: &Asked<'_>) -> Answer {
    match status {
        StatusCode::OK => whole(headers, asked),
        StatusCode::PARTIAL_CONTENT => part(headers, asked),
        StatusCode::RANGE_NOT_SATISFIABLE => past_the_end(headers, asked),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            later(status, headers)
        }
        status if status.is_server_error() => later(status, headers),
        StatusCode::UNAUTHORIZED => Answer::Refused {
            reason: format!(
                "the origin answers {status} (a user and password of the URL are not kept over a restart; create the \
                 image again with them)"
            ),
        },
        status => Answer::Refused { reason: format!("the origin answers {status}") },
    }
}

fn whole(headers: &HeaderMap, asked: &Asked<'_>) -> Answer {
    if let Some(reason) = encoded(headers) {
        return Answer::Refused { reason };
    }
    let total = match text(headers, CONTENT_LENGTH.as_str()) {
        Some(length) => match length.parse() {
            Ok(total) => Some(total),
            Err(_) => {
                return Answer::Refused {
                    reason: "the origin gives an impossible Content-Length".to_owned(),
                };
            }
        },
        None => None,
    };
    let chunked =
        text(headers, TRANSFER_ENCODING.as_str()).is_some_and(|t| t.to_ascii_lowercase().contains("chunked"));
    if total.is_none() && !chunked && asked.checksum == Checksum::NotGiven {
        // Such a body ends when the connection does, also when that breaks.
        let reason =
            "the origin gives neither a length nor chunks, so a broken transfer cannot be told from a whole \
                      one; give a checksum"
                .to_owned();
        return Answer::Refused { reason };
    }
    Answer::Whole { total, validator: validator(headers) }
}

fn part(headers: &HeaderMap, asked: &Asked<'_>) -> Answer {
    if asked.position == 0 {
        return Answer::Refused { reason: "the origin answers 206 though no range was asked for".to_owned() };
    }
    if let Some(reason) = encoded(headers) {
        return Answer::Refused { reason };
    }
    let start_again = |reason: String| Answer::StartAgain { reason };
    let range = text(headers, CONTENT_RANGE.as_str()).and_then(ContentRange::parse);
    let Some(ContentRange { first, last, total: Some(total) }) = range else {
        return start_again("the origin answers 206 without a range that can be checked".to_owned());
    };
    if first != asked.position || last < first || last >= total {
        return start_again(format!(
            "the origin gives bytes {first}-{last}/{total} where {}- was asked",
            asked.position
        ));
    }
    if let Some(known) = asked.total.filter(|known| *known != total) {
        return start_again(format!(
            "the image changed at its origin: it had {known} bytes, now it has {total}"
        ));
    }
    // If-Range should have seen to this; an origin that ignores it is found out here. A 206 has to repeat the ETag
    // (RFC 9110, 15.3.7), so that one without it proves nothing. It may leave Last-Modified out: then we pay with a
    // transfer from byte 0, rather than join bytes of what may be two files.
    let changed = match asked.validator {
        Validator::Etag(was) => text(headers, ETAG.as_str()) != Some(was.as_str()),
        Validator::LastModified(was) => text(headers, LAST_MODIFIED.as_str()) != Some(was.as_str()),
        Validator::None | Validator::File { .. } => false,
    };
    if changed {
        return start_again("the origin does not show that the image is still the same".to_owned());
    }
    Answer::Part { total }
}

fn past_the_end(headers: &HeaderMap, asked: &Asked<'_>) -> Answer {
    let size = text(headers, CONTENT_RANGE.as_str())
        .and_then(|range| range.trim().strip_prefix("bytes"))
        .and_then(|range| range.trim_start().strip_prefix("*/"))
        .and_then(|size| size.trim().parse::<u64>().ok());
    match size {
        Some(size) if size == asked.position && asked.total.is_none_or(|total| total == size) => {
            Answer::Complete
        }
        Some(size) => Answer::StartAgain {
            reason: format!(
                "the image changed at its origin: it has {size} bytes, {} had arrived",
                asked.position
            ),
        },
        None => Answer::StartAgain { reason: "the origin refuses the range".to_owned() },
    }
}

fn later(status: StatusCode, headers: &HeaderMap) -> Answer {
    let after = text(headers, RETRY_AFTER.as_str())
        .and_then(|after| after.trim().parse().ok())
        .map(Duration::from_secs);
    Answer::TryLater {
        reason: format!("the origin answers {status}"),
        after: after.unwrap_or_default().min(RETRY_AFTER_MAX),
    }
}

/// The strongest validator of an answer that may stand in If-Range.
fn validator(headers: &HeaderMap) -> Validator {
    if let Some(etag) = text(headers, ETAG.as_str())
        && etag.len() >= 2
        && etag.starts_with('"')
        && etag.ends_with('"')
    {
        return Validator::Etag(etag.to_owned());
    }
    let Some(modified) = text(headers, LAST_MODIFIED.as_str()) else { return Validator::None };
    let strong = match (http_date(modified), text(headers, DATE.as_str()).and_then(http_date)) {
        (Some(modified), Some(now)) => now.duration_since(modified).is_ok_and(|age| age >= DATE_STRONG_AFTER),
        _ => false,
    };
    if strong { Validator::LastModified(modified.to_owned()) } else { Validator::None }
}

/// A body that is not the file's own bytes.
fn encoded(headers: &HeaderMap) -> Option<String> {
    text(headers, CONTENT_ENCODING.as_str())
        .filter(|coding| !coding.eq_ignore_ascii_case("identity"))
        .map(|coding| format!("the origin sends the file encoded ({coding}) though it was asked not to"))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `bytes first-last/total`.
struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

impl ContentRange {
    fn parse(value: &str) -> Option<ContentRange> {
        let range = value.trim().strip_prefix("bytes")?.trim_start_matches([' ', '=']);
        let (span, total) = range.split_once('/')?;
        let (first, last) = span.split_once('-')?;
        let total = match total.trim() {
            "*" => None,
            total => Some(total.parse().ok()?),
        };
        Some(ContentRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()?, total })
    }
}

/// A date of HTTP, `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(value: &str) -> Option<SystemTime> {
    let at = jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(SystemTime::from(at))
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    const NONE: Validator = Validator::None;

    fn asked(position: u64, total: Option<u64>, validator: &Validator) -> Asked<'_> {
        Asked { position, total, validator, checksum: Checksum::NotGiven }
    }

    fn answer(status: u16, headers: &[(&'static str, &str)], asked: &Asked<'_>) -> Answer {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect();
        judge(StatusCode::from_u16(status).unwrap(), &headers, asked)
    }

    #[test]
    fn a_part_is_taken_only_where_it_was_asked_for() {
        let ask = asked(100, Some(1000), &NONE);
        assert_eq!(
            answer(206, &[("content-range", "bytes 100-999/1000")], &ask),
            Answer::Part { total: 1000 }
        );
        for bad in [
            "bytes 0-999/1000",
            "bytes 101-999/1000",
            "bytes 100-999/1001",
            "bytes 100-1000/1000",
            "bytes 100-99/1000",
            "bytes 100-999/*",
            "items 100-999/1000",
            "bytes 100-99999999999999999999/1000",
            "",
        ] {
            assert!(
                matches!(answer(206, &[("content-range", bad)], &ask), Answer::StartAgain { .. }),
                "{bad}"
            );
        }
        assert!(matches!(answer(206, &[], &ask), Answer::StartAgain { .. }), "multipart, or nothing");
        let whole = asked(0, None, &NONE);
        assert!(matches!(answer(206, &[("content-range", "bytes 0-9/10")], &whole), Answer::Refused { .. }));
    }

    #[test]
    fn a_part_of_another_version_is_not_taken_even_if_the_origin_ignores_if_range() {
        let etag = Validator::Etag("\"one\"".to_owned());
        let ask = asked(100, Some(1000), &etag);
        let range = ("content-range", "bytes 100-999/1000");
        assert_eq!(answer(206, &[range, ("etag", "\"one\"")], &ask), Answer::Part { total: 1000 });
        assert!(matches!(answer(206, &[range, ("etag", "\"two\"")], &ask), Answer::StartAgain { .. }));
    }

    #[test]
    fn a_part_that_does_not_repeat_its_validator_is_not_taken() {
        let range = ("content-range", "bytes 100-999/1000");
        let (old, new) = ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:50:37 GMT");
        let etag = Validator::Etag("\"one\"".to_owned());
        let ask = asked(100, Some(1000), &etag);
        for headers in [vec![range], vec![range, ("etag", "W/\"one\"")], vec![range, ("last-modified", old)]]
        {
            assert!(matches!(answer(206, &headers, &ask), Answer::StartAgain { .. }), "{headers:?}");
        }
        let modified = Validator::LastModified(old.to_owned());
        let ask = asked(100, Some(1000), &modified);
        assert_eq!(answer(206, &[range, ("last-modified", old)], &ask), Answer::Part { total: 1000 });
        for headers in [vec![range], vec![range, ("last-modified", new)], vec![range, ("etag", "\"one\"")]] {
            assert!(matches!(answer(206, &headers, &ask), Answer::StartAgain { .. }), "{headers:?}");
        }
    }

    #[test]
    fn nothing_after_the_last_byte_is_complete_only_if_the_sizes_agree() {
        let range = |size| [("content-range", size)];
        assert_eq!(answer(416, &range("bytes */1000"), &asked(1000, Some(1000), &NONE)), Answer::Complete);
        assert_eq!(answer(416, &range("bytes */1000"), &asked(1000, None, &NONE)), Answer::Complete);
        for (size, position, total) in [("bytes */900", 1000, Some(1000)), ("bytes */1000", 1000, Some(2000))]
        {
            let ask = asked(position, total, &NONE);
            assert!(matches!(answer(416, &range(size), &ask), Answer::StartAgain { .. }));
        }
        assert!(matches!(answer(416, &[], &asked(1000, None, &NONE)), Answer::StartAgain { .. }));
    }

    #[test]
    fn only_strong_validators_are_kept() {
        let ask = asked(0, None, &NONE);
        let of = |headers: &[(&'static str, &str)]| {
            let mut all = vec![("content-length", "10")];
            all.extend_from_slice(headers);
            match answer(200, &all, &ask) {
                Answer::Whole { validator, .. } => validator,
                other => panic!("{other:?}"),
            }
        };
        let (old, now) = ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:50:37 GMT");
        assert_eq!(of(&[("etag", "\"a\"")]), Validator::Etag("\"a\"".to_owned()));
        assert_eq!(of(&[("etag", "W/\"a\"")]), Validator::None);
        assert_eq!(of(&[("etag", "a")]), Validator::None);
        assert_eq!(of(&[("last-modified", old), ("date", now)]), Validator::LastModified(old.to_owned()));
        assert_eq!(
            of(&[("etag", "W/\"a\""), ("last-modified", old), ("date", now)]),
            Validator::LastModified(old.to_owned())
        );
        assert_eq!(
            of(&[("last-modified", old), ("date", old)]),
            Validator::None,
            "written in the same second"
        );
        assert_eq!(of(&[("last-modified", old)]), Validator::None);
    }

    #[test]
    fn a_body_without_an_end_needs_a_checksum() {
        let mut ask = asked(0, None, &NONE);
        assert!(matches!(answer(200, &[], &ask), Answer::Refused { .. }));
        assert!(matches!(
            answer(200, &[("transfer-encoding", "chunked")], &ask),
            Answer::Whole { total: None, .. }
        ));
        ask.checksum = Checksum::Given;
        assert!(matches!(answer(200, &[], &ask), Answer::Whole { total: None, .. }));
    }

    #[test]
    fn encoded_bodies_are_refused_and_servers_in_trouble_are_asked_again() {
        let ask = asked(0, None, &NONE);
        let gzip = [("content-length", "10"), ("content-encoding", "gzip")];
        assert!(matches!(answer(200, &gzip, &ask), Answer::Refused { .. }));
        for status in [500, 502, 503, 504, 408, 425, 429] {
            assert!(matches!(answer(status, &[], &ask), Answer::TryLater { .. }), "{status}");
        }
        for status in [204, 304, 400, 401, 403, 404, 410] {
            assert!(matches!(answer(status, &[], &ask), Answer::Refused { .. }), "{status}");
        }
        let after = answer(503, &[("retry-after", "999999")], &ask);
        assert!(matches!(after, Answer::TryLater { after, .. } if after == RETRY_AFTER_MAX));
    }
}
