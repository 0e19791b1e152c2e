//! Judges our qcow2 reader by a corpus that `tests/corpus/qcow2` or `tests/corpus/differential` wrote.
//!
//! Usage: `qcow2-judge DIRECTORY...`. Prints what differs; ends with 1 if anything does. The judgement is the one of
//! the engine's test `qcow2_corpus`, built here for long runs; what images read with the files that they name is for
//! `stack-judge` of `bedplate-inspect`.

use std::{path::PathBuf, process::ExitCode};

#[path = "../tests/qcow2_corpus/judge.rs"]
mod judge;
#[path = "../tests/qcow2_corpus/manifest.rs"]
mod manifest;
#[path = "../tests/qcow2_corpus/peers.rs"]
mod peers;
#[path = "../tests/qcow2_corpus/sound.rs"]
mod sound;
#[path = "../tests/qcow2_corpus/subject.rs"]
mod subject;
#[path = "../tests/qcow2_corpus/verdict.rs"]
mod verdict;

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for directory in std::env::args_os().skip(1).map(PathBuf::from) {
        match judge::corpus(&directory) {
            Ok((_, differences)) if differences.is_empty() => {}
            Ok((count, differences)) => {
                println!("{} of {count} images in {}:", differences.len(), directory.display());
                println!("{}", differences.join("\n"));
                code = ExitCode::FAILURE;
            }
            Err(error) => {
                println!("{error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
