//! What is acknowledged as durable survives a crash, and what is not is not reported as if it were.

use std::{io::IoSlice, os::unix::fs::FileExt};

use bedplate_engine::{device::Durability, units::ByteRange};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    libc,
};
use rustix::io::{ReadWriteFlags, pwritev2};

use crate::{
    fixture::{Fixture, VOLUME, until},
    memory::Asked,
};

fn write(offset: u64, len: usize, durability: Durability) -> Asked {
    Asked::Write { offset, len, durability }
}

#[test]
fn a_write_through_o_dsync_or_o_sync_is_durable_when_it_is_answered() {
    for flag in [libc::O_DSYNC, libc::O_SYNC, libc::O_DSYNC | libc::O_DIRECT] {
        let fixture = Fixture::new();
        fixture.open(0).write_all_at(&[1; 4096], 0).unwrap();
        fixture.open(flag).write_all_at(&[2; 4096], 4096).unwrap();
        let asked = [write(0, 4096, Durability::Volatile), write(4096, 4096, Durability::Fua)];
        assert_eq!(fixture.volume.take_asked(), asked, "neither more nor a flush in place of it");
        fixture.volume.crash();
        assert_eq!(fixture.volume.peek(0, 4096), [0; 4096], "a plain write was made durable by something");
        assert_eq!(fixture.volume.peek(4096, 4096), [2; 4096]);
    }
}

#[test]
fn a_single_write_with_rwf_dsync_is_durable_and_the_next_one_is_not() {
    for flag in [0, libc::O_DIRECT] {
        let fixture = Fixture::new();
        let file = fixture.open(flag);
        let data = [3; 4096];
        pwritev2(&file, &[IoSlice::new(&data)], 8192, ReadWriteFlags::DSYNC).unwrap();
        pwritev2(&file, &[IoSlice::new(&data)], 12288, ReadWriteFlags::empty()).unwrap();
        fixture.volume.crash();
        assert_eq!(fixture.volume.peek(8192, 4096), data);
        assert_eq!(fixture.volume.peek(12288, 4096), [0; 4096]);
    }
}

#[test]
fn fsync_and_fdatasync_make_every_earlier_write_durable_through_whatever_descriptor() {
    let fixture = Fixture::new();
    let (writer, syncer) = (fixture.open(0), fixture.open(0));
    writer.write_all_at(&[4; 4096], 0).unwrap();
    syncer.sync_data().unwrap();
    writer.write_all_at(&[5; 4096], 4096).unwrap();
    syncer.sync_all().unwrap();
    writer.write_all_at(&[6; 4096], 8192).unwrap();
    fixture.volume.crash();
    assert_eq!(fixture.volume.peek(0, 4096), [4; 4096]);
    assert_eq!(fixture.volume.peek(4096, 4096), [5; 4096]);
    assert_eq!(fixture.volume.peek(8192, 4096), [0; 4096]);
}

#[test]
fn closing_does_not_flush_as_closing_a_disk_does_not() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    file.write_all_at(&[7; 4096], 0).unwrap();
    drop(file);
    until("the release", || fixture.namespace.open_count(VOLUME) == 0);
    assert_eq!(fixture.volume.take_asked(), [write(0, 4096, Durability::Volatile)]);
}

#[test]
fn zeroing_and_punching_through_a_synchronous_descriptor_survive_a_crash() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, &[8; 64 << 10]);
    let (plain, durable) = (fixture.open(0), fixture.open(libc::O_DSYNC));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&durable, FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, 4096).unwrap();
    fallocate(&durable, punch, 4096, 4096).unwrap();
    fallocate(&plain, punch, 8192, 4096).unwrap();
    let last = fixture.volume.take_asked().pop();
    assert_eq!(last, Some(Asked::Discard { range: ByteRange::new(8192, 4096) }), "no flush was asked for");
    fixture.volume.crash();
    assert_eq!(fixture.volume.peek(0, 8192), [0; 8192]);
    assert_eq!(fixture.volume.peek(8192, 4096), [8; 4096]);
}

#[test]
fn msync_of_a_mapping_is_a_flush() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    // SAFETY: the file keeps its size, and nobody else writes to it.
    #[expect(unsafe_code, reason = "a shared mapping is what this test is about")]
    let mut mapping = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    mapping[5000] = 9;
    mapping.flush().unwrap();
    fixture.volume.crash();
    assert_eq!(fixture.volume.peek(5000, 1), [9]);
}
