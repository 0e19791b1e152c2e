//! What an origin answers to a download: status and headers, one a line; the first line is what was asked.
#![no_main]

use std::time::Duration;

use bedplate::prep::source::{
    Validator,
    http::response::{Answer, Asked, Checksum, judge},
};
use libfuzzer_sys::fuzz_target;
use reqwest::{
    StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};

const AFTER_MAX: Duration = Duration::from_secs(120);

fuzz_target!(|bytes: &[u8]| {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let Some((asked_for, validator)) = lines.next().and_then(asked) else { return };
    let Some(status) = lines.next().and_then(|line| StatusCode::from_bytes(line).ok()) else { return };
    let mut headers = HeaderMap::new();
    for line in lines {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else { continue };
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value.trim_ascii()))
        {
            headers.append(name, value);
        }
    }
    let (position, total, checksum) = asked_for;
    let asked = Asked { position, total, validator: &validator, checksum };
    match judge(status, &headers, &asked) {
        Answer::Part { total: whole } => {
            assert!(position > 0 && position < whole && total.is_none_or(|total| total == whole));
        }
        Answer::Whole { total: None, .. } => {
            assert!(checksum == Checksum::Given || headers.contains_key("transfer-encoding"));
        }
        Answer::Complete => assert!(total.is_none_or(|total| total == position)),
        Answer::TryLater { after, .. } => assert!(after <= AFTER_MAX),
        Answer::Whole { .. } | Answer::StartAgain { .. } | Answer::Refused { .. } => {}
    }
});

type AskedFor = (u64, Option<u64>, Checksum);

/// `POSITION TOTAL|- given|- [VALIDATOR]`; a validator that begins with a quote is an entity tag.
fn asked(line: &[u8]) -> Option<(AskedFor, Validator)> {
    let mut words = std::str::from_utf8(line).ok()?.splitn(4, ' ');
    let position = words.next()?.parse().ok()?;
    let total: Option<u64> = words.next()?.parse().ok();
    if total.is_some_and(|total| position > total) {
        return None;
    }
    let checksum = if words.next()? == "given" { Checksum::Given } else { Checksum::NotGiven };
    let validator = match words.next() {
        Some(tag) if tag.starts_with('"') => Validator::Etag(tag.to_owned()),
        Some(date) => Validator::LastModified(date.to_owned()),
        None => Validator::None,
    };
    Some(((position, total, checksum), validator))
}
