//! The file systems that are tried, each made, mounted and checked by its own tools.

use std::{fmt, fs::File, path::Path, process::Command};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use crate::guest::run;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl fmt::Display for FileSystem {
    /// As mount(8) calls it.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        })
    }
}

impl FileSystem {
    /// A new one in a new file.
    pub fn make(self, file: &Path, len: u64) -> Result<()> {
        File::create(file)?.set_len(len)?;
        run(Command::new(format!("mkfs.{self}")).arg("-q").arg(file))?;
        Ok(())
    }

    /// Its tool finds nothing wrong with the one in `place`, a file or a device that is not mounted.
    pub fn check(self, place: &Path) -> Result<()> {
        match self {
            FileSystem::Ext4 => run(Command::new("e2fsck").arg("-fn").arg(place))?,
            FileSystem::Xfs => run(Command::new("xfs_repair").arg("-n").arg(place))?,
        };
        Ok(())
    }
}
