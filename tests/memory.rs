//! A host short of memory does not deadlock: what the kernel must write to free memory goes through the node.
//!
//! The node, the writer and a hog share a control group that is too small for them. The kernel reclaims by writing the
//! writer's dirty pages to the loop device, which waits for the node, which must not wait for memory. That promise is
//! the kernel's IO_FLUSHER state; where the node may not have it (no CAP_SYS_RESOURCE), the node stays outside of the
//! group and only what is written through it lacks memory.

use std::time::Duration;

use crate::util::{
    group::{Controller, Group},
    long,
    node::Node,
    run::Running,
};

const LIMIT: u64 = 512 << 20;
const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn writing_through_a_loop_device_beside_a_memory_hog_comes_to_an_end() {
    let group = Group::new(Controller::Memory, LIMIT);
    let node = Node::start();
    let mib: u64 = if long() { 2048 } else { 768 };
    node.run(&format!("volume create v --size {}M", mib + 512));
    match node.log().contains("without the IO_FLUSHER state") {
        true => eprintln!("the node has no CAP_SYS_RESOURCE and so stays outside of the control group"),
        false => group.add(node.pid()),
    }
    let device = node.json("volume attach v")["device"].as_str().unwrap().to_owned();
    node.sh(&format!("mkfs.ext4 -q -E lazy_itable_init=1 {device}; mkdir m; mount {device} m"));
    let join = format!("echo $$ > {}/cgroup.procs", group.dir().display());
    // Anonymous memory that is used all the time, too much of it for the writer's pages to stay.
    let hog = Running::start(&mut node.shell(&format!(
        "{join}; exec python3 -c 'b = bytearray(320 << 20)\nwhile True:\n for i in range(0, len(b), 4096): b[i] = 1'"
    )));
    let writer = Running::start(
        &mut node
            .shell(&format!("{join}; dd if=/dev/zero of=m/much bs=1M count={mib} status=none; sync -f m")),
    );
    let ended = writer.wait(PATIENCE);
    assert!(ended.status.success(), "{}: {}", ended.status, ended.stderr);
    drop(hog);
    node.sh("umount m");
    node.run("volume detach v");
    node.sh("fsck.ext4 -fn $V/v");
    assert!(node.json("volume get v")["allocated_bytes"].as_u64().unwrap() >= mib << 20);
}
