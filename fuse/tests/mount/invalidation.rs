//! The kernel sees at once what the node changed behind its back.

use std::{fs, os::unix::fs::FileExt};

use bedplate_fuse::{Change, FileId, Kind};
use nix::libc;
use uuid::Uuid;

use crate::{
    fixture::{Fixture, VOLUME, VOLUME_SIZE, errno},
    memory::MemoryDevice,
};

#[test]
fn a_volume_that_grew_is_longer_at_once_also_where_it_is_open() {
    let fixture = Fixture::new();
    let file = fixture.open(libc::O_DIRECT);
    assert_eq!(file.metadata().unwrap().len(), VOLUME_SIZE);
    assert_eq!(errno(file.write_at(&[1; 512], VOLUME_SIZE)), libc::ENOSPC);
    fixture.volume.grow(2 * VOLUME_SIZE);
    assert!(fixture.mount().invalidate(Change::Content { file: VOLUME }));
    assert_eq!(fs::metadata(fixture.volume_path()).unwrap().len(), 2 * VOLUME_SIZE);
    assert_eq!(file.metadata().unwrap().len(), 2 * VOLUME_SIZE);
    assert_eq!(file.write_at(&[1; 512], VOLUME_SIZE).unwrap(), 512);
    assert_eq!(file.read_at(&mut [0; 512], 2 * VOLUME_SIZE - 512).unwrap(), 512);
}

#[test]
fn a_deleted_volume_is_gone_at_once() {
    let fixture = Fixture::new();
    assert!(fs::metadata(fixture.volume_path()).is_ok());
    fixture.namespace.remove(VOLUME);
    assert!(fixture.mount().invalidate(Change::Deleted { file: VOLUME, name: "v".into() }));
    assert_eq!(errno(fs::metadata(fixture.volume_path())), libc::ENOENT);
    assert_eq!(errno(fs::File::open(fixture.volume_path())), libc::ENOENT);
    assert_eq!(fs::read_dir(fixture.path("volumes")).unwrap().count(), 0);
}

#[test]
fn a_deleted_volume_that_nobody_told_of_does_not_open() {
    let fixture = Fixture::new();
    assert!(fs::metadata(fixture.volume_path()).is_ok());
    fixture.namespace.remove(VOLUME);
    assert_eq!(errno(fs::File::open(fixture.volume_path())), libc::ENOENT);
}

#[test]
fn a_created_volume_is_there_at_once_though_its_name_was_asked_for_before() {
    let fixture = Fixture::new();
    let path = fixture.path("volumes/new");
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
    fixture.namespace.add(FileId::volume(Uuid::from_u128(9)), "new", MemoryDevice::volume(8192));
    assert!(fixture.mount().invalidate(Change::Created { kind: Kind::Volume, name: "new".into() }));
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
    assert_eq!(fs::read_dir(fixture.path("volumes")).unwrap().count(), 2);
}

#[test]
fn a_reverted_volume_shows_its_new_bytes_in_a_mapping_that_saw_the_old() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, b"before");
    let file = fixture.open(0);
    // SAFETY: the file keeps its size; it changes only while no slice of the mapping is in use.
    #[expect(unsafe_code, reason = "only a mapping makes the kernel cache a volume's bytes")]
    let mapping = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    assert_eq!(&mapping[..6], b"before");
    fixture.volume.poke(0, b"after!");
    assert!(fixture.mount().invalidate(Change::Content { file: VOLUME }));
    assert_eq!(&mapping[..6], b"after!");
}

#[test]
fn a_change_of_a_file_that_the_kernel_never_saw_is_no_error() {
    let fixture = Fixture::new();
    let unseen = FileId::volume(Uuid::from_u128(99));
    assert!(fixture.mount().invalidate(Change::Content { file: unseen }));
    assert!(fixture.mount().invalidate(Change::Deleted { file: unseen, name: "unseen".into() }));
}
