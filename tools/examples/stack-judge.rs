//! Judges how images of several files read, by a corpus that `tests/corpus/qcow2` or `tests/corpus/differential` wrote.
//!
//! Usage: `stack-judge DIRECTORY...`. Prints what differs; ends with 1 if anything does. The judgement is the one of the
//! test `corpus`, built here for long runs. Images that are one file are `qcow2-judge`'s of the engine.

use std::{path::PathBuf, process::ExitCode};

#[path = "../tests/corpus/judge.rs"]
mod judge;
#[path = "../../engine/tests/qcow2_corpus/manifest.rs"]
#[allow(dead_code, reason = "the engine's test asks for more of it")]
mod manifest;
#[path = "../../engine/tests/qcow2_corpus/sound.rs"]
mod sound;
#[path = "../../engine/tests/qcow2_corpus/subject.rs"]
mod subject;
#[path = "../../engine/tests/qcow2_corpus/verdict.rs"]
mod verdict;

use self::judge::Part;

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for directory in std::env::args_os().skip(1).map(PathBuf::from) {
        for part in Part::ALL {
            match judge::corpus(&directory, part) {
                Ok((_, differences)) if differences.is_empty() => {}
                Ok((count, differences)) => {
                    let directory = directory.display();
                    println!("{} of {count} images in {directory} ({part:?}):", differences.len());
                    println!("{}", differences.join("\n"));
                    code = ExitCode::FAILURE;
                }
                Err(error) => {
                    println!("{error}");
                    code = ExitCode::FAILURE;
                }
            }
        }
    }
    code
}
