//! What every target does first: the input becomes a file.
//!
//! To run one, from this directory: `cargo +nightly fuzz run qcow2_read SEEDS -- -max_len=140000 -timeout=15`, where
//! SEEDS is a directory of small images (those of `tests/corpus/qcow2` do). What it finds is frozen as a test of the
//! engine.

use std::{cell::RefCell, fs::File, os::unix::fs::FileExt};

/// A file in memory with these bytes. One is kept and filled anew each time.
pub fn file_of(bytes: &[u8]) -> File {
    thread_local! {
        static FILE: RefCell<Option<File>> = const { RefCell::new(None) };
    }
    FILE.with_borrow_mut(|file| {
        let file = file.get_or_insert_with(|| {
            tempfile::tempfile_in("/dev/shm").expect("the machine that fuzzes has memory to spare")
        });
        file.set_len(0).and_then(|()| file.write_all_at(bytes, 0)).expect("the same");
        file.try_clone().expect("a descriptor more is to be had")
    })
}
