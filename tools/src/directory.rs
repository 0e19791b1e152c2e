//! Directories that hold a volume: replicas of Longhorn.
//!
//! Owns telling what a directory is by the names in it, and opening it.

use std::path::Path;

use bedplate_engine::error::{Error, Result};

use crate::longhorn::{self, Replica};

/// What a directory is.
pub enum Directory {
    Replica(Replica),
}

/// Open the directory `path`.
pub fn open(path: &Path) -> Result<Directory> {
    let names = names(path)?;
    if longhorn::is_replica(&names) {
        return Replica::open(path, names).map(Directory::Replica);
    }
    let what = "a directory that is neither a Longhorn replica nor a volume of Bedplate".to_owned();
    Err(Error::Unsupported { path: path.to_owned(), what })
}

/// The names in a directory, in order. One that is not UTF-8 is nothing that a volume is made of.
fn names(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(path).map_err(|e| Error::io("list", path, e))?;
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", path, e))?.file_name();
        if names.len() == longhorn::NAMES_MAX {
            let what = format!("a directory with more than {} names", longhorn::NAMES_MAX);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        names.extend(name.into_string());
    }
    names.sort();
    Ok(names)
}
