//! The image service against origins that misbehave, disks that are full and nodes that die.
//!
//! [`Node`] is a service over one directory, [`origin::Origin`] an HTTP server that does exactly what a test says and
//! remembers what it was asked. Nothing here sleeps for a result.

mod arrivals;
mod disk;
mod download;
mod joined;
mod origin;
mod peer;
mod random;
mod restart;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bedplate_engine::{device::BlockDevice, units::ByteLen};
use sha2::{Digest, Sha512};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::*;
use crate::prep::{checksum::hex, room::Reserve};

/// Longer than anything here takes; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Users and volumes, as a node would know them.
#[derive(Default)]
pub struct FakeHost {
    pub users: Mutex<HashMap<Uuid, Vec<String>>>,
    pub volumes: Mutex<HashMap<String, Arc<dyn BlockDevice>>>,
}

impl Host for FakeHost {
    fn users(&self, image: Uuid) -> Vec<String> {
        self.users.lock().unwrap().get(&image).cloned().unwrap_or_default()
    }

    fn volume_view(&self, volume: &str, _: Option<&str>) -> Result<Arc<dyn BlockDevice>, String> {
        self.volumes
            .lock()
            .unwrap()
            .get(volume)
            .cloned()
            .ok_or_else(|| format!("volume {volume:?} not found"))
    }
}

/// A service over one disk.
pub struct Node {
    pub images: Images,
    pub host: Arc<FakeHost>,
    pub runtime: Runtime,
    pub disk: PathBuf,
    _dir: Option<TempDir>,
}

/// Impatient, so that tests are quick; small marks, so that they are many.
pub fn settings() -> Settings {
    Settings {
        jobs_running_max: 4,
        base_cache: super::BaseCache::Shared,
        http: HttpSettings {
            connect_timeout: Duration::from_millis(500),
            idle_timeout: Duration::from_millis(400),
            first_byte_within: Duration::from_secs(2),
            stalled_max: Duration::from_secs(2),
            pause_min: Duration::from_millis(4),
            pause_max: Duration::from_millis(50),
        },
        // Whatever the machine has free; the tests of the reserve ask for it.
        reserve: Reserve::Fixed(ByteLen(0)),
        sync_bytes: 1 << 20,
        sync_interval: Duration::from_millis(200),
        deadline: PATIENCE,
    }
}

impl Node {
    pub fn new() -> Node {
        Node::with(settings())
    }

    pub fn with(settings: Settings) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().to_owned();
        Node { _dir: Some(dir), ..Node::over(&disk, settings) }
    }

    /// Over a directory that belongs to somebody else.
    pub fn over(disk: &Path, settings: Settings) -> Node {
        let runtime = Runtime::new().unwrap();
        let host = Arc::new(FakeHost::default());
        let disks = vec![DiskDir::open(Uuid::nil(), disk).unwrap()];
        let images = Images::open(disks, settings, host.clone(), runtime.handle().clone());
        Node { images, host, runtime, disk: disk.to_owned(), _dir: None }
    }

    pub fn create(&self, name: &str, from: &str, checksum: Option<&str>) -> Result<ImageInfo> {
        self.images.create(&CreateImage {
            name: name.to_owned(),
            from: from.to_owned(),
            checksum: checksum.map(str::to_owned),
            disk: None,
            deadline: None,
            internal_snapshot: None,
            parts: Parts::default(),
        })
    }

    pub fn wait(&self, name: &str) -> Result<ImageInfo> {
        self.runtime.block_on(self.images.wait(name, PATIENCE))
    }

    /// Create and wait.
    pub fn bring(&self, name: &str, from: &str) -> Result<ImageInfo> {
        self.create(name, from, None)?;
        self.wait(name)
    }

    pub fn delete(&self, name: &str) -> Result<()> {
        self.runtime.block_on(self.images.delete(name))
    }

    pub fn cancel(&self, name: &str) -> Result<ImageInfo> {
        self.runtime.block_on(self.images.cancel(name))
    }

    /// The bytes of a ready image's file.
    pub fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(&self.images.get(name).unwrap().copies[0].path).unwrap()
    }

    /// The directory of an image.
    pub fn image_dir(&self, name: &str) -> PathBuf {
        self.images.get(name).unwrap().copies[0].path.parent().unwrap().to_owned()
    }

    /// End this node as a shutdown would and start another over the same disk.
    pub fn restart(self) -> Node {
        assert!(self.runtime.block_on(self.images.shutdown(PATIENCE)));
        let Node { disk, _dir, images, runtime, .. } = self;
        drop((images, runtime));
        Node { _dir, ..Node::over(&disk, settings()) }
    }

    /// Wait until `holds` for an image.
    pub fn until(&self, name: &str, what: &str, holds: impl Fn(&ImageInfo) -> bool) -> ImageInfo {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.images.get(name).unwrap();
            if holds(&info) {
                return info;
            }
            assert!(Instant::now() < deadline, "{what} never came: {info:?}");
            std::thread::sleep(POLL);
        }
    }
}

/// Reproducible bytes without zero blocks.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn sha512(bytes: &[u8]) -> String {
    hex(&Sha512::digest(bytes))
}

/// The failure that a wait ended with.
pub fn failure(result: Result<ImageInfo>) -> FailureRecord {
    match result {
        Err(Error::Failed { failure, .. }) => failure,
        other => panic!("should have failed: {other:?}"),
    }
}
