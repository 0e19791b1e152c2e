//! A medium that fails on request: a file whose reads, writes and syncs can be refused with EIO, by ranges, and mended
//! again. Put a loop device over it and a file system on that, and the errors come from where a disk's errors come from.
//!
//! A FUSE file system with one file in it, which this process serves; what it holds lies in another file.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use nix::fcntl::{FallocateFlags, fallocate};

const NAME: &str = "medium";
const FILE: INodeNo = INodeNo(2);
/// The kernel may remember what it was told.
const TTL: Duration = Duration::from_secs(3600);

/// What the medium refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reads that touch these bytes.
    Read(Range<u64>),
    /// Writes that touch these bytes.
    Write(Range<u64>),
    /// Whatever is asked.
    Everything,
}

/// What is asked of it.
enum Asked {
    Read(Range<u64>),
    Write(Range<u64>),
    Sync,
}

/// The medium; it is gone when it is dropped.
pub struct Medium {
    dir: PathBuf,
    faults: Arc<Mutex<Vec<Fault>>>,
    _session: BackgroundSession,
}

impl Medium {
    /// Of `size` bytes, mounted on the directory `dir`, which is made; its bytes lie beside that.
    pub fn mount(dir: &Path, size: u64) -> Medium {
        std::fs::create_dir(dir).unwrap();
        let bytes = dir.with_extension("bytes");
        let bytes = File::options().read(true).write(true).create_new(true).open(bytes).unwrap();
        bytes.set_len(size).unwrap();
        let faults = Arc::new(Mutex::new(Vec::new()));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("failing".into())];
        let served = Served { bytes, size, faults: faults.clone() };
        let session = fuser::spawn_mount(served, dir, &config).unwrap();
        Medium { dir: dir.to_owned(), faults, _session: session }
    }

    pub fn file(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    /// Refuse this from now on, beside what is refused already.
    pub fn fail(&self, fault: Fault) {
        self.faults.lock().expect("held for a moment").push(fault);
    }

    /// Refuse nothing any more.
    pub fn mend(&self) {
        self.faults.lock().expect("held for a moment").clear();
    }
}

/// What the kernel's requests come to.
struct Served {
    bytes: File,
    size: u64,
    faults: Arc<Mutex<Vec<Fault>>>,
}

impl Served {
    /// Carry it out, unless it is to fail.
    fn ask<T>(&self, asked: &Asked, work: impl FnOnce(&File) -> io::Result<T>) -> Result<T, Errno> {
        let fails = self.faults.lock().expect("held for a moment").iter().any(|fault| fault.concerns(asked));
        if fails { Err(Errno::EIO) } else { work(&self.bytes).map_err(Errno::from) }
    }

    fn attr(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) = match ino {
            FILE => (FileType::RegularFile, 0o600, self.size),
            _ => (FileType::Directory, 0o700, 0),
        };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Fault {
    fn concerns(&self, asked: &Asked) -> bool {
        match (self, asked) {
            (Fault::Everything, _) => true,
            (Fault::Read(bad), Asked::Read(range)) | (Fault::Write(bad), Asked::Write(range)) => {
                range.start < bad.end && bad.start < range.end
            }
            (Fault::Read(_), Asked::Write(_) | Asked::Sync)
            | (Fault::Write(_), Asked::Read(_) | Asked::Sync) => false,
        }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attr(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Whatever is asked is asked here: no page cache remembers it.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = self.size.min(at + u64::from(len));
        let mut bytes = vec![0; usize::try_from(end.saturating_sub(at)).expect("a request is small")];
        match self.ask(&Asked::Read(at..end), |file| file.read_exact_at(&mut bytes, at)) {
            Ok(()) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let range = at..at + bytes.len() as u64;
        match self.ask(&Asked::Write(range), |file| file.write_all_at(bytes, at)) {
            Ok(()) => reply.written(u32::try_from(bytes.len()).expect("a request is small")),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // No power is cut here: what the kernel has stays.
        answer(self.ask(&Asked::Sync, |_| Ok(())), reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_truncate(mode);
        let range = [at, len].map(|n| i64::try_from(n).expect("small"));
        let asked = Asked::Write(at..at + len);
        answer(self.ask(&asked, |file| Ok(fallocate(file, mode, range[0], range[1])?)), reply);
    }
}

fn answer(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
