//! `--from @PATH`: a URL that is read from a file, because it may hold a secret.
//!
//! The words of a command line are for every user of the machine to see (`ps`), and end up in a shell's history. Owns
//! what such a file may look like; which URLs are sources, the node knows. What the file holds is in no message.

use std::{
    fs::File,
    io::{self, Read},
};

use super::exit::Failure;

/// Longest file; an address that is signed has a few kilobytes.
const SOURCE_FILE_LEN_MAX: u64 = 64 << 10;

/// The source that `--from` names: itself, or the URL in the file behind an `@`.
pub fn read(from: &str) -> Result<String, Failure> {
    let Some(path) = from.strip_prefix('@') else { return Ok(from.to_owned()) };
    let failed = |source| Failure::Io { what: format!("read the source from {path:?}"), source };
    let invalid = |reason: &str| failed(io::Error::new(io::ErrorKind::InvalidData, reason));
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(SOURCE_FILE_LEN_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > SOURCE_FILE_LEN_MAX {
        return Err(invalid(&format!("it is longer than {SOURCE_FILE_LEN_MAX} bytes")));
    }
    match text.trim() {
        "" => Err(invalid("it is empty")),
        source if source.contains(['\n', '\r']) => Err(invalid("it has more than one line")),
        source if is_url(source) => Ok(source.to_owned()),
        // Anything else would be taken for a path, which messages repeat.
        _ => Err(invalid("it holds no URL")),
    }
}

/// Whether it begins as a URL does.
pub fn is_url(text: &str) -> bool {
    let scheme = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    text.split_once("://").is_some_and(|(prefix, _)| !prefix.is_empty() && scheme(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_taken_as_it_is_or_from_the_one_line_of_a_file() {
        assert_eq!(read("http://h/a@b").unwrap(), "http://h/a@b");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let from = format!("@{}", path.display());
        assert!(read(&from).is_err());
        std::fs::write(&path, "https://u:secret@h/a\n").unwrap();
        assert_eq!(read(&from).unwrap(), "https://u:secret@h/a");
    }

    #[test]
    fn what_is_in_a_file_that_is_no_source_is_not_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        for content in [
            "",
            " \n",
            "secret\nsecret",
            "@secret",
            "https:/secret",
            &"secret".repeat(20_000),
            "\u{0}secret\nx",
        ] {
            std::fs::write(&path, content).unwrap();
            let refused = read(&format!("@{}", path.display())).unwrap_err();
            assert!(!refused.to_string().contains("secret"), "{refused}");
        }
    }
}
