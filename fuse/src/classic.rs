//! The classic transport: every request that arrives on `/dev/fuse`, answered on the thread that read it.
//!
//! Owns what INIT asks of the kernel, the flags with which files are opened, how long the kernel may remember names and
//! attributes, and the step from `fuser`'s requests and replies to [`served`](crate::served), which knows the answers.
//! `fuser` replies from one slice, so a read is made into this thread's buffer and copied once, by the kernel.
//! What is answered ENOSYS is not sent again: flush at close (closing a disk syncs nothing; `fsync` does), extended
//! attributes, `poll`, `bmap`, `copy_file_range` (the kernel then copies by reading and writing).

use std::{
    ffi::OsStr,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags,
    ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::{
    buffer::{REQUEST_BYTES_MAX, with_buffer},
    handles::{Listed, Route},
    served::{ATTRIBUTE_TTL, NAME_LEN_MAX, NAME_TTL, Served},
    tree::IO_SIZE,
};

/// Requests that the kernel hands over at once without a waiting thread behind each: asynchronous direct I/O and
/// read-ahead. Twice what a client at depth 128 with two jobs sends.
const BACKGROUND_MAX: u16 = 512;

/// Without these the mount works, with less speed or without shared mappings of volumes.
const WISHES: [InitFlags; 5] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    // Reading the device after an abort then says so, which tells it from an unmount.
    InitFlags::FUSE_ABORT_ERROR,
    InitFlags::FUSE_PASSTHROUGH,
];

/// The file system as `fuser` sees it.
pub(crate) struct Classic {
    pub(crate) served: Arc<Served>,
    pub(crate) terms: Arc<Terms>,
}

/// What INIT asks for on behalf of rings, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Terms {
    /// How long a request may be and how many are in work at once; without rings there is nothing to ask for.
    pub(crate) rings: Option<(usize, usize)>,
    /// Whether the kernel offered rings, and was told to use them.
    pub(crate) accepted: AtomicBool,
}

impl Terms {
    fn request_bytes_max(&self) -> u32 {
        match self.rings {
            Some((bytes, _)) if self.accepted.load(Ordering::Relaxed) => {
                u32::try_from(bytes).map_or(REQUEST_BYTES_MAX, |bytes| bytes.min(REQUEST_BYTES_MAX))
            }
            Some(_) | None => REQUEST_BYTES_MAX,
        }
    }

    fn background_max(&self) -> u16 {
        let depth = self.rings.map_or(0, |(_, depth)| depth);
        u16::try_from(2 * depth).map_or(u16::MAX, |twice| twice.max(BACKGROUND_MAX))
    }
}

impl Filesystem for Classic {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wish in WISHES {
            if config.add_capabilities(wish).is_err() {
                tracing::info!(?wish, "the kernel does not offer this");
            }
        }
        if self.terms.rings.is_some() && config.add_capabilities(InitFlags::FUSE_OVER_IO_URING).is_ok() {
            self.terms.accepted.store(true, Ordering::Relaxed);
        }
        let refused = |nearest| io::Error::other(format!("INIT: the nearest value that works is {nearest}"));
        let (bytes, background) = (self.terms.request_bytes_max(), self.terms.background_max());
        config.set_max_write(bytes).map_err(refused)?;
        // A ring's entry has no room for more than the longest write.
        if self.terms.accepted.load(Ordering::Relaxed)
            && let Err(offered) = config.set_max_readahead(bytes)
        {
            config.set_max_readahead(offered.min(bytes)).map_err(refused)?;
        }
        config.set_max_background(background).map_err(|nearest| refused(nearest.into()))?;
        if config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH) {
            // One: the images' own files lie on a file system that is not stacked itself.
            config.set_max_stack_depth(1).map_err(refused)?;
            self.served.passthrough.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.served.lookup(parent, name) {
            Ok((attr, generation)) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &NAME_TTL, &attr, generation),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.served.attr(ino) {
            Ok(attr) => reply.attr(&ATTRIBUTE_TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(Errno::EPERM);
        }
        match self.served.set_attr(ino, size) {
            Ok(attr) => reply.attr(&ATTRIBUTE_TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.served.open(ino, flags) {
            Ok((number, route)) => match &route {
                Route::Passthrough(backing) => backing.answer(reply, FileHandle(number)),
                Route::Direct | Route::Cached => reply.opened(FileHandle(number), route.open_flags()),
            },
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        with_buffer(|buffer| match self.served.read(fh, buffer, offset, size) {
            Ok(bytes) => reply.data(bytes),
            Err(errno) => reply.error(errno),
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.served.write(fh, data, offset, flags).map(u32::try_from) {
            Ok(Ok(len)) => reply.written(len),
            // A request is never as long as 4 GiB.
            Ok(Err(_)) => reply.error(Errno::EIO),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.served.flush(fh));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        empty(reply, self.served.allocate(fh, mode, offset, length));
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.served.seek(fh, offset, whence) {
            Ok(offset) => reply.offset(offset),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        empty(reply, self.served.release(fh));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.served.open_directory(ino) {
            Ok(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(names) = self.served.handles.directory(fh.0) else { return reply.error(Errno::EBADF) };
        // Entries count from 1, so that an entry's offset is where the next one is found.
        for (Listed { ino, kind, name }, next) in
            names.iter().zip(1..).skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            if reply.add(*ino, next, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.served.handles.release_directory(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// No space of its own: what a disk has left is the node's to say, per disk.
    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, self.served.file_count(), 0, IO_SIZE, NAME_LEN_MAX, IO_SIZE);
    }

    // Names are the node's to give and to take: `bedplate volume create`, `delete` and so on.

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EPERM);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        reply.error(Errno::EINVAL);
    }

    // Not offered; the defaults would say the same and log each one.

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
