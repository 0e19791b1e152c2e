//! Looking inside raw and qcow2 files, Longhorn replica directories and Bedplate's own volumes, without trusting them.
//!
//! Owns the command line of `bedplate inspect` ([`Verb`]), one file for each verb. What is opened becomes a
//! [`stack::Stack`], a read-only block device that tells where its bytes are; what compares, converts, maps or verifies
//! knows no format. Everything is opened for reading only, regular files and block devices only, and files that other
//! files name only where the operator allows it. What is corrupt is reported and the rest is shown.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::indexing_slicing, reason = "tests know their bytes"))]

mod check;
mod child;
mod compare;
mod content;
mod convert;
mod directory;
mod dump;
mod failure;
mod header_dump;
mod html;
mod info;
pub mod layer;
mod longhorn;
mod map;
pub mod page;
mod picture;
mod print;
mod qcow2_info;
mod refcheck;
pub mod size;
pub mod source;
pub mod stack;
mod tables;
mod verify;
mod volume;
mod volume_report;
pub mod written;

use clap::Subcommand;

pub use crate::{
    failure::{Failure, Result},
    print::shown,
};

/// Look inside disk images and replica directories, read-only, without a node
#[derive(Debug, Subcommand)]
pub enum Verb {
    Info(info::InfoArgs),
    Map(map::MapArgs),
    Check(check::CheckArgs),
    Compare(compare::CompareArgs),
    Verify(verify::VerifyArgs),
    Dump(dump::DumpArgs),
    Convert(convert::ConvertArgs),
}

impl Verb {
    /// Do it, print what is found, and answer the exit code: findings are no failure.
    pub fn run(&self) -> Result<u8> {
        match self {
            Verb::Info(args) => info::run(args),
            Verb::Map(args) => map::run(args),
            Verb::Check(args) => check::run(args),
            Verb::Compare(args) => compare::run(args),
            Verb::Verify(args) => verify::run(args),
            Verb::Dump(args) => dump::run(args),
            Verb::Convert(args) => convert::run(args),
        }
    }

    /// What was tried, for errors.
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::Info(_) => "inspect info",
            Verb::Map(_) => "inspect map",
            Verb::Check(_) => "inspect check",
            Verb::Compare(_) => "inspect compare",
            Verb::Verify(_) => "inspect verify",
            Verb::Dump(_) => "inspect dump",
            Verb::Convert(_) => "inspect convert",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        _verb: super::Verb,
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
