//! The configuration file. What is taken can be written, and is then taken again as the same.
#![no_main]

use std::path::Path;

use bedplate::config::Settings;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let path = Path::new("bedplate.toml");
    let parse = |text: &str| Settings::parse(text, path).and_then(Settings::finish);
    match parse(text) {
        Ok(config) => {
            let written = config.to_toml();
            let again = parse(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
            assert_eq!(again, config, "{written}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
