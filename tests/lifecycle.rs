//! A node's start and end: signals, busy mounts, second nodes, what a killed one left, and volumes that cannot be read.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
};

use nix::sys::signal::Signal;

use crate::{
    attach::slow_losetup,
    util::{
        content::{MIB, pattern, read_at},
        node::Node,
        run::{run, until},
    },
};

#[test]
fn sigterm_and_sigint_flush_unmount_and_exit_with_0() {
    let mut node = Node::start();
    node.run("volume create v --size 16M");
    for (n, signal) in [(1, Signal::SIGTERM), (2, Signal::SIGINT)] {
        node.write("v", 4096 * n, &pattern(MIB, n));
        assert_eq!(node.stop(signal).code(), Some(0), "{}", node.log());
        assert!(node.mounts().is_empty());
        assert!(!node.path("socket").exists());
        node.restart();
        // Without any sync of the writer's.
        assert_eq!(read_at(&node.volume("v"), 4096 * n, MIB), pattern(MIB, n));
    }
}

#[test]
fn the_socket_is_given_to_the_group_that_is_named_and_an_unknown_one_is_refused() {
    let mut node = Node::idle();
    node.wrap(&["env", "BEDPLATE_SOCKET_GROUP=daemon"]);
    node.restart();
    let socket = node.path("socket").display().to_string();
    assert_eq!(node.sh(&format!("stat --format='%U %G %a' {socket}")).trim(), "root daemon 660");
    let said = node.refused("serve --socket-group no-such-group --check-config", 1);
    assert!(said.contains("socket_group = \"no-such-group\": no such group"), "{said}");
    assert!(node.run("serve --socket-group daemon --check-config").contains("socket_group = \"daemon\""));
}

#[test]
fn a_signal_during_a_long_start_ends_it_in_order() {
    let mut node = Node::start();
    node.run("volume create v --size 16M");
    node.run("volume attach v");
    node.kill();
    // What the killed node left is looked at in the start, by a losetup that takes its time.
    let path = slow_losetup(&node);
    fs::write(node.scratch("hold"), "").unwrap();
    node.wrap(&["env", &path]);
    node.spawn();
    until("the start is at the devices", || node.scratch("called").exists());
    assert_eq!(node.http("GET", "/readyz"), None);
    node.signal(Signal::SIGTERM);
    until("the start is given up", || node.log().contains("the start is given up"));
    fs::remove_file(node.scratch("hold")).unwrap();
    assert_eq!(node.wait_end().code(), Some(0), "{}", node.log());
    assert!(node.mounts().is_empty());
    node.restart();
    assert!(node.http("GET", "/v1/node").unwrap().contains("\"stale_devices\":[]"));
    node.run("volume attach v");
    node.run("volume detach v");
}

#[test]
fn a_busy_mount_is_detached_and_that_is_said_and_the_next_node_serves() {
    let mut node = Node::start();
    node.run("volume create v --size 16M");
    let mut file = File::options().read(true).write(true).open(node.volume("v")).unwrap();
    file.write_all_at(&pattern(4096, 1), 0).unwrap();
    assert_eq!(node.stop(Signal::SIGTERM).code(), Some(0));
    assert!(node.log().contains("busy") && node.log().contains("detached"), "{}", node.log());
    assert!(node.mounts().is_empty());
    node.restart();
    assert_eq!(read_at(&node.volume("v"), 0, 4096), pattern(4096, 1));
    // The old user gets errors, no bytes.
    assert!(file.read(&mut [0; 512]).is_err());
}

#[test]
fn a_second_node_on_the_same_disk_is_refused_and_told_who_holds_it() {
    let node = Node::start();
    let disk = node.path("disk").display().to_string();
    let script = format!("$B serve --state $T/s --disk {disk} --mount $T/m --socket $T/k");
    let ended = run(&mut node.shell(&script));
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    let pid = node.pid().to_string();
    let said = ended.stderr.lines().last().unwrap_or_default();
    assert!(said.contains(&disk) && said.contains(&pid), "it does not name {pid}: {said}");
    // Nor is the mount or the socket of a living node taken.
    let ended = run(&mut node.shell("$B serve --state $T/s --disk $T/d --mount $T/m --socket $T/../socket"));
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    let ended = run(&mut node.shell("$B serve --state $T/s --disk $T/d --mount $T/../mount --socket $T/k"));
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    node.run("volume create v --size 1M");
    node.write("v", 0, &[1; 512]);
}

#[test]
fn the_stale_mount_of_a_killed_node_is_repaired_at_the_next_start_also_when_it_is_busy() {
    let mut node = Node::start();
    node.run("volume create v --size 16M");
    node.write("v", 0, &pattern(4096, 3));
    node.sh("sync $V/v");
    for _ in 0..2 {
        let busy = File::open(node.volume("v")).unwrap();
        node.kill();
        assert!(fs::metadata(node.volume("v")).is_err());
        node.restart();
        assert_eq!(node.mounts(), [node.path("mount")]);
        assert_eq!(read_at(&node.volume("v"), 0, 4096), pattern(4096, 3));
        drop(busy);
    }
}

#[test]
fn a_volume_whose_record_cannot_be_read_is_listed_with_the_reason_and_the_rest_is_served() {
    let mut node = Node::start();
    node.run("volume create good --size 1M");
    node.run("volume create bad --size 1M");
    node.write("good", 0, &[7; 512]);
    assert!(node.stop(Signal::SIGTERM).success());
    let layers = |node: &Node| node.files_on_disk().iter().filter(|file| file.ends_with("/map")).count();
    let before = layers(&node);
    let record = node.files_on_disk().into_iter().find(|file| file.starts_with("volumes/bad-")).unwrap();
    let record = node.path("disk").join(record);
    let sound = fs::read(&record).unwrap();
    for damage in [b"{ not JSON".to_vec(), sound[..sound.len() / 2].to_vec(), Vec::new()] {
        fs::write(&record, damage).unwrap();
        node.restart();
        assert_eq!(read_at(&node.volume("good"), 0, 512), [7; 512]);
        let list = node.json("volume list");
        let bad =
            list.as_array().unwrap().iter().find(|v| v["name"].as_str().unwrap().starts_with("bad")).unwrap();
        assert!(
            bad["state"] != "ready" && bad["message"].as_str().is_some_and(|why| !why.is_empty()),
            "{bad}"
        );
        // Nothing is collected while a record is unreadable.
        assert_eq!(layers(&node), before);
        assert!(node.stop(Signal::SIGTERM).success());
    }
    fs::write(&record, sound).unwrap();
    node.restart();
    assert_eq!(node.json("volume get bad")["state"], "ready");
}
