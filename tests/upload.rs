//! Images from stdin: whole, wrong, and broken off on either side; and deadlines of images.

use std::{
    io::Write,
    process::{Child, Stdio},
};

use nix::sys::signal::Signal;

use crate::util::{content::pattern, node::Node, origin::Origin, run::until};

const MIB: u64 = 1 << 20;

/// A client that has sent 8 MiB and sends no more; it goes with this.
struct Stalled(Child);

impl Stalled {
    fn start(node: &Node) -> Stalled {
        let mut command = node.command("image create up --from -");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut client = Stalled(command.spawn().unwrap());
        client.0.stdin.as_mut().unwrap().write_all(&pattern(8 << 20, 3)).unwrap();
        until("bytes arrive", || {
            let image = node.try_run("image get up -o json").text();
            let image: serde_json::Value = serde_json::from_str(&image).unwrap_or_default();
            image["copies"][0]["progress"]["done_bytes"].as_u64().unwrap_or(0) >= 7 * MIB
        });
        client
    }

    fn exit_code(mut self) -> Option<i32> {
        let mut status = None;
        until("the client ends", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Of images there is nothing but records.
fn assert_no_bytes(node: &Node) {
    let files = node.files_on_disk();
    let bytes = files.iter().filter(|file| file.starts_with("images/") && !file.ends_with("/image.json"));
    assert_eq!(bytes.count(), 0, "{files:?}");
}

/// The failed image says why, takes no space, and can be sent again.
fn assert_nothing_is_left(node: &Node, reason: &str) {
    until("the image has failed", || node.json("image get up")["state"] == "failed");
    let image = node.json("image get up");
    let message = image["copies"][0]["message"].as_str().unwrap();
    assert!(message.contains(reason) && message.contains("send it again"), "{message}");
    until("its bytes are gone", || node.json("image get up")["allocated_bytes"] == 0);
    assert_no_bytes(node);
    node.sh("head -c 1000000 /dev/zero | $B image create up --from -");
    assert_eq!(node.json("image get up")["state"], "ready");
}

#[test]
fn a_pipe_becomes_an_image_with_its_holes() {
    let node = Node::start();
    node.sh("truncate -s 64M f; for at in 3 17 62; do head -c 700001 /dev/urandom | dd of=f bs=1M seek=$at conv=notrunc status=none; done");
    let image =
        node.sh("cat f | $B image create up --from - --checksum $(sha512sum < f | cut -d' ' -f1) -o json");
    let image: serde_json::Value = serde_json::from_str(&image).unwrap();
    assert_eq!((image["state"].as_str(), image["source"].as_str()), (Some("ready"), Some("upload")));
    assert_eq!(image["size_bytes"], 64 * MIB);
    assert!(image["allocated_bytes"].as_u64().unwrap() < 3 * MIB, "{image}");
    node.sh("cmp f $I/up");
    // A file on stdin is as good as a pipe, and a name that is taken is refused before anything is read.
    node.sh("$B image create again --from - < f; cmp f $I/again; ! $B image create up --from - < f");
}

#[test]
fn an_upload_with_other_bytes_than_expected_is_exit_code_5_and_leaves_nothing() {
    let node = Node::start();
    let wrong = "0".repeat(128);
    let said = node.sh(&format!(
        "code=0; head -c 20000000 /dev/urandom | $B image create up --from - --checksum {wrong} 2>&1 || code=$?; echo $code"
    ));
    assert!(said.contains(&wrong) && said.trim_end().ends_with('5'), "{said}");
    assert_no_bytes(&node);
    let empty = node.sh("code=0; $B image create e --from - < /dev/null 2>&1 || code=$?; echo $code");
    assert!(empty.contains("empty") && empty.trim_end().ends_with('5'), "{empty}");
}

#[test]
fn an_upload_whose_client_is_killed_leaves_nothing() {
    let node = Node::start();
    drop(Stalled::start(&node));
    assert_nothing_is_left(&node, "broke off after");
}

#[test]
fn an_upload_whose_node_is_killed_leaves_nothing_at_the_next_start() {
    let mut node = Node::start();
    let client = Stalled::start(&node);
    node.kill();
    assert_eq!(client.exit_code(), Some(1));
    node.restart();
    assert_nothing_is_left(&node, "restarted");
}

#[test]
fn a_node_that_stops_does_not_wait_for_an_upload() {
    let mut node = Node::start();
    let client = Stalled::start(&node);
    assert!(node.stop(Signal::SIGTERM).success());
    assert_eq!(client.exit_code(), Some(1));
    node.restart();
    assert_nothing_is_left(&node, "shutting down");
}

#[test]
fn an_upload_that_is_cancelled_ends_its_client() {
    let node = Node::start();
    let client = Stalled::start(&node);
    node.run("image cancel up");
    assert_eq!(client.exit_code(), Some(1));
    assert_no_bytes(&node);
}

#[test]
fn an_image_that_takes_longer_than_its_deadline_is_exit_code_6() {
    let node = Node::start();
    let origin = Origin::held_at(pattern(4 << 20, 4), 1 << 20);
    let line = format!("image create slow --from {} --deadline 1s --wait", origin.url());
    let said = node.refused(&line, 6);
    assert!(said.contains("not done within 1 s"), "{said}");
    let mut silent = node.command("image create silent --from - --deadline 1s");
    silent.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    assert_eq!(Stalled(silent.spawn().unwrap()).exit_code(), Some(6));
}
