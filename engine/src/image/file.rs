//! The open file of an image, read through the page cache or past it.
//!
//! Owns [`ImageFile`]. Whoever opens the file decides: with `O_DIRECT` nothing of it enters the page cache, and what
//! does not lie as the device wants it goes through a bounce buffer. Reads are whole or an error; the length of the
//! file may be anything, so that the last read of a file past the cache may be shorter than what it asks for.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use rustix::io::ReadWriteFlags;

use crate::{
    buffer::{BUFFER_ALIGN, is_aligned, with_scratch},
    error::{Error, Result},
    exec::asynchronous::{Cache, Descriptor, Located},
    units::{ByteRange, to_usize},
};

/// Every device takes reads past the cache at multiples of this. It could be 512 on many; then a page is still what is
/// read cheapest.
pub const DIRECT_ALIGN: u64 = BUFFER_ALIGN as u64;

/// Bytes that the kernel is asked for at once; of more it takes as much as a request of the device has.
const AHEAD_STEP: u64 = 512 << 10;

/// Whether bytes of an image stay in memory after they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageCache {
    /// One copy for all who read the file.
    Through,
    /// None: the file was opened with `O_DIRECT`.
    Past,
}

/// A regular file and what errors call it.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    cache: PageCache,
    /// The same, for whoever reads it without our calls.
    travel: Cache,
    len: u64,
}

impl ImageFile {
    /// Refuses what is not a regular file.
    pub fn new(file: File, path: &Path) -> Result<ImageFile> {
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        if !meta.is_file() {
            let what = "anything but a regular file".into();
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        let flags =
            fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|e| Error::io("look at", path, e.into()))?;
        let (cache, travel) = match OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT) {
            true => (PageCache::Past, Cache::Direct { align: DIRECT_ALIGN }),
            false => (PageCache::Through, Cache::of(&file)),
        };
        Ok(ImageFile { file, path: path.to_owned(), cache, travel, len: meta.size() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To ask the system about it; to read it is for [`ImageFile::read_exact_at`] and who goes by [`ImageFile::locate`].
    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn cache(&self) -> PageCache {
        self.cache
    }

    /// Its length when it was opened.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fill `buffer` from `at`; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self.cache {
            PageCache::Through => self.file.read_exact_at(buffer, at),
            PageCache::Past if lies_well(buffer, at) => self.read_at_least(buffer, at, buffer.len()),
            PageCache::Past => with_scratch(|scratch| {
                let mut done = 0;
                while done < buffer.len() {
                    let from = at + done as u64;
                    let start = from / DIRECT_ALIGN * DIRECT_ALIGN;
                    let skip = to_usize(from - start);
                    let take = (buffer.len() - done).min(scratch.len() - skip);
                    let whole = (skip + take).next_multiple_of(BUFFER_ALIGN);
                    self.read_at_least(&mut scratch[..whole], start, skip + take)?;
                    buffer[done..done + take].copy_from_slice(&scratch[skip..skip + take]);
                    done += take;
                }
                Ok(())
            }),
        }
    }

    /// Where the bytes of `range` are, which are the file's from `at` on, for an executor that reads them itself.
    pub fn locate(&self, range: ByteRange, at: u64, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        let file = Descriptor { fd: self.file.as_fd(), cache: self.travel };
        match self.cache {
            PageCache::Through => {
                found(range, Located::File { file, offset: at });
            }
            PageCache::Past => {
                // The last block, which the end of the file may cut, is read by who knows that.
                let whole = (self.len / DIRECT_ALIGN * DIRECT_ALIGN).saturating_sub(at).min(range.len.0);
                let start = range.start.0;
                if whole > 0 {
                    found(ByteRange::new(start, whole), Located::File { file, offset: at });
                }
                if whole < range.len.0 {
                    found(ByteRange::new(start + whole, range.len.0 - whole), Located::Waits);
                }
            }
        }
    }

    /// Have these bytes read into the page cache and do not wait for them. A hint: whoever reads finds out what is wrong.
    pub fn read_ahead(&self, range: ByteRange) {
        if self.travel != Cache::Buffered {
            return;
        }
        let (mut at, end) = (range.start.0, range.end().0.min(self.len));
        while at < end {
            let len = AHEAD_STEP.min(end - at);
            if !self.is_resident(at + len - 1)
                && let (Ok(at), Ok(len)) = (i64::try_from(at), i64::try_from(len))
            {
                let _ = posix_fadvise(self.file.as_fd(), at, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
            }
            at += len;
        }
    }

    /// Whether this byte is in the page cache, as far as that is told at once: asking for what is there costs the kernel
    /// a look at each page.
    fn is_resident(&self, at: u64) -> bool {
        let mut byte = [0];
        let buffers = &mut [IoSliceMut::new(&mut byte)];
        rustix::io::preadv2(&self.file, buffers, at, ReadWriteFlags::NOWAIT).is_ok_and(|read| read == 1)
    }

    /// Read at least `needed` bytes into `buffer`, which may reach past the end of the file.
    fn read_at_least(&self, buffer: &mut [u8], at: u64, needed: usize) -> io::Result<()> {
        let mut done = 0;
        while done < needed {
            match self.file.read_at(&mut buffer[done..], at + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    done += len;
                    // Only the end of a file cuts such a read within a block; nothing can be asked for behind that.
                    if done < needed && !done.is_multiple_of(BUFFER_ALIGN) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn lies_well(buffer: &[u8], at: u64) -> bool {
    at.is_multiple_of(DIRECT_ALIGN)
        && buffer.len().is_multiple_of(BUFFER_ALIGN)
        && is_aligned(buffer, BUFFER_ALIGN)
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt};

    use super::*;

    #[test]
    fn past_the_cache_every_offset_and_length_reads_the_same_up_to_the_last_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let content: Vec<u8> = (0..(1u32 << 20) + 5000).map(|n| (n % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let direct = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(&path).unwrap();
        let file = ImageFile::new(direct, &path).unwrap();
        assert_eq!(file.cache(), PageCache::Past);
        let end = content.len();
        for (at, len) in
            [(0, 4096), (1, 1), (4095, 2), (777, 100_000), (0, end), (end - 1, 1), (end - 5000, 5000)]
        {
            let mut buffer = vec![0; len];
            file.read_exact_at(&mut buffer, at as u64).unwrap();
            assert!(buffer == content[at..at + len], "{len} bytes at {at}");
        }
        let mut aligned = crate::buffer::AlignedBuffer::new(8192);
        file.read_exact_at(&mut aligned[..4096], 4096).unwrap();
        assert!(aligned[..4096] == content[4096..8192]);
        let cut = file.read_exact_at(&mut aligned, end as u64 / 4096 * 4096).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        let past = file.read_exact_at(&mut [0; 2], end as u64 - 1).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }
}
