//! A disk in a temporary directory, and images to stand on.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bedplate_engine::{
    device::{BlockDevice, Complete, Extent, Geometry, Request},
    error::{Error, Result},
    image::{self, BaseImage, BaseSource, Format, PROBE_LEN, qcow2::View},
    units::ByteRange,
    volume::{
        device::Volume,
        disk::{Disk, Held},
        record::ImageRef,
    },
};
use uuid::Uuid;

/// Images by uuid: files of the test.
#[derive(Default)]
pub struct Images(Mutex<HashMap<Uuid, PathBuf>>);

impl BaseSource for Images {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        let images = self.0.lock().expect("no test panics with it");
        let path = images
            .get(&image.uuid)
            .ok_or_else(|| Error::NotFound { kind: "image", name: image.name.clone() })?;
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let mut start = [0; PROBE_LEN];
        file.read_exact_at(&mut start, 0).map_err(|e| Error::io("read", path, e))?;
        image::open(file, path, Format::of(&start), &View::Active)
    }
}

pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub images: Arc<Images>,
}

impl Fixture {
    pub fn new() -> Fixture {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("disk")).expect("a directory");
        Fixture { dir, images: Arc::default() }
    }

    pub fn disk(&self) -> Arc<Disk> {
        open(Held::take(&self.dir.path().join("disk")), self.images.clone())
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn image(&self, content: &[u8]) -> ImageRef {
        let uuid = Uuid::new_v4();
        let path = self.dir.path().join(uuid.to_string());
        std::fs::write(&path, content).expect("the image is written");
        self.image_in(uuid, path)
    }

    /// The image in a file, of whatever format.
    pub fn image_in(&self, uuid: Uuid, path: PathBuf) -> ImageRef {
        self.images.0.lock().expect("no test panics with it").insert(uuid, path);
        ImageRef { name: "base".into(), uuid, sha512: String::new() }
    }
}

/// Open a disk with the executor that these tests are about.
pub fn open(held: Result<Held>, images: Arc<Images>) -> Arc<Disk> {
    let held = held.expect("the disk can be had").executor(crate::EXECUTOR);
    held.serve(images).expect("the disk opens")
}

/// A volume whose every request is submitted, so that the disk's executor carries it out.
pub struct Served(Arc<Volume>);

pub fn served(disk: &Disk, name: &str) -> Served {
    Served(disk.volume(name).expect("there"))
}

impl std::ops::Deref for Served {
    type Target = Arc<Volume>;

    fn deref(&self) -> &Arc<Volume> {
        &self.0
    }
}

impl BlockDevice for Served {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn submit(&self, request: Request, complete: Complete) {
        self.0.submit(request, complete);
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }
}

/// A small generator of numbers: splitmix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// All bytes of a device.
pub fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.geometry().size.as_usize()];
    for (piece, n) in bytes.chunks_mut(8 << 20).zip(0u64..) {
        device.read_at(piece, n * (8 << 20)).expect("the device is readable");
    }
    bytes
}

/// Panic at the first difference, and say where it is.
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} (block {}) is {} instead of {}", at / 4096, found[at], expected[at]);
    }
}
