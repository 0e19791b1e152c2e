//! Limits of the process and of its control group: work is refused and says what to raise, what is served goes on, and
//! with room again the same work is done. No limit ends a node but one that it refuses to start with.

use std::{fs, path::Path};

use nix::sys::signal::Signal;

use crate::util::{
    content::{MIB, pattern, read_at},
    group::{Controller, Group},
    node::Node,
};

/// The volume takes writes and flushes and gives back what was written.
fn serves(node: &Node, volume: &str, seed: u64) {
    node.write(volume, 0, &pattern(MIB, seed));
    node.sh(&format!("sync $V/{volume}"));
    assert_eq!(read_at(&node.volume(volume), 0, MIB), pattern(MIB, seed));
}

#[test]
fn without_descriptors_volumes_are_refused_and_those_that_are_there_serve() {
    let mut node = Node::idle();
    node.wrap(&["prlimit", "--nofile=160:160"]);
    node.restart();
    fs::write(node.scratch("base.raw"), pattern(MIB, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    let refused = (0..160).find_map(|n| {
        let ended = node.try_run(&format!("volume create v{n} --image base"));
        (!ended.status.success()).then_some((n, ended))
    });
    let (count, ended) = refused.expect("there are fewer descriptors than volumes");
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    assert!(ended.stderr.contains("raise the limit of open files"), "{}", ended.stderr);
    assert!(count > 10, "{count}");
    let said = node.refused("snapshot create v0 s", 4);
    assert!(said.contains("raise the limit of open files"), "{said}");
    serves(&node, "v0", 2);
    serves(&node, &format!("v{}", count - 1), 3);
    node.assert_nothing_is_left_over();

    for n in 1..4 {
        node.run(&format!("volume delete v{n}"));
    }
    node.run("snapshot create v0 s");
    node.run("volume create again --image base");
    serves(&node, "again", 4);
    assert!(node.stop(Signal::SIGTERM).success());
    // All of them open again under the limit that they were made under.
    node.restart();
    assert_eq!(read_at(&node.volume("v0"), 0, MIB), pattern(MIB, 2));
    assert_eq!(read_at(&node.volume("again"), 0, MIB), pattern(MIB, 4));
}

#[test]
fn without_threads_jobs_are_refused_and_volumes_serve() {
    let group = Group::new(Controller::Pids, 10_000);
    let node = Node::start();
    node.run(&format!("volume create v --size {}", 4 * MIB));
    fs::write(node.scratch("base.raw"), pattern(MIB, 1)).unwrap();
    group.add(node.pid());
    // Those that it has.
    group.set(node.threads().len() as u64);
    for line in ["volume export v out.raw", "volume attach v", "image create base --from base.raw --wait"] {
        let ended = node.try_run(line);
        assert!(!ended.status.success(), "{line}: {}", ended.text());
        assert!(ended.stderr.contains("raise the limit of threads"), "{line}: {}", ended.stderr);
    }
    serves(&node, "v", 2);
    assert!(!node.scratch("out.raw").exists());

    group.set(10_000);
    node.run("image delete base");
    node.run("image create base --from base.raw --wait");
    node.run("volume export v out.raw");
    let device = node.json("volume attach v")["device"].as_str().unwrap().to_owned();
    node.sh(&format!("cmp {device} out.raw"));
    node.run("volume detach v");
    node.idle_jobs();
    node.assert_nothing_is_left_over();
}

#[test]
fn in_little_memory_a_node_serves_copies_and_exports_what_is_far_larger() {
    let group = Group::new(Controller::Memory, 128 * MIB);
    let node = Node::start();
    group.add(node.pid());
    node.sh("head -c 384M /dev/urandom > base.raw");
    node.run("image create base --from base.raw --wait");
    for n in 0..4 {
        node.run(&format!("volume create v{n} --image base"));
    }
    node.sh(
        "fio --name=v --filename=$V/v0:$V/v1:$V/v2:$V/v3 --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite \
         --bs=128k --size=256m --io_size=256m --verify=crc32c --output=/dev/stderr",
    );
    node.run("image create copy --from volume:v0 --wait");
    node.run("volume export v1 out.raw");
    node.sh("cmp out.raw $V/v1; cmp $I/copy $V/v0; cmp $I/base base.raw");
    // The kernel ends a member that goes beyond it, and this is the same process.
    group_has(&group, &node);
}

fn group_has(group: &Group, node: &Node) {
    let members = fs::read_to_string(group.dir().join("cgroup.procs")).unwrap();
    assert!(members.lines().any(|member| member == node.pid().to_string()), "{members}");
}

#[test]
fn a_node_refuses_to_start_where_addresses_are_few_and_says_what_to_raise() {
    let mut node = Node::idle();
    node.wrap(&["prlimit", "--as=1073741824"]);
    node.spawn();
    assert_eq!(node.wait_end().code(), Some(4), "{}", node.log());
    assert!(node.log().contains("ulimit -v"), "{}", node.log());
    assert!(!Path::new(&node.path("socket")).exists());
    node.wrap(&[]);
    node.restart();
}
