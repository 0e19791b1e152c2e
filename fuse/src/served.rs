//! What each request means, whichever transport brings it.
//!
//! Owns [`Served`]: numbers to files by [`tree`](crate::tree), handles to devices by [`handles`](crate::handles), the
//! rules of each operation by [`device_file`], errors to numbers by [`errno`](crate::errno). It is also where a fault of
//! a device is logged, once per opening, and where a panic of the node or of a device is kept from taking the serving
//! thread with it: such a request fails, and nothing else.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::File,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use bedplate_engine::{device::Access, error::Error};
use fuser::{Errno, FileAttr, FileHandle, FileType, Generation, INodeNo, OpenAccMode, OpenFlags};

use crate::{
    backing::Backing,
    buffer::with_aligned,
    device_file::{self, Allocation, Seek},
    errno::Fault,
    handles::{Handle, Handles, Listed, Route, TooMany},
    latency::Wakefulness,
    namespace::{FileEntry, FileId, Kind, ListedFile, Namespace},
    options::MountOptions,
    transport::Transport,
    tree::{self, Full, Node, Owner, Tree},
    warm::Warming,
};

/// How long a name stands: until it is invalidated, or found to name nothing that is.
pub(crate) const NAME_TTL: Duration = Duration::from_secs(3600);
/// How long attributes stand. Size changes are invalidated; allocated bytes and times move by themselves.
pub(crate) const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);
/// Longest name that the kernel lets through.
pub(crate) const NAME_LEN_MAX: u32 = 255;

/// The files of one mount.
pub(crate) struct Served {
    pub(crate) namespace: Arc<dyn Namespace>,
    pub(crate) options: MountOptions,
    pub(crate) owner: Owner,
    pub(crate) tree: Arc<Tree>,
    pub(crate) handles: Handles,
    /// The directories' times.
    pub(crate) started: SystemTime,
    /// Whether the kernel offers passthrough; INIT says.
    pub(crate) passthrough: AtomicBool,
    /// The connection, as long as the transport has it.
    pub(crate) device: Weak<OwnedFd>,
    /// Whether a request has come by a ring; then all do.
    pub(crate) rings: AtomicBool,
    /// Told of requests, if processors are to be kept awake for them.
    pub(crate) awake: Option<Wakefulness>,
    /// Over once the mount has started.
    pub(crate) warming: Warming,
}

type Answer<T> = Result<T, Errno>;
type Outcome<T> = Result<T, Fault>;

const NOT_FOUND: Fault = Fault::Refused(Errno::ENOENT);

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
    /// How requests come: the way that the first one came.
    pub(crate) fn transport(&self) -> Transport {
        if self.rings.load(Ordering::Relaxed) { Transport::Uring } else { Transport::Classic }
    }

    pub(crate) fn lookup(&self, parent: INodeNo, name: &OsStr) -> Answer<(FileAttr, Generation)> {
        self.answer("lookup", || match self.node(parent)? {
            Node::Root => {
                let kind = Kind::ALL.into_iter().find(|kind| name == kind.directory());
                let kind = kind.ok_or_else(|| {
                    self.warming.attend(name);
                    NOT_FOUND
                })?;
                Ok((tree::directory_attr(kind, self.owner, self.started), Generation(0)))
            }
            Node::Directory(kind) => {
                let entry =
                    name.to_str().and_then(|name| self.namespace.lookup(kind, name)).ok_or(NOT_FOUND)?;
                Ok((self.file_attr(&entry)?, tree::generation(entry.id)))
            }
            Node::File(_) => Err(Fault::Refused(Errno::ENOTDIR)),
        })
    }

    pub(crate) fn attr(&self, ino: INodeNo) -> Answer<FileAttr> {
        self.answer("getattr", || self.attr_of(ino))
    }

    /// Check `size`, the one attribute that a client may set; the times, which it may set too, nobody keeps.
    pub(crate) fn set_attr(&self, ino: INodeNo, size: Option<u64>) -> Answer<FileAttr> {
        self.answer("setattr", || {
            if let Some(new_size) = size {
                let entry = self.stat(self.file(ino)?)?;
                match entry.access {
                    Access::ReadOnly => return Err(Fault::Refused(Errno::EROFS)),
                    Access::ReadWrite => device_file::truncate(entry.size, new_size)?,
                }
            }
            self.attr_of(ino)
        })
    }

    pub(crate) fn open(&self, ino: INodeNo, flags: OpenFlags) -> Answer<(u64, Route)> {
        self.answer("open", || {
            let file = self.file(ino)?;
            let opened = self.namespace.open(file).map_err(|error| match error {
                // The kernel then looks the name up anew, and finds out by itself.
                Error::NotFound { .. } => Fault::Refused(Errno::ESTALE),
                error => Fault::Device(error),
            })?;
            let access = match file.kind {
                Kind::Image => Access::ReadOnly,
                Kind::Volume => opened.device.geometry().access,
            };
            if flags.acc_mode() != OpenAccMode::O_RDONLY && access == Access::ReadOnly {
                return Err(Fault::Refused(Errno::EROFS));
            }
            let durability = device_file::durability(flags.0);
            Ok(self.handles.open(file, opened, durability, |file| self.back(file))?)
        })
    }

    /// An open file, for a transport that carries its requests out by itself.
    pub(crate) fn handle(&self, fh: FileHandle) -> Answer<Arc<Handle>> {
        if let Some(awake) = &self.awake {
            awake.busy();
        }
        self.handles.file(fh.0).ok_or(Errno::EBADF)
    }

    pub(crate) fn release(&self, fh: FileHandle) -> Answer<()> {
        self.answer("release", || {
            self.handles.release(fh.0);
            Ok(())
        })
    }

    /// Read into `buffer`; the answer is the part of it that holds bytes of the file.
    pub(crate) fn read<'b>(
        &self,
        fh: FileHandle,
        buffer: &'b mut [u8],
        offset: u64,
        len: u32,
    ) -> Answer<&'b [u8]> {
        self.with(fh, "read", |handle| device_file::read(&*handle.device, buffer, offset, len))
    }

    /// Write, and say how much. `flags` are those of the request: the handle's, or of this one write.
    pub(crate) fn write(&self, fh: FileHandle, data: &[u8], offset: u64, flags: OpenFlags) -> Answer<usize> {
        let durability = device_file::durability(flags.0);
        self.with(fh, "write", |handle| {
            let write = |data: &[u8]| device_file::write(&*handle.device, data, offset, durability);
            // The kernel was told never to send as much.
            with_aligned(data, offset, write).unwrap_or(Err(Fault::Refused(Errno::EINVAL)))
        })
    }

    pub(crate) fn flush(&self, fh: FileHandle) -> Answer<()> {
        self.with(fh, "flush", |handle| Ok(handle.device.flush()?))
    }

    /// The request has no flags of its own: the handle's say whether it is to be durable.
    pub(crate) fn allocate(&self, fh: FileHandle, mode: i32, offset: u64, len: u64) -> Answer<()> {
        let what = Allocation::decode(mode).ok_or(Errno::EOPNOTSUPP)?;
        self.with(fh, "fallocate", |handle| {
            device_file::allocate(&*handle.device, what, offset, len, handle.durability)
        })
    }

    pub(crate) fn seek(&self, fh: FileHandle, offset: i64, whence: i32) -> Answer<i64> {
        let what = Seek::decode(whence).ok_or(Errno::EINVAL)?;
        let offset = u64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let found = self.with(fh, "lseek", |handle| device_file::seek(&*handle.device, what, offset))?;
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }

    /// Open a directory: what it lists is what it held now, so that no name is shown twice or passed over.
    pub(crate) fn open_directory(&self, ino: INodeNo) -> Answer<u64> {
        self.answer("opendir", || Ok(self.handles.open_directory(self.list(ino)?)?))
    }

    pub(crate) fn file_count(&self) -> u64 {
        let count: usize = Kind::ALL.into_iter().map(|kind| self.namespace.list(kind).len()).sum();
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    fn attr_of(&self, ino: INodeNo) -> Outcome<FileAttr> {
        match self.node(ino)? {
            Node::Root => Ok(tree::root_attr(self.owner, self.started)),
            Node::Directory(kind) => Ok(tree::directory_attr(kind, self.owner, self.started)),
            Node::File(file) => self.file_attr(&self.stat(file)?),
        }
    }

    fn file_attr(&self, entry: &FileEntry) -> Outcome<FileAttr> {
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

    /// The file's number; one that no longer is gives way for it.
    pub(crate) fn number(&self, file: FileId) -> Result<INodeNo, Full> {
        self.tree.number(file).or_else(|Full| {
            let named =
                Kind::ALL.into_iter().flat_map(|kind| self.namespace.list(kind)).map(|entry| entry.id);
            let living: HashSet<FileId> = named.chain(self.handles.open_files()).collect();
            self.tree.forget_except(&living);
            self.tree.number(file)
        })
    }

    /// Register the image's own file with the kernel. Any refusal means cached reads.
    fn back(&self, file: &File) -> Option<Backing> {
        if !self.passthrough.load(Ordering::Relaxed) {
            return None;
        }
        match Backing::register(&self.device, file) {
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
                for ListedFile { id, name } in entries {
                    names.push(Listed { ino: self.number(id)?, kind: FileType::RegularFile, name });
                }
            }
            Node::File(_) => return Err(Fault::Refused(Errno::ENOTDIR)),
        }
        Ok(names)
    }

    /// Run `work` on an open file.
    fn with<T>(
        &self,
        fh: FileHandle,
        op: &'static str,
        work: impl FnOnce(&Handle) -> Outcome<T>,
    ) -> Answer<T> {
        let handle = self.handle(fh)?;
        guard(|| work(&handle)).map_err(|fault| handle.report(op, &fault))
    }

    /// Run `work` that has no open file yet.
    fn answer<T>(&self, op: &'static str, work: impl FnOnce() -> Outcome<T>) -> Answer<T> {
        guard(work).map_err(|fault| {
            if let Fault::Device(error) = &fault {
                tracing::warn!(op, %error, "a request failed");
            }
            fault.errno()
        })
    }
}

/// Run what a request needs of the node or of a device; a panic there is this request's error.
pub(crate) fn guard<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        tracing::error!("a request panicked; it is answered with an I/O error");
        Err(Fault::Refused(Errno::EIO))
    })
}
