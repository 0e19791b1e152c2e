//! A node for tests of the API and the command line: a few objects in memory, and every kind of refusal on request.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Reply, Request},
    error::{Error, Result as EngineResult},
    units::{BLOCK_SIZE, ByteLen, ByteRange, to_usize},
};
use jiff::Timestamp;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    node::{Node, Origin, Readiness, Result, UploadParts},
    problem::{Code, Refusal},
    types::*,
};

/// The volume that every node of this kind has.
pub const VOLUME: &str = "root";
/// The snapshot whose content breaks off.
pub const BROKEN: &str = "broken";

#[derive(Debug)]
pub struct FakeNode {
    pub device: Arc<Pattern>,
    pub readiness: Mutex<Readiness>,
    volumes: Mutex<Vec<Volume>>,
    /// What the last whole upload brought.
    pub uploaded: Arc<Mutex<Vec<u8>>>,
}

impl FakeNode {
    pub fn shared() -> Arc<FakeNode> {
        Arc::new(FakeNode {
            device: Arc::new(Pattern { size: 5 * (1 << 20) + 512, fails_at: None }),
            readiness: Mutex::new(Readiness::Ready),
            volumes: Mutex::new(vec![volume(VOLUME, 1 << 30)]),
            uploaded: Arc::default(),
        })
    }

    fn job(&self, kind: JobKind, object: &str) -> Job {
        Job {
            id: 7,
            kind,
            object: object.to_owned(),
            state: JobState::Done,
            progress: None,
            error: None,
            report: None,
            digests: None,
            created_at: Timestamp::UNIX_EPOCH,
        }
    }
}

fn volume(name: &str, size_bytes: u64) -> Volume {
    Volume {
        name: name.to_owned(),
        uuid: Uuid::nil(),
        state: VolumeState::Ready,
        size_bytes,
        allocated_bytes: 0,
        image: None,
        snapshots: Vec::new(),
        path: Some(format!("/mnt/volumes/{name}")),
        device: None,
        io_path: Some(IoPath::Uring),
        created_at: Some(Timestamp::UNIX_EPOCH),
        disk: "/disk".to_owned(),
        message: None,
        holders: Vec::new(),
    }
}

pub fn image(name: &str) -> Image {
    Image {
        name: name.to_owned(),
        uuid: Some(Uuid::nil()),
        state: ImageState::Ready,
        format: Some(Format::Raw),
        internal_snapshot: None,
        size_bytes: Some(513),
        virtual_size_bytes: Some(1024),
        allocated_bytes: 4096,
        sha512: Some("0".repeat(128)),
        source: "/a".to_owned(),
        sources: Vec::new(),
        copies: Vec::new(),
        io_path: None,
        created_at: Some(Timestamp::UNIX_EPOCH),
    }
}

fn not_found(name: &str) -> Refusal {
    Refusal::from(Error::NotFound { kind: "volume", name: name.to_owned() })
}

impl Node for FakeNode {
    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn info(&self) -> NodeInfo {
        NodeInfo {
            version: "0".to_owned(),
            pid: 1,
            started_at: Timestamp::UNIX_EPOCH,
            mount: None,
            transport: Some(Transport::Uring),
            disks: vec![Disk {
                id: None,
                path: "/disk".to_owned(),
                state: DiskState::Failed,
                message: Some("unplugged".to_owned()),
                size_bytes: 10,
                free_bytes: 5,
                executor: Some(Executor::Ring),
            }],
            stale_devices: Vec::new(),
        }
    }

    fn images(&self) -> Vec<Image> {
        vec![image("a")]
    }

    fn image(&self, name: &str) -> Result<Image> {
        Ok(image(name))
    }

    fn create_image(&self, request: CreateImage) -> Result<Image> {
        Ok(Image { state: ImageState::Pending, source: request.source, ..image(&request.name) })
    }

    fn upload_image(&self, name: &str) -> Result<UploadParts> {
        let (parts, mut queue) = mpsc::channel(1);
        if name == BROKEN {
            return Ok(parts);
        }
        let uploaded = self.uploaded.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            while let Some(part) = queue.blocking_recv() {
                match part {
                    Some(part) => bytes.extend_from_slice(&part),
                    None => *uploaded.lock().unwrap_or_else(PoisonError::into_inner) = bytes.split_off(0),
                }
            }
        });
        Ok(parts)
    }

    fn delete_image(&self, name: &str) -> Result<()> {
        let by = "volume root".to_owned();
        Err(Refusal::from(Error::InUse { kind: "image", name: name.to_owned(), by }))
    }

    fn cancel_image(&self, name: &str) -> Result<Image> {
        Err(Refusal::new(Code::NotReady, format!("image {name:?} has no job")))
    }

    fn verify_image(&self, name: &str) -> Result<Image> {
        Ok(image(name))
    }

    fn volumes(&self) -> Vec<Volume> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn volume(&self, name: &str) -> Result<Volume> {
        self.volumes().into_iter().find(|volume| volume.name == name).ok_or_else(|| not_found(name))
    }

    fn create_volume(&self, request: CreateVolume) -> Result<Volume> {
        let made = volume(&request.name, request.size_bytes.unwrap_or(1024));
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).push(made.clone());
        Ok(made)
    }

    fn delete_volume(&self, name: &str) -> Result<()> {
        self.volume(name)?;
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).retain(|volume| volume.name != name);
        Ok(())
    }

    fn resize_volume(&self, name: &str, request: ResizeVolume) -> Result<Volume> {
        Ok(Volume { size_bytes: request.size_bytes, ..self.volume(name)? })
    }

    fn clone_volume(&self, name: &str, _: CloneVolume) -> Result<Job> {
        Ok(self.job(JobKind::VolumeClone, name))
    }

    fn flatten_volume(&self, _: &str) -> Result<Job> {
        panic!("a node with a fault");
    }

    fn recover_volume(&self, name: &str) -> Result<Job> {
        Ok(Job { report: Some(RecoverReport::default()), ..self.job(JobKind::VolumeRecover, name) })
    }

    fn attach_volume(&self, name: &str) -> Result<Volume> {
        Ok(Volume { device: Some("/dev/loop0".to_owned()), ..self.volume(name)? })
    }

    fn detach_volume(&self, name: &str) -> Result<Volume> {
        self.volume(name)
    }

    fn snapshots(&self, _: &str) -> Result<Vec<Snapshot>> {
        Ok(Vec::new())
    }

    fn create_snapshot(&self, _: &str, request: CreateSnapshot) -> Result<Snapshot> {
        Ok(Snapshot { name: request.name, size_bytes: 0, created_at: None })
    }

    fn delete_snapshot(&self, volume: &str, name: &str) -> Result<Job> {
        Ok(self.job(JobKind::SnapshotDelete, &format!("{volume}@{name}")))
    }

    fn revert_volume(&self, volume: &str, _: &str, _: RevertVolume) -> Result<Volume> {
        self.volume(volume)
    }

    fn export(&self, _: Origin, request: Export) -> Result<Job> {
        Ok(self.job(JobKind::VolumeExport, &request.path))
    }

    fn content(&self, origin: Origin) -> Result<Arc<dyn BlockDevice>> {
        match origin {
            Origin::Volume { snapshot: Some(snapshot), .. } if snapshot == BROKEN => {
                Ok(Arc::new(Pattern { size: self.device.size, fails_at: Some(3 << 20) }))
            }
            Origin::Image(_) | Origin::Volume { .. } => Ok(self.device.clone()),
        }
    }

    fn jobs(&self) -> Vec<Job> {
        Vec::new()
    }

    fn job(&self, id: u64) -> Result<Job> {
        match id {
            7 => Ok(self.job(JobKind::VolumeClone, "a")),
            _ => Err(Refusal::new(Code::NotFound, format!("job \"{id}\" not found"))),
        }
    }

    fn cancel_job(&self, id: u64) -> Result<()> {
        Node::job(self, id)?;
        Err(Refusal::new(Code::NotReady, format!("job \"{id}\" has ended already")))
    }

    fn wait_job(&self, id: u64, _: Duration) -> Result<Job> {
        Node::job(self, id)
    }
}

/// A read-only device whose second MiB is a hole and whose other bytes follow from their position.
#[derive(Debug)]
pub struct Pattern {
    pub size: u64,
    pub fails_at: Option<u64>,
}

impl Pattern {
    pub fn byte(at: u64) -> u8 {
        match at >> 20 {
            1 => 0,
            _ => u8::try_from(at / BLOCK_SIZE % 251).unwrap_or(0) | 1,
        }
    }
}

impl BlockDevice for Pattern {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.size), access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let Request::Read { offset, mut buffer } = request else {
            let result = Err(Error::ReadOnly { what: "a pattern".to_owned() });
            return complete(Reply { result, buffer: Vec::new() });
        };
        let end = offset + buffer.len() as u64;
        let result = match self.fails_at {
            Some(at) if at < end => Err(Error::Lost { start: at, len: 512, reason: "damage".into() }),
            _ => {
                (offset..end).zip(buffer.iter_mut()).for_each(|(at, byte)| *byte = Pattern::byte(at));
                Ok(())
            }
        };
        complete(Reply { result, buffer });
    }

    fn extents(&self, range: ByteRange) -> EngineResult<Vec<Extent>> {
        // One run at a time, as a device may.
        let mib = range.start.0 >> 20;
        let end = ((mib + 1) << 20).min(range.end().0);
        let kind = if mib == 1 { ExtentKind::Zero } else { ExtentKind::Data };
        Ok(vec![Extent { range: ByteRange::new(range.start.0, end - range.start.0), kind }])
    }
}

/// What the pattern's content is.
pub fn content(device: &Pattern) -> Vec<u8> {
    let mut content = Vec::with_capacity(to_usize(device.size));
    content.extend((0..device.size).map(Pattern::byte));
    content
}
