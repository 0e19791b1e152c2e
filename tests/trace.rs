//! What the node asks of the kernel, as the kernel sees it: between the arrival of a FLUSH or of a FUA write and its
//! answer, the layer's data is synced and after that its map; and a listing of the mount opens no file.
//!
//! The node runs under `strace`, one trace for each thread, with the times of each call. A request and its answer are
//! found by the number that the FUSE protocol gives them, in the first bytes read from and written to /dev/fuse.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use nix::{libc::O_DSYNC, sys::signal::Signal};

use crate::util::{content::pattern, node::Node};

/// Numbers of requests (linux/fuse.h).
const FUSE_WRITE: u32 = 16;
const FUSE_FSYNC: u32 = 20;

/// A call of the node, in seconds of the clock.
#[derive(Debug)]
struct Call {
    began: f64,
    ended: f64,
    what: What,
}

#[derive(Debug, PartialEq)]
enum What {
    Arrival { opcode: u32, unique: u64 },
    Answer { unique: u64 },
    SyncData,
    SyncMap,
}

/// A node under strace.
fn traced() -> Node {
    let calls = "trace=read,readv,write,writev,fdatasync,fsync,sync_file_range,pwritev2";
    let mut node = Node::idle();
    let prefix = node.path("trace").display().to_string();
    let words = ["strace", "-ff", "-y", "-xx", "-s", "64", "-ttt", "-T", "-e", calls, "-o", prefix.as_str()];
    node.wrap(&words);
    node.restart();
    node
}

/// All that matters of the traces, in the order of time.
fn calls(node: &Node) -> Vec<Call> {
    let mut calls = Vec::new();
    for entry in fs::read_dir(node.path("")).unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with("trace.") {
            let text = fs::read_to_string(entry.path()).unwrap();
            calls.extend(text.lines().filter_map(parse));
        }
    }
    calls.sort_by(|a: &Call, b: &Call| a.began.total_cmp(&b.began));
    calls
}

/// One line: `TIME name(FD<path>, "bytes"...) = result <duration>`. Calls that failed or did not return are none.
fn parse(line: &str) -> Option<Call> {
    let (time, rest) = line.split_once(' ')?;
    let began: f64 = time.parse().ok()?;
    let (rest, duration) = rest.strip_suffix('>')?.rsplit_once(" <")?;
    let (call, result) = rest.rsplit_once(" = ")?;
    result.split(' ').next()?.parse::<u64>().ok()?;
    let (name, arguments) = call.split_once('(')?;
    let path = unhex(arguments.split_once('<')?.1.split_once('>')?.0);
    let path = String::from_utf8_lossy(&path).into_owned();
    let bytes = || Some(unhex(arguments.split_once('"')?.1.split_once('"')?.0));
    let u32_at = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let what = match name {
        "fdatasync" | "fsync" if path.ends_with("/data") => What::SyncData,
        "fdatasync" | "fsync" if path.ends_with("/map") => What::SyncMap,
        "read" | "readv" if path == "/dev/fuse" => {
            let bytes = bytes()?;
            What::Arrival { opcode: u32_at(&bytes, 4)?, unique: u64_at(&bytes, 8)? }
        }
        "write" | "writev" if path == "/dev/fuse" => What::Answer { unique: u64_at(&bytes()?, 8)? },
        _ => return None,
    };
    Some(Call { began, ended: began + duration.parse::<f64>().ok()?, what })
}

/// Bytes that strace wrote as `\xNN`; others as they are.
fn unhex(text: &str) -> Vec<u8> {
    if !text.starts_with("\\x") {
        return text.as_bytes().to_vec();
    }
    text.split("\\x").skip(1).filter_map(|hex| u8::from_str_radix(hex.get(..2)?, 16).ok()).collect()
}

/// Check every request of this kind; how many there were. Times are exact to a microsecond.
fn check(calls: &[Call], kind: u32) -> usize {
    const EXACT: f64 = 2e-6;
    let mut checked = 0;
    for arrival in calls {
        let What::Arrival { opcode, unique } = arrival.what else { continue };
        if opcode != kind {
            continue;
        }
        let answer = calls.iter().find(|call| call.what == What::Answer { unique }).expect("it was answered");
        let within = |call: &&Call| call.began + EXACT >= arrival.ended && call.ended <= answer.began + EXACT;
        let mut syncs = calls.iter().filter(within);
        let data = syncs.clone().find(|call| call.what == What::SyncData);
        let data = data.unwrap_or_else(|| panic!("request {unique} was answered without a sync of the data"));
        assert!(
            syncs.any(|call| call.what == What::SyncMap && call.began + EXACT >= data.ended),
            "request {unique} was answered without a sync of the map after that of the data"
        );
        checked += 1;
    }
    checked
}

#[test]
fn a_flush_is_answered_after_the_sync_of_the_data_and_then_of_the_map() {
    let mut node = traced();
    node.run("volume create v --size 16M");
    let file = File::options().write(true).open(node.volume("v")).unwrap();
    for n in 0..10 {
        file.write_all_at(&pattern(8192, n), n * 12_288).unwrap();
        file.sync_data().unwrap();
    }
    drop(file);
    assert!(node.stop(Signal::SIGTERM).success());
    assert_eq!(check(&calls(&node), FUSE_FSYNC), 10);
}

#[test]
fn a_write_with_o_dsync_is_answered_after_the_sync_of_the_data_and_then_of_the_map() {
    let mut node = traced();
    node.run("volume create v --size 16M");
    let file = File::options().write(true).custom_flags(O_DSYNC).open(node.volume("v")).unwrap();
    for n in 0..10 {
        file.write_all_at(&pattern(4096 - 512 * (n % 2), n), n * 12_288).unwrap();
    }
    drop(file);
    assert!(node.stop(Signal::SIGTERM).success());
    assert_eq!(check(&calls(&node), FUSE_WRITE), 10);
}

#[test]
fn a_directory_is_listed_and_the_file_system_asked_for_its_size_without_a_look_at_any_disk() {
    const TIMES: usize = 100;
    let mut node = Node::start();
    fs::write(node.scratch("base.raw"), pattern(1 << 20, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    assert!(node.stop(Signal::SIGTERM).success());
    let trace = node.path("opened").display().to_string();
    node.wrap(&["strace", "-f", "-qq", "-y", "-e", "trace=open,openat,openat2", "-o", &trace]);
    node.restart();
    let listed = node.sh(&format!("for i in $(seq {TIMES}); do command ls -U $I $V; stat -f $V; done"));
    assert_eq!(listed.lines().filter(|line| *line == "base").count(), TIMES);
    assert!(node.stop(Signal::SIGTERM).success());
    let opened = fs::read_to_string(trace).unwrap();
    let of_disk =
        |line: &&str| line.contains("/image\"") || line.contains("\"image\"") || line.contains("/data\"");
    let count = opened.lines().filter(of_disk).count();
    // At the start and at the end they are opened, and that is seen.
    assert!((1..TIMES).contains(&count), "{count} openings:\n{opened}");
}
