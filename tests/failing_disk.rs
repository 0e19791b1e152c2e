//! Failing disks: an error below is an error above for the range that it is about (invariant 0), the rest serves, and the
//! node lives (12). After a failed sync a volume takes no more writes until it is recovered (7). A disk that goes away
//! takes only what is on it, and brings it back.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use nix::{errno::Errno, sys::signal::Signal};

use crate::util::{
    content::{MIB, pattern, read_at, sparse_image},
    disk::{FileSystem, LoopDisk},
    journal::{Dice, Durability, Journal, write_until},
    medium::{Fault, Medium},
    node::Node,
    run::until,
};

const KIB: u64 = 1 << 10;
const SIZE: u64 = 16 * MIB;
/// All of a volume, in sectors.
const WHOLE: (u64, u64) = (0, SIZE / 512);

/// A node on a disk whose medium fails on request.
struct Failing {
    node: Node,
    disk: LoopDisk,
    medium: Medium,
}

impl Failing {
    fn start(file_system: FileSystem) -> Failing {
        let mut node = Node::idle();
        let medium = Medium::mount(&node.path("medium"), (file_system.smallest_mib() + 64) * MIB);
        let disk = LoopDisk::over(&node, &medium.file(), file_system, 512);
        node.restart();
        Failing { node, disk, medium }
    }

    /// The only file on the disk whose name ends so.
    fn file(&self, end: &str) -> PathBuf {
        let files: Vec<_> =
            self.node.files_on_disk().into_iter().filter(|file| file.ends_with(end)).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        self.node.path("disk").join(&files[0])
    }
}

/// Ends the threads of a test, also of one that fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn open(node: &Node, volume: &str) -> File {
    File::options().read(true).write(true).open(node.volume(volume)).unwrap()
}

/// Read a part of a volume, or the error.
fn read(file: &File, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut bytes, at).map(|()| bytes)
}

fn part(bytes: &[u8], range: Range<u64>) -> &[u8] {
    &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
}

fn is_eio<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(Errno::EIO as i32))
}

/// What a volume without an image holds before anything was written.
fn zeros(_sector: u64) -> Vec<u8> {
    vec![0; 512]
}

#[test]
fn a_part_of_an_image_that_the_medium_does_not_give_fails_alone_and_reads_again_once_it_does() {
    let failing = Failing::start(FileSystem::Ext4);
    let (node, base) = (&failing.node, pattern(SIZE, 1));
    fs::write(node.scratch("base.raw"), &base).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    node.run("volume create w --image base");
    let bad = 8 * MIB..8 * MIB + 64 * KIB;
    node.write("w", bad.start, &pattern(64 * KIB, 2));
    node.sh("sync $V/w");
    let image = failing.file("/image");
    let forget = format!("dd if='{}' iflag=nocache count=0 status=none", image.display());
    node.sh(&forget);
    failing.medium.fail(Fault::Read(failing.disk.place_of(node, &image, bad.start, 64 * KIB)));

    let v = open(node, "v");
    for at in (bad.start..bad.end).step_by(4096) {
        assert!(is_eio(read(&v, at, 4096)), "{at}");
    }
    let around = [0..bad.start, bad.end..SIZE];
    for range in around.clone() {
        assert!(read(&v, range.start, range.end - range.start).unwrap() == part(&base, range));
    }
    assert_eq!(read_at(&node.volume("w"), bad.start, 64 * KIB), pattern(64 * KIB, 2));
    // Half a block would need the other half; a whole one needs nothing.
    assert!(is_eio(v.write_all_at(&[7; 512], bad.start)));
    v.write_all_at(&[7; 4096], bad.start + 4096).unwrap();
    v.sync_all().unwrap();
    assert_eq!(read(&v, bad.start + 4096, 4096).unwrap(), [7; 4096]);
    let said = node.refused("image verify base", 1);
    assert!(said.contains("Input/output error"), "{said}");

    failing.medium.mend();
    node.sh(&forget);
    node.run("image verify base");
    assert!(read(&v, bad.start, 4096).unwrap() == part(&base, bad.start..bad.start + 4096));
    assert_eq!(read(&v, bad.start + 4096, 4096).unwrap(), [7; 4096]);
}

#[test]
fn a_write_that_the_medium_refuses_fails_alone() {
    let mut failing = Failing::start(FileSystem::Ext4);
    let node = &failing.node;
    node.run(&format!("volume create v --size {SIZE}"));
    node.write("v", 0, &pattern(MIB, 1));
    node.sh("sync $V/v");
    let bad = 256 * KIB..320 * KIB;
    let data = failing.file("/data");
    failing.medium.fail(Fault::Write(failing.disk.place_of(node, &data, bad.start, 64 * KIB)));

    let v = open(node, "v");
    assert!(is_eio(v.write_all_at(&[7; 4096], bad.start)));
    v.write_all_at(&[8; 4096], bad.end).unwrap();
    v.write_all_at(&[9; 4096], 8 * MIB).unwrap();
    v.sync_all().unwrap();
    assert!(read(&v, 0, bad.start).unwrap() == part(&pattern(MIB, 1), 0..bad.start));
    // What failed is what it was, or what it was to be.
    let found = read(&v, bad.start, 4096).unwrap();
    assert!(found == [7; 4096] || found == part(&pattern(MIB, 1), bad.start..bad.start + 4096));

    failing.medium.mend();
    v.write_all_at(&[7; 4096], bad.start).unwrap();
    v.sync_all().unwrap();
    drop(v);
    failing.node.kill();
    failing.node.restart();
    for (at, byte) in [(bad.start, 7), (bad.end, 8), (8 * MIB, 9)] {
        assert_eq!(read_at(&failing.node.volume("v"), at, 4096), [byte; 4096]);
    }
}

#[test]
fn after_a_failed_sync_a_volume_takes_no_writes_until_it_is_recovered_and_its_neighbour_goes_on() {
    let mut failing = Failing::start(FileSystem::Ext4);
    failing.node.run(&format!("volume create a --size {SIZE}"));
    let map = failing.file("/map");
    failing.node.run(&format!("volume create b --size {SIZE}"));
    let (mut of_a, mut of_b, mut dice) = (Journal::default(), Journal::default(), Dice::new(1));
    let mut write = |node: &Node, volume: &str, journal: &mut Journal| {
        write_until(&open(node, volume), journal, &mut dice, WHOLE, Durability::Fsync, |flushes| {
            flushes >= 10
        })
    };
    write(&failing.node, "a", &mut of_a).unwrap();
    write(&failing.node, "b", &mut of_b).unwrap();
    for (_, place) in failing.disk.places_of(&failing.node, &map) {
        failing.medium.fail(Fault::Write(place));
    }

    assert!(is_eio(write(&failing.node, "a", &mut of_a)));
    for _ in 0..2 {
        let node = &failing.node;
        write(node, "b", &mut of_b).unwrap();
        // One that was marked does not even open for writing.
        let opened = File::options().write(true).open(node.volume("a"));
        assert!(opened.and_then(|a| a.write_all_at(&[1; 4096], 0)).is_err());
        assert_eq!(node.json("volume get a")["state"], "failed");
        // Also after the next start.
        failing.node.kill();
        failing.node.restart();
    }

    failing.medium.mend();
    failing.node.run("volume recover a");
    of_a.check(&failing.node.volume("a"), WHOLE, zeros).unwrap();
    of_b.check(&failing.node.volume("b"), WHOLE, zeros).unwrap();
    write(&failing.node, "a", &mut of_a).unwrap();
    failing.node.kill();
    failing.node.restart();
    of_a.check(&failing.node.volume("a"), WHOLE, zeros).unwrap();
}

/// A disk dies under load; another one of the same node goes on; it comes back with all that was flushed.
fn dies_and_comes_back(file_system: FileSystem, die: impl Fn(&Failing)) {
    let mut failing = Failing::start(file_system);
    let image = failing.node.scratch("base.raw");
    sparse_image(&image, SIZE);
    failing.node.run("image create base --from base.raw --wait");
    failing.node.run("volume create v --image base");
    // There is more room on it, so what comes now comes there.
    failing.node.add_disk("other");
    failing.node.stop(Signal::SIGTERM);
    failing.node.restart();
    failing.node.run(&format!("volume create w --size {SIZE}"));
    let base = fs::read(image).unwrap();
    let before = |sector: u64| part(&base, sector * 512..sector * 512 + 512).to_vec();
    let (mut of_v, mut of_w) = (Journal::default(), Journal::default());

    let (flushes, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let _end = End(&is_over);
        let v = open(&failing.node, "v");
        let (of_v, flushes, is_over) = (&mut of_v, &flushes, &is_over);
        let writer = scope.spawn(move || {
            let mut dice = Dice::new(1);
            write_until(&v, of_v, &mut dice, WHOLE, Durability::Fsync, |n| {
                flushes.store(n, Ordering::SeqCst);
                is_over.load(Ordering::SeqCst)
            })
        });
        until("it is under load", || flushes.load(Ordering::SeqCst) >= 10 || writer.is_finished());
        die(&failing);
        assert!(is_eio(writer.join().unwrap()));
    });

    let node = &failing.node;
    let mut dice = Dice::new(2);
    write_until(&open(node, "w"), &mut of_w, &mut dice, WHOLE, Durability::Fsync, |n| n >= 10).unwrap();
    node.run("volume create x --size 1M");
    assert!(open(node, "v").write_all_at(&[1; 4096], 0).is_err());
    assert!(open(node, "v").sync_all().is_err());
    assert_eq!(node.json("volume get v")["state"], "failed");
    let read = of_v.read_back(&open(node, "v"), WHOLE, before);
    assert!(read.is_err(), "what changed since the last flush cannot be known");

    // What an operator does: stop the node, see to the disk, start the node, recover what says so.
    failing.node.stop(Signal::SIGTERM);
    failing.disk.unmount(&failing.node);
    failing.medium.mend();
    failing.disk.mount_again(&failing.node);
    failing.node.restart();
    let node = &failing.node;
    if node.json("volume get v")["state"] == "failed" {
        node.run("volume recover v");
    }
    of_v.check(&node.volume("v"), WHOLE, before).unwrap();
    of_w.check(&node.volume("w"), WHOLE, zeros).unwrap();
    node.run("image verify base");
    write_until(&open(node, "v"), &mut of_v, &mut dice, WHOLE, Durability::Fsync, |n| n >= 10).unwrap();
    failing.node.kill();
    failing.node.restart();
    of_v.check(&failing.node.volume("v"), WHOLE, before).unwrap();
    failing.node.assert_nothing_is_left_over();
}

#[test]
fn an_ext4_disk_that_answers_nothing_takes_only_its_own_volumes_and_brings_them_back() {
    dies_and_comes_back(FileSystem::Ext4, |failing| failing.medium.fail(Fault::Everything));
}

#[test]
fn an_xfs_disk_that_is_shut_down_takes_only_its_own_volumes_and_brings_them_back() {
    dies_and_comes_back(FileSystem::Xfs, |failing| {
        failing.node.sh("xfs_io -x -c shutdown $D");
    });
}

#[test]
fn a_disk_that_is_unmounted_under_the_node_is_still_written_to_and_its_empty_place_never() {
    let mut node = Node::idle();
    let disk = LoopDisk::mount(&node, FileSystem::Ext4, 128, 512);
    node.restart();
    node.run(&format!("volume create v --size {SIZE}"));
    disk.unmount(&node);
    node.write("v", 0, &pattern(MIB, 1));
    node.run("snapshot create v s");
    node.write("v", 0, &pattern(MIB, 2));
    node.sh("sync $V/v");
    assert!(node.stop(Signal::SIGTERM).success());
    assert_eq!(node.files_on_disk(), Vec::<String>::new());
    // Not made into a new disk, which would hide the one that is missing.
    node.restart();
    assert_eq!(node.names("volume"), Vec::<String>::new());
    assert!(node.log().contains("mount it and restart the node"), "{}", node.log());
    assert!(node.stop(Signal::SIGTERM).success());
    assert_eq!(node.files_on_disk(), Vec::<String>::new());
    disk.mount_again(&node);
    node.restart();
    assert_eq!(read_at(&node.volume("v"), 0, MIB), pattern(MIB, 2));
    node.run("snapshot revert v s");
    assert_eq!(read_at(&node.volume("v"), 0, MIB), pattern(MIB, 1));
    drop((node, disk));
}

#[test]
fn an_image_that_is_cut_under_load_fails_where_it_was_cut_and_serves_the_rest() {
    let node = Node::start();
    let base = pattern(SIZE, 1);
    fs::write(node.scratch("base.raw"), &base).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    node.run("volume create w --image base");
    let half = SIZE / 2;
    node.write("w", half, &pattern(half, 2));
    let image = node.files_on_disk().into_iter().find(|file| file.ends_with("/image")).unwrap();
    let image = node.path("disk").join(image);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).unwrap();

    // Blocks that were read, by whether the image was whole, and by which half.
    let counts = [const { AtomicU64::new(0) }; 4];
    let (is_cut, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let _end = End(&is_over);
        for reader in 0..2 {
            let (node, base, counts, is_cut, is_over) = (&node, &base, &counts, &is_cut, &is_over);
            scope.spawn(move || {
                let (v, mut dice) = (open(node, "v"), Dice::new(reader + 1));
                while !is_over.load(Ordering::SeqCst) {
                    let at = dice.roll(SIZE / 4096) * 4096;
                    let was_cut = is_cut.load(Ordering::SeqCst);
                    let found = read(&v, at, 4096);
                    match (found, at < half) {
                        (Ok(bytes), _) => {
                            assert!(bytes == part(base, at..at + 4096), "{at}");
                            assert!(at < half || !was_cut, "{at} is not there any more");
                        }
                        (Err(error), in_first) => assert!(!in_first && is_eio::<()>(Err(error)), "{at}"),
                    }
                    counts[usize::from(was_cut) * 2 + usize::from(at >= half)].fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let reached = |of: Range<usize>| of.into_iter().all(|n| counts[n].load(Ordering::SeqCst) >= 200);
        until("the whole image is read", || reached(0..2));
        File::options().write(true).open(&image).unwrap().set_len(half).unwrap();
        is_cut.store(true, Ordering::SeqCst);
        until("the cut image is read", || reached(2..4));
    });
    // What a volume has of its own needs no image.
    assert_eq!(read_at(&node.volume("w"), half, half), pattern(half, 2));
    for at in (half..half + MIB).step_by(4096) {
        // One by one: the kernel may cut larger ones in the middle of a block, which then needs the image.
        node.write("v", at, &[3; 4096]);
    }
    node.sh("sync $V/v");
    assert!(read_at(&node.volume("v"), half, MIB).iter().all(|byte| *byte == 3));
    node.refused("image verify base", 5);
}
