//! The file under a format, as `info` shows it below `children`.
//!
//! Owns the keys that `qemu-img info` has there since its block layer shows its graph: one child, `file`, with the length
//! of the file itself, which no other key tells. Backing and data files are no children in it, and so not here.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use bedplate_engine::{
    error::{Error, Result},
    units::SECTOR_SIZE,
};
use serde::Serialize;

/// One edge of the graph.
#[derive(Debug, Serialize)]
pub struct Child {
    name: &'static str,
    info: ChildInfo,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ChildInfo {
    children: [(); 0],
    /// Length of the file in whole sectors.
    virtual_size: u64,
    filename: String,
    format: &'static str,
    actual_size: u64,
    format_specific: ChildSpecific,
    dirty_flag: bool,
}

/// What a file has of its own: nothing that is asked for here.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum ChildSpecific {
    File {},
}

impl Child {
    /// The regular file or block device that errors call `path`.
    pub fn file(file: &File, path: &Path) -> Result<Child> {
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        let mut file = file;
        let len = file.seek(SeekFrom::End(0)).map_err(|e| Error::io("seek", path, e))?;
        let info = ChildInfo {
            children: [],
            virtual_size: len.next_multiple_of(SECTOR_SIZE),
            filename: path.display().to_string(),
            format: if meta.file_type().is_block_device() { "host_device" } else { "file" },
            actual_size: meta.blocks() * 512,
            format_specific: ChildSpecific::File {},
            dirty_flag: false,
        };
        Ok(Child { name: "file", info })
    }
}
