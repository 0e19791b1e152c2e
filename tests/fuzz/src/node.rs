//! A node that does nothing: what reaches it has passed the API.
//!
//! Every request that has a body is written as JSON and read again, which must give the same.

use std::{fmt::Debug, sync::Arc, time::Duration};

use bedplate::api::{
    node::{Node, Origin, Readiness, Result, UploadParts},
    problem::{Code, Refusal},
    types::{
        CloneVolume, CreateImage, CreateSnapshot, CreateVolume, Export, Image, Job, NodeInfo, ResizeVolume,
        RevertVolume, Snapshot, Volume,
    },
};
use bedplate_engine::device::BlockDevice;
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{runtime::Handle, sync::mpsc};

/// It has nothing and knows nobody.
#[derive(Debug)]
pub struct Nothing;

fn refuse<T>(name: &str) -> Result<T> {
    Err(Refusal::new(Code::NotFound, format!("{name:?} is not here")))
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug, R>(name: &str, request: &T) -> Result<R> {
    let json = serde_json::to_vec(request).expect("what was read can be written");
    let read: T = serde_json::from_slice(&json).expect("what was written can be read");
    assert_eq!(&read, request);
    refuse(name)
}

impl Node for Nothing {
    fn readiness(&self) -> Readiness {
        Readiness::Ready
    }
    fn info(&self) -> NodeInfo {
        NodeInfo {
            version: String::new(),
            pid: 1,
            started_at: Timestamp::UNIX_EPOCH,
            mount: None,
            transport: None,
            disks: Vec::new(),
            stale_devices: Vec::new(),
        }
    }
    fn images(&self) -> Vec<Image> {
        Vec::new()
    }
    fn image(&self, name: &str) -> Result<Image> {
        refuse(name)
    }
    fn create_image(&self, request: CreateImage) -> Result<Image> {
        again(&request.name, &request)
    }
    fn upload_image(&self, _: &str) -> Result<UploadParts> {
        let (parts, mut queue) = mpsc::channel(1);
        Handle::current().spawn(async move { while queue.recv().await.is_some() {} });
        Ok(parts)
    }
    fn delete_image(&self, name: &str) -> Result<()> {
        refuse(name)
    }
    fn cancel_image(&self, name: &str) -> Result<Image> {
        refuse(name)
    }
    fn verify_image(&self, name: &str) -> Result<Image> {
        refuse(name)
    }
    fn volumes(&self) -> Vec<Volume> {
        Vec::new()
    }
    fn volume(&self, name: &str) -> Result<Volume> {
        refuse(name)
    }
    fn create_volume(&self, request: CreateVolume) -> Result<Volume> {
        again(&request.name, &request)
    }
    fn delete_volume(&self, name: &str) -> Result<()> {
        refuse(name)
    }
    fn resize_volume(&self, name: &str, request: ResizeVolume) -> Result<Volume> {
        again(name, &request)
    }
    fn clone_volume(&self, name: &str, request: CloneVolume) -> Result<Job> {
        again(name, &request)
    }
    fn flatten_volume(&self, name: &str) -> Result<Job> {
        refuse(name)
    }
    fn recover_volume(&self, name: &str) -> Result<Job> {
        refuse(name)
    }
    fn attach_volume(&self, name: &str) -> Result<Volume> {
        refuse(name)
    }
    fn detach_volume(&self, name: &str) -> Result<Volume> {
        refuse(name)
    }
    fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>> {
        refuse(volume)
    }
    fn create_snapshot(&self, volume: &str, request: CreateSnapshot) -> Result<Snapshot> {
        again(volume, &request)
    }
    fn delete_snapshot(&self, volume: &str, _: &str) -> Result<Job> {
        refuse(volume)
    }
    fn revert_volume(&self, volume: &str, _: &str, request: RevertVolume) -> Result<Volume> {
        again(volume, &request)
    }
    fn export(&self, origin: Origin, request: Export) -> Result<Job> {
        again(&format!("{origin:?}"), &request)
    }
    fn content(&self, origin: Origin) -> Result<Arc<dyn BlockDevice>> {
        refuse(&format!("{origin:?}"))
    }
    fn jobs(&self) -> Vec<Job> {
        Vec::new()
    }
    fn job(&self, id: u64) -> Result<Job> {
        refuse(&id.to_string())
    }
    fn cancel_job(&self, id: u64) -> Result<()> {
        refuse(&id.to_string())
    }
    fn wait_job(&self, id: u64, _: Duration) -> Result<Job> {
        refuse(&id.to_string())
    }
}
