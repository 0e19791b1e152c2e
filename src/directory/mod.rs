//! A directory that is held by its descriptor, and names opened beneath it.
//!
//! Everything that images write goes through here, so that a disk which is unmounted under us fails instead of filling
//! its empty mount point. Names are single components and links are not followed. Owns the one way in which a small
//! file is replaced: write new, fsync, rename, fsync the directory; and (`file.rs`) the one place where a file is asked
//! for its holes. Paths are kept for messages only.
//!
//! For the crash lab there is a second kind ([`Directory::simulated`]), over the engine's trait of a storage: the same
//! steps, on a medium in memory that fails and forgets.

mod file;
mod simulated;

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    error::{Corruption, Error, Result},
    exec::storage::Storage,
    units::ByteOffset,
};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, open, openat, renameat},
    sys::{
        stat::{Mode, mkdirat},
        statvfs::fstatvfs,
    },
    unistd::{UnlinkatFlags, unlinkat},
};

pub use self::file::{HeldFile, allocated, next_data};
use self::simulated::SimulatedDirectory;

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
    kind: Kind,
    path: PathBuf,
}

#[derive(Debug)]
enum Kind {
    System(OwnedFd),
    Simulated(SimulatedDirectory),
}

impl Directory {
    pub fn open(path: &Path) -> Result<Directory> {
        let fd = open(path, DIRECTORY_FLAGS, Mode::empty()).map_err(|e| failed("open", path, e))?;
        Ok(Directory { kind: Kind::System(fd), path: path.to_owned() })
    }

    /// The root of a simulated machine's medium.
    pub fn simulated(storage: Arc<dyn Storage>) -> Directory {
        Directory::of(SimulatedDirectory::root(storage))
    }

    fn of(directory: SimulatedDirectory) -> Directory {
        Directory { path: directory.path(), kind: Kind::Simulated(directory) }
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open_dir(&self, name: &str) -> Result<Directory> {
        let fd = match &self.kind {
            Kind::System(fd) => fd,
            Kind::Simulated(dir) => return dir.open_dir(name).map(Directory::of),
        };
        let path = self.path.join(name);
        let fd = openat(fd, name, DIRECTORY_FLAGS | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(|e| failed("open", &path, e))?;
        Ok(Directory { kind: Kind::System(fd), path })
    }

    /// Make a directory; the caller syncs this one once what is in it is durable.
    pub fn create_dir(&self, name: &str) -> Result<Directory> {
        match &self.kind {
            Kind::System(fd) => mkdirat(fd, name, Mode::from_bits_truncate(0o755))
                .map_err(|e| failed("create", &self.path.join(name), e))?,
            Kind::Simulated(dir) => dir.create_dir(name)?,
        }
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

    pub fn open_file(&self, name: &str, how: Open) -> Result<HeldFile> {
        let fd = match &self.kind {
            Kind::System(fd) => fd,
            Kind::Simulated(dir) => return dir.open_file(name, how).map(HeldFile::simulated),
        };
        let flags = match how {
            Open::Read => OFlag::O_RDONLY,
            Open::ReadDirect => OFlag::O_RDONLY | OFlag::O_DIRECT,
            Open::Write => OFlag::O_RDWR,
            Open::CreateWrite => OFlag::O_RDWR | OFlag::O_CREAT,
        };
        let path = self.path.join(name);
        match openat(fd, name, flags | FILE_FLAGS, Mode::from_bits_truncate(0o600)) {
            Ok(fd) => Ok(HeldFile::new(File::from(fd), path)),
            Err(e) => Err(failed("open", &path, e)),
        }
    }

    /// The same for whoever needs a descriptor.
    pub fn open_system_file(&self, name: &str, how: Open) -> Result<File> {
        self.open_file(name, how)?.into_system()
    }

    /// Whether the name is there.
    pub fn exists(&self, name: &str) -> Result<bool> {
        let found = match &self.kind {
            Kind::System(fd) => {
                let found = openat(fd, name, OFlag::O_PATH | FILE_FLAGS, Mode::empty());
                found.map(drop).map_err(|e| failed("stat", &self.path.join(name), e))
            }
            Kind::Simulated(dir) => dir.open_file(name, Open::Read).map(drop),
        };
        match found {
            Ok(()) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The names in here that are valid UTF-8, sorted; at most [`DIRECTORY_ENTRIES_MAX`].
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = match &self.kind {
            Kind::System(fd) => self.list(fd)?,
            Kind::Simulated(dir) => dir.names()?,
        };
        names.sort();
        Ok(names)
    }

    fn list(&self, fd: &OwnedFd) -> Result<Vec<String>> {
        let mut dir = Dir::openat(fd, ".", DIRECTORY_FLAGS, Mode::empty())
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
        Ok(names)
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        match &self.kind {
            Kind::System(fd) => {
                renameat(fd, from, fd, to).map_err(|e| failed("rename", &self.path.join(from), e))
            }
            Kind::Simulated(dir) => dir.rename(from, to),
        }
    }

    /// Remove a file; that it is not there is fine.
    pub fn remove_file(&self, name: &str) -> Result<Removed> {
        removed(match &self.kind {
            Kind::System(fd) => self.unlink(fd, name, UnlinkatFlags::NoRemoveDir),
            Kind::Simulated(dir) => dir.remove_file(name),
        })
    }

    /// Remove an empty directory; that it is not there is fine.
    pub fn remove_dir(&self, name: &str) -> Result<()> {
        let result = match &self.kind {
            Kind::System(fd) => self.unlink(fd, name, UnlinkatFlags::RemoveDir),
            Kind::Simulated(dir) => dir.remove_dir(name),
        };
        removed(result).map(drop)
    }

    fn unlink(&self, fd: &OwnedFd, name: &str, kind: UnlinkatFlags) -> Result<()> {
        unlinkat(fd, name, kind).map_err(|e| failed("remove", &self.path.join(name), e))
    }

    /// Whether a file in here can be opened past the page cache. Where that cannot be found out, it is hoped for.
    pub fn takes_direct_reads(&self) -> bool {
        let Kind::System(fd) = &self.kind else { return false };
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        !matches!(openat(fd, ".", flags, Mode::from_bits_truncate(0o600)), Err(Errno::EINVAL))
    }

    /// Make the names in here durable.
    pub fn sync(&self) -> Result<()> {
        match &self.kind {
            Kind::System(fd) => nix::unistd::fsync(fd).map_err(|e| failed("sync", &self.path, e)),
            Kind::Simulated(dir) => dir.sync(),
        }
    }

    /// Replace a small file: a crash leaves the old content or the new.
    pub fn replace(&self, name: &str, content: &[u8]) -> Result<()> {
        let new = format!("{name}.new");
        // What an earlier crash left under this name is not written into.
        self.remove_file(&new)?;
        let file = self.open_file(&new, Open::CreateWrite)?;
        file.write_all_at(content, 0)?;
        file.sync_all()?;
        self.rename(&new, name)?;
        self.sync()
    }

    /// The whole of a file of at most [`SMALL_FILE_LEN_MAX`] bytes.
    pub fn read_small(&self, name: &str) -> Result<Vec<u8>> {
        let content = self.open_file(name, Open::Read)?.read_from_start(SMALL_FILE_LEN_MAX + 1)?;
        if content.len() as u64 > SMALL_FILE_LEN_MAX {
            let what = Corruption::Record(format!("longer than {SMALL_FILE_LEN_MAX} bytes"));
            return Err(Error::Corrupt {
                path: self.path.join(name),
                what,
                at: ByteOffset(SMALL_FILE_LEN_MAX),
            });
        }
        Ok(content)
    }

    /// How large the file system is, and how much of it may still be written.
    pub fn space(&self) -> Result<Space> {
        let fd = match &self.kind {
            Kind::System(fd) => fd,
            Kind::Simulated(dir) => return dir.space(),
        };
        let stat = fstatvfs(fd).map_err(|e| failed("statvfs", &self.path, e))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        Ok(Space { free_bytes: bytes(stat.blocks_available()), size_bytes: bytes(stat.blocks()) })
    }

    /// Bytes that we may still write on this file system.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.space()?.free_bytes)
    }
}

fn removed(result: Result<()>) -> Result<Removed> {
    match result {
        Ok(()) => Ok(Removed::File),
        Err(e) if e.is_not_found() => Ok(Removed::Nothing),
        Err(e) => Err(e),
    }
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
