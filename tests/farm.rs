//! A farm: one root file system, fetched by URL, and twenty volumes over it that are mounted, written and checked.

use std::{fs, time::Duration};

use crate::{
    block_device::fio,
    util::{long, node::Node, origin::Origin},
};

const VOLUMES: u64 = 20;
const PATIENCE: Duration = Duration::from_secs(300);

/// A real tree in an ext4 file system; the long version's is a whole Debian.
fn root_file_system(node: &Node) {
    if long() {
        let make =
            "mmdebstrap --variant=minbase bookworm tree; mke2fs -q -t ext4 -d tree root.raw 1G; rm -r tree";
        node.sh_within(make, PATIENCE);
        return;
    }
    node.sh_within(
        "mkdir -p tree/usr tree/etc; cp -a /usr/sbin /usr/libexec tree/usr; cp -a /etc/. tree/etc
         mke2fs -q -t ext4 -d tree root.raw 400M; rm -r tree",
        PATIENCE,
    );
}

#[test]
fn twenty_volumes_over_a_fetched_root_file_system_hold_what_each_was_written_and_the_image_stays() {
    let node = Node::start();
    root_file_system(&node);
    farm(&node, &["root.raw"]);
}

#[test]
fn twenty_volumes_over_compressed_and_subclustered_root_file_systems_hold_what_each_was_written() {
    let node = Node::start();
    root_file_system(&node);
    let options = ["-c", "-c -o compression_type=zstd", "-o extended_l2=on,cluster_size=128k"];
    for (n, options) in options.iter().enumerate() {
        let make = format!("qemu-img convert -m 2 -W -f raw -O qcow2 {options} root.raw root{n}.qcow2");
        node.sh_within(&make, PATIENCE);
    }
    farm(&node, &["root0.qcow2", "root1.qcow2", "root2.qcow2"]);
}

/// Twenty volumes, over each of these files in turn.
fn farm(node: &Node, files: &[&str]) {
    let mut images = Vec::new();
    for (n, file) in files.iter().enumerate() {
        let sum = node.sha512(&node.scratch(file));
        let origin = Origin::start(fs::read(node.scratch(file)).unwrap());
        node.run(&format!("image create root{n} --from {} --checksum {sum} --wait", origin.url()));
        images.push((format!("root{n}"), sum, origin));
    }
    let names: Vec<String> = (0..VOLUMES).map(|n| format!("v{n}")).collect();
    for ((n, name), (image, ..)) in (0..).zip(&names).zip(images.iter().cycle()) {
        node.run(&format!("volume create {name} --image {image} --size {}M", 1024 + n));
        let device = node.json(&format!("volume attach {name}"))["device"].as_str().unwrap().to_owned();
        node.sh(&format!("mkdir m{n}; mount {device} m{n}"));
    }
    // All are mounted; each writes files of its own, replaces and deletes some of the image's.
    let writers: Vec<_> = (0..VOLUMES)
        .map(|n| {
            let script = format!(
                "cd m{n}; mkdir own; for i in $(seq 12); do head -c $((i * 20011 + {n})) /dev/urandom > own/$i; done
                 rm -r etc; mkdir etc; echo host{n} > etc/hostname; echo {n} >> usr/sbin/fsck.ext4
                 find . -xdev -type f -path './own/*' -o -type f -path './etc/*' -o -type f -path './usr/sbin/f*' |
                     LC_ALL=C sort | xargs sha256sum > ../journal{n}
                 cd ..; sync -f m{n}"
            );
            crate::util::run::Running::start(&mut node.shell(&script))
        })
        .collect();
    for writer in writers {
        let ended = writer.wait(PATIENCE);
        assert!(ended.status.success(), "{}", ended.stderr);
    }
    for (n, name) in (0..VOLUMES).zip(&names) {
        node.sh(&format!("umount m{n}"));
        node.run(&format!("volume detach {name}"));
        node.sh(&format!("fsck.ext4 -fn $V/{name} > fsck 2>&1 || {{ cat fsck >&2; exit 1; }}"));
    }
    assert!(node.loops().is_empty());
    // Mounted anew, each has what its journal says and nothing of another's.
    for (n, name) in (0..VOLUMES).zip(&names) {
        let device = node.json(&format!("volume attach {name}"))["device"].as_str().unwrap().to_owned();
        node.sh(&format!(
            "mount -o ro {device} m{n}; (cd m{n}; sha256sum --quiet -c ../journal{n})
             [ $(ls m{n}/own | wc -l) = 12 ]; [ $(cat m{n}/etc/hostname) = host{n} ]; umount m{n}"
        ));
        node.run(&format!("volume detach {name}"));
    }
    let guest = node.sha512(&node.scratch("root.raw"));
    for ((image, sum, origin), file) in images.iter().zip(files) {
        assert_eq!(node.sha512(&node.image(image)), guest);
        node.run(&format!("image verify {image}"));
        assert_eq!(node.json(&format!("image get {image}"))["sha512"], sum.as_str());
        assert_eq!(origin.sent(), node.scratch(file).metadata().unwrap().len());
    }
    for (seed, name) in (1..).zip(&names[..files.len()]) {
        let seconds = if long() { 60 } else { 2 };
        node.sh_within(&fio(name, "randwrite", seed, Some(seconds)), PATIENCE);
    }
}
