//! The qcow2 reader against images that qemu made: a corpus over every feature of the format and every way to break
//! it, and images drawn at random.
//!
//! The images come from `tests/corpus` at the top of the repository (Python, qemu-img, qemu-io), whose README says how
//! to run the long version. Each test makes its own in a temporary directory.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]
#![allow(clippy::indexing_slicing, reason = "tests end where something is not as it should be")]

mod judge;
mod manifest;
mod peers;
mod sound;
mod subject;
mod verdict;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn generator(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/corpus").join(name)
}

/// Run a generator and judge what it wrote. Returns the number of images.
fn judged(generate: &mut Command, directory: &Path) -> usize {
    let done = generate.output().unwrap_or_else(|e| panic!("{generate:?}: {e}"));
    assert!(done.status.success(), "{generate:?}: {}", String::from_utf8_lossy(&done.stderr));
    let (count, differences) = judge::corpus(directory).unwrap();
    assert!(differences.is_empty(), "{} of {count} images:\n{}", differences.len(), differences.join("\n"));
    count
}

#[test]
fn sound_images_read_as_qemu_reads_them_and_damaged_ones_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("corpus");
    let count = judged(Command::new(generator("qcow2")).arg(&directory), &directory);
    assert!(count >= 180, "only {count} images");
}

#[test]
fn images_drawn_at_random_read_as_qemu_reads_them() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("drawn");
    let mut draw = Command::new(generator("differential"));
    draw.args(["--images", "50", "--seed", "1", "--into"]).arg(&directory);
    let count = judged(&mut draw, &directory);
    assert!(count >= 45, "only {count} images");
}
