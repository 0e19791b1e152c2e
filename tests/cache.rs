//! Images and memory: how often the disk is read for many readers of one image, and what stays in the page cache.
//!
//! The disk is a file system on a loop device of its own with direct I/O, so that its counters show our reads and
//! nothing else, and so that mounting it again empties its cache. What is asserted is bytes, never time.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::Barrier,
    thread,
};

use crate::util::{
    content::{MIB, pattern},
    long,
    node::Node,
};

const KIB: u64 = 1 << 10;

/// A node that has not been started, with its disk on a loop device; and that device's name.
fn on_own_device(size_mib: u64) -> (Node, String) {
    let node = Node::idle();
    node.sh(&format!(
        "truncate -s {size_mib}M disk.img; mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 disk.img"
    ));
    let device = node.sh("losetup --find --show --direct-io=on disk.img").trim().to_owned();
    node.sh(&format!("mount {device} $D"));
    (node, device)
}

/// Stop the node, and start it with nothing of its disk in memory.
fn start_cold(node: &mut Node, device: &str) {
    node.stop(nix::sys::signal::Signal::SIGTERM);
    node.sh(&format!("umount $D; mount {device} $D"));
    node.restart();
}

/// Bytes that were read from a device.
fn bytes_read(device: &str) -> u64 {
    let name = device.trim_start_matches("/dev/");
    let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    stat.split_whitespace().nth(2).unwrap().parse::<u64>().unwrap() * 512
}

/// Memory of the node that is not a cache of files.
fn anonymous_memory(node: &Node) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let field = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    field.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// What a system reads to start: scattered files of 16 to 64 KiB, and here and there a megabyte in order, in pieces.
fn boot_set(size: u64) -> Vec<(u64, u64)> {
    let mut state = 1u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut reads = Vec::new();
    let mut megabytes: Vec<u64> = (0..size / MIB).collect();
    for at in (1..megabytes.len()).rev() {
        let other = usize::try_from(random(at as u64 + 1)).unwrap();
        megabytes.swap(at, other);
    }
    for (number, megabyte) in megabytes.into_iter().enumerate() {
        let start = megabyte * MIB;
        match number % 8 {
            0 => reads.extend((0..16).map(|piece| (start + piece * 64 * KIB, 64 * KIB))),
            _ => reads.extend((0..4).map(|part| {
                let len = (1 + random(4)) * 16 * KIB;
                (start + part * 256 * KIB + random(12) * 16 * KIB, len)
            })),
        }
    }
    reads
}

#[test]
fn fifty_volumes_that_start_at_once_read_their_image_from_the_disk_once() {
    let (size, volumes) = if long() { (1024 * MIB, 50) } else { (96 * MIB, 50) };
    let (mut node, device) = on_own_device(size / MIB + 256);
    node.restart();
    let content = pattern(size, 5);
    fs::write(node.scratch("base.raw"), &content).unwrap();
    node.run("image create base --from base.raw --wait");
    let names: Vec<String> = (0..volumes).map(|number| format!("v{number}")).collect();
    for name in &names {
        node.run(&format!("volume create {name} --image base"));
    }
    start_cold(&mut node, &device);

    let set = boot_set(size);
    let set_bytes: u64 = set.iter().map(|(_, len)| len).sum();
    let files: Vec<File> = names.iter().map(|name| File::open(node.volume(name)).unwrap()).collect();
    let (read_before, memory_before) = (bytes_read(&device), anonymous_memory(&node));
    let start = Barrier::new(files.len());
    thread::scope(|scope| {
        for file in &files {
            let (set, content, start) = (&set, &content, &start);
            scope.spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                start.wait();
                for (at, len) in set {
                    let buffer = &mut buffer[..usize::try_from(*len).unwrap()];
                    file.read_exact_at(buffer, *at).unwrap();
                    assert!(buffer == &content[usize::try_from(*at).unwrap()..][..buffer.len()], "at {at}");
                }
            });
        }
    });
    let read = bytes_read(&device) - read_before;
    let grown = anonymous_memory(&node).saturating_sub(memory_before);
    eprintln!(
        "{volumes} volumes read {set_bytes} bytes each, the disk was read {read} bytes, memory grew by {grown}"
    );
    assert!(read >= set_bytes, "the cache was not cold");
    assert!(read <= set_bytes / 10 * 11, "{read} bytes were read from the disk for a set of {set_bytes}");
    // One copy of the set in each volume would be fifty times as much.
    assert!(grown <= set_bytes / 2, "the node has {grown} bytes more than before it was read from");
}

#[test]
fn a_base_past_the_cache_reads_the_same_and_leaves_nothing_in_memory() {
    let (mut node, device) = on_own_device(256);
    node.restart();
    let mut content = pattern(9 * MIB + 777, 3);
    content[2 * 1048576..4 * 1048576].fill(0);
    fs::write(node.scratch("base.raw"), &content).unwrap();
    node.sh("qemu-img convert -q -f raw -O qcow2 base.raw plain.qcow2");
    node.sh("qemu-img convert -q -c -f raw -O qcow2 base.raw packed.qcow2");
    for (image, file) in [("raw", "base.raw"), ("plain", "plain.qcow2"), ("packed", "packed.qcow2")] {
        node.run(&format!("image create {image} --from {file} --wait"));
        node.run(&format!("volume create {image} --image {image}"));
    }
    let resident = |node: &Node| -> Vec<u64> {
        let text = node.sh("fincore --bytes --noheadings --output RES $D/images/*/image");
        text.lines().map(|line| line.trim().parse().unwrap()).collect()
    };
    let read_all = |node: &Node| {
        // Also in pieces that lie as badly as they can.
        for volume in ["raw", "plain", "packed"] {
            node.sh(&format!("cmp -n {} base.raw $V/{volume}", content.len()));
            let file = File::open(node.volume(volume)).unwrap();
            for (at, len) in [(511, 2), (4095, 8194), (5 * 1048576 + 1, 300_001), (content.len() - 777, 777)]
            {
                let mut buffer = vec![0; len];
                file.read_exact_at(&mut buffer, at as u64).unwrap();
                assert!(buffer == content[at..at + len], "{volume}: {len} bytes at {at}");
            }
        }
    };
    start_cold(&mut node, &device);
    read_all(&node);
    let shared = resident(&node);
    assert!(shared.len() == 3 && shared.iter().all(|bytes| *bytes > MIB), "{shared:?}");

    node.wrap(&["env", "BEDPLATE_BASE_CACHE=direct"]);
    node.stop(nix::sys::signal::Signal::SIGTERM);
    // What an earlier node left is given back, too.
    node.restart();
    read_all(&node);
    assert_eq!(resident(&node), [0, 0, 0]);
}
