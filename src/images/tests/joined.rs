//! Images that are joined from several files, and what their records say of those.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
    time::SystemTime,
};

use bedplate_inspect::{
    source::{FileArgs, OpenArgs},
    stack::Stack,
};

use super::*;
use crate::{
    catalog::store::{PARTIAL_DATA, PARTIAL_RECORD},
    directory::Directory,
    images::joined::{look, sources},
    prep::{
        checksum::Hasher,
        failure::Failure,
        partial::{Kept, PartialNames, Proof},
        progress::Meter,
        source::Validator,
        stop::Stop,
    },
};

const LEN: usize = 1 << 20;

/// A Longhorn replica of three layers in `dir`, each with some noise of its own, and the backing file beside it.
/// Returns the content and the files in order.
fn replica(dir: &Path) -> (Vec<u8>, Vec<PathBuf>) {
    let replica = dir.join("replica");
    fs::create_dir(&replica).unwrap();
    let layers = ["volume-head-002.img", "volume-snap-b.img", "volume-snap-a.img"];
    let mut content = noise(LEN, 60);
    fs::write(dir.join("backing"), &content).unwrap();
    for (n, name) in layers.iter().enumerate().rev() {
        let file = File::create(replica.join(name)).unwrap();
        file.set_len(LEN as u64).unwrap();
        let (at, bytes) = (n * 100 * 4096, noise(8192, n as u64));
        file.write_all_at(&bytes, at as u64).unwrap();
        content[at..at + bytes.len()].copy_from_slice(&bytes);
        let parent = layers.get(n + 1).copied().unwrap_or_default();
        fs::write(replica.join(format!("{name}.meta")), format!(r#"{{"Parent":"{parent}"}}"#)).unwrap();
    }
    let meta = format!(
        r#"{{"Size":{LEN},"Head":"{}","Parent":"{}","BackingFilePath":"/elsewhere"}}"#,
        layers[0], layers[1]
    );
    fs::write(replica.join("volume.meta"), meta).unwrap();
    let files = layers.iter().map(|name| replica.join(name)).chain([dir.join("backing")]).collect();
    (content, files)
}

/// The replica, opened.
fn open(dir: &Path) -> Stack {
    let files = FileArgs { backing: Some(dir.join("backing")), allow_references: None };
    let args = OpenArgs { files, ..OpenArgs::default() };
    bedplate_inspect::source::open(&dir.join("replica"), &args).unwrap()
}

fn request(dir: &Path) -> CreateImage {
    let parts = Parts { backing: Some(dir.join("backing").display().to_string()), allow_references: None };
    CreateImage {
        name: "a".to_owned(),
        from: dir.join("replica").display().to_string(),
        checksum: None,
        disk: None,
        deadline: None,
        internal_snapshot: None,
        parts,
    }
}

fn sources_of(files: &[PathBuf]) -> Vec<SourceFile> {
    let source = |path: &PathBuf| {
        let content = fs::read(path).unwrap();
        let size_bytes = content.len() as u64;
        SourceFile { path: path.display().to_string(), size_bytes, sha512: sha512(&content) }
    };
    files.iter().map(source).collect()
}

#[test]
fn the_files_of_a_joined_image_are_in_its_record_top_first_with_their_digests() {
    let dir = tempfile::tempdir().unwrap();
    let (content, files) = replica(dir.path());
    let node = Node::new();
    node.images.create(&request(dir.path())).unwrap();
    let info = node.wait("a").unwrap();
    assert!(node.content("a") == content);
    assert_eq!(info.sources, sources_of(&files));
    // A snapshot is made of fewer of them.
    let snapshot = Some("b".to_owned());
    let of_snapshot =
        CreateImage { name: "b".to_owned(), internal_snapshot: snapshot, ..request(dir.path()) };
    node.images.create(&of_snapshot).unwrap();
    assert_eq!(node.wait("b").unwrap().sources, sources_of(&files[1..]));
    // They are of the image that was joined, and of none that is made from it.
    assert_eq!(node.bring("c", "image:a").unwrap().sources, []);
    let node = node.restart();
    assert_eq!(node.images.get("a").unwrap().sources, sources_of(&files));
    node.images.verify("a").unwrap();
    assert_eq!(node.wait("a").unwrap().sources, sources_of(&files));
}

#[test]
fn a_source_that_is_written_to_while_it_is_read_fails_the_image_and_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (_, files) = replica(dir.path());
    // Long enough to read that the writer is there meanwhile.
    File::options().write(true).open(&files[3]).unwrap().set_len(256 << 20).unwrap();
    let node = Node::new();
    let ended = AtomicBool::new(false);
    let failure = std::thread::scope(|scope| {
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (file, ended) = (File::options().write(true).open(&files[3]).unwrap(), &ended);
        scope.spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                file.write_all_at(b"x", 77).unwrap();
                let _ = begun.send(());
            }
        });
        has_begun.recv().unwrap();
        node.images.create(&request(dir.path())).unwrap();
        let failure = failure(node.wait("a"));
        ended.store(true, Ordering::SeqCst);
        failure
    });
    assert_eq!(failure.code, FailureCode::Source);
    let path = files[3].display().to_string();
    assert!(failure.message.contains("changed while it was read"), "{}", failure.message);
    assert!(failure.message.contains(&path), "{}", failure.message);
    let info = node.images.get("a").unwrap();
    assert!(matches!(info.state, ImageState::Failed(_)) && info.sources.is_empty(), "{info:?}");
    let left: Vec<_> = fs::read_dir(node.image_dir("a")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["image.json"]);
    // The next try is of what there is then.
    node.images.create(&request(dir.path())).unwrap();
    assert_eq!(node.wait("a").unwrap().sources, sources_of(&files));
}

#[test]
fn what_an_earlier_run_joined_is_joined_again_as_nobody_knows_of_which_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (content, _) = replica(dir.path());
    let node = Node::new();
    let turns = node.runtime.block_on(node.images.0.turns.clone().acquire_many_owned(4)).unwrap();
    node.images.create(&request(dir.path())).unwrap();
    // As a node leaves it that went down when everything had arrived, and before it was published.
    let (at, then) = (node.image_dir("a"), noise(LEN, 61));
    fs::write(at.join(PARTIAL_DATA), &then).unwrap();
    let mut hasher = Hasher::new(None);
    hasher.update(&then);
    let (position, total, complete) = (LEN as u64, Some(LEN as u64), true);
    let (validator, proof, midstate) = (Validator::None, Proof::NotNeeded, hasher.midstate());
    let names = PartialNames { data: PARTIAL_DATA, record: PARTIAL_RECORD };
    let kept = Kept { position, total, complete, validator, proof, midstate };
    kept.store(&Directory::open(&at).unwrap(), names).unwrap();
    drop(turns);
    node.wait("a").unwrap();
    assert!(node.content("a") == content);
}

#[test]
fn a_change_is_found_by_the_time_alone_and_also_of_a_file_that_gives_no_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, files) = replica(dir.path());
    let (meter, stop) = (Meter::default(), Stop::after(PATIENCE));
    let path = dir.path().join("replica");
    let open = || open(dir.path());
    for file in &files {
        let before = look(&open(), &meter, &stop).unwrap();
        let stack = open();
        assert_eq!(sources(&path, &stack, &before, &meter, &stop).unwrap(), sources_of(&files));
        File::options().write(true).open(file).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let found = sources(&path, &stack, &before, &meter, &stop);
        assert!(matches!(&found, Err(Failure::Changed(changed)) if changed == file), "{found:?}");
    }
    // Another file under the same name is another file.
    let before = look(&open(), &meter, &stop).unwrap();
    let modified = fs::metadata(&files[3]).unwrap().modified().unwrap();
    fs::copy(&files[3], dir.path().join("copy")).unwrap();
    File::options().write(true).open(dir.path().join("copy")).unwrap().set_modified(modified).unwrap();
    fs::rename(dir.path().join("copy"), &files[3]).unwrap();
    let found = sources(&path, &open(), &before, &meter, &stop);
    assert!(matches!(&found, Err(Failure::Changed(changed)) if changed == &files[3]), "{found:?}");
}

#[test]
fn a_write_that_leaves_no_other_time_is_found_in_a_file_that_was_written_to_just_now() {
    let dir = tempfile::tempdir().unwrap();
    let (_, files) = replica(dir.path());
    let (meter, stop) = (Meter::default(), Stop::after(PATIENCE));
    for file in &files {
        let then = fs::metadata(file).unwrap().modified().unwrap();
        let before = look(&open(dir.path()), &meter, &stop).unwrap();
        let mut content = fs::read(file).unwrap();
        content[77] ^= 1;
        // As file systems do that keep times in steps.
        fs::write(file, content).unwrap();
        File::options().write(true).open(file).unwrap().set_modified(then).unwrap();
        let found = sources(&dir.path().join("replica"), &open(dir.path()), &before, &meter, &stop);
        assert!(matches!(&found, Err(Failure::Changed(changed)) if changed == file), "{found:?}");
    }
}
