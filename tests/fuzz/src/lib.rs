//! What the targets share: inputs as files, directories and maps.
//!
//! `run` builds and runs them; `engine/docs/testing.md` lists what reads bytes from outside, and which target or test
//! covers each. What a target finds is frozen as a test of the crate that it was found in.

pub mod map;
pub mod node;
pub mod tree;

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
