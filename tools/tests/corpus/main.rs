//! Images of several files against what qemu reads of them: a corpus over every feature of qcow2, and images drawn at
//! random.
//!
//! The images and the judgement of sound ones are those of the engine's test `qcow2_corpus`, which holds its reader
//! against everything that is one file. Here all of them are opened as everything that inspects, converts or joins
//! images opens them, with the files that they name where that is allowed. Each test makes its own corpus in a temporary
//! directory.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]
#![allow(clippy::indexing_slicing, reason = "tests end where something is not as it should be")]

mod judge;
#[path = "../../../engine/tests/qcow2_corpus/manifest.rs"]
#[allow(dead_code, reason = "the engine's test asks for more of it")]
mod manifest;
#[path = "../../../engine/tests/qcow2_corpus/sound.rs"]
mod sound;
#[path = "../../../engine/tests/qcow2_corpus/subject.rs"]
mod subject;
#[path = "../../../engine/tests/qcow2_corpus/verdict.rs"]
mod verdict;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use self::judge::Part;

fn generator(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/corpus").join(name)
}

/// Run a generator.
fn generate(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Judge the corpus in `directory`, of which each part of [`Part::ALL`] has at least so many images.
fn judged(directory: &Path, least: [usize; 3]) {
    for (part, least) in Part::ALL.into_iter().zip(least) {
        let (count, differences) = judge::corpus(directory, part).unwrap();
        let list = differences.join("\n");
        assert!(differences.is_empty(), "{} of {count} images, {part:?}:\n{list}", differences.len());
        assert!(count >= least, "only {count} images, {part:?}");
    }
}

#[test]
fn files_that_images_name_are_read_where_that_is_allowed_and_refused_by_name_where_not() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("corpus");
    generate(Command::new(generator("qcow2")).arg(&directory));
    judged(&directory, [80, 15, 18]);
}

#[test]
fn images_drawn_at_random_read_as_qemu_reads_them_with_the_files_below() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("drawn");
    let mut draw = Command::new(generator("differential"));
    generate(draw.args(["--images", "50", "--seed", "1", "--into"]).arg(&directory));
    judged(&directory, [35, 3, 0]);
}
