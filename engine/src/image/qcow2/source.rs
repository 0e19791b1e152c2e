//! One file that image bytes come from.
//!
//! Owns [`Source`]: a regular file of a length that was asked once. Every read names what it reads, lies within that
//! length, and is whole or an error; bytes that went missing since are corruption, never zeros.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::fault::Fault;
use crate::{
    error::{Error, Result},
    units::to_usize,
};

#[derive(Debug)]
pub struct Source {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Source {
    /// `file` must be a regular file; `path` is what errors call it.
    pub fn new(file: File, path: &Path) -> Result<Source> {
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        if !meta.is_file() {
            let what = "anything but a regular file".into();
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        Ok(Source { file, path: path.to_owned(), len: meta.len() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, for executors that read mapped data on their own.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length of the file when it was opened.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file holds all of `len` bytes at `at`.
    pub fn holds(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Fill `buffer` from `at`; `what` names it in errors.
    pub fn read(&self, buffer: &mut [u8], at: u64, what: &'static str) -> Result<()> {
        match self.file.read_exact_at(buffer, at) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(Fault::truncated(what, self.len.max(at)).of(&self.path))
            }
            Err(e) => Err(Error::io("read", &self.path, e)),
        }
    }

    /// The `len` bytes at `at`. Nothing is allocated for what the file does not have.
    pub fn bytes(&self, at: u64, len: u64, what: &'static str) -> Result<Vec<u8>> {
        if !self.holds(at, len) {
            return Err(Fault::truncated(what, self.len.max(at)).of(&self.path));
        }
        let mut bytes = vec![0; to_usize(len)];
        self.read(&mut bytes, at, what)?;
        Ok(bytes)
    }

    /// Up to `len` bytes at `at`: what the file has of them.
    pub fn bytes_up_to(&self, at: u64, len: u64, what: &'static str) -> Result<Vec<u8>> {
        self.bytes(at.min(self.len), len.min(self.len.saturating_sub(at)), what)
    }
}
