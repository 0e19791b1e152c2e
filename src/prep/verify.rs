//! Reading a file back from the medium and comparing its sum.
//!
//! The page cache may hold good bytes over a bad medium, so this reads past it: O_DIRECT where the file system can,
//! else the cache is dropped first and behind. Reading and hashing overlap in two threads. Holes are hashed, not read.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use bedplate_engine::{
    error::{Corruption, Error as Storage},
    units::ByteOffset,
};
use nix::{
    errno::Errno,
    fcntl::{PosixFadviseAdvice, posix_fadvise},
};

use super::{
    checksum::{Expected, Hasher, Sums},
    failure::{Failure, Result},
    pipeline::start,
    progress::{Meter, Phase},
    stop::Stop,
};
use crate::directory::{Directory, Open, next_data};

/// Bytes of one read.
const READ_LEN: usize = 1 << 20;
/// Alignment that satisfies O_DIRECT on every file system that has it.
const ALIGN: usize = 4096;
/// Zeros that travel as one piece: a hole may be longer than anybody wants to wait for.
const ZEROS_LEN_MAX: u64 = 64 << 20;
/// Pieces on their way to the hasher.
const PIECES_MAX: usize = 8;

/// Read the file `name`, which must have `size_bytes`, from the medium and return its sum.
/// `expected` decides which sums there are; comparing is the caller's.
pub fn verify(
    dir: &Directory,
    name: &str,
    size_bytes: u64,
    expected: Option<&Expected>,
    meter: &Meter,
    stop: &Stop,
) -> Result<Sums> {
    let path = dir.path().join(name);
    meter.begin(Phase::Verifying, 0, Some(size_bytes));
    let cached = dir.open_system_file(name, Open::Read)?;
    let len = cached.metadata().map_err(|e| Storage::io("stat", &path, e))?.len();
    if len != size_bytes {
        return Err(Failure::Corrupt(format!("{} has {len} bytes instead of {size_bytes}", path.display())));
    }
    // What is dirty goes to the medium first, or reading it from there would prove nothing.
    cached.sync_all().map_err(|e| Storage::io("sync", &path, e))?;
    let medium = Medium::open(dir, name, cached)?;
    let (to_hash, pieces) = sync_channel(PIECES_MAX);
    std::thread::scope(|scope| {
        let hashing = start(scope, "hash", move || hash(&pieces, Hasher::new(expected)))?;
        let read = read_all(&medium, &path, size_bytes, &to_hash, meter, stop);
        drop(to_hash);
        let hasher = hashing.join();
        read?;
        hasher
            .map(Hasher::finish)
            .map_err(|_| Failure::Source("the hashing thread ended unexpectedly".to_owned()))
    })
}

enum Piece {
    Data(Vec<u8>),
    Zeros(u64),
}

fn hash(pieces: &Receiver<Piece>, mut hasher: Hasher) -> Hasher {
    for piece in pieces {
        match piece {
            Piece::Data(bytes) => hasher.update(&bytes),
            Piece::Zeros(len) => hasher.zeros(len),
        }
    }
    hasher
}

fn read_all(
    medium: &Medium,
    path: &Path,
    size: u64,
    to_hash: &SyncSender<Piece>,
    meter: &Meter,
    stop: &Stop,
) -> Result<()> {
    let mut buffer = AlignedBuffer::new();
    let mut at = 0;
    while at < size {
        let (data, end) =
            next_data(medium.file(), at, size).map_err(|e| Storage::io("seek", path, e.into()))?;
        while at < data {
            stop.check()?;
            let zeros = (data - at).min(ZEROS_LEN_MAX);
            // The hasher ends only when this side hangs up.
            drop(to_hash.send(Piece::Zeros(zeros)));
            at += zeros;
            meter.advance_to(at);
        }
        while at < end {
            stop.check()?;
            let wanted = usize::try_from(end - at).unwrap_or(READ_LEN).min(READ_LEN);
            let bytes = medium.read(&mut buffer, at, wanted).map_err(|e| Storage::io("read", path, e))?;
            if bytes.is_empty() {
                let what = Corruption::Truncated("image");
                return Err(Storage::Corrupt { path: path.to_owned(), what, at: ByteOffset(at) }.into());
            }
            at += bytes.len() as u64;
            drop(to_hash.send(Piece::Data(bytes.to_vec())));
            meter.advance_to(at);
        }
    }
    meter.advance_to(size);
    Ok(())
}

/// A file that is read past the page cache.
enum Medium {
    Direct(File),
    /// The file system has no O_DIRECT: the cache is dropped ahead of every read.
    Dropping(File),
}

impl Medium {
    fn open(dir: &Directory, name: &str, cached: File) -> Result<Medium> {
        match dir.open_system_file(name, Open::ReadDirect) {
            Ok(direct) => Ok(Medium::Direct(direct)),
            Err(Storage::Io { source, .. }) if source.raw_os_error() == Some(Errno::EINVAL as i32) => {
                Ok(Medium::Dropping(cached))
            }
            Err(e) => Err(e.into()),
        }
    }

    fn file(&self) -> &File {
        match self {
            Medium::Direct(file) | Medium::Dropping(file) => file,
        }
    }

    /// Up to `wanted` bytes at `at`; fewer only at the end of the file. `at` is aligned: it is where the last read
    /// ended, or where data begins, which is a block of the file system.
    fn read<'b>(&self, buffer: &'b mut AlignedBuffer, at: u64, wanted: usize) -> std::io::Result<&'b [u8]> {
        let skip = usize::try_from(at % ALIGN as u64).unwrap_or(0);
        let start = at - skip as u64;
        let space = buffer.aligned((skip + wanted).next_multiple_of(ALIGN));
        if let Medium::Dropping(file) = self {
            let (offset, len) = (i64::try_from(start), i64::try_from(space.len()));
            if let (Ok(offset), Ok(len)) = (offset, len) {
                // Advice: where it is not taken, this is the best that can be done.
                let _ = posix_fadvise(file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            }
        }
        let mut filled = 0;
        while filled < skip + wanted {
            let rest = space.get_mut(filled..).unwrap_or_default();
            let got = match self.file().read_at(rest, start + filled as u64) {
                Ok(got) => got,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            filled += got;
            // The end of the file, where a direct read stops at an odd byte, after which none can follow.
            if got == 0 || !filled.is_multiple_of(ALIGN) {
                break;
            }
        }
        let end = filled.min(skip + wanted);
        Ok(space.get(skip.min(end)..end).unwrap_or_default())
    }
}

/// A buffer with an aligned part of at least [`READ_LEN`] and two blocks.
struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    fn new() -> AlignedBuffer {
        AlignedBuffer(vec![0; READ_LEN + 3 * ALIGN])
    }

    fn aligned(&mut self, len: usize) -> &mut [u8] {
        let skip = self.0.as_ptr().align_offset(ALIGN);
        self.0.get_mut(skip..skip + len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_hole_of_any_length_is_left_when_the_job_ends() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("x")).unwrap().set_len(4 * ZEROS_LEN_MAX).unwrap();
        let held = Directory::open(dir.path()).unwrap();
        let (meter, stop) = (Meter::default(), Stop::after(Duration::from_secs(60)));
        stop.cancel();
        let ended = verify(&held, "x", 4 * ZEROS_LEN_MAX, None, &meter, &stop);
        assert!(matches!(ended, Err(Failure::Cancelled)));
    }
}
