//! Two requests at once, brought about for certain: the node runs under `strace`, which holds back the step of one
//! that the other has to meet.

use std::fs;

use nix::sys::signal::Signal;

use crate::util::{
    content::pattern,
    node::Node,
    run::{DEADLINE, until},
};

/// A node with an image `base` that takes a second and a half for every rename, the step that makes a volume appear.
fn with_slow_renames() -> Node {
    let mut node = Node::start();
    fs::write(node.scratch("base.raw"), pattern(1 << 20, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create other --image base");
    assert!(node.stop(Signal::SIGTERM).success());
    let inject = "inject=rename,renameat,renameat2:delay_enter=1500000";
    node.wrap(&[
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=rename,renameat,renameat2",
        "-e",
        inject,
    ]);
    node.restart();
    node
}

/// Until a volume is on its way and has no record yet.
fn until_one_is_made(node: &Node) {
    until("a volume is on its way", || {
        let volumes = fs::read_dir(node.path("disk/volumes")).unwrap();
        volumes.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with('.'))
    });
}

#[test]
fn an_image_is_not_deleted_while_a_volume_over_it_is_made() {
    let node = with_slow_renames();
    node.run("volume delete other");
    let creating = node.begin("volume create v --image base");
    until_one_is_made(&node);
    let said = node.refused("image delete base", 4);
    assert!(said.contains("the creation of volume v"), "{said}");
    assert!(creating.wait(DEADLINE).status.success());
    let said = node.refused("image delete base", 4);
    assert!(said.contains("volume v"), "{said}");
    node.sh("cmp $T/base.raw $V/v");
}

#[test]
fn an_image_is_not_deleted_while_the_one_volume_over_it_is_cloned_and_deleted() {
    let node = with_slow_renames();
    let cloning = node.begin("volume clone other v");
    until_one_is_made(&node);
    // Deleted as soon as the clone is made: at no moment does nobody stand on the image.
    let deleting = node.begin("volume delete other");
    let mut refused = 0;
    while !node.names("volume").iter().eq(["v"]) {
        node.refused("image delete base", 4);
        refused += 1;
    }
    assert!(refused > 0);
    assert!(cloning.wait(DEADLINE).status.success() && deleting.wait(DEADLINE).status.success());
    node.refused("image delete base", 4);
    node.sh("cmp $T/base.raw $V/v");
}
