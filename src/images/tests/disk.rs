//! What the disk does: it fills up, its bytes change, its records are not ours.

use std::process::Command;

use super::{
    arrivals::damage_quietly,
    origin::{Answer, Origin},
    *,
};

/// A file system of its own, unmounted at the end.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(size: &str) -> SmallDisk {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "tests run as root");
        SmallDisk(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, as a failed test may leave files open.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn ready(node: &Node) -> PathBuf {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    std::fs::write(&path, noise(2 << 20, 40)).unwrap();
    node.bring("a", path.to_str().unwrap()).unwrap().copies[0].path.clone()
}

#[test]
fn room_is_checked_before_the_first_byte() {
    let disk = SmallDisk::new("16m");
    let origin = Origin::file(&noise(20 << 20, 41));
    let node = Node::over(disk.0.path(), settings());
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert_eq!(failed.code, FailureCode::NoSpace);
    assert!(failed.message.contains("are needed"), "{}", failed.message);
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);
}

#[test]
fn a_disk_that_fills_up_fails_the_job_keeps_what_was_synced_and_goes_on_when_there_is_room() {
    let disk = SmallDisk::new("16m");
    let ballast = disk.0.path().join("ballast");
    std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    let content = noise(10 << 20, 42);
    let body = content.clone();
    // No length is said, so that nothing can be checked ahead.
    let origin = Origin::start(move |asked| match asked.first() {
        0 => Answer::chunked(&body, "etag: \"v1\"\r\n", None),
        first => Answer::part(&body, first, "etag: \"v1\"\r\n"),
    });
    let node = Node::over(disk.0.path(), settings());
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert_eq!(failed.code, FailureCode::NoSpace);
    let kept = node.images.get("a").unwrap().allocated_bytes;
    assert!(kept > 1 << 20, "{kept}");

    std::fs::remove_file(ballast).unwrap();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert!(origin.seen()[1].0.first() >= 1 << 20);
    node.delete("a").unwrap();
}

#[test]
fn a_cancel_clears_what_a_failed_job_has_kept() {
    let disk = SmallDisk::new("8m");
    let body = noise(10 << 20, 43);
    let origin = Origin::start(move |_| Answer::chunked(&body, "etag: \"v1\"\r\n", None));
    let node = Node::over(disk.0.path(), settings());
    assert_eq!(failure(node.bring("a", &origin.url("/a"))).code, FailureCode::NoSpace);
    assert!(node.images.get("a").unwrap().allocated_bytes > 0);
    assert_eq!(node.cancel("a").unwrap().allocated_bytes, 0);
}

#[test]
fn verify_reads_the_medium_and_finds_a_byte_that_changed() {
    let node = Node::new();
    let path = ready(&node);
    node.images.verify("a").unwrap();
    node.wait("a").unwrap();
    damage_quietly(&path);
    assert!(node.images.open_device("a").is_ok(), "from outside nothing is to be seen");
    node.images.verify("a").unwrap();
    let failed = failure(node.wait("a"));
    assert_eq!(failed.code, FailureCode::Corrupt);
    assert!(matches!(node.images.open_device("a"), Err(Error::Failed { .. })));
    let node = node.restart();
    assert!(matches!(
        node.images.base_path(node.images.get("a").unwrap().uuid.unwrap()),
        Err(Error::Failed { .. })
    ));
    assert_eq!(node.images.get("a").unwrap().size_bytes, Some(2 << 20), "the record tells what it was");
}

#[test]
fn a_file_that_was_touched_is_verified_before_it_serves_again() {
    let node = Node::new();
    let path = ready(&node);
    std::fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(matches!(node.images.open_device("a"), Err(Error::NotReady { .. })));
    node.wait("a").unwrap();
    assert!(node.images.open_device("a").is_ok());

    std::fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    let node = node.restart();
    node.wait("a").unwrap();
    assert!(node.images.open_device("a").is_ok());
    // What was found is recorded: the next start has nothing to verify.
    let node = node.restart();
    assert_eq!(node.images.get("a").unwrap().state, ImageState::Ready);
}

#[test]
fn a_file_that_was_cut_or_is_gone_fails_with_the_reason() {
    let node = Node::new();
    let path = ready(&node);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let node = node.restart();
    let failed = failure(node.wait("a"));
    assert!(
        failed.code == FailureCode::Corrupt && failed.message.contains("1000 bytes"),
        "{}",
        failed.message
    );
    std::fs::remove_file(&path).unwrap();
    node.images.verify("a").unwrap();
    assert_eq!(failure(node.wait("a")).code, FailureCode::Storage);
    node.delete("a").unwrap();
}

#[test]
fn a_record_of_another_version_is_listed_keeps_its_name_and_stops_collection() {
    let node = Node::new();
    let image = ready(&node);
    let images = node.disk.join("images");
    let newer = images.join("newer-0123abcd");
    let litter = images.join("litter-89abcdef");
    std::fs::create_dir(&newer).unwrap();
    std::fs::write(newer.join("image.json"), br#"{"format_version": 2}"#).unwrap();
    std::fs::create_dir(&litter).unwrap();
    std::fs::write(litter.join("partial.data"), b"x").unwrap();
    let node = node.restart();
    let info = node.images.get("newer").unwrap();
    assert!(
        matches!(&info.state, ImageState::Unknown(reason) if reason.contains("format version 2")),
        "{info:?}"
    );
    assert!(matches!(node.create("newer", image.to_str().unwrap(), None), Err(Error::Exists(_))));
    assert!(matches!(node.delete("newer"), Err(Error::NotReady { .. })));
    assert_eq!(node.images.get("a").unwrap().state, ImageState::Ready, "the others are served");
    assert!(litter.exists());

    std::fs::remove_dir_all(&newer).unwrap();
    let node = node.restart();
    assert!(!litter.exists());
    assert_eq!(node.images.list().len(), 1);
}

#[test]
fn a_deletion_that_a_crash_interrupted_is_finished_and_a_file_without_a_record_is_not_touched() {
    let node = Node::new();
    let path = ready(&node);
    let dir = path.parent().unwrap().to_owned();
    std::fs::rename(dir.join("image.json"), dir.join("deleted.json")).unwrap();
    let node = node.restart();
    assert!(!dir.exists() && node.images.list().is_empty());

    let path = ready(&node);
    std::fs::remove_file(path.with_file_name("image.json")).unwrap();
    let node = node.restart();
    assert!(path.exists());
    assert!(matches!(node.images.get("a").unwrap().state, ImageState::Unknown(_)));
}

#[test]
fn two_disks_with_one_name_are_both_served() {
    let (one, two) = (Node::new(), Node::new());
    ready(&one);
    ready(&two);
    let uuid = two.images.get("a").unwrap().uuid.unwrap();
    let disks = vec![
        DiskDir::open(Uuid::from_u128(1), &one.disk).unwrap(),
        DiskDir::open(Uuid::from_u128(2), &two.disk).unwrap(),
    ];
    let both = Images::open(disks, settings(), one.host.clone(), one.runtime.handle().clone());
    let second = format!("a~{}", &uuid.simple().to_string()[..8]);
    assert_eq!(both.get(&second).unwrap().uuid, Some(uuid));
    assert_eq!(both.get("a").unwrap().copies[0].disk, Uuid::from_u128(1));
    assert!(both.open_device(&second).is_ok());
}
