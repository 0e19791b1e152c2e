//! Where things lie: exports among the node's own files, disks with sectors of 4 KiB, and image files that somebody
//! cuts.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
};

use nix::sys::signal::Signal;

use crate::util::{
    content::{MIB, pattern, read_at},
    disk::{FileSystem, LoopDisk},
    node::Node,
};

#[test]
fn an_export_among_the_nodes_own_files_is_refused_also_through_links() {
    let node = Node::start();
    node.run("volume create v --size 1M");
    node.run("image create i --from volume:v --wait");
    for own in ["disk", "state", "mount"] {
        symlink(node.path(own), node.scratch(own)).unwrap();
    }
    symlink(node.path("disk/layers"), node.scratch("below")).unwrap();
    let before = node.files_on_disk();
    for own in ["../disk", "../state", "../mount", "../mount/volumes", "disk", "state", "mount", "below"] {
        for what in ["volume export v", "image export i"] {
            for force in ["", " --force"] {
                let said = node.refused(&format!("{what} {own}/out.raw{force}"), 1);
                assert!(said.contains("the node's own directory"), "{own}: {said}");
            }
        }
    }
    assert_eq!(node.files_on_disk(), before);
    assert!(!node.path("state/out.raw").exists());
    node.run("volume export v out.raw");
}

#[test]
fn a_disk_with_sectors_of_4_kib_takes_writes_of_512_bytes() {
    let mut node = Node::idle();
    let disk = LoopDisk::mount(&node, FileSystem::Ext4, 256, 4096);
    let name = disk.device.trim_start_matches("/dev/");
    assert_eq!(node.sh(&format!("cat /sys/block/{name}/queue/logical_block_size")).trim(), "4096");
    node.restart();
    fs::write(node.scratch("base.raw"), pattern(8 * MIB + 512, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base --size 32M");
    node.sh("fio --name=v --filename=$V/v --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=512 --size=4m \
             --offset=16m --verify=crc32c --output=/dev/stderr");
    node.write("v", 3 * 512, &pattern(512, 2));
    let mut expected = pattern(8 * MIB + 512, 1);
    expected[1536..2048].copy_from_slice(&pattern(512, 2));
    assert_eq!(read_at(&node.volume("v"), 0, 8 * MIB + 512), expected);
    node.run("snapshot create v s");
    node.sh("sync $V/v");
    node.kill();
    node.restart();
    assert_eq!(read_at(&node.volume("v"), 0, 8 * MIB + 512), expected);
    node.sh("$B volume export v@s out.raw; cmp out.raw $V/v");
    node.run("image verify base");
    assert!(node.stop(Signal::SIGTERM).success());
    drop(disk);
}

#[test]
fn flattening_over_an_image_that_was_cut_fails_and_says_so() {
    let node = Node::start();
    fs::write(node.scratch("base.raw"), pattern(16 * MIB, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    node.write("v", 0, &pattern(MIB, 2));
    let image = node.files_on_disk().into_iter().find(|file| file.ends_with("/image")).unwrap();
    let image = node.path("disk").join(image);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).unwrap();
    File::options().write(true).open(&image).unwrap().set_len(8 * MIB).unwrap();

    let said = node.refused("volume flatten v", 5);
    assert!(said.contains("image"), "{said}");
    assert_eq!(node.json("volume get v")["image"]["name"], "base");
    // What is still there reads as before, what is not fails: no zeros.
    assert_eq!(read_at(&node.volume("v"), 0, MIB), pattern(MIB, 2));
    let mut buffer = [0; 4096];
    let file = File::open(node.volume("v")).unwrap();
    assert!(std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, 12 * MIB).is_err());
}
