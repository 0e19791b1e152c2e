//! Volumes as loop devices: whose a device is, also through links, for two who ask at once, and after a SIGKILL.

use std::{fs, os::unix::fs::symlink};

use serde_json::Value;

use crate::util::{
    node::Node,
    run::{DEADLINE, until},
};

fn attach(node: &Node, volume: &str) -> String {
    node.json(&format!("volume attach {volume}"))["device"].as_str().unwrap().to_owned()
}

#[test]
fn an_attached_volume_is_a_device_with_direct_io_that_follows_the_size() {
    let node = Node::start();
    node.run("volume create v --size 64M");
    let device = node.json("volume attach v")["device"].as_str().unwrap().to_owned();
    assert_eq!(node.json("volume attach v")["device"], device.as_str());
    assert_eq!(node.json("volume get v")["device"], device.as_str());
    let name = device.trim_start_matches("/dev/");
    assert_eq!(node.sh(&format!("cat /sys/block/{name}/loop/dio")).trim(), "1");
    node.sh(&format!("mkfs.ext4 -q {device}; mkdir m; mount {device} m; echo kept > m/file"));
    node.run("volume resize v 128M");
    assert_eq!(node.sh(&format!("blockdev --getsize64 {device}")).trim(), "134217728");
    let said = node.refused("volume detach v", 4);
    assert!(said.contains("scratch/m"), "{said}");
    // Growing it while it is mounted needs a capability that not every container has.
    node.sh(&format!("umount m; e2fsck -fp {device}; resize2fs {device}; mount {device} m"));
    node.sh("[ $(df --output=size -B1M m | tail -1) -gt 100 ]; cat m/file; umount m");
    node.run("volume detach v");
    assert!(node.loops().is_empty());
    assert!(node.json("volume get v")["device"].is_null());
    node.sh("fsck.ext4 -fn $V/v");
    node.run("volume delete v");
}

#[test]
fn loop_devices_of_a_killed_node_are_detached_or_listed_as_stale() {
    let mut node = Node::start();
    node.run("volume create free --size 16M");
    node.run("volume create busy --size 16M");
    node.run("volume attach free");
    let device = node.json("volume attach busy")["device"].as_str().unwrap().to_owned();
    node.sh(&format!("mkfs.ext4 -q {device}; mkdir m; mount {device} m"));
    node.kill();
    node.restart();
    let info = node.http("GET", "/v1/node").unwrap();
    assert!(info.contains(&format!("\"stale_devices\":[\"{device}\"]")), "{info}");
    node.sh("umount -l m");
    until("the device goes with its last user", || {
        node.http("GET", "/v1/node").unwrap().contains("\"stale_devices\":[]")
    });
    assert!(node.loops().is_empty(), "{:?}", node.loops());
    node.run("volume attach busy");
    node.run("volume detach busy");
}

#[test]
fn a_mount_that_is_reached_through_links_is_the_same_mount() {
    let mut node = Node::idle();
    fs::create_dir_all(node.path("real/place")).unwrap();
    symlink("real", node.path("link")).unwrap();
    symlink(node.path("link/place"), node.path("mount")).unwrap();
    node.restart();
    node.run("volume create v --size 16M");
    let device = attach(&node, "v");
    assert_eq!(attach(&node, "v"), device);
    assert_eq!(node.loops().len(), 1);
    node.run("volume detach v");
    assert!(node.loops().is_empty());

    let device = attach(&node, "v");
    node.sh(&format!("mkfs.ext4 -q {device}; mkdir m; mount {device} m"));
    node.kill();
    node.restart();
    let info = node.http("GET", "/v1/node").unwrap();
    assert!(info.contains(&format!("\"stale_devices\":[\"{device}\"]")), "{info}");
    node.sh("umount -l m");
    until("the device goes with its last user", || node.loops().is_empty());
    attach(&node, "v");
    node.run("volume detach v");
}

#[test]
fn a_device_that_somebody_else_made_over_the_file_is_the_volumes_device() {
    let node = Node::start();
    node.run("volume create v --size 16M");
    let device = node.sh("losetup --find --show $V/v").trim().to_owned();
    assert_eq!(attach(&node, "v"), device);
    node.run("volume detach v");
    assert!(node.loops().is_empty());
}

#[test]
fn many_who_attach_one_volume_at_once_get_one_device() {
    let node = Node::start();
    node.run("volume create v --size 16M");
    let begun: Vec<_> = (0..8).map(|_| node.begin("volume attach v -o json")).collect();
    let devices = begun.into_iter().map(|running| {
        let ended = running.wait(DEADLINE);
        assert!(ended.status.success(), "{}", ended.stderr);
        serde_json::from_slice::<Value>(&ended.stdout).unwrap()["device"].clone()
    });
    let devices: Vec<Value> = devices.collect();
    assert!(devices.iter().all(|device| *device == devices[0]), "{devices:?}");
    assert_eq!(node.loops().len(), 1);
    node.run("volume detach v");
}

#[test]
fn volumes_are_listed_while_losetup_does_not_return() {
    let mut node = Node::idle();
    let path = slow_losetup(&node);
    node.wrap(&["env", &path]);
    node.restart();
    node.run("volume create v --size 16M");
    fs::write(node.scratch("hold"), "").unwrap();
    let attaching = node.begin("volume attach v");
    until("losetup has been called", || node.scratch("called").exists());
    assert!(node.json("volume get v")["device"].is_null());
    assert_eq!(node.names("volume"), ["v"]);
    fs::remove_file(node.scratch("hold")).unwrap();
    assert!(attaching.wait(DEADLINE).status.success());
    node.run("volume detach v");
}

/// `PATH=...` with a `losetup` that does not begin while there is a file `hold`.
pub fn slow_losetup(node: &Node) -> String {
    use std::os::unix::fs::PermissionsExt;
    let dir = node.scratch("bin");
    fs::create_dir(&dir).unwrap();
    let real = node.sh("command -v losetup");
    let script = format!(
        "#!/bin/sh\ntouch {called}\nwhile [ -e {hold} ]; do sleep 0.01; done\nexec {real} \"$@\"\n",
        called = node.scratch("called").display(),
        hold = node.scratch("hold").display(),
        real = real.trim()
    );
    fs::write(dir.join("losetup"), script).unwrap();
    fs::set_permissions(dir.join("losetup"), fs::Permissions::from_mode(0o755)).unwrap();
    format!("PATH={}:{}", dir.display(), std::env::var("PATH").unwrap())
}
