//! The JSON files of a replica directory.
//!
//! Owns [`VolumeMeta`] and [`LayerMeta`], with the keys that Longhorn writes. Keys that are missing or unknown are no
//! error: releases differ, and a restored layer's record may hold nothing but its parent. The `Name` of a layer's
//! record is what the file was called once; nothing relies on it.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use bedplate_engine::{
    error::{Corruption, Error, Result},
    units::ByteOffset,
};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

/// Bytes of one record.
pub const RECORD_LEN_MAX: u64 = 1 << 20;

/// `volume.meta`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VolumeMeta {
    pub size: u64,
    pub head: String,
    pub dirty: bool,
    pub rebuilding: bool,
    pub error: String,
    pub parent: String,
    /// Where the node that wrote this had the backing file; empty for none.
    pub backing_file_path: String,
    pub encrypted: bool,
}

/// `NAME.img.meta`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerMeta {
    /// File name of the layer below; empty for the oldest.
    pub parent: String,
    pub removed: bool,
    pub user_created: bool,
    pub created: String,
    #[serde(deserialize_with = "null_is_none")]
    pub labels: Labels,
}

/// What users and controllers said of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Labels(pub BTreeMap<String, String>);

fn null_is_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
    Option::<Labels>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Parse the record in `file`.
pub fn read<T: DeserializeOwned>(file: File, path: &Path) -> Result<T> {
    let corrupt = |what| Error::Corrupt { path: path.to_owned(), what, at: ByteOffset(0) };
    let mut text = Vec::new();
    file.take(RECORD_LEN_MAX + 1).read_to_end(&mut text).map_err(|e| Error::io("read", path, e))?;
    if text.len() as u64 > RECORD_LEN_MAX {
        return Err(corrupt(Corruption::Record(format!("it is longer than {RECORD_LEN_MAX} bytes"))));
    }
    serde_json::from_slice(&text).map_err(|e| corrupt(Corruption::Record(e.to_string())))
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        read(file, Path::new("x"))
    }

    #[test]
    fn records_of_all_releases_are_read() {
        let old: VolumeMeta = parse(r#"{"Size":4096,"Head":"volume-head-001.img","Dirty":true}"#).unwrap();
        assert_eq!((old.size, old.dirty, old.backing_file_path.as_str()), (4096, true, ""));
        let restored: LayerMeta = parse("{\"Parent\":\"\"}\n").unwrap();
        assert_eq!(restored, LayerMeta::default());
        let labelled: LayerMeta = parse(r#"{"Parent":"p","Labels":{"a":"b"},"New":[1]}"#).unwrap();
        assert_eq!(labelled.labels.0["a"], "b");
        let unlabelled: LayerMeta = parse(r#"{"Parent":"p","Labels":null}"#).unwrap();
        assert!(unlabelled.labels.0.is_empty());
    }

    #[test]
    fn what_is_no_record_is_corrupt() {
        let deep = "[".repeat(100_000);
        for text in ["", "{", "7", "{\"Size\":-1}", "{\"Size\":1e400}", &deep] {
            assert!(matches!(parse::<VolumeMeta>(text), Err(Error::Corrupt { .. })), "{text:.20}");
        }
    }
}
