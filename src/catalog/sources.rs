//! The files that one image was joined from, as its record keeps them.
//!
//! Owns [`SourceFile`] and what a list of them may look like: whoever has the files can tell by it whether they are
//! still the ones (`sha512sum FILE` agrees), and in which order they lay. Nothing is read from them again.

use serde::{Deserialize, Serialize};

/// Files of one image: more than any chain of qcow2 files or of Longhorn's layers has, and few enough that the record
/// stays small. A volume of Bedplate has two for each layer, and may have more layers than that: what it holds is to be
/// had from the node that serves it.
pub const SOURCES_MAX: usize = 512;
/// Bytes of all their paths together.
pub const SOURCE_PATHS_LEN_MAX: usize = 128 << 10;

/// A file that took part, as it was while it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Where it was found, absolute.
    pub path: String,
    pub size_bytes: u64,
    /// Of the file as it is, its holes too.
    pub sha512: String,
}

/// Refuse the files of a list, known by their paths, that no record has room for.
pub fn check_room<'a>(paths: impl ExactSizeIterator<Item = &'a str>) -> Result<(), String> {
    if paths.len() > SOURCES_MAX {
        return Err(format!("an image of {} files: there may be {SOURCES_MAX} (SOURCES_MAX)", paths.len()));
    }
    let len: usize = paths.map(str::len).sum();
    if len > SOURCE_PATHS_LEN_MAX {
        return Err(format!(
            "an image of files whose paths have {len} bytes: they may have {SOURCE_PATHS_LEN_MAX} (SOURCE_PATHS_LEN_MAX)"
        ));
    }
    Ok(())
}

/// Whether a record may say this; the error says why not.
pub(super) fn verify(sources: &[SourceFile]) -> Result<(), String> {
    check_room(sources.iter().map(|source| source.path.as_str()))?;
    for source in sources {
        if !source.path.starts_with('/') {
            return Err(format!("the path of the source {:?} is not absolute", source.path));
        }
        if !is_sha512(&source.sha512) {
            return Err("the sha512 of a source is not 128 lower-case hexadecimal digits".to_owned());
        }
    }
    Ok(())
}

/// Whether a text is a SHA-512 as records have it.
pub(super) fn is_sha512(text: &str) -> bool {
    text.len() == 128 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::SMALL_FILE_LEN_MAX;

    #[test]
    fn the_longest_list_that_is_taken_fits_into_a_record_that_can_be_read() {
        // What takes most room in JSON.
        let path = format!("/{}", "\u{1}".repeat(SOURCE_PATHS_LEN_MAX / SOURCES_MAX - 1));
        let source = SourceFile { path, size_bytes: u64::MAX, sha512: "a".repeat(128) };
        let mut list = vec![source; SOURCES_MAX];
        assert_eq!(verify(&list), Ok(()));
        let json = serde_json::to_vec_pretty(&[&list]).unwrap();
        // As much again as three paths is left for the rest.
        assert!(json.len() as u64 + 3 * 6 * 4096 < SMALL_FILE_LEN_MAX, "{}", json.len());
        list[0].path.push('x');
        assert!(verify(&list).is_err_and(|why| why.contains("SOURCE_PATHS_LEN_MAX")));
        list[0].path = "/".to_owned();
        list.push(list[0].clone());
        assert!(verify(&list).is_err_and(|why| why.contains("SOURCES_MAX")));
    }
}
