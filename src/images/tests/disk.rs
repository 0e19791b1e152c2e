//! What the disk does: it fills up, its bytes change, its records are not ours.

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{
    arrivals::{begun, damage_quietly, stalling},
    origin::{Answer, Origin},
    *,
};
use crate::{
    directory::Directory,
    prep::{
        arrival::{PIECE_LEN, Spec, arrive},
        checksum::Hasher,
        partial::{Kept, PartialNames, Proof},
        pipeline::Hands,
        room::Reserve,
        source::{Validator, file::FileSource},
        stop::Stop,
    },
};

/// With the reserve that nodes have, and with patience: an origin that a busy machine keeps waiting is none that broke.
fn reserving() -> Settings {
    let mut settings = Settings { reserve: Reserve::OfSize, ..settings() };
    settings.http.idle_timeout = PATIENCE;
    settings.http.first_byte_within = PATIENCE;
    settings.http.stalled_max = PATIENCE;
    settings
}

/// A file system of its own, unmounted at the end.
struct SmallDisk {
    mount: TempDir,
    /// The file under a file system that lives on a loop device.
    backing: Option<TempDir>,
}

impl SmallDisk {
    fn tmpfs(size: &str) -> SmallDisk {
        let disk = SmallDisk { mount: tempfile::tempdir().unwrap(), backing: None };
        let options = format!("size={size}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(disk.path()));
        disk
    }

    /// On a file, by way of a loop device that goes with the mount.
    fn on_file(mkfs: &[&str], size: u64) -> SmallDisk {
        let backing = tempfile::tempdir().unwrap();
        let disk = SmallDisk { mount: tempfile::tempdir().unwrap(), backing: Some(backing) };
        let file = disk.backing_file();
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&file));
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(disk.path()));
        disk
    }

    fn path(&self) -> &Path {
        self.mount.path()
    }

    fn backing_file(&self) -> PathBuf {
        self.backing.as_ref().unwrap().path().join("file-system")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, as a failed test may leave files open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Tests of disks run as root.
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ready(node: &Node) -> PathBuf {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    std::fs::write(&path, noise(2 << 20, 40)).unwrap();
    node.bring("a", path.to_str().unwrap()).unwrap().copies[0].path.clone()
}

#[test]
fn room_is_checked_before_the_first_byte() {
    let disk = SmallDisk::tmpfs("16m");
    let origin = Origin::file(&noise(20 << 20, 41));
    let node = Node::over(disk.path(), reserving());
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert_eq!(failed.code, FailureCode::NoSpace);
    assert!(failed.message.contains("are needed"), "{}", failed.message);
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);
}

#[test]
fn a_disk_that_fills_up_fails_the_job_keeps_what_was_synced_and_goes_on_when_there_is_room() {
    let disk = SmallDisk::tmpfs("32m");
    let ballast = disk.path().join("ballast");
    let content = noise(10 << 20, 42);
    let (body, other) = (content.clone(), ballast.clone());
    let origin = Origin::start(move |asked| {
        if asked.index == 1 {
            // Somebody else fills the disk between two attempts.
            std::fs::write(&other, vec![1; 15 << 20]).unwrap();
        }
        let answer = Answer::file(asked, &body, "\"v1\"");
        if asked.index == 0 { answer.cut(4 << 20) } else { answer }
    });
    let node = Node::over(disk.path(), reserving());
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert_eq!(failed.code, FailureCode::NoSpace);
    let kept = node.images.get("a").unwrap().allocated_bytes;
    assert!(kept > 1 << 20, "{kept}");

    std::fs::remove_file(ballast).unwrap();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert!(origin.seen()[2].0.first() >= 1 << 20);
    node.delete("a").unwrap();
}

#[test]
fn a_source_without_an_end_stops_before_the_disk_is_full_and_leaves_nothing() {
    let disk = SmallDisk::tmpfs("64m");
    let body = noise(100 << 20, 43);
    let origin = Origin::start(move |_| Answer::chunked(&body, "etag: \"v1\"\r\n", None));
    let node = Node::over(disk.path(), reserving());
    let held = DiskDir::open(Uuid::nil(), disk.path()).unwrap();
    let before = held.free_bytes().unwrap();
    node.create("a", &origin.url("/a"), None).unwrap();
    let ended = AtomicBool::new(false);
    let (failed, least) = std::thread::scope(|scope| {
        let watched = scope.spawn(|| {
            let mut least = before;
            while !ended.load(Ordering::Acquire) {
                least = least.min(held.free_bytes().unwrap());
                std::thread::sleep(POLL);
            }
            least
        });
        let failed = failure(node.wait("a"));
        ended.store(true, Ordering::Release);
        (failed, watched.join().unwrap())
    });
    assert_eq!(failed.code, FailureCode::NoSpace);
    assert!(failed.message.contains("does not say how many"), "{}", failed.message);
    // One piece, and what its record takes, may be written before it is seen.
    assert!(least >= Reserve::OfSize.bytes(64 << 20) - (2 << 20), "{least} bytes were free at the least");
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);
}

#[test]
fn what_a_crash_left_of_a_source_without_an_end_is_cleared_away_at_the_next_start() {
    let disk = SmallDisk::tmpfs("16m");
    let body = noise(20 << 20, 45);
    let origin = Origin::start(move |_| Answer::chunked(&body, "etag: \"v1\"\r\n", None));
    let node = Node::over(disk.path(), reserving());
    assert_eq!(failure(node.bring("a", &origin.url("/a"))).code, FailureCode::NoSpace);
    // As it is between the record and the removal.
    std::fs::write(node.image_dir("a").join("partial.data"), noise(1 << 20, 46)).unwrap();
    let node = node.restart();
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);
}

#[test]
fn a_cancel_clears_what_a_failed_job_has_kept() {
    let body = noise(4 << 20, 43);
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::file(asked, &body, "\"v1\"").cut(2 << 20),
        _ => Answer::status("404 Not Found"),
    });
    let node = Node::new();
    assert_eq!(failure(node.bring("a", &origin.url("/a"))).code, FailureCode::Source);
    assert!(node.images.get("a").unwrap().allocated_bytes > 0);
    assert_eq!(node.cancel("a").unwrap().allocated_bytes, 0);
}

/// A copy of `source` that was interrupted after `position` bytes, and goes on now.
fn go_on(disk: &SmallDisk, source: &Path, position: u64, kept_of: &std::fs::Metadata) -> FileArrival {
    let held = Arc::new(Directory::open(disk.path()).unwrap());
    let names = PartialNames { data: "partial.data", record: "partial.json" };
    let mut content = std::fs::read(source).unwrap();
    content.truncate(usize::try_from(position).unwrap());
    std::fs::write(disk.path().join(names.data), &content).unwrap();
    let mut hasher = Hasher::new(None);
    hasher.update(&content);
    let validator = Validator::File {
        device: kept_of.dev(),
        inode: kept_of.ino(),
        size_bytes: kept_of.len(),
        mtime_ns: kept_of.mtime() * 1_000_000_000 + kept_of.mtime_nsec(),
    };
    let (total, midstate) = (Some(kept_of.len()), hasher.midstate());
    let (complete, proof) = (false, Proof::NotNeeded);
    Kept { position, total, complete, validator, proof, midstate }.store(&held, names).unwrap();
    let spec = Spec {
        dir: held,
        names,
        source: "x".to_owned(),
        format: None,
        expected: None,
        size_max: u64::MAX,
        reserve: Reserve::OfSize,
        hands: Hands::Threads,
        piece_len: PIECE_LEN,
        sync_bytes: 1 << 20,
        sync_interval: PATIENCE,
        meter: Arc::default(),
        stop: Arc::new(Stop::after(PATIENCE)),
    };
    arrive(&spec, &mut FileSource::new(source)).map(|arrived| arrived.sums.sha512)
}

type FileArrival = Result<String, crate::prep::failure::Failure>;

#[test]
fn a_copy_that_goes_on_needs_room_only_for_what_is_left() {
    let disk = SmallDisk::tmpfs("64m");
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, noise(40 << 20, 47)).unwrap();
    let sum = go_on(&disk, &source, 20 << 20, &source.metadata().unwrap()).unwrap();
    assert_eq!(sum, sha512(&noise(40 << 20, 47)));
}

#[test]
fn a_copy_that_begins_again_has_the_room_of_what_is_thrown_away() {
    let disk = SmallDisk::tmpfs("64m");
    let dir = tempfile::tempdir().unwrap();
    let (source, other) = (dir.path().join("source"), dir.path().join("other"));
    std::fs::write(&source, noise(40 << 20, 48)).unwrap();
    std::fs::write(&other, noise(40 << 20, 48)).unwrap();
    let sum = go_on(&disk, &source, 20 << 20, &other.metadata().unwrap()).unwrap();
    assert_eq!(sum, sha512(&noise(40 << 20, 48)));
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
        node.images.open_base(node.images.get("a").unwrap().uuid.unwrap()),
        Err(Error::Failed { .. })
    ));
    assert_eq!(node.images.get("a").unwrap().size_bytes, Some(2 << 20), "the record tells what it was");
}

#[test]
fn a_verification_that_ends_early_says_so_and_changes_nothing_else() {
    let mut hurried = settings();
    hurried.deadline = Duration::ZERO;
    let node = Node::new();
    ready(&node);
    let outcome = |node: &Node| node.images.get("a").unwrap().copies[0].verification.clone();
    assert_eq!(outcome(&node), None);
    node.images.verify("a").unwrap();
    node.wait("a").unwrap();
    assert_eq!(outcome(&node), Some(Verification::Passed));

    let Node { disk, _dir, .. } = node.restart();
    let node = Node::over(&disk, hurried);
    node.images.verify("a").unwrap();
    node.wait("a").unwrap();
    let ended = outcome(&node);
    assert!(matches!(&ended, Some(Verification::Failed(f)) if f.code == FailureCode::TimedOut), "{ended:?}");
    assert_eq!(node.images.get("a").unwrap().state, ImageState::Ready);

    let mut one_at_a_time = settings();
    one_at_a_time.jobs_running_max = 1;
    let silent = stalling();
    let node = Node::over(&disk, one_at_a_time);
    begun(&node, &silent, "b");
    // It waits for its turn, so that it is cancelled for certain.
    node.images.verify("a").unwrap();
    node.cancel("a").unwrap();
    let ended = outcome(&node);
    assert!(matches!(&ended, Some(Verification::Failed(f)) if f.code == FailureCode::Cancelled), "{ended:?}");
    assert_eq!(node.images.get("a").unwrap().state, ImageState::Ready);
}

#[test]
fn verify_finds_what_the_page_cache_hides() {
    let disk = SmallDisk::on_file(&["mkfs.ext4", "-q", "-b", "4096"], 64 << 20);
    let node = Node::over(disk.path(), reserving());
    let path = ready(&node);
    let content = std::fs::read(&path).unwrap();
    // The medium goes bad under the file system.
    let backing = std::fs::OpenOptions::new().read(true).write(true).open(disk.backing_file()).unwrap();
    let bytes = std::fs::read(disk.backing_file()).unwrap();
    let block = &content[1 << 20..(1 << 20) + 4096];
    let at = bytes.chunks_exact(4096).position(|found| found == block).unwrap() * 4096;
    backing.write_all_at(&[!block[9]], at as u64 + 9).unwrap();

    assert!(std::fs::read(&path).unwrap() == content, "the cache still holds the good bytes");
    node.images.verify("a").unwrap();
    assert_eq!(failure(node.wait("a")).code, FailureCode::Corrupt);
    drop(node);
}

#[test]
fn a_clone_shares_its_blocks_where_the_file_system_can() {
    let disk = SmallDisk::on_file(&["mkfs.xfs", "-q", "-m", "reflink=1"], 400 << 20);
    let node = Node::over(disk.path(), reserving());
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, noise(24 << 20, 44)).unwrap();
    node.bring("a", source.to_str().unwrap()).unwrap();
    let held = DiskDir::open(Uuid::nil(), disk.path()).unwrap();
    let before = held.free_bytes().unwrap();
    let clone = node.bring("b", "image:a").unwrap();
    // XFS gives space back late, so there may even be more.
    assert!(held.free_bytes().unwrap() + (4 << 20) > before);
    assert!(node.content("b") == node.content("a"));
    assert_eq!(clone.allocated_bytes, 24 << 20);
    node.delete("a").unwrap();
    node.images.verify("b").unwrap();
    node.wait("b").unwrap();
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

#[test]
fn one_image_on_two_disks_is_found_by_its_uuid_until_both_are_gone() {
    let (one, two) = (Node::new(), Node::new());
    ready(&one);
    let copied = std::process::Command::new("cp").arg("-aT").args([&one.disk, &two.disk]).status().unwrap();
    assert!(copied.success());
    let disks = vec![
        DiskDir::open(Uuid::from_u128(1), &one.disk).unwrap(),
        DiskDir::open(Uuid::from_u128(2), &two.disk).unwrap(),
    ];
    let both = Images::open(disks, settings(), one.host.clone(), one.runtime.handle().clone());
    let uuid = both.get("a").unwrap().uuid.unwrap().to_string();
    assert_eq!(both.get(&uuid).unwrap().name, "a");
    one.runtime.block_on(both.delete("a")).unwrap();
    let second = both.get(&uuid).unwrap();
    assert_eq!(second.name, format!("a~{}", &uuid[..8]));
    one.runtime.block_on(both.delete(&second.name)).unwrap();
    assert!(matches!(both.get(&uuid), Err(Error::NotFound(_))));
}
