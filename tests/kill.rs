//! SIGKILL of the node at moments that matter: what was acknowledged as durable is there after the restart, what was
//! under way has happened or has not, and nothing is left over.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use nix::libc::O_DSYNC;
use serde_json::Value;

use crate::util::{
    content::{MIB, pattern, read_at, sparse_image},
    journal::{Dice, Durability, Journal, SECTOR, write_until},
    long,
    node::Node,
    origin::Origin,
    run::{DEADLINE, until},
};

const SIZE: u64 = 64 * MIB;
const WRITERS: u64 = 4;

/// A node with a volume `v` over an image of holes and data, and the image's file.
fn with_volume() -> (Node, Vec<u8>) {
    let node = Node::start();
    sparse_image(&node.scratch("base.raw"), SIZE);
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    let base = fs::read(node.scratch("base.raw")).unwrap();
    (node, base)
}

fn sector_of(content: &[u8], sector: u64) -> Vec<u8> {
    let at = usize::try_from(sector * SECTOR).unwrap();
    content[at..at + 512].to_vec()
}

/// The part of a volume that a writer has to itself.
fn region(writer: u64) -> (u64, u64) {
    let count = SIZE / SECTOR / WRITERS;
    (writer * count, count)
}

/// Let all writers change the volume, kill the node once each has `flushes` acknowledged flushes and `meanwhile` has
/// returned, and let the writers end with the errors that follow.
fn write_until_killed(
    node: &mut Node,
    journals: &mut [Journal],
    seed: u64,
    flushes: u64,
    meanwhile: impl FnOnce(&Node),
) {
    let path = node.volume("v");
    let (barrier, killed) = (Barrier::new(journals.len() + 1), AtomicBool::new(false));
    let counts: Vec<AtomicU64> = journals.iter().map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        let mut writers = Vec::new();
        for (writer, journal) in (0..).zip(journals.iter_mut()) {
            let (path, barrier, killed) = (&path, &barrier, &killed);
            let count = &counts[usize::try_from(writer).unwrap()];
            writers.push(scope.spawn(move || {
                // Half of them sync now and then, half with every write.
                let (durability, flags) =
                    if writer % 2 == 0 { (Durability::Fsync, 0) } else { (Durability::Dsync, O_DSYNC) };
                let file = fs::File::options().read(true).write(true).custom_flags(flags).open(path).unwrap();
                let mut dice = Dice::new(seed * 100 + writer + 1);
                barrier.wait();
                let ended = write_until(&file, journal, &mut dice, region(writer), durability, |flushes| {
                    count.store(flushes, Ordering::SeqCst);
                    false
                });
                let error = ended.expect_err("nothing else ends it");
                assert!(killed.load(Ordering::SeqCst), "a writer failed before the kill: {error}");
            }));
        }
        barrier.wait();
        meanwhile(node);
        until("every writer has flushed", || {
            writers.iter().any(|writer| writer.is_finished())
                || counts.iter().all(|count| count.load(Ordering::SeqCst) >= flushes)
        });
        killed.store(true, Ordering::SeqCst);
        node.kill();
    });
}

#[test]
fn what_was_synced_is_there_after_each_of_several_kills() {
    let (mut node, base) = with_volume();
    let mut journals = vec![Journal::default(); usize::try_from(WRITERS).unwrap()];
    let rounds = if long() { 40 } else { 5 };
    for round in 0..rounds {
        let flushes = 5 + 20 * (round % 5);
        write_until_killed(&mut node, &mut journals, round, flushes, |node| {
            // Something of a volume's life goes on in each round.
            match round % 5 {
                1 => drop(node.run(&format!("snapshot create v s{round}"))),
                2 => drop(node.run(&format!("volume clone v c{round}"))),
                3 => drop(node.run(&format!("snapshot delete v s{}", round - 2))),
                4 => drop(node.run("volume resize v 64M")),
                _ => {}
            }
        });
        node.restart();
        for (writer, journal) in (0..).zip(&mut journals) {
            let before = |sector| sector_of(&base, sector);
            journal.check(&node.volume("v"), region(writer), before).unwrap();
        }
    }
    assert!(journals.iter().all(|journal| journal.sectors() > 100));
    node.idle_jobs();
    node.assert_nothing_is_left_over();
    // Where nobody wrote, the image still shows through.
    let written: u64 = journals.iter().map(|journal| journal.sectors() as u64).sum();
    assert!(written < SIZE / SECTOR);
    node.run("image verify base");
}

#[test]
fn fio_verifies_after_a_kill_what_it_had_synced_before() {
    let (mut node, _) = with_volume();
    let job = "fio --name=v --filename=$V/v --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k \
               --size=24m --verify=crc32c --randseed=7 --output=/dev/stderr";
    node.sh(&format!("{job} --do_verify=0 --end_fsync=1"));
    node.kill();
    node.restart();
    node.sh(&format!("{job} --verify_only=1"));
}

#[test]
fn a_kill_while_the_mount_is_made_ends_the_node_and_the_next_one_starts() {
    let mut node = Node::idle();
    // Over the other transport the mount asks itself nothing.
    node.wrap(&["env", "BEDPLATE_FUSE_TRANSPORT=classic"]);
    for _ in 0..8 {
        node.spawn();
        let deadline = Instant::now() + DEADLINE;
        // The moment is short, so that nothing is slept; it may be over before it is seen.
        while !node.threads().iter().any(|name| name == "fuse-warm") && node.http("GET", "/readyz").is_none()
        {
            assert!(Instant::now() < deadline, "{}", node.log());
        }
        node.kill();
    }
    node.restart();
}

#[test]
fn a_snapshot_holds_what_was_acknowledged_before_it_also_without_a_sync() {
    let (mut node, _) = with_volume();
    node.write("v", 3 * MIB + 512, &pattern(2 * MIB, 5));
    node.run("snapshot create v s");
    node.kill();
    node.restart();
    assert_eq!(read_at(&node.volume("v"), 3 * MIB + 512, 2 * MIB), pattern(2 * MIB, 5));
    node.run("volume clone v@s c");
    assert_eq!(read_at(&node.volume("c"), 3 * MIB + 512, 2 * MIB), pattern(2 * MIB, 5));
}

#[test]
fn a_download_goes_on_after_a_kill_and_fetches_next_to_nothing_twice() {
    let mut node = Node::start();
    let content = pattern(112 * MIB, 9);
    let origin = Origin::held_at(content.clone(), 80 << 20);
    node.run(&format!("image create base --from {}", origin.url()));
    let progress = |node: &Node| node.json("image get base")["copies"][0]["progress"]["done_bytes"].as_u64();
    until("the download is held", || origin.sent() == 80 * MIB && progress(&node) == Some(80 * MIB));
    let mut kept = 0;
    until("something of it is kept", || {
        kept = kept_bytes(&node);
        kept > 0
    });
    node.kill();
    kept = kept.max(kept_bytes(&node));
    origin.open();
    node.restart();
    until("the image is ready", || node.json("image get base")["state"] == "ready");
    fs::write(node.scratch("expected"), &content).unwrap();
    node.sh("cmp $T/expected $I/base");
    assert_eq!(node.json("image get base")["sha512"], node.sha512(&node.scratch("expected")).as_str());
    // What had arrived and was not yet synced comes again, nothing else, but for what the dead connection swallowed.
    let twice = origin.sent() - 112 * MIB;
    assert!(twice <= 80 * MIB - kept + MIB, "{twice} bytes were fetched twice, {kept} were kept");
    node.assert_nothing_is_left_over();
}

/// How much of an arrival is on the disk for good, as its record says.
fn kept_bytes(node: &Node) -> u64 {
    let record = node.files_on_disk().into_iter().find(|file| file.ends_with("partial.json"));
    let text = record.and_then(|file| fs::read_to_string(node.path("disk").join(file)).ok());
    let record: Value = text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    record["kept"]["position"].as_u64().unwrap_or(0)
}

/// Run `line` beside the test and kill the node while a job of `kind` has moved some bytes. Whether it was still at it.
fn kill_during(node: &mut Node, line: &str, kind: &str) -> bool {
    let command = node.begin(line);
    let mut found = Value::Null;
    until("the job is at work", || {
        found = node.jobs().into_iter().rfind(|job| job["kind"] == kind).unwrap_or_default();
        found["state"] == "done" || found["progress"]["done_bytes"].as_u64() > Some(MIB)
            // Merging tells nothing of its progress.
            || (kind == "snapshot_delete" && found["state"] == "running")
    });
    node.kill();
    drop(command);
    node.restart();
    node.idle_jobs();
    found["state"] == "running"
}

/// A volume with enough data that jobs over it take a while, with a snapshot in the middle.
fn with_much_data() -> Node {
    let (node, _) = with_volume();
    node.run("volume resize v 512M");
    for at in (64 * MIB..320 * MIB).step_by(8 << 20) {
        node.write("v", at, &pattern(8 * MIB, at));
    }
    node.run("snapshot create v s");
    for at in (100 * MIB..228 * MIB).step_by(8 << 20) {
        node.write("v", at, &pattern(8 * MIB, at + 1));
    }
    node.sh("sync $V/v; cp --sparse=always $V/v $T/expected");
    node
}

#[test]
fn a_kill_during_an_export_leaves_no_file_and_the_next_export_is_whole() {
    let mut node = with_much_data();
    let interrupted = kill_during(&mut node, "volume export v out.raw", "volume_export");
    let files = node.sh("ls -A $T");
    if interrupted {
        assert_eq!(files.split_whitespace().collect::<Vec<_>>(), ["base.raw", "expected"]);
        node.run("volume export v out.raw");
    }
    node.sh("cmp $T/expected $T/out.raw; cmp $T/expected $V/v");
    node.idle_jobs();
    node.assert_nothing_is_left_over();
    assert_eq!(node.json("snapshot list v").as_array().unwrap().len(), 1);
}

#[test]
fn a_kill_during_a_full_clone_leaves_a_whole_clone_or_none() {
    let mut node = with_much_data();
    kill_during(&mut node, "volume clone v new --full", "volume_clone");
    if node.names("volume") == ["v"] {
        node.assert_nothing_is_left_over();
        node.run("volume clone v new --full");
    }
    node.sh("cmp $T/expected $V/new");
    node.sh("cmp $T/expected $V/v");
    assert_eq!(node.names("volume"), ["new", "v"]);
    node.idle_jobs();
    node.assert_nothing_is_left_over();
}

#[test]
fn a_kill_during_flattening_leaves_the_volume_as_it_was_and_it_can_be_done_again() {
    let mut node = with_much_data();
    node.run("volume create w --image base --size 512M");
    node.sh("cmp -n 67108864 $T/base.raw $V/w");
    kill_during(&mut node, "volume flatten v", "volume_flatten");
    node.sh("cmp $T/expected $V/v");
    node.assert_nothing_is_left_over();
    node.run("volume flatten v");
    node.run("volume delete w");
    node.run("image delete base");
    node.sh("cmp $T/expected $V/v");
    node.idle_jobs();
    node.assert_nothing_is_left_over();
}

#[test]
fn a_kill_during_the_deletion_of_a_snapshot_changes_nothing_that_is_read() {
    let mut node = with_much_data();
    node.run("snapshot create v t");
    node.write("v", 200 * MIB, &pattern(64 * MIB, 4));
    node.sh("sync $V/v; cp --sparse=always $V/v $T/expected");
    let before = node.allocated_on_disk();
    kill_during(&mut node, "snapshot delete v s", "snapshot_delete");
    node.sh("cmp $T/expected $V/v");
    let left: Vec<Value> = node.json("snapshot list v").as_array().unwrap().clone();
    if left.len() == 2 {
        node.run("snapshot delete v s");
    }
    // Either way the space that only it held is given back, by the next start at the latest.
    until("the layer is merged", || node.allocated_on_disk() < before - 100 * MIB);
    node.idle_jobs();
    node.sh("cmp $T/expected $V/v");
    node.assert_nothing_is_left_over();
    node.run("snapshot delete v t");
    node.sh("cmp $T/expected $V/v");
    assert!(node.begin("volume get v").wait(DEADLINE).status.success());
}
