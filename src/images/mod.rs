//! The image service of a node: the room where the catalog (records) and prep (jobs) are wired together.

mod info;

use std::{fs::File, sync::Arc, time::Duration};

use bedplate_engine::device::BlockDevice;
use uuid::Uuid;

pub use crate::catalog::{
    record::{FailureCode, FailureRecord, Format},
    store::DiskDir,
};
pub use info::{
    BasePath, CopyInfo, CreateImage, Error, Host, ImageInfo, ImageState, Result, Settings,
};

/// The service; cheap to clone. Methods block for a few small disk operations unless they are `async`:
/// call them where blocking is allowed.
#[derive(Clone)]
pub struct Images;

impl Images {
    /// Read the records of all disks, start what was unfinished, verify what changed. Inside a tokio runtime.
    pub fn open(_disks: Vec<DiskDir>, _settings: Settings, _host: Arc<dyn Host>) -> Result<Images> {
        Ok(Images)
    }
    /// Begin an image; returns at once with the image *pending*.
    pub fn create(&self, _request: CreateImage) -> Result<ImageInfo> {
        Err(Error::ShuttingDown)
    }
    pub fn list(&self) -> Vec<ImageInfo> {
        Vec::new()
    }
    /// By name or uuid.
    pub fn get(&self, _name: &str) -> Result<ImageInfo> {
        Err(Error::ShuttingDown)
    }
    /// Cancels its job first; refused while something stands on it.
    pub fn delete(&self, _name: &str) -> Result<()> {
        Err(Error::ShuttingDown)
    }
    /// End its job (*failed, cancelled*) and clear away what had arrived; also of a failed one.
    pub fn cancel(&self, _name: &str) -> Result<ImageInfo> {
        Err(Error::ShuttingDown)
    }
    /// Start to read it back from the medium; `wait` for the result.
    pub fn verify(&self, _name: &str) -> Result<ImageInfo> {
        Err(Error::ShuttingDown)
    }
    /// Until no job is at it: ready, or [`Error::Failed`], or [`Error::TimedOut`].
    pub async fn wait(&self, _name: &str, _timeout: Duration) -> Result<ImageInfo> {
        Err(Error::ShuttingDown)
    }
    /// A read-only device over a ready image, by name or uuid.
    pub fn open_device(&self, _name: &str) -> Result<Arc<dyn BlockDevice>> {
        Err(Error::ShuttingDown)
    }
    /// The file of a ready raw image and its length, for passthrough.
    pub fn raw_file(&self, _uuid: Uuid) -> Result<(File, u64)> {
        Err(Error::ShuttingDown)
    }
    /// Where the engine opens a ready image.
    pub fn base_path(&self, _uuid: Uuid) -> Result<BasePath> {
        Err(Error::ShuttingDown)
    }
    /// Stop jobs, keeping what has arrived; they go on at the next open. Whether all had ended by the deadline.
    pub async fn shutdown(&self, _deadline: Duration) -> bool {
        true
    }
}
