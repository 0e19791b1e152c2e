//! SHA-512 of files that are open already, as they are.
//!
//! For files that others made and that are read beside what arrives: what they are digested for is to say later which
//! they were. Holes are hashed, not read: a chain of layers has as many bytes of zeros as it has layers times the size
//! of the volume, so that hashing is most of the work, and the files are shared out among the cores.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
    path::Path,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use bedplate_engine::{error::Error as Storage, units::VOLUME_SIZE_MAX};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{
    checksum::Hasher,
    failure::{Failure, Result},
    progress::{Meter, Phase},
    stop::Stop,
};
use crate::directory::next_data;

/// Bytes of one read.
const READ_LEN: usize = 1 << 20;
/// Zeros that are hashed between two looks at whether the job is to end.
const ZEROS_LEN_MAX: u64 = 64 << 20;
/// Files that are read at once.
const THREADS_MAX: usize = 8;

/// A file, and how much of it is digested.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub file: &'a File,
    /// For messages.
    pub path: &'a Path,
    pub size_bytes: u64,
}

impl<'a> Part<'a> {
    /// All of a regular file or block device, unless it is longer than anything that can be of use here: a hole of
    /// exabytes takes nobody any space, and whoever digests it years.
    pub fn whole(file: &'a File, path: &'a Path) -> Result<Part<'a>> {
        let meta = file.metadata().map_err(|e| Storage::io("stat", path, e))?;
        let size_bytes = if meta.file_type().is_block_device() {
            let mut file = file;
            file.seek(SeekFrom::End(0)).map_err(|e| Storage::io("seek", path, e))?
        } else {
            meta.len()
        };
        if size_bytes > VOLUME_SIZE_MAX {
            let what =
                format!("{} has {size_bytes} bytes: at most {VOLUME_SIZE_MAX} are read", path.display());
            return Err(Failure::Unsupported(what));
        }
        Ok(Part { file, path, size_bytes })
    }
}

/// The sum of each file, in their order, in lower-case hexadecimal digits. Whether they changed meanwhile is for the caller
/// to find out.
pub fn digest(files: &[Part<'_>], meter: &Meter, stop: &Stop) -> Result<Vec<String>> {
    meter.begin(Phase::Hashing, 0, Some(files.iter().map(|file| file.size_bytes).sum()));
    let fault = OnceLock::new();
    let advance = |len: u64| {
        meter.advance_by(len);
        // What one thread has met ends the others, too.
        fault.get().map_or_else(|| stop.check(), |fault: &Failure| Err(fault.clone()))
    };
    let next = AtomicUsize::new(0);
    let sums = Mutex::new(vec![None; files.len()]);
    let work = || -> Result<()> {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(file) = files.get(index) else { return Ok(()) };
            let sum = sum_of(*file, &advance).inspect_err(|failure| {
                let _ = fault.set(failure.clone());
            })?;
            if let Some(place) = sums.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
                *place = Some(sum);
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(files.len());
    thread::scope(|scope| {
        // With fewer threads it takes longer, and that is all.
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let threads: Vec<_> = (1..threads).map_while(spawn).collect();
        let own = work();
        let others = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(ended_early())));
        others.fold(own, Result::and)
    })?;
    let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    sums.into_iter().collect::<Option<Vec<_>>>().ok_or_else(ended_early)
}

fn ended_early() -> Failure {
    Failure::Source("a hashing thread ended unexpectedly".to_owned())
}

/// `advance` is told how many bytes more are through, and says when to end.
fn sum_of(file: Part<'_>, advance: &impl Fn(u64) -> Result<()>) -> Result<String> {
    let Part { file, path, size_bytes } = file;
    // Advice only.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
    let mut hasher = Hasher::new(None);
    let mut buffer = vec![0; READ_LEN];
    let mut at = 0;
    while at < size_bytes {
        let (data, end) = next_data(file, at, size_bytes).map_err(|e| Storage::io("seek", path, e.into()))?;
        while at < data {
            let zeros = (data - at).min(ZEROS_LEN_MAX);
            hasher.zeros(zeros);
            at += zeros;
            advance(zeros)?;
        }
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(READ_LEN).min(READ_LEN);
            let part = buffer.get_mut(..len).unwrap_or_default();
            file.read_exact_at(part, at).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => Failure::Changed(path.to_owned()),
                _ => Storage::io("read", path, e).into(),
            })?;
            hasher.update(part);
            at += len as u64;
            advance(len as u64)?;
        }
    }
    Ok(hasher.finish().sha512)
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;
    use crate::prep::checksum::hex;

    fn stop() -> Stop {
        Stop::after(Duration::from_secs(60))
    }

    #[test]
    fn each_file_has_the_sum_of_its_bytes_and_holes_in_the_order_of_the_list() {
        use sha2::{Digest, Sha512};
        let dir = tempfile::tempdir().unwrap();
        let contents: Vec<Vec<u8>> = (0..5_u8)
            .map(|n| {
                let mut content = vec![0; usize::from(n) * 700_001];
                content.iter_mut().skip(300_000).take(5000).for_each(|byte| *byte = n);
                content
            })
            .collect();
        let files: Vec<(File, PathBuf)> = contents
            .iter()
            .enumerate()
            .map(|(n, content)| {
                let path = dir.path().join(n.to_string());
                let file = File::create_new(&path).unwrap();
                file.set_len(content.len() as u64).unwrap();
                bedplate_engine::sparse::write_sparse(&file, content, 0).unwrap();
                (File::open(&path).unwrap(), path)
            })
            .collect();
        let sized: Vec<_> = files.iter().map(|(file, path)| Part::whole(file, path).unwrap()).collect();
        let meter = Meter::default();
        let sums = digest(&sized, &meter, &stop()).unwrap();
        let expected: Vec<String> = contents.iter().map(|content| hex(&Sha512::digest(content))).collect();
        assert_eq!(sums, expected);
        assert_eq!(meter.progress().done_bytes, meter.progress().total_bytes.unwrap());
    }

    #[test]
    fn a_file_that_is_longer_than_any_volume_is_refused() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create("long", flags).unwrap());
        file.set_len(VOLUME_SIZE_MAX).unwrap();
        assert!(Part::whole(&file, Path::new("x")).is_ok());
        file.set_len(VOLUME_SIZE_MAX + 1).unwrap();
        assert!(matches!(Part::whole(&file, Path::new("x")), Err(Failure::Unsupported(_))));
    }

    #[test]
    fn a_hole_of_any_length_is_left_when_the_job_ends() {
        let path = Path::new("x");
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 43).unwrap();
        let cancelled = stop();
        cancelled.cancel();
        let whole = Part::whole(&file, path).unwrap();
        assert!(matches!(digest(&[whole], &Meter::default(), &cancelled), Err(Failure::Cancelled)));
    }
}
