//! The contract: what goes over the wire, in JSON.
//!
//! Owns the shape of every request and answer, for clients, the OpenAPI document and `-o json` alike. Fields are only
//! ever added within `/v1`. Sizes are exact bytes, times RFC 3339, and a value that is not known is `null`, never left
//! out. States that carry data inside the program become a word and a message here, and only here.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::problem::{Code, Problem};

/// How an image, or one copy of it, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// Waits for its turn.
    Pending,
    /// Its bytes are arriving.
    InProgress,
    /// Every byte is on disk and verified; it is served.
    Ready,
    /// Ended without a good copy; the copy's message says why.
    Failed,
    /// Not served for now: it is being verified again, or its record cannot be read.
    Unknown,
}

/// How a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Takes reads and writes.
    Ready,
    /// Readable, but takes no more writes since a fault; `volume recover` is the way out.
    Failed,
    /// Cannot be opened now; the message says why.
    Unknown,
}

/// How a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    Ready,
    /// Not served; the message says why.
    Failed,
}

/// What the bytes of an image's file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Raw,
    Qcow2,
}

/// What a running job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Queued,
    Connecting,
    Transferring,
    Hashing,
    Syncing,
    Publishing,
    Verifying,
}

/// How far a running job is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub phase: Phase,
    pub done_bytes: u64,
    /// Not known while the source has not said it.
    pub total_bytes: Option<u64>,
    pub rate_bytes_per_s: u64,
    /// Seconds left.
    pub eta_s: Option<u64>,
    /// The number of the present attempt at the source, from 1.
    pub attempt: u32,
    /// Why the attempt before this one ended.
    pub last_error: Option<String>,
    /// Set while the job pauses between two attempts.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub next_retry_at: Option<Timestamp>,
}

/// What a verification found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerificationState {
    /// The bytes are the ones that were verified before.
    Passed,
    /// They are not (`corrupt`), or it ended before that was known; the code says which.
    Failed,
}

/// How reading a copy back from the medium ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    pub state: VerificationState,
    /// Why it failed.
    pub message: Option<String>,
    /// The stable word for the message.
    pub code: Option<Code>,
}

/// An image's file on one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Copy {
    /// The disk's directory.
    pub disk: String,
    pub state: ImageState,
    /// While a job is at it.
    pub progress: Option<Progress>,
    /// Why it is failed or unknown.
    pub message: Option<String>,
    /// The stable word for the message, where it is failed.
    pub code: Option<Code>,
    /// How the last verification ended; `null` while one runs, and until the first since the node started.
    pub verification: Option<Verification>,
}

/// A file that an image was joined from, as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SourceFile {
    pub path: String,
    pub size_bytes: u64,
    /// Of the file as it was: `sha512sum FILE` agrees while it still is.
    pub sha512: String,
}

/// An image: immutable bytes with a name and a checksum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    pub name: String,
    /// Not known only where the record cannot be read.
    pub uuid: Option<Uuid>,
    pub state: ImageState,
    pub format: Option<Format>,
    /// Which internal snapshot of a qcow2 file is its content, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_snapshot: Option<String>,
    /// Length of the file.
    pub size_bytes: Option<u64>,
    /// Size of the disk that it is an image of.
    pub virtual_size_bytes: Option<u64>,
    /// What it takes on its disk; holes take nothing.
    pub allocated_bytes: u64,
    /// Of the file as it is: `sha512sum FILE` agrees.
    pub sha512: Option<String>,
    /// Where it came from, without credentials.
    pub source: String,
    /// The files that it was joined from, the top of the chain first; left out when its source was one file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceFile>,
    pub copies: Vec<Copy>,
    /// Which way its bytes go while its file is open.
    #[serde(default)]
    pub io_path: Option<IoPath>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Timestamp>,
}

/// Which way the bytes of an open file of the mount go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum IoPath {
    /// Every request to the node, by io_uring.
    Uring,
    /// Every request to the node, on /dev/fuse.
    Classic,
    /// From the node once, then from the kernel's page cache.
    Cached,
    /// From the image's own file, by the kernel alone.
    Passthrough,
}

/// How the mount's requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// By io_uring.
    Uring,
    /// On /dev/fuse.
    Classic,
}

/// The image that a volume stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageRef {
    pub name: String,
    pub uuid: Uuid,
}

/// What a volume held at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    pub name: String,
    pub size_bytes: u64,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Timestamp>,
}

/// A copy-on-write block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    pub name: String,
    pub uuid: Uuid,
    pub state: VolumeState,
    pub size_bytes: u64,
    /// What its layers take on the disk, those too that it shares with clones; the image is not counted.
    pub allocated_bytes: u64,
    /// `null` for a volume that began empty or was flattened.
    pub image: Option<ImageRef>,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The volume's file, while the node serves it.
    pub path: Option<String>,
    /// The loop device, while it is attached.
    pub device: Option<String>,
    /// Which way its bytes go while its file is open.
    #[serde(default)]
    pub io_path: Option<IoPath>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Timestamp>,
    /// The disk's directory.
    pub disk: String,
    /// Why it is failed or unknown.
    pub message: Option<String>,
    /// Who has it open.
    pub holders: Vec<String>,
}

/// One of the node's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Not known where the disk could not be opened.
    pub id: Option<Uuid>,
    pub path: String,
    pub state: DiskState,
    pub message: Option<String>,
    pub size_bytes: u64,
    pub free_bytes: u64,
    /// Not known where the disk is not served.
    pub executor: Option<Executor>,
}

/// What carries requests out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Executor {
    /// Workers with an io_uring each.
    Ring,
    /// Whoever asks.
    Blocking,
}

/// The running node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeInfo {
    pub version: String,
    pub pid: u32,
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    pub mount: Option<String>,
    /// How the mount's requests come.
    #[serde(default)]
    pub transport: Option<Transport>,
    pub disks: Vec<Disk>,
    /// Loop devices over files of a node that is gone, which somebody still uses.
    pub stale_devices: Vec<String>,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    VolumeClone,
    VolumeFlatten,
    VolumeRecover,
    VolumeExport,
    ImageExport,
    SnapshotDelete,
    /// Merging what deleted snapshots and finished exports left on a disk.
    DiskReclaim,
}

/// How a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Running,
    Done,
    Failed,
}

/// A range of a volume, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Range {
    pub start_bytes: u64,
    pub len_bytes: u64,
}

/// What `volume recover` found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoverReport {
    /// Why the volume had stopped taking writes.
    pub faults: Vec<String>,
    /// What cannot be read any more; `[]` when nothing was lost.
    pub lost: Vec<Range>,
}

/// SHA-512 of what an export wrote, in hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportDigests {
    /// The file.
    pub file_sha512: Option<String>,
    /// What a guest reads from it.
    pub guest_sha512: Option<String>,
}

/// Work that may outlast its request. A finished job can be asked about for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    pub id: u64,
    pub kind: JobKind,
    /// The volume, image or disk that it is about.
    pub object: String,
    pub state: JobState,
    /// While it runs.
    pub progress: Option<Progress>,
    /// Why it failed.
    pub error: Option<Problem>,
    /// Of a recovery that is done.
    pub report: Option<RecoverReport>,
    /// Of an export that is done and was to give them.
    pub digests: Option<ExportDigests>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// Make an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateImage {
    /// Letters, digits, `.`, `_` and `-`; 64 at most; no leading dot.
    pub name: String,
    /// An absolute path, an `http(s)://` URL, `volume:NAME[@SNAPSHOT]`, `image:NAME`, or `upload`: then its
    /// bytes are sent to `/v1/images/NAME/content`.
    pub source: String,
    /// SHA-512 as 128 hexadecimal digits, or `sha256:` and 64.
    #[serde(default)]
    pub checksum: Option<String>,
    /// The longest that it may take.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    /// The snapshot that is to be the image's content: an internal one of a qcow2 file by id or name, or one of a replica.
    #[serde(default)]
    pub internal_snapshot: Option<String>,
    /// What a Longhorn replica directory stands on: the absolute path of a raw or qcow2 file, or `none`.
    #[serde(default)]
    pub backing: Option<String>,
    /// The absolute path of the directory in which the files must lie that a qcow2 file names; all of them become one
    /// raw image.
    #[serde(default)]
    pub allow_references: Option<String>,
}

/// Make a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    pub name: String,
    /// A ready image; without one the volume begins empty and needs a size.
    #[serde(default)]
    pub image: Option<String>,
    /// The image's virtual size when not given. Rounded up to 512.
    #[serde(default)]
    pub size_bytes: Option<u64>,
}

/// Make a volume that begins as another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVolume {
    /// The new volume's name.
    pub name: String,
    /// The volume as it is now when not given.
    #[serde(default)]
    pub snapshot: Option<String>,
    #[serde(default)]
    pub method: CloneMethod,
}

/// What a clone shares with its origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CloneMethod {
    /// The layers below; takes no time and no space.
    #[default]
    Linked,
    /// Nothing, not even the image.
    Full,
}

/// Grow a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// Rounded up to 512.
    pub size_bytes: u64,
}

/// Take a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    pub name: String,
}

/// Go back to a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevertVolume {
    /// Keep what the volume holds now as a snapshot of this name.
    #[serde(default)]
    pub snapshot_first: Option<String>,
}

/// Write an image or volume into a file of the node's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// An absolute path.
    pub path: String,
    /// Of a volume; the volume as it is now when not given.
    #[serde(default)]
    pub snapshot: Option<String>,
    pub format: Format,
    /// Of qcow2 only; clusters are stored as they are when not given.
    #[serde(default)]
    pub compress: Option<Compression>,
    /// Of qcow2 only: a power of two from 512 to 2 MiB; 64 KiB when not given.
    #[serde(default)]
    pub cluster_size_bytes: Option<u64>,
    /// Give the SHA-512 of the file that was written.
    #[serde(default)]
    pub digest_file: bool,
    /// Give the SHA-512 of what a guest reads from it.
    #[serde(default)]
    pub digest_guest: bool,
    #[serde(default)]
    pub existing: Existing,
}

/// How the clusters of a qcow2 file are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    Zlib,
    Zstd,
}

/// What becomes of a file that an export would replace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Existing {
    #[default]
    Refuse,
    Replace,
}

/// Which content is streamed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ContentQuery {
    /// Of a volume; the volume as it is now when not given.
    #[serde(default)]
    pub snapshot: Option<String>,
}
