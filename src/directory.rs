//! A directory that is held by its descriptor, and names opened beneath it.
//!
//! Everything that images write goes through here, so that a disk which is unmounted under us fails instead of filling
//! its empty mount point. Names are single components and links are not followed. Owns the one way in which a small
//! file is replaced: write new, fsync, rename, fsync the directory; and the one place where a file is asked for its
//! holes. Paths are kept for messages only.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bedplate_engine::error::{Corruption, Error, Result};
use bedplate_engine::units::ByteOffset;
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, open, openat, renameat},
    sys::{
        stat::{Mode, mkdirat},
        statvfs::fstatvfs,
    },
    unistd::{UnlinkatFlags, Whence, lseek, unlinkat},
};

/// Most entries of one directory that are looked at.
pub const DIRECTORY_ENTRIES_MAX: usize = 65_536;
/// Longest file that [`Directory::read_small`] reads.
pub const SMALL_FILE_LEN_MAX: u64 = 1 << 20;

const DIRECTORY_FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
const FILE_FLAGS: OFlag = OFlag::O_NOFOLLOW.union(OFlag::O_CLOEXEC);

/// How [`Directory::open_file`] opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    Read,
    /// Past the page cache, where the file system can.
    ReadDirect,
    Write,
    /// Make it when it is missing (mode 0600).
    CreateWrite,
}

/// What a removal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    File,
    /// There was no such name, and so nothing has to be made durable.
    Nothing,
}

/// What [`Directory::space`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free_bytes: u64,
    pub size_bytes: u64,
}

/// A held directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    pub fn open(path: &Path) -> Result<Directory> {
        let fd = open(path, DIRECTORY_FLAGS, Mode::empty()).map_err(|e| failed("open", path, e))?;
        Ok(Directory { fd, path: path.to_owned() })
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open_dir(&self, name: &str) -> Result<Directory> {
        let path = self.path.join(name);
        let fd = openat(&self.fd, name, DIRECTORY_FLAGS | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(|e| failed("open", &path, e))?;
        Ok(Directory { fd, path })
    }

    /// Make a directory; the caller syncs this one once what is in it is durable.
    pub fn create_dir(&self, name: &str) -> Result<Directory> {
        mkdirat(&self.fd, name, Mode::from_bits_truncate(0o755))
            .map_err(|e| failed("create", &self.path.join(name), e))?;
        self.open_dir(name)
    }

    /// Open a directory, making it durably when it is missing.
    pub fn ensure_dir(&self, name: &str) -> Result<Directory> {
        match self.open_dir(name) {
            Err(e) if e.is_not_found() => {
                let made = self.create_dir(name)?;
                self.sync()?;
                Ok(made)
            }
            other => other,
        }
    }

    pub fn open_file(&self, name: &str, how: Open) -> Result<File> {
        let flags = match how {
            Open::Read => OFlag::O_RDONLY,
            Open::ReadDirect => OFlag::O_RDONLY | OFlag::O_DIRECT,
            Open::Write => OFlag::O_RDWR,
            Open::CreateWrite => OFlag::O_RDWR | OFlag::O_CREAT,
        };
        openat(&self.fd, name, flags | FILE_FLAGS, Mode::from_bits_truncate(0o600))
            .map(File::from)
            .map_err(|e| failed("open", &self.path.join(name), e))
    }

    /// Whether the name is there.
    pub fn exists(&self, name: &str) -> Result<bool> {
        match openat(&self.fd, name, OFlag::O_PATH | FILE_FLAGS, Mode::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(failed("stat", &self.path.join(name), e)),
        }
    }

    /// The names in here that are valid UTF-8, sorted; at most [`DIRECTORY_ENTRIES_MAX`].
    pub fn names(&self) -> Result<Vec<String>> {
        let mut dir = Dir::openat(&self.fd, ".", DIRECTORY_FLAGS, Mode::empty())
            .map_err(|e| failed("list", &self.path, e))?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(|e| failed("list", &self.path, e))?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(_) if names.len() == DIRECTORY_ENTRIES_MAX => {
                    return Err(Error::Busy { limit: "DIRECTORY_ENTRIES_MAX" });
                }
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort();
        Ok(names)
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        renameat(&self.fd, from, &self.fd, to).map_err(|e| failed("rename", &self.path.join(from), e))
    }

    /// Remove a file; that it is not there is fine.
    pub fn remove_file(&self, name: &str) -> Result<Removed> {
        self.remove(name, UnlinkatFlags::NoRemoveDir)
    }

    /// Remove an empty directory; that it is not there is fine.
    pub fn remove_dir(&self, name: &str) -> Result<()> {
        self.remove(name, UnlinkatFlags::RemoveDir).map(drop)
    }

    fn remove(&self, name: &str, kind: UnlinkatFlags) -> Result<Removed> {
        match unlinkat(&self.fd, name, kind) {
            Ok(()) => Ok(Removed::File),
            Err(Errno::ENOENT) => Ok(Removed::Nothing),
            Err(e) => Err(failed("remove", &self.path.join(name), e)),
        }
    }

    /// Whether a file in here can be opened past the page cache. Where that cannot be found out, it is hoped for.
    pub fn takes_direct_reads(&self) -> bool {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        !matches!(openat(&self.fd, ".", flags, Mode::from_bits_truncate(0o600)), Err(Errno::EINVAL))
    }

    /// Make the names in here durable.
    pub fn sync(&self) -> Result<()> {
        nix::unistd::fsync(&self.fd).map_err(|e| failed("sync", &self.path, e))
    }

    /// Replace a small file: a crash leaves the old content or the new.
    pub fn replace(&self, name: &str, content: &[u8]) -> Result<()> {
        let new = format!("{name}.new");
        let path = self.path.join(&new);
        // What an earlier crash left under this name is not written into.
        self.remove_file(&new)?;
        let mut file = self.open_file(&new, Open::CreateWrite)?;
        file.write_all(content).map_err(|e| Error::io("write", &path, e))?;
        file.sync_all().map_err(|e| Error::io("sync", &path, e))?;
        self.rename(&new, name)?;
        self.sync()
    }

    /// The whole of a file of at most [`SMALL_FILE_LEN_MAX`] bytes.
    pub fn read_small(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path.join(name);
        let file = self.open_file(name, Open::Read)?;
        let mut content = Vec::new();
        file.take(SMALL_FILE_LEN_MAX + 1)
            .read_to_end(&mut content)
            .map_err(|e| Error::io("read", &path, e))?;
        if content.len() as u64 > SMALL_FILE_LEN_MAX {
            let what = Corruption::Record(format!("longer than {SMALL_FILE_LEN_MAX} bytes"));
            return Err(Error::Corrupt { path, what, at: ByteOffset(SMALL_FILE_LEN_MAX) });
        }
        Ok(content)
    }

    /// How large the file system is, and how much of it may still be written.
    pub fn space(&self) -> Result<Space> {
        let stat = fstatvfs(&self.fd).map_err(|e| failed("statvfs", &self.path, e))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        Ok(Space { free_bytes: bytes(stat.blocks_available()), size_bytes: bytes(stat.blocks()) })
    }

    /// Bytes that we may still write on this file system.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.space()?.free_bytes)
    }
}

/// The next run with data at or after `at`: its start and end, both `size` when there is none.
pub fn next_data(file: &File, at: u64, size: u64) -> nix::Result<(u64, u64)> {
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, at, whence).map(|at| u64::try_from(at).unwrap_or(size))
    };
    let start = match seek(at, Whence::SeekData) {
        Ok(start) => start.min(size),
        // Nothing but a hole up to the end.
        Err(Errno::ENXIO) => return Ok((size, size)),
        // Neither devices nor every file system know holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok((at, size)),
        Err(e) => return Err(e),
    };
    if start == size {
        return Ok((size, size));
    }
    let end = seek(start, Whence::SeekHole)?.min(size);
    // A file that shrinks under us must not make the caller go round for ever.
    if end <= start { Err(Errno::EIO) } else { Ok((start, end)) }
}

fn failed(op: &'static str, path: &Path, errno: Errno) -> Error {
    Error::io(op, path, errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_has_the_new_content_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let held = Directory::open(dir.path()).unwrap();
        held.replace("record", b"one").unwrap();
        std::fs::write(dir.path().join("record.new"), b"left by a crash, and longer").unwrap();
        held.replace("record", b"two").unwrap();
        assert_eq!(held.read_small("record").unwrap(), b"two");
        assert_eq!(held.names().unwrap(), ["record"]);
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("image")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("dir")).unwrap();
        let held = Directory::open(dir.path()).unwrap();
        assert!(held.open_file("image", Open::Read).is_err());
        assert!(held.open_dir("dir").is_err());
    }

    #[test]
    fn what_was_opened_stays_the_directory_when_its_path_leads_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::create_dir(&disk).unwrap();
        let held = Directory::open(&disk).unwrap();
        std::fs::rename(&disk, dir.path().join("unmounted")).unwrap();
        std::fs::create_dir(&disk).unwrap();
        held.replace("record", b"x").unwrap();
        assert!(!disk.join("record").exists());
        assert!(dir.path().join("unmounted/record").exists());
    }
}
