//! One file that image bytes come from.
//!
//! Owns [`Source`]: a regular file of a length that was asked once. Every read names what it reads, lies within that
//! length, and is whole or an error; bytes that went missing since are corruption, never zeros.

use std::{fs::File, io, path::Path};

use super::fault::Fault;
use crate::{
    error::{Error, Result},
    exec::asynchronous::Located,
    image::file::ImageFile,
    units::{ByteRange, to_usize},
};

#[derive(Debug)]
pub struct Source(ImageFile);

impl Source {
    /// `file` must be a regular file; `path` is what errors call it.
    pub fn new(file: File, path: &Path) -> Result<Source> {
        Ok(Source(ImageFile::new(file, path)?))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The file itself, for whoever hashes or looks at it.
    pub fn file(&self) -> &File {
        self.0.file()
    }

    /// See [`ImageFile::locate`].
    pub fn locate(&self, range: ByteRange, offset: u64, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        self.0.locate(range, offset, found);
    }

    pub fn read_ahead(&self, range: ByteRange) {
        self.0.read_ahead(range);
    }

    /// Length of the file when it was opened.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether the file holds all of `len` bytes at `at`.
    pub fn holds(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// Fill `buffer` from `at`; `what` names it in errors.
    pub fn read(&self, buffer: &mut [u8], at: u64, what: &'static str) -> Result<()> {
        match self.0.read_exact_at(buffer, at) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(Fault::truncated(what, self.len().max(at)).of(self.path()))
            }
            Err(e) => Err(Error::io("read", self.path(), e)),
        }
    }

    /// The `len` bytes at `at`. Nothing is allocated for what the file does not have.
    pub fn bytes(&self, at: u64, len: u64, what: &'static str) -> Result<Vec<u8>> {
        if !self.holds(at, len) {
            return Err(Fault::truncated(what, self.len().max(at)).of(self.path()));
        }
        let mut bytes = vec![0; to_usize(len)];
        self.read(&mut bytes, at, what)?;
        Ok(bytes)
    }

    /// Up to `len` bytes at `at`: what the file has of them.
    pub fn bytes_up_to(&self, at: u64, len: u64, what: &'static str) -> Result<Vec<u8>> {
        self.bytes(at.min(self.len()), len.min(self.len().saturating_sub(at)), what)
    }
}
