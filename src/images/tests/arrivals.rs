//! Images from files, devices and other images; names, cancelling and deleting.

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    sync::Barrier,
};

use super::{
    origin::{Answer, Origin, Pace},
    *,
};
use crate::{
    catalog::store::{PARTIAL_DATA, PARTIAL_RECORD},
    directory::Directory,
    prep::{
        checksum::Hasher,
        partial::{Kept, PartialNames, Proof},
        source::Validator,
        testing::MemoryDevice,
    },
};

/// A file with a hole, data, a hole and an odd end.
fn sparse_file(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = dir.join("source.raw");
    let mut content = vec![0; (5 << 20) + 777];
    content[1 << 20..(1 << 20) + 300_000].copy_from_slice(&noise(300_000, 30));
    let end = content.len();
    content[end - 10..].copy_from_slice(&[9; 10]);
    let file = std::fs::File::create(&path).unwrap();
    file.write_all_at(&content[1 << 20..(1 << 20) + 300_000], 1 << 20).unwrap();
    file.write_all_at(&[9; 10], end as u64 - 10).unwrap();
    (path, content)
}

#[test]
fn a_file_comes_in_with_its_holes_and_becomes_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let (path, content) = sparse_file(dir.path());
    let node = Node::new();
    let info = node.bring("a", path.to_str().unwrap()).unwrap();
    assert!(node.content("a") == content);
    assert_eq!(info.sha512, Some(sha512(&content)));
    assert!(info.allocated_bytes < 400_000, "{}", info.allocated_bytes);
    assert_eq!(std::fs::metadata(&info.copies[0].path).unwrap().mode() & 0o777, 0o444);
    assert_eq!(info.source, path.to_str().unwrap());

    let device = node.images.open_device("a").unwrap();
    assert_eq!(device.geometry().size.0, (content.len() as u64).next_multiple_of(512));
    let mut sector = [1; 512];
    device.read_at(&mut sector, device.geometry().size.0 - 512).unwrap();
    let odd = content.len() % 512;
    assert!(sector[..odd] == content[content.len() - odd..] && sector[odd..].iter().all(|b| *b == 0));
    let uuid = info.uuid.unwrap();
    assert!(node.images.file_of_content(uuid).unwrap().is_none(), "the device is longer than the file");
    let (base, sum) = node.images.open_base(uuid).unwrap();
    let shared = || node.images.0.open_shared("a").unwrap().0;
    assert!(Arc::ptr_eq(&shared(), &shared()), "it is in memory once");
    let mut read = vec![0; content.len()];
    base.read_at(&mut read, 0).unwrap();
    assert!(read == content && sum == sha512(&content));
    assert_eq!(node.images.get(&uuid.to_string()).unwrap().name, "a");
}

#[test]
fn a_volume_comes_in_from_its_view_without_reading_zeros() {
    let node = Node::new();
    let mut content = vec![0; 3 << 20];
    content.extend_from_slice(&noise(3 << 20, 31));
    node.host.volumes.lock().unwrap().insert("web".to_owned(), Arc::new(MemoryDevice(content.clone())));
    let info = node.bring("a", "volume:web@monday").unwrap();
    assert!(node.content("a") == content);
    assert!(info.allocated_bytes <= (3 << 20) + 8192);
    assert_eq!(info.source, "volume:web@monday");
    assert!(failure(node.bring("b", "volume:other")).message.contains("other"));
}

#[test]
fn a_volume_has_no_internal_snapshots_and_that_is_said_before_it_is_copied() {
    let node = Node::new();
    let request = CreateImage {
        name: "a".to_owned(),
        from: "volume:web".to_owned(),
        checksum: None,
        disk: None,
        deadline: None,
        internal_snapshot: Some("monday".to_owned()),
        parts: Parts::default(),
    };
    let refused = node.images.create(&request);
    assert!(
        matches!(&refused, Err(Error::Invalid(text)) if text.contains("volume:web@monday")),
        "{refused:?}"
    );
    assert!(node.images.list().is_empty());
}

/// All turns of the jobs: as long as they are held, none begins.
fn all_turns(node: &Node) -> tokio::sync::OwnedSemaphorePermit {
    node.runtime.block_on(node.images.0.turns.clone().acquire_many_owned(4)).unwrap()
}

#[test]
fn a_volume_that_begins_again_is_raw_whatever_its_guest_wrote_into_it() {
    let node = Node::new();
    let mut content = noise(3 << 20, 50);
    content[..8].copy_from_slice(b"\x1f\x8b\x08\0\0\0\0\0");
    node.host.volumes.lock().unwrap().insert("web".to_owned(), Arc::new(MemoryDevice(content.clone())));
    let turns = all_turns(&node);
    node.create("a", "volume:web", None).unwrap();
    // As a node leaves it that went down in the middle.
    let dir = node.image_dir("a");
    std::fs::write(dir.join(PARTIAL_DATA), &content[..1 << 20]).unwrap();
    let mut hasher = Hasher::new(None);
    hasher.update(&content[..1 << 20]);
    let kept = Kept {
        position: 1 << 20,
        total: Some(3 << 20),
        complete: false,
        validator: Validator::None,
        proof: Proof::NotNeeded,
        midstate: hasher.midstate(),
    };
    let names = PartialNames { data: PARTIAL_DATA, record: PARTIAL_RECORD };
    kept.store(&Directory::open(&dir).unwrap(), names).unwrap();
    drop(turns);
    assert_eq!(node.wait("a").unwrap().format, Some(Format::Raw));
    assert!(node.content("a") == content);
}

#[test]
fn the_verification_of_what_was_uploaded_once_is_no_upload() {
    let node = Node::new();
    node.create("a", "upload", None).unwrap();
    let parts = node.images.upload("a").unwrap();
    node.runtime.block_on(async {
        parts.send(Some(noise(1 << 20, 51).into())).await.unwrap();
        parts.send(None).await.unwrap();
    });
    node.wait("a").unwrap();
    let turns = all_turns(&node);
    node.images.verify("a").unwrap();
    node.images.end_uploads();
    drop(turns);
    assert_eq!(node.wait("a").unwrap().copies[0].verification, Some(Verification::Passed));
}

#[test]
fn uploads_that_are_asked_for_at_once_keep_to_their_limit() {
    let node = Node::new();
    let barrier = Barrier::new(2 * UPLOADS_MAX);
    let ask = |n| {
        barrier.wait();
        match node.create(&format!("a{n}"), "upload", None) {
            Ok(_) => 1,
            Err(Error::Busy("UPLOADS_MAX")) => 0,
            Err(e) => panic!("{e}"),
        }
    };
    let ask = &ask;
    let begun: usize = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..2 * UPLOADS_MAX).map(|n| scope.spawn(move || ask(n))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    // Before anything is asserted: nobody sends them.
    assert!(node.runtime.block_on(node.images.shutdown(PATIENCE)));
    assert_eq!(begun, UPLOADS_MAX);
}

#[test]
fn a_clone_is_the_same_image_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, content) = sparse_file(dir.path());
    let node = Node::new();
    let original = node.bring("a", path.to_str().unwrap()).unwrap();
    let copy = node.bring("b", "image:a").unwrap();
    assert!(node.content("b") == content);
    assert_eq!(copy.sha512, original.sha512);
    assert_ne!(copy.uuid, original.uuid);
    assert!(copy.allocated_bytes < 400_000);
    node.delete("a").unwrap();
    assert!(node.content("b") == content);
    assert!(matches!(node.create("c", "image:a", None), Err(Error::NotFound(_))));
    node.create("d", "image:b", Some(&"0".repeat(128))).unwrap();
    assert_eq!(failure(node.wait("d")).code, FailureCode::Checksum);
    node.create("e", "image:b", Some(&format!("sha256:{}", hex(&sha2::Sha256::digest(&content))))).unwrap();
    node.wait("e").unwrap();
}

#[test]
fn a_clone_of_damaged_bytes_fails_and_puts_its_original_in_doubt() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sparse_file(dir.path());
    let node = Node::new();
    let info = node.bring("a", path.to_str().unwrap()).unwrap();
    damage_quietly(&info.copies[0].path);
    let failed = failure(node.bring("b", "image:a"));
    assert_eq!(failed.code, FailureCode::Corrupt);
    assert_eq!(failure(node.wait("a")).code, FailureCode::Corrupt);
}

/// Change a byte of a file, and nothing that can be seen from outside.
pub fn damage_quietly(path: &Path) {
    let times = std::fs::metadata(path).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0xaa], (1 << 20) + 5).unwrap();
    file.set_modified(times.modified().unwrap()).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn formats_that_cannot_be_served_are_refused_before_they_have_arrived() {
    let mut xz = b"\xfd7zXZ\0".to_vec();
    xz.resize(3 << 20, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw.xz");
    std::fs::write(&path, &xz).unwrap();
    let node = Node::new();
    let failed = failure(node.bring("a", path.to_str().unwrap()));
    assert_eq!(failed.code, FailureCode::Unsupported);
    assert!(failed.message.contains("xz"));
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);
}

#[test]
fn what_is_not_a_file_with_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    let node = Node::new();
    assert_eq!(failure(node.bring("a", empty.to_str().unwrap())).code, FailureCode::Unsupported);
    assert_eq!(failure(node.bring("b", "/dev/zero")).code, FailureCode::Unsupported);
    assert_eq!(failure(node.bring("c", dir.path().to_str().unwrap())).code, FailureCode::Unsupported);
    assert!(matches!(node.create("d", "/no/such/file", None), Err(Error::Storage(e)) if e.is_not_found()));
    assert!(matches!(node.create("d", "relative", None), Err(Error::Invalid(_))));
    assert!(matches!(node.create("../d", "/dev/null", None), Err(Error::Name { .. })));
    assert!(matches!(node.create("d", "/dev/null", Some("12")), Err(Error::Invalid(_))));
    assert!(matches!(node.images.get("d"), Err(Error::NotFound(_))));
}

#[test]
fn of_two_that_want_one_name_one_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sparse_file(dir.path());
    let node = Node::new();
    let barrier = Barrier::new(8);
    let won: usize = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    match node.create("a", path.to_str().unwrap(), None) {
                        Ok(_) => 1,
                        Err(Error::Exists(_)) => 0,
                        Err(e) => panic!("{e}"),
                    }
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    node.wait("a").unwrap();
    assert_eq!(std::fs::read_dir(node.disk.join("images")).unwrap().count(), 1);
}

/// Falls silent in the middle.
pub fn stalling() -> Origin {
    let content = noise(4 << 20, 32);
    Origin::start(move |asked| Answer::file(asked, &content, "\"v1\"").cut(2 << 20).paced(Pace::Stall))
}

/// A download whose first bytes are here.
pub fn begun(node: &Node, origin: &Origin, name: &str) {
    node.create(name, &origin.url("/a"), None).unwrap();
    node.until(name, "the first byte", |info| {
        info.copies[0].progress.as_ref().is_some_and(|p| p.done_bytes > 0)
    });
}

#[test]
fn a_cancelled_job_fails_as_cancelled_and_leaves_no_bytes() {
    let (node, origin) = (Node::new(), stalling());
    begun(&node, &origin, "a");
    let info = node.cancel("a").unwrap();
    assert!(matches!(info.state, ImageState::Failed(f) if f.code == FailureCode::Cancelled));
    assert_eq!(info.allocated_bytes, 0);
    let good = Origin::file(&noise(1000, 33));
    // Another source is another image.
    assert!(matches!(node.create("a", &good.url("/a"), None), Err(Error::Exists(_))));
    node.delete("a").unwrap();
    node.bring("a", &good.url("/a")).unwrap();
    assert!(matches!(node.runtime.block_on(node.images.cancel("a")), Err(Error::NotRunning(_))));
}

#[test]
fn deleting_an_image_in_progress_cancels_it_and_frees_its_name() {
    let (node, origin) = (Node::new(), stalling());
    begun(&node, &origin, "a");
    node.delete("a").unwrap();
    assert!(matches!(node.images.get("a"), Err(Error::NotFound(_))));
    assert_eq!(std::fs::read_dir(node.disk.join("images")).unwrap().count(), 0);
    assert!(matches!(node.delete("a"), Err(Error::NotFound(_))));
}

#[test]
fn an_image_whose_deletion_was_not_finished_is_not_used_any_more_and_can_be_deleted() {
    let node = Node::new();
    let origin = Origin::file(&noise(100_000, 33));
    node.bring("a", &origin.url("/a")).unwrap();
    let obstacle = node.image_dir("a").join("partial.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    node.delete("a").unwrap_err();
    let left = node.images.get("a").unwrap();
    assert!(matches!(left.state, ImageState::Failed(_)), "{left:?}");
    assert!(matches!(node.images.open_base(left.uuid.unwrap()), Err(Error::Failed { .. })));
    std::fs::remove_dir(&obstacle).unwrap();
    node.delete("a").unwrap();
    assert!(matches!(node.images.get("a"), Err(Error::NotFound(_))));
    assert_eq!(std::fs::read_dir(node.disk.join("images")).unwrap().count(), 0);
}

#[test]
fn what_is_kept_of_a_failed_download_is_used_when_it_is_created_again() {
    let content = noise(4 << 20, 34);
    let (body, well) = (content.clone(), Arc::new(Mutex::new(false)));
    let cured = well.clone();
    let origin = Origin::start(move |asked| {
        let answer = Answer::file(asked, &body, "\"v1\"");
        let sent = if asked.first() == 0 { 2 << 20 } else { 0 };
        if *cured.lock().unwrap() { answer } else { answer.cut(sent) }
    });
    let node = Node::new();
    assert_eq!(failure(node.bring("a", &origin.url("/a"))).code, FailureCode::Source);
    *well.lock().unwrap() = true;
    let before = origin.seen().len();
    node.bring("a", &origin.url("/a")).unwrap();
    assert_eq!(origin.seen()[before].0.first(), 2 << 20);
    assert!(node.content("a") == content);
}

/// An image of which everything had arrived when its job failed, as the disk may refuse its last record. Its origin now
/// gives `now` with this tag.
fn failed_at_the_last_step(
    content: &[u8],
    kept: Validator,
    now: &[u8],
    etag: &'static str,
) -> (Node, Origin) {
    let (first, second) = (content.to_vec(), now.to_vec());
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::file(asked, &first, "\"v1\""),
        _ => Answer::file(asked, &second, etag),
    });
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    let dir = node.image_dir("a");
    let mut record = ImageRecord::parse(&std::fs::read(dir.join("image.json")).unwrap(), &dir).unwrap();
    let failure = FailureRecord { code: FailureCode::Storage, message: "refused".to_owned() };
    record.state = RecordState::Failed { failure, published: None };
    std::fs::rename(dir.join("image"), dir.join(PARTIAL_DATA)).unwrap();
    let held = Directory::open(&dir).unwrap();
    held.replace("image.json", &record.to_json()).unwrap();
    let mut hasher = Hasher::new(None);
    hasher.update(content);
    let names = PartialNames { data: PARTIAL_DATA, record: PARTIAL_RECORD };
    let kept = Kept {
        position: content.len() as u64,
        total: Some(content.len() as u64),
        complete: true,
        validator: kept,
        proof: Proof::NotNeeded,
        midstate: hasher.midstate(),
    };
    kept.store(&held, names).unwrap();
    (node.restart(), origin)
}

#[test]
fn what_is_kept_is_used_again_when_the_origin_proves_that_it_is_the_same() {
    let content = noise(1 << 20, 35);
    let etag = Validator::Etag("\"v1\"".to_owned());
    let (node, origin) = failed_at_the_last_step(&content, etag, &content, "\"v1\"");
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    let (asked, sent) = origin.seen()[1].clone();
    assert_eq!((origin.seen().len(), asked.first(), sent), (2, content.len() - 1, 1));
}

#[test]
fn what_is_kept_is_not_taken_for_what_the_origin_has_now() {
    let (old, new) = (noise(1 << 20, 36), noise(1 << 20, 37));
    let etag = || Validator::Etag("\"v1\"".to_owned());
    for (kept, now) in [(etag(), "\"v2\""), (Validator::None, "\"v1\"")] {
        let (node, origin) = failed_at_the_last_step(&old, kept, &new, now);
        let info = node.bring("a", &origin.url("/a")).unwrap();
        assert_eq!(info.sha512, Some(sha512(&new)));
        assert!(node.content("a") == new);
    }
}

#[test]
fn the_proof_is_still_asked_for_when_the_node_restarts_before_it_came() {
    let (old, new) = (noise(1 << 20, 38), noise(1 << 20, 39));
    let (node, origin) = failed_at_the_last_step(&old, Validator::Etag("\"v1\"".to_owned()), &new, "\"v2\"");
    let url = origin.url("/a");
    // No turn is free, so that the node goes down before anybody has asked.
    let turns = all_turns(&node);
    node.create("a", &url, None).unwrap();
    let node = node.restart();
    drop(turns);
    assert_eq!(node.wait("a").unwrap().sha512, Some(sha512(&new)));
}

#[test]
fn who_holds_a_failed_image_holds_it_when_it_is_created_again() {
    let body = noise(1 << 20, 52);
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::status("404 Not Found"),
        _ => Answer::file(asked, &body, "\"v1\""),
    });
    let node = Node::new();
    failure(node.bring("a", &origin.url("/a")));
    let hold = node.images.hold("a", "volume web1, which is being made").unwrap();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(matches!(node.delete("a"), Err(Error::InUse { .. })));
    drop(hold);
    node.delete("a").unwrap();
}

#[test]
fn an_image_that_is_called_like_the_uuid_of_another_is_never_taken_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    std::fs::write(&one, noise(1 << 20, 53)).unwrap();
    std::fs::write(&two, noise(1 << 20, 54)).unwrap();
    let node = Node::new();
    let image = node.bring("a", one.to_str().unwrap()).unwrap();
    let uuid = image.uuid.unwrap();
    let refused = node.create(&uuid.to_string(), two.to_str().unwrap(), None);
    assert!(matches!(refused, Err(Error::Exists(_))), "{refused:?}");

    // Another disk may bring such a name nevertheless.
    node.bring("b", two.to_str().unwrap()).unwrap();
    let was = node.image_dir("b");
    let mut record = ImageRecord::parse(&std::fs::read(was.join("image.json")).unwrap(), &was).unwrap();
    record.name = ImageName::parse(&uuid.to_string()).unwrap();
    std::fs::write(was.join("image.json"), record.to_json()).unwrap();
    std::fs::rename(&was, was.with_file_name(record.directory_name())).unwrap();
    let node = node.restart();
    assert_eq!(node.images.list().len(), 2);
    assert_eq!(Some(node.images.open_base(uuid).unwrap().1), image.sha512);
    assert_eq!(node.images.get(&record.uuid.to_string()).unwrap().name, uuid.to_string());
}

#[test]
fn an_image_in_use_stays_and_the_refusal_names_its_users() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sparse_file(dir.path());
    let node = Node::new();
    let uuid = node.bring("a", path.to_str().unwrap()).unwrap().uuid.unwrap();
    node.host.users.lock().unwrap().insert(uuid, vec!["volume web1".to_owned(), "volume web2".to_owned()]);
    let refused = node.delete("a").unwrap_err();
    assert!(refused.to_string().contains("volume web1, volume web2"), "{refused}");
    node.host.users.lock().unwrap().clear();
    let hold = node.images.hold("a", "volume web3, which is being made").unwrap();
    assert!(matches!(node.delete("a"), Err(Error::InUse { .. })));
    drop(hold);
    let device = node.images.open_device("a").unwrap();
    node.delete("a").unwrap();
    let mut buffer = [0; 512];
    device.read_at(&mut buffer, 1 << 20).unwrap();
    assert!(matches!(node.images.open_device("a"), Err(Error::NotFound(_))));
}
