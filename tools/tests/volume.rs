//! Bedplate's own volume directories, offline: what the engine wrote and read is what an inspection reads.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod program;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::{Error, Result},
    image::{BaseImage, BaseSource, raw::RawImage},
    units::{ByteLen, ByteRange},
    volume::{
        disk::Disk,
        life::Origin,
        record::{ImageRef, dir_name},
    },
};
use program::inspect;
use tempfile::TempDir;
use uuid::Uuid;

const IMAGE_LEN: u64 = 3 << 20;

/// The images of a disk, by its directory.
struct Images(PathBuf);

impl BaseSource for Images {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        let path = self.0.join(dir_name(&image.name, image.uuid)).join("image");
        let file = fs::File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(Arc::new(RawImage::new(file, path, ByteLen(IMAGE_LEN))?))
    }
}

struct Fixture {
    dir: TempDir,
    image: ImageRef,
    /// Content of the snapshot and of the head.
    snapshot: Vec<u8>,
    head: Vec<u8>,
}

impl Fixture {
    /// A disk with an image and a volume over it that has a snapshot.
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageRef { name: "base".into(), uuid: Uuid::new_v4(), sha512: "0".repeat(128) };
        let disk_dir = dir.path().join("disk");
        fs::create_dir(&disk_dir).unwrap();
        drop(Disk::open(&disk_dir, Arc::new(Images(disk_dir.join("images")))).unwrap());
        let image_dir = disk_dir.join("images").join(dir_name(&image.name, image.uuid));
        fs::create_dir_all(&image_dir).unwrap();
        let content: Vec<u8> = (0..IMAGE_LEN).map(|at| (at / 4096 % 251 + 1).to_le_bytes()[0]).collect();
        fs::write(image_dir.join("image"), content).unwrap();
        fs::write(image_dir.join("image.json"), r#"{"format_version":1,"format":"raw"}"#).unwrap();
        let mut fixture = Fixture { dir, image, snapshot: Vec::new(), head: Vec::new() };
        let disk = fixture.disk();
        disk.create_volume("v", Origin::Image(fixture.image.clone()), Some(ByteLen(8 << 20))).unwrap();
        let volume = disk.volume("v").unwrap();
        volume.write_at(&[0xaa; 10_000], 5000, Durability::Volatile).unwrap();
        volume.zero(ByteRange::new(1 << 20, 65536), Durability::Volatile).unwrap();
        volume.write_at(&[0xbb; 4096], 6 << 20, Durability::Fua).unwrap();
        fixture.snapshot = content_of(&*volume);
        disk.create_snapshot("v", "s").unwrap();
        volume.write_at(&[0xcc; 100], 7000, Durability::Fua).unwrap();
        volume.zero(ByteRange::new(0, 4096), Durability::Fua).unwrap();
        drop((volume, disk));
        let disk = fixture.disk();
        disk.resize("v", ByteLen(9 << 20)).unwrap();
        let volume = disk.volume("v").unwrap();
        volume.flush().unwrap();
        fixture.head = content_of(&*volume);
        fixture
    }

    fn disk(&self) -> Arc<Disk> {
        let path = self.dir.path().join("disk");
        Disk::open(&path, Arc::new(Images(path.join("images")))).unwrap()
    }

    fn volume(&self) -> String {
        let mut volumes = fs::read_dir(self.dir.path().join("disk/volumes")).unwrap();
        volumes.next().unwrap().unwrap().path().to_str().unwrap().to_owned()
    }

    fn converted(&self, flags: &[&str]) -> Vec<u8> {
        let out = self.dir.path().join("out");
        let volume = self.volume();
        let args = [&["convert", &volume, out.to_str().unwrap(), "--force"][..], flags].concat();
        let done = inspect(&args);
        assert_eq!(done.code, 0, "{}", done.stderr);
        fs::read(out).unwrap()
    }

    /// A file of the layer that is not the head's, or of the head's.
    fn layer_file(&self, name: &str, of_head: bool) -> PathBuf {
        let record = fs::read_to_string(Path::new(&self.volume()).join("volume.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        let head = &record["head"];
        let layers = record["layers"].as_array().unwrap();
        let layer = layers.iter().find(|layer| (layer["uuid"] == *head) == of_head).unwrap();
        self.dir.path().join("disk/layers").join(layer["uuid"].as_str().unwrap()).join(name)
    }
}

fn content_of(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; device.geometry().size.as_usize()];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn the_head_and_a_snapshot_read_as_the_engine_reads_them() {
    let fixture = Fixture::new();
    assert!(fixture.converted(&[]) == fixture.head);
    assert!(fixture.converted(&["--snapshot", "s"]) == fixture.snapshot);
    let volume = fixture.volume();
    assert_eq!(inspect(&["convert", &volume, "/dev/null/x", "--snapshot", "t"]).code, 3);
    let info = inspect(&["info", &volume, "-o", "json"]);
    assert_eq!(info.code, 0, "{}", info.stdout);
    let info = info.json();
    assert_eq!((&info["virtual-size"], &info["backing-filename"]), (&(9 << 20).into(), &"base".into()));
    assert_eq!(info["format-specific"]["data"]["snapshots"][0]["name"], "s");
    assert!(inspect(&["info", &volume]).stdout.contains("Snapshots:"));
    let map = inspect(&["map", &volume, "-o", "json", "--layers"]).json();
    let whole: u64 = map.as_array().unwrap().iter().map(|run| run["length"].as_u64().unwrap()).sum();
    assert_eq!(whole, 9 << 20);
    assert!(map.as_array().unwrap().iter().any(|run| run["depth"] == 2 && run["data"] == true), "{map}");
    let checked = inspect(&["check", &volume]);
    assert_eq!(checked.code, 0, "{}", checked.stdout);
}

#[test]
fn a_disk_that_is_served_is_refused_by_the_name_of_who_serves_it() {
    let fixture = Fixture::new();
    let served = fixture.disk();
    for verb in ["info", "map"] {
        let refused = inspect(&[verb, &fixture.volume()]);
        assert_eq!(refused.code, 4);
        assert!(refused.stderr.contains(&format!("process {}", std::process::id())), "{}", refused.stderr);
    }
    assert_eq!(inspect(&["check", &fixture.volume()]).code, 1);
    drop(served);
    assert_eq!(inspect(&["check", &fixture.volume()]).code, 0);
}

#[test]
fn inspecting_changes_nothing() {
    let fixture = Fixture::new();
    let listing = || {
        program::run("find", &[fixture.dir.path().to_str().unwrap(), "-printf", "%p %s %b %T@ %C@\n"]).stdout
    };
    let before = listing();
    for verb in ["info", "map", "check"] {
        inspect(&[verb, &fixture.volume()]);
    }
    assert_eq!(before, listing());
}

#[test]
fn damage_of_maps_and_missing_files_is_named() {
    let fixture = Fixture::new();
    let volume = fixture.volume();
    let code = |verb: &str| inspect(&[verb, &volume]).code;
    // A bitmap of the sealed map, which follows its header and directory.
    let map = fixture.layer_file("map", false);
    let sound = fs::read(&map).unwrap();
    let mut bytes = sound.clone();
    bytes[512 + 16] ^= 1;
    fs::write(&map, &bytes).unwrap();
    assert_eq!((code("check"), code("info"), code("map")), (2, 5, 5));
    let found = inspect(&["map", &volume, "-o", "json"]).json();
    assert!(found.as_array().unwrap().iter().any(|run| run["damage"].is_string()), "{found}");
    fs::write(&map, &sound).unwrap();
    assert_eq!(code("check"), 0);
    // A map that is no map, and one that is not there.
    fs::write(&map, "nothing").unwrap();
    assert_eq!((code("check"), code("info"), code("map")), (2, 5, 5));
    fs::remove_file(&map).unwrap();
    assert_eq!((code("check"), code("map")), (2, 3));
    fs::write(&map, &sound).unwrap();
    // Data that the file does not have.
    let data = fixture.layer_file("data", false);
    let long = data.metadata().unwrap().len();
    fs::File::options().write(true).open(&data).unwrap().set_len(4096).unwrap();
    assert_eq!(code("check"), 2);
    fs::File::options().write(true).open(&data).unwrap().set_len(long).unwrap();
    // An image that is elsewhere.
    let images = fixture.dir.path().join("disk/images");
    fs::rename(&images, fixture.dir.path().join("elsewhere")).unwrap();
    assert_eq!(code("check"), 2);
    let out = fixture.dir.path().join("out");
    let refused = inspect(&["convert", &volume, out.to_str().unwrap()]);
    assert!(refused.stderr.contains("--backing FILE"), "{}", refused.stderr);
    let refused = inspect(&["convert", &volume, out.to_str().unwrap(), "--backing", "none"]);
    assert!(refused.code == 2 && refused.stderr.contains("image \"base\""), "{}", refused.stderr);
    let image = fixture.dir.path().join("elsewhere").join(dir_name("base", fixture.image.uuid)).join("image");
    fs::write(&data, fs::read(&data).unwrap()).unwrap();
    let found = inspect(&["convert", &volume, out.to_str().unwrap(), "--backing", image.to_str().unwrap()]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    // A record that is no record.
    fs::write(Path::new(&volume).join("volume.json"), "{}").unwrap();
    assert_eq!((code("check"), code("info")), (2, 5));
}

#[test]
fn an_image_is_read_as_its_record_says_not_as_it_looks() {
    let fixture = Fixture::new();
    let dir = fixture.dir.path().join("disk/images").join(dir_name("base", fixture.image.uuid));
    let (raw, qcow2) = (fixture.dir.path().join("raw"), fixture.dir.path().join("qcow2"));
    fs::rename(dir.join("image"), &raw).unwrap();
    let (raw, qcow2) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
    program::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, qcow2]);
    program::qemu_img(&["snapshot", "-c", "golden", qcow2]);
    program::qemu_io(qcow2, "write -P 66 0 3M");
    fs::copy(qcow2, dir.join("image")).unwrap();
    fs::write(dir.join("image.json"), r#"{"format":"qcow2","internal_snapshot":"golden"}"#).unwrap();
    assert!(fixture.converted(&[]) == fixture.head);
    fs::write(dir.join("image.json"), r#"{"format":"qcow2"}"#).unwrap();
    assert!(fixture.converted(&[]) != fixture.head);
    fs::write(dir.join("image.json"), r#"{"format":"vmdk"}"#).unwrap();
    assert_eq!(inspect(&["check", &fixture.volume()]).code, 2);
}
