//! The manifest of a corpus of qcow2 images, as `tests/corpus/qcow2` and `tests/corpus/differential` write it.
//!
//! Owns the shape only; what each expectation asks of a reader is in `judge.rs`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub struct Manifest {
    pub entries: Vec<Entry>,
}

/// One image.
#[derive(Debug, Deserialize)]
pub struct Entry {
    pub name: String,
    /// Within the corpus.
    pub file: PathBuf,
    pub expect: Expectation,
}

/// What a reader makes of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expectation {
    /// Sound.
    Same(Box<Same>),
    /// Refused when it is opened.
    Refused(Refusal),
    /// Opens, but these parts are lost.
    Lost(Loss),
    /// Names a file that must not be opened.
    Reference { naming: String },
    /// Reads as its original; a list in it is corrupt.
    Unlisted { what: List, otherwise: PathBuf },
    /// Reads as its original; `check` is what a check of its refcounts ends with.
    Readable {
        #[expect(dead_code, reason = "for `inspect check`, which is judged with the built program")]
        check: i32,
        otherwise: PathBuf,
    },
}

/// What is in a sound image.
#[derive(Debug, Deserialize)]
pub struct Same {
    pub size: u64,
    pub content: Content,
    /// Bytes that qemu-img's map calls data, where that was asked.
    pub data_bytes: Option<u64>,
    pub snapshots: Vec<Snapshot>,
    pub bitmaps: Vec<String>,
    pub dirty: bool,
    pub corrupt: bool,
    /// Whether it needs other files.
    pub references: bool,
    /// Other readers that have a say.
    pub peers: Vec<Peer>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Of all bytes.
    Sha512(String),
    /// Of a disk too large to read: zeros but for these.
    Extents(Vec<DataExtent>),
}

#[derive(Debug, Deserialize)]
pub struct DataExtent {
    pub start: u64,
    pub len: u64,
    pub sha512: String,
}

#[derive(Debug, Deserialize)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    pub size: u64,
    pub sha512: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub enum Peer {
    #[serde(rename = "imago")]
    Imago,
    #[serde(rename = "qcow2-rs")]
    Qcow2Rs,
}

#[derive(Debug, Deserialize)]
pub struct Refusal {
    pub class: Class,
    /// What the message says, but for case and underscores.
    pub naming: String,
    /// Offset in the file of the bytes that are wrong, where one place is.
    pub at: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    Corrupt,
    Unsupported,
    Any,
}

#[derive(Debug, Deserialize)]
pub struct Loss {
    pub found_by: FoundBy,
    pub naming: String,
    /// Start and length of guest ranges.
    pub ranges: Vec<(u64, u64)>,
    pub otherwise: PathBuf,
}

/// What tells that something is lost.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    /// Looking at every table.
    Verify,
    /// Only reading it.
    Read,
    Either,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum List {
    Snapshots,
    Bitmaps,
}

impl Manifest {
    /// The manifest of the corpus in `directory`.
    pub fn load(directory: &Path) -> Result<Manifest, String> {
        let path = directory.join("manifest.json");
        let text = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))
    }
}
