//! The words between the image service and whoever uses it: requests, answers, settings and errors.
//!
//! Nothing here does anything. States and failures are enums; the strings that people see are made where they are
//! shown.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bedplate_engine::{device::BlockDevice, error::Error as Storage, image::Format};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    catalog::{
        name::NameError,
        record::{FailureRecord, Parts},
        sources::SourceFile,
    },
    prep::{progress::Progress, room::Reserve, source::http::HttpSettings},
};

/// What the service needs from the node around it.
pub trait Host: Send + Sync + 'static {
    /// Who stands on this image ("volume web1"), for refusals. Called with no lock of the service held.
    fn users(&self, image: Uuid) -> Vec<String>;

    /// A read-only view of a volume that does not change while it is held; a snapshot is taken when none is named.
    /// Called when the job starts, and again when it starts over after a restart of the node. The error is shown.
    fn volume_view(&self, volume: &str, snapshot: Option<&str>) -> Result<Arc<dyn BlockDevice>, String>;
}

/// Whether the page cache keeps what volumes read of their images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum BaseCache {
    /// One copy for all volumes over an image, which the kernel gives up when memory is short.
    #[default]
    Shared,
    /// None: images are read with O_DIRECT, for a machine whose memory belongs to its guests.
    Direct,
}

/// Settings of the service; [`Default`] is sound.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Jobs that run at once; others wait as *pending*.
    pub jobs_running_max: usize,
    pub http: HttpSettings,
    /// How the images are opened that volumes stand on.
    pub base_cache: BaseCache,
    /// Free bytes that images leave on a disk.
    pub reserve: Reserve,
    /// What has arrived is made durable and recorded each time this many bytes have come ...
    pub sync_bytes: u64,
    /// ... or this much time has passed, whichever is first.
    pub sync_interval: Duration,
    /// The longest that a job may take when its request does not say.
    pub deadline: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            jobs_running_max: 4,
            http: HttpSettings::default(),
            base_cache: BaseCache::default(),
            reserve: Reserve::default(),
            sync_bytes: 64 << 20,
            sync_interval: Duration::from_secs(1),
            deadline: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// Make an image.
#[derive(Clone, Debug)]
pub struct CreateImage {
    pub name: String,
    /// An absolute path, an http(s) URL, `volume:NAME[@SNAPSHOT]`, `image:NAME`, or `upload` for
    /// [`super::Images::upload`].
    pub from: String,
    /// SHA-512 as 128 hexadecimal digits (also `sha512:HEX`), or `sha256:HEX`.
    pub checksum: Option<String>,
    /// The disk to put it on; the one with the most free space when none is given.
    pub disk: Option<Uuid>,
    pub deadline: Option<Duration>,
    /// The internal snapshot of a qcow2 file that is to be its content, by id or name.
    pub internal_snapshot: Option<String>,
    /// Where the other files lie, of a source whose content is joined from several. `internal_snapshot` is then a
    /// snapshot of whatever the source is.
    pub parts: Parts,
}

/// How an image, or a copy of it, is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Waits for its turn.
    Pending,
    /// Bytes arrive.
    InProgress,
    /// Every byte is durable and verified.
    Ready,
    Failed(FailureRecord),
    /// Not served for now, and why: it is verified again, or its record cannot be read.
    Unknown(String),
}

/// How reading a copy back from the medium ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verification {
    /// The bytes are the ones that were verified before.
    Passed,
    /// They are not, or it ended before that was known; which of the two, the code says.
    Failed(FailureRecord),
}

/// An image's file on one disk.
#[derive(Clone, Debug, PartialEq)]
pub struct CopyInfo {
    pub disk: Uuid,
    pub path: PathBuf,
    pub state: ImageState,
    /// While a job is at it.
    pub progress: Option<Progress>,
    /// How the last verification ended; unknown while one runs, and until the first since the node started.
    pub verification: Option<Verification>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ImageInfo {
    /// As it is served: `name~uuid8` for the second of two disks that bring the same name.
    pub name: String,
    /// Unknown only where the record cannot be read.
    pub uuid: Option<Uuid>,
    pub state: ImageState,
    pub format: Option<Format>,
    /// Which internal snapshot of the file is its content.
    pub internal_snapshot: Option<String>,
    pub size_bytes: Option<u64>,
    pub virtual_size_bytes: Option<u64>,
    pub allocated_bytes: u64,
    pub sha512: Option<String>,
    /// Without credentials.
    pub source: String,
    /// The files that it was joined from, the top of the chain first; none when its source was one file.
    pub sources: Vec<SourceFile>,
    pub copies: Vec<CopyInfo>,
    pub created_at: Option<Timestamp>,
}

/// Why a call on the service did not do what it should. The exit codes of the command line are beside them.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// 1: the request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// 1: see [`NameError`].
    #[error("image {name:?}: {reason}")]
    Name { name: String, reason: NameError },
    /// 3
    #[error("image {0:?} not found")]
    NotFound(String),
    /// 3
    #[error("disk {0} is not one of this node's")]
    DiskNotFound(Uuid),
    /// 4
    #[error("image {0:?} exists already")]
    Exists(String),
    /// 4
    #[error("image {name:?} is in use by {}", by.join(", "))]
    InUse { name: String, by: Vec<String> },
    /// 4: it is not ready, or a job is at it; `state` says more.
    #[error("image {name:?} is {state}")]
    NotReady { name: String, state: String },
    /// 4: there is nothing to cancel.
    #[error("image {0:?} has no job that could be cancelled")]
    NotRunning(String),
    /// 5 for `checksum` and `corrupt`, 6 for `timed_out`, 1 for the others.
    #[error("image {name:?} failed: {}", failure.message)]
    Failed { name: String, failure: FailureRecord },
    /// 6: the wait is over, the job goes on.
    #[error("image {name:?} was not ready after {} s; its job goes on", after.as_secs())]
    TimedOut { name: String, after: Duration },
    /// 4: a limit with this name.
    #[error("too many at once ({0}); try again later")]
    Busy(&'static str),
    /// 1
    #[error("the node is shutting down")]
    ShuttingDown,
    /// 1; 5 when it is [`Storage::Corrupt`].
    #[error(transparent)]
    Storage(#[from] Storage),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
