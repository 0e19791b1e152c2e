//! The classic transport: every request that arrives on `/dev/fuse`, answered on the thread that read it.
//!
//! Owns the translation between the kernel's requests and the rest of this crate: numbers to files by
//! [`tree`](crate::tree), handles to devices by [`handles`](crate::handles), the rules of each operation by
//! [`device_file`], errors by [`errno`](crate::errno). Decides what INIT asks of the kernel and with which flags files
//! are opened. A device that panics fails its request and nothing else.
//! What is answered ENOSYS is not sent again: flush at close (closing a disk syncs nothing; `fsync` does), extended
//! attributes, `poll`, `bmap`, `copy_file_range` (the kernel then copies by reading and writing).

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use bedplate_engine::device::{Access, Durability};
use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};

use crate::{
    buffer::{REQUEST_BYTES_MAX, with_buffer},
    device_file::{self, Allocation, Seek},
    errno::Fault,
    handles::{Handle, Handles, Listed, Route, TooMany},
    namespace::{FileEntry, FileId, Kind, Namespace},
    options::MountOptions,
    tree::{self, Full, IO_SIZE, Node, Owner, Tree},
};

/// Requests that the kernel hands over at once without a waiting thread behind each: asynchronous direct I/O and
/// read-ahead. Twice what a client at depth 128 with two jobs sends.
const BACKGROUND_MAX: u16 = 512;

/// How long a name stands: until it is invalidated, or found to name nothing that is.
const NAME_TTL: Duration = Duration::from_secs(3600);
/// How long attributes stand. Size changes are invalidated; allocated bytes and times move by themselves.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);

/// Longest name that the kernel lets through.
const NAME_LEN_MAX: u32 = 255;

/// Without these the mount works, with less speed or without shared mappings of volumes.
const WISHES: [InitFlags; 5] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    // Reading the device after an abort then says so, which tells it from an unmount.
    InitFlags::FUSE_ABORT_ERROR,
    InitFlags::FUSE_PASSTHROUGH,
];

/// What the transport shares with the mount that owns it.
pub(crate) struct Served {
    pub(crate) namespace: Arc<dyn Namespace>,
    pub(crate) options: MountOptions,
    pub(crate) owner: Owner,
    pub(crate) tree: Arc<Tree>,
    pub(crate) handles: Handles,
    pub(crate) started: SystemTime,
    /// Whether the kernel offered passthrough and has not refused it since.
    pub(crate) passthrough: AtomicBool,
}

/// The file system as `fuser` sees it.
pub(crate) struct Classic(pub(crate) Arc<Served>);

type Outcome<T> = Result<T, Fault>;

impl From<Full> for Fault {
    fn from(_: Full) -> Fault {
        tracing::warn!(limit = "INODES_MAX", "no inode number left for a file");
        Fault::Refused(Errno::ENFILE)
    }
}

impl From<TooMany> for Fault {
    fn from(TooMany { limit }: TooMany) -> Fault {
        tracing::warn!(limit, "too many open at once");
        Fault::Refused(Errno::ENFILE)
    }
}

impl Served {
    fn entry(&self, parent: INodeNo, name: &OsStr) -> Outcome<(FileAttr, Generation)> {
        match self.node(parent)? {
            Node::Root => {
                let kind = Kind::ALL.into_iter().find(|kind| name == kind.directory()).ok_or(NOT_FOUND)?;
                Ok((tree::directory_attr(kind, self.owner, self.started), Generation(0)))
            }
            Node::Directory(kind) => {
                let entry =
                    name.to_str().and_then(|name| self.namespace.lookup(kind, name)).ok_or(NOT_FOUND)?;
                Ok((self.attr(&entry)?, tree::generation(entry.id)))
            }
            Node::File(_) => Err(Fault::Refused(Errno::ENOTDIR)),
        }
    }

    fn attr_of(&self, ino: INodeNo) -> Outcome<FileAttr> {
        match self.node(ino)? {
            Node::Root => Ok(tree::root_attr(self.owner, self.started)),
            Node::Directory(kind) => Ok(tree::directory_attr(kind, self.owner, self.started)),
            Node::File(file) => self.attr(&self.stat(file)?),
        }
    }

    fn attr(&self, entry: &FileEntry) -> Outcome<FileAttr> {
        Ok(tree::file_attr(self.number(entry.id)?, entry, &self.options, self.owner))
    }

    /// A number that this mount gave out and forgot is stale: the kernel then looks the name up anew.
    fn node(&self, ino: INodeNo) -> Outcome<Node> {
        self.tree.node(ino).ok_or(Fault::Refused(Errno::ESTALE))
    }

    fn file(&self, ino: INodeNo) -> Outcome<FileId> {
        match self.node(ino)? {
            Node::File(file) => Ok(file),
            Node::Root | Node::Directory(_) => Err(Fault::Refused(Errno::EISDIR)),
        }
    }

    fn stat(&self, file: FileId) -> Outcome<FileEntry> {
        self.namespace.stat(file).ok_or(Fault::Refused(Errno::ESTALE))
    }

    fn handle(&self, fh: FileHandle) -> Outcome<Arc<Handle>> {
        self.handles.file(fh.0).ok_or(Fault::Refused(Errno::EBADF))
    }

    fn number(&self, file: FileId) -> Result<INodeNo, Full> {
        self.tree.number(file).or_else(|Full| {
            let named =
                Kind::ALL.into_iter().flat_map(|kind| self.namespace.list(kind)).map(|entry| entry.id);
            let living: HashSet<FileId> = named.chain(self.handles.open_files()).collect();
            self.tree.forget_except(&living);
            self.tree.number(file)
        })
    }

    /// Check `size`, the one attribute that a client may set, and the times, which nobody keeps.
    fn set_attr(&self, ino: INodeNo, size: Option<u64>) -> Outcome<FileAttr> {
        if let Some(new_size) = size {
            let entry = self.stat(self.file(ino)?)?;
            match entry.access {
                Access::ReadOnly => return Err(Fault::Refused(Errno::EROFS)),
                Access::ReadWrite => device_file::truncate(entry.size, new_size)?,
            }
        }
        self.attr_of(ino)
    }

    fn open(&self, ino: INodeNo, flags: OpenFlags, reply: &ReplyOpen) -> Outcome<(u64, Route)> {
        let file = self.file(ino)?;
        let opened = match call(|| self.namespace.open(file)) {
            Err(Fault::Device(bedplate_engine::error::Error::NotFound { .. })) => {
                return Err(Fault::Refused(Errno::ESTALE));
            }
            opened => opened?,
        };
        let access = match file.kind {
            Kind::Image => Access::ReadOnly,
            Kind::Volume => opened.device.geometry().access,
        };
        if flags.acc_mode() != OpenAccMode::O_RDONLY && access == Access::ReadOnly {
            return Err(Fault::Refused(Errno::EROFS));
        }
        let durability = device_file::durability(flags.0);
        Ok(self.handles.open(file, opened, durability, |file| self.back(file, reply))?)
    }

    /// Register the image's own file with the kernel. Any refusal means cached reads.
    fn back(&self, file: &std::fs::File, reply: &ReplyOpen) -> Option<BackingId> {
        if !self.passthrough.load(Ordering::Relaxed) {
            return None;
        }
        match reply.open_backing(file) {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::info!(%error, "the kernel does not pass this file through; its reads are cached");
                None
            }
        }
    }

    fn list(&self, ino: INodeNo) -> Outcome<Vec<Listed>> {
        let directory = |ino, name: &str| Listed { ino, kind: FileType::Directory, name: name.into() };
        let mut names = vec![directory(ino, "."), directory(INodeNo::ROOT, "..")];
        match self.node(ino)? {
            Node::Root => {
                names.extend(Kind::ALL.map(|kind| directory(tree::directory_ino(kind), kind.directory())));
            }
            Node::Directory(kind) => {
                let mut entries = self.namespace.list(kind);
                entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                for FileEntry { id, name, .. } in entries {
                    names.push(Listed { ino: self.number(id)?, kind: FileType::RegularFile, name });
                }
            }
            Node::File(_) => return Err(Fault::Refused(Errno::ENOTDIR)),
        }
        Ok(names)
    }

    /// Log a fault of the device where it leaves us, once per handle.
    fn errno(&self, handle: Option<&Handle>, op: &'static str, fault: &Fault) -> Errno {
        if let Fault::Device(error) = fault
            && handle.is_none_or(Handle::first_fault)
        {
            let file = handle.map(|handle| handle.file.to_string());
            tracing::warn!(op, file, %error, "a request failed");
        }
        fault.errno()
    }

    /// Run `work` on an open file.
    fn with<T>(
        &self,
        fh: FileHandle,
        op: &'static str,
        work: impl FnOnce(&Handle) -> Outcome<T>,
    ) -> Result<T, Errno> {
        let handle = self.handle(fh).map_err(|fault| fault.errno())?;
        call(|| work(&handle)).map_err(|fault| self.errno(Some(&handle), op, &fault))
    }
}

const NOT_FOUND: Fault = Fault::Refused(Errno::ENOENT);

/// Keep a panic of the node or of a device from taking a serving thread with it.
fn call<T, E>(work: impl FnOnce() -> Result<T, E>) -> Outcome<T>
where
    Fault: From<E>,
{
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Ok(result?),
        Err(_) => {
            tracing::error!("a request panicked; it is answered with an I/O error");
            Err(Fault::Refused(Errno::EIO))
        }
    }
}

/// The flags of an open reply. A volume is never cached, and its writers are not made to wait for one another.
fn open_flags(route: &Route) -> FopenFlags {
    match route {
        Route::Direct => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        Route::Cached => FopenFlags::FOPEN_KEEP_CACHE,
        Route::Passthrough(_) => FopenFlags::empty(),
    }
}

impl Filesystem for Classic {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wish in WISHES {
            if config.add_capabilities(wish).is_err() {
                tracing::info!(?wish, "the kernel does not offer this");
            }
        }
        let refused = |nearest| io::Error::other(format!("INIT: the nearest value that works is {nearest}"));
        config.set_max_write(REQUEST_BYTES_MAX).map_err(refused)?;
        config.set_max_background(BACKGROUND_MAX).map_err(|nearest| refused(nearest.into()))?;
        if config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH) {
            // One: the images' own files lie on a file system that is not stacked itself.
            config.set_max_stack_depth(1).map_err(refused)?;
            self.0.passthrough.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match call(|| self.0.entry(parent, name)) {
            Ok((attr, generation)) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &NAME_TTL, &attr, generation),
            Err(fault) => reply.error(fault.errno()),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match call(|| self.0.attr_of(ino)) {
            Ok(attr) => reply.attr(&ATTRIBUTE_TTL, &attr),
            Err(fault) => reply.error(fault.errno()),
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
        match call(|| self.0.set_attr(ino, size)) {
            Ok(attr) => reply.attr(&ATTRIBUTE_TTL, &attr),
            Err(fault) => reply.error(fault.errno()),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match call(|| self.0.open(ino, flags, &reply)) {
            Ok((number, route)) => match &route {
                Route::Passthrough(id) => {
                    reply.opened_passthrough(FileHandle(number), open_flags(&route), id)
                }
                Route::Direct | Route::Cached => reply.opened(FileHandle(number), open_flags(&route)),
            },
            Err(fault) => reply.error(self.0.errno(None, "open", &fault)),
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
        with_buffer(|buffer| {
            let read =
                self.0.with(fh, "read", |handle| device_file::read(&*handle.device, buffer, offset, size));
            match read {
                Ok(bytes) => reply.data(bytes),
                Err(errno) => reply.error(errno),
            }
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
        let durability = device_file::durability(flags.0);
        let written =
            self.0.with(fh, "write", |handle| device_file::write(&*handle.device, data, offset, durability));
        match written.map(u32::try_from) {
            Ok(Ok(len)) => reply.written(len),
            // A request is never as long as 4 GiB.
            Ok(Err(_)) => reply.error(Errno::EIO),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.0.with(fh, "flush", |handle| Ok(handle.device.flush()?)));
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
        let Some(what) = Allocation::decode(mode) else { return reply.error(Errno::EOPNOTSUPP) };
        let done = self.0.with(fh, "fallocate", |handle| {
            // The request has no flags of its own: the handle's say whether it is to be durable.
            let durability: Durability = handle.durability;
            device_file::allocate(&*handle.device, what, offset, length, durability)
        });
        empty(reply, done);
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let (Some(what), Ok(offset)) = (Seek::decode(whence), u64::try_from(offset)) else {
            return reply.error(Errno::EINVAL);
        };
        let found = self.0.with(fh, "lseek", |handle| device_file::seek(&*handle.device, what, offset));
        match found.map(i64::try_from) {
            Ok(Ok(offset)) => reply.offset(offset),
            Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
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
        let released: Outcome<()> = call(|| {
            self.0.handles.release(fh.0);
            Ok::<(), Fault>(())
        });
        empty(reply, released.map_err(|fault| fault.errno()));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match call(|| Ok::<u64, Fault>(self.0.handles.open_directory(self.0.list(ino)?)?)) {
            Ok(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
            Err(fault) => reply.error(fault.errno()),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(names) = self.0.handles.directory(fh.0) else { return reply.error(Errno::EBADF) };
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
        self.0.handles.release_directory(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// No space of its own: what a disk has left is the node's to say, per disk.
    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let count = Kind::ALL.into_iter().map(|kind| self.0.namespace.list(kind).len()).sum::<usize>();
        let files = u64::try_from(count).unwrap_or(u64::MAX);
        reply.statfs(0, 0, 0, files, 0, IO_SIZE, NAME_LEN_MAX, IO_SIZE);
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
        _: fuser::CopyFileRangeFlags,
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
