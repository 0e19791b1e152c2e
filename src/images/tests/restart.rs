//! Nodes that go down in the middle, politely or not.

use std::{os::unix::fs::FileExt, process::Command};

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
    },
};

const LEN: usize = 6_000_123;
/// Where the first connection falls silent.
const SILENT_AT: usize = 3_500_000;
const NAMES: PartialNames = PartialNames { data: PARTIAL_DATA, record: PARTIAL_RECORD };

/// Falls silent once, then is good.
fn origin_that_stalls_once(content: &[u8]) -> Origin {
    let content = content.to_vec();
    Origin::start(move |asked| {
        let answer = Answer::file(asked, &content, "\"v1\"");
        if asked.index == 0 { answer.cut(SILENT_AT).paced(Pace::Stall) } else { answer }
    })
}

fn patient() -> Settings {
    let mut settings = settings();
    settings.http.idle_timeout = PATIENCE;
    settings
}

/// What is kept in the only image directory of a disk, once it is at least `position`.
fn kept_on(disk: &Path, position: u64) -> (PathBuf, Kept) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(image) = std::fs::read_dir(disk.join("images")).ok().and_then(|mut dirs| dirs.next()) {
            let image = image.unwrap().path();
            if let Some(kept) = Kept::load(&Directory::open(&image).unwrap(), NAMES)
                && kept.position >= position
            {
                return (image, kept);
            }
        }
        assert!(Instant::now() < deadline, "nothing was kept");
        std::thread::sleep(POLL);
    }
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target)
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn what_was_synced_is_not_fetched_again_after_a_power_cut_and_what_was_not_is_not_trusted() {
    let content = noise(LEN, 20);
    let origin = origin_that_stalls_once(&content);
    let node = Node::with(patient());
    node.create("a", &origin.url("/a"), None).unwrap();
    let (_, kept) = kept_on(&node.disk, SILENT_AT as u64);
    assert_eq!(kept.position, SILENT_AT as u64, "the last bytes are kept by time, not by amount");

    let copy = tempfile::tempdir().unwrap();
    copy_tree(&node.disk, copy.path());
    let (image, kept) = kept_on(copy.path(), 1);
    // Writes past the last sync survive in any form.
    let data = std::fs::OpenOptions::new().write(true).open(image.join(PARTIAL_DATA)).unwrap();
    data.write_all_at(&noise(1 << 20, 21), kept.position).unwrap();

    let before = origin.seen().len();
    let node = Node::over(copy.path(), settings());
    let info = node.wait("a").unwrap();
    assert_eq!(info.sha512, Some(sha512(&content)));
    assert!(node.content("a") == content);
    assert_eq!(origin.seen()[before].0.first() as u64, kept.position);
    assert!(!image.join(PARTIAL_DATA).exists() && !image.join(PARTIAL_RECORD).exists());
}

#[test]
fn a_killed_node_goes_on_where_it_had_synced() {
    const CHILD: &str = "BEDPLATE_TEST_KILLED_NODE";
    if let Ok(task) = std::env::var(CHILD) {
        // This process is the node that will be killed.
        let (disk, url) = task.split_once('|').unwrap();
        let node = Node::over(Path::new(disk), patient());
        node.bring("a", url).unwrap();
        return;
    }
    let content = noise(LEN, 22);
    let origin = origin_that_stalls_once(&content);
    let disk = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "images::tests::restart::a_killed_node_goes_on_where_it_had_synced"])
        .env(CHILD, format!("{}|{}", disk.path().display(), origin.url("/a")))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let (_, kept) = kept_on(disk.path(), SILENT_AT as u64);
    child.kill().unwrap();
    child.wait().unwrap();

    let node = Node::over(disk.path(), settings());
    node.wait("a").unwrap();
    assert!(node.content("a") == content);
    assert_eq!(origin.seen()[1].0.first() as u64, kept.position);
    assert_eq!(origin.seen().len(), 2);
}

#[test]
fn a_shutdown_keeps_all_that_arrived_and_the_next_start_goes_on_by_itself() {
    let content = noise(LEN, 23);
    let origin = origin_that_stalls_once(&content);
    let mut patient = patient();
    // Only the shutdown itself can be what syncs.
    (patient.sync_bytes, patient.sync_interval) = (u64::MAX, PATIENCE);
    let node = Node::with(patient);
    node.create("a", &origin.url("/a"), None).unwrap();
    node.until("a", "the last byte before the silence", |info| {
        info.copies[0].progress.as_ref().is_some_and(|p| p.done_bytes >= 3 << 20)
    });
    let node = node.restart();
    let asked_again = node.wait("a").map(|_| origin.seen()[1].0.first()).unwrap();
    assert!(asked_again >= 3 << 20, "{asked_again}");
    assert!(node.content("a") == content);
}

#[test]
fn a_prefix_whose_midstate_is_of_no_use_is_read_again_and_not_fetched() {
    let content = noise(LEN, 24);
    let origin = origin_that_stalls_once(&content);
    let node = Node::with(patient());
    node.create("a", &origin.url("/a"), None).unwrap();
    kept_on(&node.disk, SILENT_AT as u64);
    let copy = tempfile::tempdir().unwrap();
    copy_tree(&node.disk, copy.path());
    let (image, kept) = kept_on(copy.path(), 1);
    let mut json = serde_json::to_value(&kept).unwrap();
    json["midstate"]["sha512"] = "00".into();
    let foreign: Kept = serde_json::from_value(json).unwrap();
    foreign.store(&Directory::open(&image).unwrap(), NAMES).unwrap();

    let node = Node::over(copy.path(), settings());
    assert_eq!(node.wait("a").unwrap().sha512, Some(sha512(&content)));
    assert_eq!(origin.seen()[1].0.first() as u64, kept.position);
}

#[test]
fn an_image_that_was_renamed_but_not_recorded_becomes_ready_without_its_source() {
    for source in [None, Some("upload")] {
        renamed_but_not_recorded(source);
    }
}

fn renamed_but_not_recorded(source: Option<&str>) {
    let content = noise(100_000, 25);
    let origin = Origin::file(&content);
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    let dir = node.image_dir("a");
    let disk = node.disk.clone();
    // As it is between the rename and the record.
    let record = std::fs::read(dir.join("image.json")).unwrap();
    let mut record = ImageRecord::parse(&record, &dir).unwrap();
    record.state = RecordState::InProgress;
    record.source = source.map_or(record.source, str::to_owned);
    let held = Directory::open(&dir).unwrap();
    held.replace("image.json", &record.to_json()).unwrap();
    let mut hasher = Hasher::new(None);
    hasher.update(&content);
    let kept = Kept {
        position: content.len() as u64,
        total: Some(content.len() as u64),
        complete: true,
        validator: Validator::None,
        proof: Proof::NotNeeded,
        midstate: hasher.midstate(),
    };
    kept.store(&held, NAMES).unwrap();
    drop(origin);

    let node_again = Node::over(&disk, settings());
    assert_eq!(node_again.wait("a").unwrap().sha512, Some(sha512(&content)));
    assert!(node_again.content("a") == content);
}

#[test]
fn jobs_wait_for_their_turn_and_are_pending_meanwhile() {
    let content = noise(LEN, 26);
    let first = origin_that_stalls_once(&content);
    let second = Origin::file(&content);
    let mut one_at_a_time = patient();
    one_at_a_time.jobs_running_max = 1;
    let node = Node::with(one_at_a_time);
    node.create("a", &first.url("/a"), None).unwrap();
    node.until("a", "the first byte", |info| {
        info.copies[0].progress.as_ref().is_some_and(|p| p.done_bytes > 0)
    });
    node.create("b", &second.url("/b"), None).unwrap();
    assert_eq!(node.images.get("b").unwrap().state, ImageState::Pending);
    assert!(second.seen().is_empty());
    node.cancel("a").unwrap();
    node.wait("b").unwrap();
}
