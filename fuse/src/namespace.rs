//! What the front end asks of the node: which files there are, and a device for each.
//!
//! Owns the trait [`Namespace`] and the types that cross it. Every method is called on a thread that serves the mount,
//! so an implementation waits for nothing that itself waits for the mount, and never opens or stats anything beneath the
//! mount. A directory is listed from memory; to tell of one file or open it, files of the disks may be looked at, under
//! no lock that others wait for.

use std::{fmt, fs::File, sync::Arc, time::SystemTime};

use bedplate_engine::{
    device::{Access, BlockDevice},
    error::Result,
};
use uuid::Uuid;

/// Which of the mount's two directories a file is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Image,
    Volume,
}

impl Kind {
    pub const ALL: [Kind; 2] = [Kind::Image, Kind::Volume];

    /// The directory's name beneath the mount.
    pub const fn directory(self) -> &'static str {
        match self {
            Kind::Image => "images",
            Kind::Volume => "volumes",
        }
    }
}

/// What a file is, whatever its name is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    pub kind: Kind,
    pub uuid: Uuid,
}

impl FileId {
    pub const fn image(uuid: Uuid) -> FileId {
        FileId { kind: Kind::Image, uuid }
    }

    pub const fn volume(uuid: Uuid) -> FileId {
        FileId { kind: Kind::Volume, uuid }
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.directory(), self.uuid)
    }
}

/// A file as a directory lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    pub name: String,
    pub id: FileId,
}

/// A file as `stat` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    pub name: String,
    pub id: FileId,
    /// The virtual size in bytes, which is the file's length.
    pub size: u64,
    /// Bytes that it takes on its disk.
    pub allocated_bytes: u64,
    pub modified: SystemTime,
    /// [`Access::ReadOnly`] takes the write bits away, and opening for writing is refused.
    pub access: Access,
}

/// An opened file.
pub struct OpenFile {
    pub device: Arc<dyn BlockDevice>,
    /// The image's own file, opened for reading, when its bytes are exactly the image's content. The kernel may then
    /// read it without asking us.
    pub passthrough: Option<Arc<File>>,
    /// Dropped when the last user of this opening is gone: keeps the image or volume "in use" meanwhile.
    pub hold: Box<dyn Send + Sync>,
}

/// The node's images and volumes.
pub trait Namespace: Send + Sync + 'static {
    /// The files of one directory, in any order.
    fn list(&self, kind: Kind) -> Vec<ListedFile>;

    fn lookup(&self, kind: Kind, name: &str) -> Option<FileEntry>;

    /// The same file by identity; `None` once it is deleted.
    fn stat(&self, file: FileId) -> Option<FileEntry>;

    fn open(&self, file: FileId) -> Result<OpenFile>;
}
