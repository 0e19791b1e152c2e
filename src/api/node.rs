//! What the routes ask of the node.
//!
//! Owns the trait [`Node`], so that the API knows neither the catalog nor prep nor the mount, and so that a test can
//! stand a node of its own behind the routes. Every method may block for disk operations: the routes call it where
//! that is allowed. Whatever takes longer than a request should is a [`Job`] and returns at once.

use std::{sync::Arc, time::Duration};

use axum::body::Bytes;
use bedplate_engine::device::BlockDevice;
use tokio::sync::mpsc;

use super::{
    problem::Refusal,
    types::{
        CloneVolume, CreateImage, CreateSnapshot, CreateVolume, Export, Image, Job, NodeInfo, ResizeVolume,
        RevertVolume, Snapshot, Volume,
    },
};

pub type Result<T, E = Refusal> = std::result::Result<T, E>;

/// Whether the node takes requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Not now, and why: it goes down, or its mount is gone.
    NotReady(String),
}

/// What a stream or an export is taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Image(String),
    Volume { name: String, snapshot: Option<String> },
}

/// Where the bytes of an upload go, in order. `None` says that the last one has been sent; dropped before that, the
/// upload broke off. Closed when nobody takes them any more: what became of the image says why.
pub type UploadParts = mpsc::Sender<Option<Bytes>>;

/// A running node. Objects are named by name; an image or volume also by its uuid.
pub trait Node: Send + Sync + 'static {
    fn readiness(&self) -> Readiness;
    fn info(&self) -> NodeInfo;

    fn images(&self) -> Vec<Image>;
    fn image(&self, name: &str) -> Result<Image>;
    /// Begins; the image is *pending*.
    fn create_image(&self, request: CreateImage) -> Result<Image>;
    /// The bytes of an image that was created with the source `upload`; once.
    fn upload_image(&self, name: &str) -> Result<UploadParts>;
    fn delete_image(&self, name: &str) -> Result<()>;
    fn cancel_image(&self, name: &str) -> Result<Image>;
    /// Begins to read it back; it has progress until that ends.
    fn verify_image(&self, name: &str) -> Result<Image>;

    fn volumes(&self) -> Vec<Volume>;
    fn volume(&self, name: &str) -> Result<Volume>;
    fn create_volume(&self, request: CreateVolume) -> Result<Volume>;
    fn delete_volume(&self, name: &str) -> Result<()>;
    fn resize_volume(&self, name: &str, request: ResizeVolume) -> Result<Volume>;
    fn clone_volume(&self, name: &str, request: CloneVolume) -> Result<Job>;
    fn flatten_volume(&self, name: &str) -> Result<Job>;
    fn recover_volume(&self, name: &str) -> Result<Job>;
    /// The volume with its loop device.
    fn attach_volume(&self, name: &str) -> Result<Volume>;
    fn detach_volume(&self, name: &str) -> Result<Volume>;

    fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>>;
    fn create_snapshot(&self, volume: &str, request: CreateSnapshot) -> Result<Snapshot>;
    fn delete_snapshot(&self, volume: &str, name: &str) -> Result<Job>;
    fn revert_volume(&self, volume: &str, snapshot: &str, request: RevertVolume) -> Result<Volume>;

    fn export(&self, origin: Origin, request: Export) -> Result<Job>;
    /// A read-only view that does not change while it is held.
    fn content(&self, origin: Origin) -> Result<Arc<dyn BlockDevice>>;

    fn jobs(&self) -> Vec<Job>;
    fn job(&self, id: u64) -> Result<Job>;
    /// Tells it to stop; it ends soon after.
    fn cancel_job(&self, id: u64) -> Result<()>;
    /// The job when it has ended, or as it is after `patience`.
    fn wait_job(&self, id: u64, patience: Duration) -> Result<Job>;
}
