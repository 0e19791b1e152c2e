//! What people do with disks as files: dd, cp, qemu-img, a shell's redirection, fio.

use std::{fs, process::Command};

use bedplate_fuse::Change;

use crate::fixture::{Fixture, VOLUME, VOLUME_SIZE, pattern, shell, shell_ok};

/// A sparse file as long as the volume, with data, holes and zeros, at `$T/source`.
fn source(fixture: &Fixture) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(VOLUME_SIZE).unwrap()];
    content[..3 << 20].copy_from_slice(&pattern(3 << 20, 1));
    content[40 << 20..(40 << 20) + 5000].copy_from_slice(&pattern(5000, 2));
    fs::write(fixture.scratch("source"), &content).unwrap();
    shell_ok(fixture, "fallocate --dig-holes $T/source");
    content
}

/// A volume that is not empty, so that what a tool leaves out shows.
fn dirty(fixture: &Fixture) {
    for mebibyte in (0..64).step_by(8) {
        fixture.volume.poke(mebibyte << 20, &[0xdd; 1 << 20]);
    }
}

fn content(fixture: &Fixture) -> Vec<u8> {
    fixture.volume.peek(0, usize::try_from(VOLUME_SIZE).unwrap())
}

#[test]
fn dd_without_notrunc_overwrites_what_it_writes_and_nothing_else() {
    let fixture = Fixture::new();
    dirty(&fixture);
    let mut expected = content(&fixture);
    fs::write(fixture.scratch("source"), pattern(2 << 20, 3)).unwrap();
    shell_ok(
        &fixture,
        "dd if=$T/source of=$F bs=64k status=none; dd if=$F of=$T/back bs=1M count=2 status=none",
    );
    expected[..2 << 20].copy_from_slice(&pattern(2 << 20, 3));
    assert!(content(&fixture) == expected);
    assert_eq!(fs::read(fixture.scratch("back")).unwrap(), pattern(2 << 20, 3));
}

#[test]
fn dd_fills_a_volume_and_ends_with_no_space() {
    let fixture = Fixture::new();
    let output = shell(&fixture, "dd if=/dev/zero of=$F bs=1M status=none");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left on device"));
}

#[test]
fn a_shells_redirection_leaves_the_rest_of_the_volume_alone() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, b"0123456789");
    shell_ok(&fixture, "printf abc > $F; : > $F");
    assert_eq!(fixture.volume.peek(0, 10), b"abc3456789");
}

#[test]
fn cp_with_sparse_always_makes_the_volume_equal_to_its_source() {
    let fixture = Fixture::new();
    let expected = source(&fixture);
    dirty(&fixture);
    shell_ok(&fixture, "cp --sparse=always $T/source $F; cmp $T/source $F");
    assert!(content(&fixture) == expected);
}

#[test]
fn cp_from_a_volume_keeps_its_holes() {
    let fixture = Fixture::new();
    fixture.volume.poke(8 << 20, &pattern(1 << 20, 5));
    let used = shell_ok(&fixture, "cp --sparse=auto $F $T/copy; cmp $F $T/copy; stat -c %b $T/copy");
    let blocks: u64 = used.trim().parse().unwrap();
    assert!((2048..4096).contains(&blocks), "{blocks} blocks of 512 for one MiB of data");
}

#[test]
fn qemu_img_converts_onto_a_volume_and_maps_compares_and_converts_from_it() {
    let fixture = Fixture::new();
    let expected = source(&fixture);
    dirty(&fixture);
    let script = "
        qemu-img convert -n -f raw -O raw $T/source $F
        qemu-img compare -f raw -F raw $T/source $F
        qemu-img convert -f raw -O qcow2 $F $T/copy.qcow2
        qemu-img compare -f raw -F qcow2 $F $T/copy.qcow2
        qemu-img convert -n -t none -T none -f raw -O raw $T/source $F
        qemu-img compare -f raw -F raw $T/source $F
        qemu-img map -f raw --output=json $F";
    let map = shell_ok(&fixture, script);
    assert!(content(&fixture) == expected);
    assert!(map.contains(r#""zero": true, "data": false"#), "{map}");
}

#[test]
fn fio_verifies_what_several_jobs_wrote_at_depth() {
    let fixture = Fixture::new();
    let script = "
        fio --name=verify --filename=$F --size=16M --offset_increment=16M --numjobs=4 --ioengine=libaio --iodepth=32 \
            --direct=1 --rw=randwrite --bsrange=512-256k --bs_unaligned=0 --blockalign=512 --verify=crc32c \
            --verify_fatal=1 --do_verify=1 --group_reporting --output-format=terse --aux-path=$T";
    shell_ok(&fixture, script);
}

#[test]
fn a_file_system_is_made_on_a_volume_and_is_sound() {
    let fixture = Fixture::new();
    shell_ok(&fixture, "mkfs.ext4 -q -F $F; fsck.ext4 -fn $F");
}

#[test]
fn a_loop_device_over_a_volume_carries_a_file_system_discards_and_follows_a_resize() {
    let fixture = Fixture::new();
    let script = "
        L=$(losetup --find --show --direct-io=on $F)
        trap 'mountpoint -q $T/fs && umount $T/fs; losetup -d $L' EXIT
        mkfs.ext4 -q $L
        mkdir $T/fs; mount -o discard $L $T/fs
        dd if=/dev/urandom of=$T/fs/file bs=1M count=20 status=none
        sha512sum < $T/fs/file > $T/sum
        umount $T/fs; fsck.ext4 -fn $L; mount $L $T/fs
        sha512sum < $T/fs/file | cmp - $T/sum
        umount $T/fs
        blkdiscard $L";
    shell_ok(&fixture, script);
    let whole = usize::try_from(VOLUME_SIZE).unwrap();
    assert!(fixture.volume.peek(0, whole).iter().all(|byte| *byte == 0), "the discard reached the device");

    let device = LoopDevice::over(&fixture);
    fixture.volume.grow(2 * VOLUME_SIZE);
    assert!(fixture.mount().invalidate(Change::Content { file: VOLUME }));
    let script = format!("stat -c %s $F; losetup -c {0}; blockdev --getsize64 {0}", device.0);
    assert_eq!(shell_ok(&fixture, &script), format!("{0}\n{0}\n", 2 * VOLUME_SIZE));
}

/// A loop device, detached when the test is over.
struct LoopDevice(String);

impl LoopDevice {
    fn over(fixture: &Fixture) -> LoopDevice {
        LoopDevice(shell_ok(fixture, "losetup --find --show --direct-io=on $F").trim().into())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["-d", &self.0]).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} stays attached", self.0);
    }
}
