//! A real disk: a directory on a local file system.
//!
//! Held by a directory descriptor; every name is opened beneath it without following links, so that an unmounted
//! disk's empty mount point is never written to. Layer data is opened past the page cache (`O_DIRECT`) where the file
//! system can; bytes that do not lie as the device wants them go through a bounce buffer.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{
        FallocateFlags, Flock, OFlag, OpenHow, PosixFadviseAdvice, ResolveFlag, fallocate, openat2,
        posix_fadvise,
    },
    sys::{
        stat::{Mode, major, minor},
        statvfs::fstatvfs,
    },
    unistd::{UnlinkatFlags, Whence, lseek64, unlinkat},
};

use super::{EntryKind, Open, Storage, StorageFile};
use crate::{
    buffer::{is_aligned, with_scratch},
    error::{Error, Result},
    exec::asynchronous::{Cache, Descriptor},
    units::{ByteRange, SECTOR_SIZE, to_usize},
};

/// A directory of a local file system.
#[derive(Debug)]
pub struct FileStorage {
    root: OwnedFd,
    path: PathBuf,
    /// Held as long as anything can write: every writer holds its storage (invariant 11).
    _lock: Option<Flock<File>>,
}

impl FileStorage {
    /// Hold the directory `path`, which must exist.
    pub fn open(path: &Path) -> Result<FileStorage> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let root =
            nix::fcntl::open(path, flags, Mode::empty()).map_err(|e| Error::io("open", path, e.into()))?;
        Ok(FileStorage { root, path: path.to_owned(), _lock: None })
    }

    /// Keep `lock` until nobody holds this storage any more.
    #[must_use]
    pub fn holding(self, lock: Flock<File>) -> FileStorage {
        FileStorage { _lock: Some(lock), ..self }
    }

    fn open_beneath(&self, path: &str, flags: OFlag) -> Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        let mode =
            if flags.contains(OFlag::O_CREAT) { Mode::from_bits_truncate(0o600) } else { Mode::empty() };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        loop {
            match openat2(&self.root, path, how) {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                other => return other.map_err(|e| self.error("open", path, e)),
            }
        }
    }

    fn error(&self, op: &'static str, path: &str, errno: Errno) -> Error {
        Error::io(op, self.full_path(path), errno.into())
    }

    /// The directory that holds `path`, and its name there.
    fn parent<'a>(&self, path: &'a str) -> Result<(OwnedFd, &'a str)> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.open_beneath(parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?, name))
    }
}

impl FileStorage {
    /// Sync a directory and those in it, `depth` levels down.
    fn sync_dirs(&self, path: &str, depth: usize) -> Result<()> {
        self.sync_dir(path)?;
        if depth == 0 {
            return Ok(());
        }
        for (name, kind) in self.list(path)? {
            if kind == EntryKind::Directory {
                let below = if path.is_empty() { name } else { format!("{path}/{name}") };
                self.sync_dirs(&below, depth - 1)?;
            }
        }
        Ok(())
    }

    fn kind_of(&self, path: &str) -> Result<EntryKind> {
        let fd = self.open_beneath(path.trim_start_matches('/'), OFlag::O_PATH)?;
        let meta = File::from(fd).metadata().map_err(|e| Error::io("stat", self.full_path(path), e))?;
        Ok(match (meta.is_dir(), meta.is_file()) {
            (true, _) => EntryKind::Directory,
            (false, true) => EntryKind::File,
            (false, false) => EntryKind::Other,
        })
    }
}

impl Storage for FileStorage {
    fn full_path(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.path.clone() } else { self.path.join(path) }
    }

    fn open(&self, path: &str, how: Open) -> Result<Arc<dyn StorageFile>> {
        let flags = match how {
            Open::Read => OFlag::O_RDONLY,
            Open::ReadWrite | Open::Direct => OFlag::O_RDWR,
            Open::Create | Open::CreateDirect => OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL,
        };
        let (fd, direct) = match how {
            Open::Read | Open::ReadWrite | Open::Create => (self.open_beneath(path, flags)?, false),
            Open::Direct | Open::CreateDirect => match self.open_beneath(path, flags | OFlag::O_DIRECT) {
                Ok(fd) => (fd, true),
                Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::EINVAL as i32) => {
                    // Not on this file system; the name may have been made all the same.
                    (self.open_beneath(path, OFlag::O_RDWR | (flags & OFlag::O_CREAT))?, false)
                }
                Err(error) => return Err(error),
            },
        };
        let file = File::from(fd);
        let path = self.full_path(path);
        let cache = match Cache::of(&file) {
            Cache::Buffered if direct => Cache::Direct { align: sector_size(&file) },
            cache => cache,
        };
        Ok(Arc::new(DiskFile { file, path, cache }))
    }

    fn create_dir(&self, path: &str) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        nix::sys::stat::mkdirat(&parent, name, Mode::from_bits_truncate(0o700))
            .map_err(|e| self.error("create directory", path, e))
    }

    fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>> {
        let fd = self.open_beneath(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        let mut dir = Dir::from_fd(fd).map_err(|e| self.error("list", path, e))?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(|e| self.error("list", path, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                Some(Type::File) => EntryKind::File,
                Some(Type::Directory) => EntryKind::Directory,
                Some(_) => EntryKind::Other,
                // Some file systems keep no types in their directories.
                None => self.kind_of(&format!("{path}/{name}"))?,
            };
            names.push((name, kind));
        }
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from_dir, from_name) = self.parent(from)?;
        let (to_dir, to_name) = self.parent(to)?;
        nix::fcntl::renameat(&from_dir, from_name, &to_dir, to_name)
            .map_err(|e| self.error("rename", from, e))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir).map_err(|e| self.error("remove", path, e))
    }

    fn remove_dir(&self, path: &str) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        unlinkat(&parent, name, UnlinkatFlags::RemoveDir).map_err(|e| self.error("remove", path, e))
    }

    fn sync_dir(&self, path: &str) -> Result<()> {
        let fd = self.open_beneath(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        nix::unistd::fsync(&fd).map_err(|e| self.error("sync", path, e))
    }

    /// One call for the whole file system, rather than one and a flush of the device for each directory. It also fails
    /// for bytes of a file that the medium does not take, which is that file's fault alone: names are then synced by
    /// directory.
    fn sync_names(&self) -> Result<()> {
        let Err(errno) = nix::unistd::syncfs(&self.root) else { return Ok(()) };
        tracing::warn!(disk = %self.path.display(), %errno, "the file system does not sync as a whole");
        // `volumes/UUID` and `layers/UUID`.
        self.sync_dirs("", 2)
    }

    fn allocate(&self, path: &str, len: u64) -> Result<()> {
        let fd = self.open_beneath(path, OFlag::O_RDWR | OFlag::O_CREAT)?;
        let len = i64::try_from(len).map_err(|_| Error::Invalid(format!("{len} bytes are too many")))?;
        nix::unistd::ftruncate(&fd, 0).map_err(|e| self.error("truncate", path, e))?;
        if len == 0 {
            return Ok(());
        }
        match fallocate(&fd, FallocateFlags::empty(), 0, len) {
            // A file system that cannot reserve has no reserve; nothing else depends on it.
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(errno) => {
                // Do not hold on to a part of a full disk.
                nix::unistd::ftruncate(&fd, 0).map_err(|e| self.error("truncate", path, e))?;
                Err(self.error("allocate", path, errno))
            }
        }
    }

    fn free_bytes(&self) -> Result<u64> {
        let stat = fstatvfs(&self.root).map_err(|e| self.error("statfs", "", e))?;
        Ok(stat.blocks_available() * stat.fragment_size())
    }

    fn total_bytes(&self) -> Result<u64> {
        let stat = fstatvfs(&self.root).map_err(|e| self.error("statfs", "", e))?;
        Ok(stat.blocks() * stat.fragment_size())
    }
}

#[derive(Debug)]
struct DiskFile {
    file: File,
    path: PathBuf,
    cache: Cache,
}

/// The logical sector size of the block device that the file lies on, or 4096 where the system does not say (file
/// systems over several devices). Trying it out tells nothing: reads of holes and past the end are not checked.
fn sector_size(file: &File) -> u64 {
    let size = file.metadata().ok().and_then(|meta| {
        let device = meta.dev();
        let node = format!("/sys/dev/block/{}:{}", major(device), minor(device));
        // A partition's queue is its disk's.
        let of_disk = std::fs::read_to_string(format!("{node}/queue/logical_block_size"));
        let text =
            of_disk.or_else(|_| std::fs::read_to_string(format!("{node}/../queue/logical_block_size")));
        text.ok()?.trim().parse::<u64>().ok()
    });
    size.filter(|size| *size == SECTOR_SIZE).unwrap_or(4096)
}

impl DiskFile {
    fn error(&self, op: &'static str, source: io::Error) -> Error {
        Error::io(op, &self.path, source)
    }

    fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| self.error("read", e))
    }

    fn write_all(&self, data: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(data, offset).map_err(|e| self.error("write", e))
    }
}

impl StorageFile for DiskFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn os_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn len(&self) -> Result<u64> {
        self.file.metadata().map(|meta| meta.len()).map_err(|e| self.error("stat", e))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let Cache::Direct { align } = self.cache else { return self.read_exact(buffer, offset) };
        let len = buffer.len() as u64;
        if offset.is_multiple_of(align) && len.is_multiple_of(align) && is_aligned(buffer, to_usize(align)) {
            return self.read_exact(buffer, offset);
        }
        with_scratch(|scratch| {
            let mut done = 0;
            while done < buffer.len() {
                let at = offset + done as u64;
                let start = at / align * align;
                let skip = to_usize(at - start);
                let take = (buffer.len() - done).min(scratch.len() - skip);
                let whole = (skip + take).next_multiple_of(to_usize(align));
                self.read_exact(&mut scratch[..whole], start)?;
                buffer[done..done + take].copy_from_slice(&scratch[skip..skip + take]);
                done += take;
            }
            Ok(())
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let Cache::Direct { align } = self.cache else { return self.write_all(data, offset) };
        if is_aligned(data, to_usize(align)) {
            return self.write_all(data, offset);
        }
        with_scratch(|scratch| {
            for (chunk, n) in data.chunks(scratch.len()).zip(0u64..) {
                scratch[..chunk.len()].copy_from_slice(chunk);
                self.write_all(&scratch[..chunk.len()], offset + n * scratch.len() as u64)?;
            }
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|e| self.error("set length", e))
    }

    fn punch(&self, range: ByteRange) -> Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, len) = (i64::try_from(range.start.0), i64::try_from(range.len.0));
        let (Ok(start), Ok(len)) = (start, len) else {
            return Err(Error::Invalid(format!("{range} is too large to punch")));
        };
        fallocate(&self.file, flags, start, len).map_err(|e| self.error("punch", e.into()))
    }

    fn sync(&self) -> Result<()> {
        // The standard library repeats an interrupted call; any other error is final.
        self.file.sync_data().map_err(|e| self.error("sync", e))
    }

    fn drop_cache(&self) -> Result<()> {
        posix_fadvise(self.file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|e| self.error("drop cache", e.into()))
    }

    fn read_ahead(&self) {
        // Whoever reads finds out what is wrong.
        let _ = posix_fadvise(self.file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    fn descriptor(&self) -> Option<Descriptor<'_>> {
        Some(Descriptor { fd: self.file.as_fd(), cache: self.cache })
    }

    fn write_align(&self) -> u64 {
        match self.cache {
            Cache::Buffered | Cache::Memory => SECTOR_SIZE,
            Cache::Direct { align } => align,
        }
    }

    fn allocated(&self) -> Result<u64> {
        self.file.metadata().map(|meta| meta.blocks() * 512).map_err(|e| self.error("stat", e))
    }

    fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let seek = |at: u64, whence| match lseek64(&self.file, i64::try_from(at).unwrap_or(i64::MAX), whence)
        {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(self.error("seek", errno.into())),
        };
        let mut found = Vec::new();
        let mut at = range.start.0;
        while at < range.end().0 {
            let Some(start) = seek(at, Whence::SeekData)?.filter(|start| *start < range.end().0) else {
                break;
            };
            let end = seek(start, Whence::SeekHole)?.unwrap_or(range.end().0).min(range.end().0);
            found.push(ByteRange::new(start, end - start));
            at = end;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_files_take_any_offset_and_length() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = FileStorage::open(dir.path()).expect("opens");
        let file = storage.open("data", Open::CreateDirect).expect("creates");
        file.set_len(1 << 20).expect("grows");
        let data: Vec<u8> = (0..8192u32).map(|n| (n % 251) as u8).collect();
        file.write_at(&data, 4096).expect("writes");
        let mut back = vec![0; 3000];
        file.read_at(&mut back, 4096 + 777).expect("reads");
        assert_eq!(back, data[777..3777]);
        assert!(file.read_at(&mut back, (1 << 20) - 100).is_err(), "past the end is an error, not zeros");
    }

    #[test]
    fn names_that_leave_the_disk_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = FileStorage::open(dir.path()).expect("opens");
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).expect("links");
        assert!(storage.open("../x", Open::Create).is_err());
        assert!(storage.open("link/passwd", Open::Read).is_err());
    }
}
