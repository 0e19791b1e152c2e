//! Jobs at the command line: each that runs can be seen and cancelled, and leaves things as they should be.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::util::{
    content::{MIB, pattern},
    node::Node,
    run::{DEADLINE, until},
};

const SIZE: u64 = 32 * MIB;

/// A node with volumes `v` and `w` over an image full of data, whose writes each take that many microseconds longer.
fn with_slow_writes(delay_us: u32) -> Node {
    let mut node = Node::start();
    fs::write(node.scratch("base.raw"), pattern(SIZE, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    node.run("volume create w --image base");
    // A layer to merge, between two snapshots.
    for (snapshot, seed) in [("one", 2), ("two", 3), ("three", 4)] {
        node.write("w", MIB * seed, &pattern(SIZE / 4, seed));
        node.run(&format!("snapshot create w {snapshot}"));
    }
    node.sh("cp $V/w $T/expected");
    assert!(node.stop(Signal::SIGTERM).success());
    let calls = "pwrite64,pwritev,pwritev2,copy_file_range";
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:delay_enter={delay_us}"));
    node.wrap(&["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
    node.restart();
    node
}

/// Run `line` and cancel its job of this kind once that runs; what the line said when it had ended.
fn cancel_during(node: &Node, line: &str, kind: &str) -> String {
    let running = node.begin(line);
    let mut job = Value::Null;
    until("the job runs", || {
        let jobs = node.json("job list");
        let found = jobs.as_array().unwrap().iter().find(|job| job["kind"] == kind).cloned();
        job = found.unwrap_or_default();
        job["state"] == "running"
    });
    let id = &job["id"];
    assert_eq!(node.json(&format!("job get {id}"))["object"], job["object"]);
    let ended = node.json(&format!("job cancel {id}"));
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&"failed".into(), &"cancelled".into()),
        "{ended}"
    );
    assert!(node.refused(&format!("job cancel {id}"), 4).contains("ended already"));
    assert!(node.refused(&format!("job get {id} --wait"), 1).contains("cancelled"));
    let ended = running.wait(DEADLINE);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("cancelled"), "{}", ended.stderr);
    ended.stderr
}

#[test]
fn what_takes_long_is_cancelled_at_the_command_line_and_leaves_what_it_found() {
    let node = with_slow_writes(200_000);
    cancel_during(&node, "volume export v out.raw", "volume_export");
    cancel_during(&node, "image export base out.raw", "image_export");
    assert_eq!(node.sh("ls -A $T").split_whitespace().collect::<Vec<_>>(), ["base.raw", "expected"]);
    cancel_during(&node, "volume clone v new --full", "volume_clone");
    assert_eq!(node.names("volume"), ["v", "w"]);
    // The snapshot is gone, only the merging is left.
    cancel_during(&node, "snapshot delete w two", "snapshot_delete");
    assert_eq!(node.json("snapshot list w").as_array().unwrap().len(), 2);
    node.sh("cmp $T/base.raw $V/v; cmp $T/expected $V/w");
    assert!(node.run("job list").contains("snapshot_delete"));
    node.refused("job get 999", 3);
}

#[test]
fn flattening_is_cancelled_and_goes_on_from_there() {
    let mut node = with_slow_writes(200_000);
    node.run("snapshot create v s");
    let said = cancel_during(&node, "volume flatten v", "volume_flatten");
    assert!(said.contains("what was copied is kept"), "{said}");
    assert!(!node.json("volume get v")["image"].is_null());
    assert!(node.stop(Signal::SIGTERM).success());
    node.wrap(&[]);
    node.restart();
    node.run("volume flatten v");
    assert!(node.json("volume get v")["image"].is_null());
    node.idle_jobs();
    node.sh("cmp $T/base.raw $V/v; cmp $T/expected $V/w");
}
