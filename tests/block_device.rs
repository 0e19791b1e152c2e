//! A volume's file is a block device: the tools of block devices, through the mount, also while the volume's life goes
//! on around them.

use std::time::Duration;

use crate::util::{
    content::{MIB, allocated, sparse_image},
    long,
    node::Node,
};

fn with_volume() -> Node {
    let node = Node::start();
    sparse_image(&node.scratch("base.raw"), 128 * MIB);
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    node
}

#[test]
fn dd_without_notrunc_and_redirection_write_where_they_are_told() {
    let node = with_volume();
    node.sh("head -c 1M /dev/urandom > new; cp base.raw expected
             dd if=new of=expected bs=64k conv=notrunc status=none
             dd if=new of=$V/v bs=64k status=none; cmp expected $V/v
             : > $V/v; cmp expected $V/v
             dd if=new of=expected bs=4k seek=5000 conv=notrunc status=none
             dd if=new of=$V/v bs=4k seek=5000 oflag=direct status=none; cmp expected $V/v
             ! dd if=new of=$V/v bs=1M seek=128 status=none 2> said; grep -q 'No space' said
             ! truncate -s 1M $V/v 2> said; ! rm $V/v 2> said; cmp expected $V/v");
    node.sh("qemu-img convert -n -f raw -O raw base.raw $V/v; cmp base.raw $V/v");
}

/// Random sizes, direct, several jobs with descriptors of their own.
pub fn fio(volume: &str, rw: &str, seed: u32, runtime: Option<u32>) -> String {
    let bound = runtime.map_or(String::new(), |seconds| format!("--time_based --runtime={seconds}"));
    format!(
        "fio --name={rw} --filename=$V/{volume} --rw={rw} --direct=1 --ioengine=libaio --iodepth=8 --numjobs=4 \
         --offset_increment=32m --size=32m --bsrange=512-1m --blockalign=512 --verify=crc32c --verify_fatal=1 \
         --verify_backlog=32 --randseed={seed} --end_fsync=1 --output=$T/fio-{volume}-{seed} {bound} || {{ cat $T/fio-{volume}-{seed} >&2; exit 1; }}"
    )
}

#[test]
fn fio_verifies_random_and_sequential_writes_of_many_sizes_and_jobs() {
    let node = with_volume();
    for (seed, rw) in [(1, "randwrite"), (2, "write"), (3, "randrw")] {
        node.sh(&fio("v", rw, seed, None));
    }
    node.run("image verify base");
}

#[test]
fn fio_verifies_across_snapshots_merges_and_clones() {
    let node = with_volume();
    let seconds = if long() { 180 } else { 8 };
    let mut writer =
        crate::util::run::Running::start(&mut node.shell(&fio("v", "randwrite", 4, Some(seconds))));
    let mut rounds = 0;
    while writer.is_running() {
        node.run(&format!("snapshot create v s{rounds}"));
        node.run(&format!("volume clone v c{rounds}"));
        node.run(&format!("snapshot create v t{rounds}"));
        node.run(&format!("snapshot delete v s{rounds}"));
        node.run(&format!("volume delete c{rounds}"));
        node.run(&format!("snapshot delete v t{rounds}"));
        rounds += 1;
    }
    let ended = writer.wait(Duration::from_secs(u64::from(seconds) + 60));
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(rounds > 0);
    // A clone that was taken under load does not change any more.
    node.run("volume clone v last");
    node.sh("cmp $V/v $V/last");
    node.run("image verify base");
}

#[test]
fn discarded_space_is_given_back_also_through_a_file_system() {
    let node = Node::start();
    node.run("volume create v --size 256M");
    let device = node.json("volume attach v")["device"].as_str().unwrap().to_owned();
    node.sh(&format!(
        "mkfs.ext4 -q {device}; mkdir m; mount {device} m; head -c 96M /dev/urandom > m/much; sync m/much"
    ));
    let full = node.json("volume get v")["allocated_bytes"].as_u64().unwrap();
    assert!(full >= 96 * MIB, "{full}");
    assert!(allocated(&node.volume("v")) >= 96 * MIB);
    node.sh("rm m/much; sync; fstrim m; sync -f m; umount m; fsck.ext4 -fn $V/v");
    node.run("volume detach v");
    crate::util::run::until("the space is given back", || {
        node.json("volume get v")["allocated_bytes"].as_u64().unwrap() < 24 * MIB
    });
    assert!(node.allocated_on_disk() < full);
}
