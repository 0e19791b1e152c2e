//! A volume's file as a disk: reads, writes, the end, punching, zeroing, seeking, mapping, many writers.

use std::{
    fs::{self, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    sync::Barrier,
    thread,
};

use bedplate_engine::{
    device::{Durability, REQUEST_LEN_MAX},
    error::Error,
    units::ByteRange,
};
use bedplate_fuse::{FileId, IoPath, TransportChoice};
use memmap2::MmapMut;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    libc,
    unistd::{Whence, lseek},
};
use uuid::Uuid;

use crate::{
    TRANSPORT,
    fixture::{Fixture, VOLUME, VOLUME_SIZE, errno, pattern, shell_ok, until},
    memory::{Asked, MemoryDevice},
};

const SIZE: i64 = 64 << 20;

#[test]
fn what_is_written_is_read_at_any_alignment_and_length() {
    let fixture = Fixture::new();
    let mut model = vec![0; 6 << 20];
    for direct in [0, libc::O_DIRECT] {
        let file = fixture.open(direct);
        let ranges =
            [(0, 1), (511, 2), (4095, 4098), (1 << 20, 3 << 20), (12345, 1 << 20), ((5 << 20) + 7, 700_001)];
        for (seed, (offset, len)) in (1..).zip(ranges) {
            let data = pattern(len, seed);
            file.write_all_at(&data, offset.try_into().unwrap()).unwrap();
            model[offset..offset + len].copy_from_slice(&data);
            let mut back = vec![0; model.len()];
            file.read_exact_at(&mut back, 0).unwrap();
            assert!(back == model, "after a write of {len} at {offset}");
        }
    }
}

#[test]
fn a_request_of_one_mebibyte_arrives_in_as_few_parts_as_the_transport_allows() {
    const LEN: usize = 1 << 20;
    let fixture = Fixture::new();
    let file = fixture.open(libc::O_DIRECT);
    // Aligned to pages: the kernel counts the pages that a request touches.
    let mut buffer = MmapMut::map_anon(LEN).unwrap();
    buffer.copy_from_slice(&pattern(LEN, 1));
    file.write_all_at(&buffer, 1 << 20).unwrap();
    file.read_exact_at(&mut buffer, 1 << 20).unwrap();
    assert!(buffer[..] == pattern(LEN, 1));
    // Every entry of a ring has the memory for the longest request.
    let request = match TRANSPORT {
        TransportChoice::Uring => 256 << 10,
        TransportChoice::Auto | TransportChoice::Classic => LEN,
    };
    let asked = fixture.volume.take_asked();
    assert_eq!(asked.len(), 2 * LEN / request);
    for asked in asked {
        let (Asked::Write { len, .. } | Asked::Read { len, .. }) = asked else { panic!("{asked:?}") };
        assert_eq!(len, request);
    }
}

#[test]
fn a_read_across_the_end_is_short_and_past_it_there_is_nothing() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    let mut buffer = [1; 4096];
    assert_eq!(file.read_at(&mut buffer, VOLUME_SIZE - 100).unwrap(), 100);
    assert_eq!(file.read_at(&mut buffer, VOLUME_SIZE).unwrap(), 0);
    assert_eq!(file.read_at(&mut buffer, VOLUME_SIZE + 4096).unwrap(), 0);
}

#[test]
fn a_write_across_the_end_is_short_and_past_it_there_is_no_space() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    assert_eq!(file.write_at(&[9; 4096], VOLUME_SIZE - 100).unwrap(), 100);
    assert_eq!(fixture.volume.peek(VOLUME_SIZE - 100, 100), [9; 100]);
    assert_eq!(errno(file.write_at(&[9; 10], VOLUME_SIZE)), libc::ENOSPC);
    assert_eq!(errno(file.write_at(&[9; 10], VOLUME_SIZE + 4096)), libc::ENOSPC);
    let mut appender = OpenOptions::new().append(true).open(fixture.volume_path()).unwrap();
    assert_eq!(errno(appender.write(b"x")), libc::ENOSPC);
    assert_eq!(fs::metadata(fixture.volume_path()).unwrap().len(), VOLUME_SIZE);
}

#[test]
fn truncation_to_nothing_or_to_its_own_size_changes_nothing_and_any_other_is_refused() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, b"kept");
    let file = fixture.open(0);
    file.set_len(0).unwrap();
    file.set_len(VOLUME_SIZE).unwrap();
    OpenOptions::new().write(true).truncate(true).open(fixture.volume_path()).unwrap();
    for size in [1, VOLUME_SIZE - 512, VOLUME_SIZE + 512] {
        assert_eq!(errno(file.set_len(size)), libc::EINVAL, "{size}");
    }
    assert_eq!(file.metadata().unwrap().len(), VOLUME_SIZE);
    assert_eq!(fixture.volume.peek(0, 4), b"kept");
    assert_eq!(fixture.volume.take_asked(), []);
}

#[test]
fn punching_discards_and_zeroing_zeroes_within_the_size() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, &[5; 64 << 10]);
    let file = fixture.open(0);
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, 4096, 8192).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 20480, 100).unwrap();
    let asked = [
        Asked::Discard { range: ByteRange::new(4096, 8192) },
        Asked::Zero { range: ByteRange::new(20480, 100), durability: Durability::Volatile },
    ];
    assert_eq!(fixture.volume.take_asked(), asked);
    let mut bytes = vec![1; 32 << 10];
    file.read_exact_at(&mut bytes, 0).unwrap();
    for (at, byte) in bytes.iter().enumerate() {
        let cleared = (4096..12288).contains(&at) || (20480..20580).contains(&at);
        assert_eq!(*byte, if cleared { 0 } else { 5 }, "at {at}");
    }
}

#[test]
fn space_within_the_size_is_promised_and_past_the_end_there_is_none() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
    fallocate(&file, keep, 4096, 4096).unwrap();
    for mode in [FallocateFlags::empty(), keep, zero] {
        assert_eq!(fallocate(&file, mode, SIZE - 4096, 8192), Err(Errno::ENOSPC), "{mode:?}");
    }
    assert_eq!(fallocate(&file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4096), Err(Errno::EOPNOTSUPP));
    assert_eq!(fixture.volume.take_asked(), []);
    // With the size kept, what lies past the end is simply not there to be cleared.
    fallocate(&file, zero | keep, SIZE - 4096, 8192).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, SIZE, 8192).unwrap();
    let last = ByteRange::new(VOLUME_SIZE - 4096, 4096);
    assert_eq!(fixture.volume.take_asked(), [Asked::Zero { range: last, durability: Durability::Volatile }]);
    assert_eq!(file.metadata().unwrap().len(), VOLUME_SIZE);
}

#[test]
fn a_discard_longer_than_a_request_goes_down_in_pieces() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    fixture.volume.poke(VOLUME_SIZE - 4096, &[1; 4096]);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 0, SIZE).unwrap();
    let asked = fixture.volume.take_asked();
    assert_eq!(asked.len(), usize::try_from(VOLUME_SIZE / REQUEST_LEN_MAX).unwrap());
    assert_eq!(fixture.volume.peek(VOLUME_SIZE - 4096, 4096), [0; 4096]);
}

#[test]
fn seeking_finds_data_and_holes() {
    let fixture = Fixture::new();
    fixture.volume.poke(8 << 20, &[1; 8192]);
    fixture.volume.poke(VOLUME_SIZE - 4096, &[1; 4096]);
    let file = fixture.open(0);
    let seek = |offset, whence| lseek(&file, offset, whence);
    assert_eq!(seek(0, Whence::SeekHole), Ok(0));
    assert_eq!(seek(0, Whence::SeekData), Ok(8 << 20));
    assert_eq!(seek((8 << 20) + 5000, Whence::SeekData), Ok((8 << 20) + 5000));
    assert_eq!(seek((8 << 20) + 5, Whence::SeekHole), Ok((8 << 20) + 8192));
    assert_eq!(seek((8 << 20) + 8192, Whence::SeekData), Ok(SIZE - 4096));
    // The end counts as a hole, and past it there is nothing to find.
    assert_eq!(seek(SIZE - 1, Whence::SeekHole), Ok(SIZE));
    assert_eq!(seek(SIZE, Whence::SeekData), Err(Errno::ENXIO));
    let mut file = &file;
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), VOLUME_SIZE);
}

#[test]
fn seeking_crosses_a_terabyte_of_nothing() {
    let fixture = Fixture::new();
    let (file, size) = (FileId::volume(Uuid::from_u128(8)), 1 << 40);
    let device = MemoryDevice::volume(size);
    device.poke(size - 4096, &[1; 4096]);
    fixture.namespace.add(file, "huge", device);
    let opened = fs::File::open(fixture.path("volumes/huge")).unwrap();
    assert_eq!(lseek(&opened, 0, Whence::SeekData), Ok((1 << 40) - 4096));
}

#[test]
fn many_writers_on_many_descriptors_are_in_the_device_at_once() {
    const WRITERS: usize = 8;
    let fixture = Fixture::new();
    // Each write waits inside the device until all are there: it passes only if the kernel does not line them up.
    fixture.volume.hold_writes_until(WRITERS);
    let file = fixture.open(0);
    let start = Barrier::new(WRITERS);
    thread::scope(|scope| {
        for n in 0..WRITERS {
            let (fixture, start, file) = (&fixture, &start, &file);
            scope.spawn(move || {
                // Half of them on one shared descriptor, half on one of their own.
                let own = (n % 2 == 0).then(|| fixture.open(0));
                let data = pattern(4096, n.try_into().unwrap());
                start.wait();
                let offset = 4096 * u64::try_from(n).unwrap();
                own.as_ref().unwrap_or(file).write_all_at(&data, offset).unwrap();
            });
        }
    });
    assert_eq!(fixture.volume.most_writes_inside(), WRITERS);
    for n in 0..WRITERS {
        let expected = pattern(4096, n.try_into().unwrap());
        assert_eq!(fixture.volume.peek(4096 * u64::try_from(n).unwrap(), 4096), expected, "writer {n}");
    }
}

#[test]
fn a_shared_mapping_and_the_file_see_each_others_bytes() {
    let fixture = Fixture::new();
    fixture.volume.poke(4096, b"from the device");
    let file = fixture.open(0);
    // SAFETY: the file keeps its size, and nobody else changes it while a slice of the mapping is in use.
    #[expect(unsafe_code, reason = "a shared mapping is what this test is about")]
    let mut mapping = unsafe { MmapMut::map_mut(&file) }.unwrap();
    assert_eq!(&mapping[4096..4111], b"from the device");
    mapping[10000..10007].copy_from_slice(b"through");
    mapping.flush().unwrap();
    assert_eq!(fixture.volume.peek(10000, 7), b"through");
    file.write_all_at(b"direct", 20000).unwrap();
    assert_eq!(&mapping[20000..20006], b"direct");
}

/// The client is a process of its own: the kernel holds its address space while it writes the mapping back, and a thread that
/// serves the mount may want more memory of that one meanwhile.
#[test]
fn what_a_client_leaves_in_a_mapping_is_written_back_when_it_lets_go_without_a_flush() {
    let fixture = Fixture::new();
    let script = r#"python3 -c '
import mmap, os
file = os.open(os.environ["F"], os.O_RDWR)
mapping = mmap.mmap(file, 65536)
mapping[30000:30004] = b"last"
mapping.close()'"#;
    shell_ok(&fixture, script);
    until("the write-back of the mapping", || fixture.volume.peek(30000, 4) == b"last");
}

#[test]
fn an_error_of_the_device_is_the_clients_error_and_never_zeros() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    fixture.volume.fail_with(Error::Failed { reason: "a sync failed".into() });
    assert_eq!(errno(file.read_at(&mut [0; 4096], 0)), libc::EIO);
    assert_eq!(errno(file.write_at(&[0; 4096], 0)), libc::EIO);
    assert_eq!(errno(file.sync_data()), libc::EIO);
    fixture.volume.fail_with(Error::NoSpace { path: "data".into() });
    assert_eq!(errno(file.write_at(&[0; 4096], 0)), libc::ENOSPC);
}

#[test]
fn a_device_that_panics_fails_its_request_and_the_mount_goes_on() {
    let fixture = Fixture::new();
    let file = fixture.open(0);
    // More often than there are threads.
    fixture.volume.panic_at(13 * 4096);
    for _ in 0..40 {
        assert_eq!(errno(file.read_at(&mut [0; 512], 13 * 4096)), libc::EIO);
    }
    assert_eq!(file.read_at(&mut [0; 512], 0).unwrap(), 512);
}

#[test]
fn a_volume_is_served_directly_and_held_while_it_is_open() {
    let fixture = Fixture::new();
    assert_eq!(fixture.mount().io_path(VOLUME), None);
    let (first, second) = (fixture.open(0), fixture.open(0));
    assert_eq!(fixture.mount().io_path(VOLUME), Some(IoPath::Direct));
    assert_eq!(fixture.namespace.open_count(VOLUME), 2);
    drop((first, second));
    // The kernel releases on its own time.
    until("the release", || fixture.namespace.open_count(VOLUME) == 0);
    assert_eq!(fixture.mount().io_path(VOLUME), None);
    assert!(fixture.mount().open_files().is_empty());
}
