//! Names, sizes, times, checksums and URLs, as users, requests and records give them. The first byte says which.
#![no_main]

use bedplate::{
    catalog::name::ImageName,
    duration::{parse_duration, show_duration},
    prep::{checksum::Expected, source::http::Origin},
};
use bedplate_engine::volume::record::{check_user_name, dir_name};
use bedplate_inspect::size::{parse_bytes, parse_size, show};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % 5 {
        0 => {
            if let Ok(duration) = parse_duration(text) {
                assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
            }
        }
        1 => size(text),
        2 => {
            // The two of them have one rule.
            assert_eq!(ImageName::parse(text).is_ok(), check_user_name(text).is_ok());
            if ImageName::parse(text).is_ok() {
                let dir = dir_name(text, uuid::Uuid::nil());
                assert!(!dir.contains(['/', '\0']) && !dir.starts_with('.'));
            }
        }
        3 => {
            if let Ok(expected) = Expected::parse(text) {
                assert_eq!(Expected::parse(&expected.to_string()), Ok(expected));
            }
        }
        _ => url(text),
    }
});

fn size(text: &str) {
    if let Ok(bytes) = parse_bytes(text) {
        assert_eq!(parse_bytes(&bytes.to_string()), Ok(bytes));
        assert!(!show(bytes).is_empty());
        if let Ok(sectors) = parse_size(text) {
            assert!(sectors.is_multiple_of(512) && sectors >= bytes && sectors - bytes < 512);
        }
    } else {
        assert!(parse_size(text).is_err());
    }
}

fn url(text: &str) {
    match Origin::parse(text) {
        Ok(origin) => {
            let recorded = origin.for_record();
            let authority = recorded.split('/').nth(2).unwrap_or_default();
            assert!(!authority.contains('@'), "credentials are not recorded");
            let again = Origin::parse(recorded).unwrap_or_else(|error| panic!("{recorded}: {error}"));
            assert_eq!(again.for_record(), recorded);
            assert!(!origin.for_people().contains('?'));
        }
        Err(error) => assert!(!error.is_empty()),
    }
}
