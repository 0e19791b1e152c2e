//! Names, attributes, and what a mount refuses to do with names.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use bedplate_fuse::{FileId, Kind, Mode, MountOptions};
use nix::{
    libc,
    sys::{stat::Mode as FileMode, statvfs::statvfs},
};
use uuid::Uuid;

use crate::{
    fixture::{Fixture, IMAGE, VOLUME, VOLUME_SIZE, errno, options, shell_ok},
    memory::MemoryDevice,
};

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_root_has_images_and_volumes_and_each_lists_its_files() {
    let fixture = Fixture::new();
    fixture.namespace.add(IMAGE, "i", MemoryDevice::image(vec![7; 100]));
    assert_eq!(names(&fixture.dir()), ["images", "volumes"]);
    assert_eq!(names(&fixture.path("images")), ["i"]);
    assert_eq!(names(&fixture.path("volumes")), ["v"]);
    assert_eq!(errno(fs::metadata(fixture.path("volumes/none"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(fixture.path("none"))), libc::ENOENT);
}

#[test]
fn a_listing_of_thousands_is_complete_and_has_no_name_twice() {
    let fixture = Fixture::new();
    for n in 0..3000_u32 {
        let file = FileId::volume(Uuid::from_u128(1000 + u128::from(n)));
        fixture.namespace.add(file, &format!("volume-{n:05}"), MemoryDevice::volume(4096));
    }
    let mut expected: Vec<String> = (0..3000).map(|n| format!("volume-{n:05}")).collect();
    expected.insert(0, "v".into());
    expected.sort();
    assert_eq!(names(&fixture.path("volumes")), expected);
}

#[test]
fn ls_shows_size_mode_and_blocks() {
    let fixture = Fixture::new();
    fixture.namespace.add(IMAGE, "i", MemoryDevice::image(vec![7; 10000]));
    fixture.volume.poke(8192, &[1; 4096]);
    let volume = fs::metadata(fixture.volume_path()).unwrap();
    assert_eq!(volume.len(), VOLUME_SIZE);
    assert_eq!((volume.mode(), volume.nlink(), volume.uid()), (libc::S_IFREG | 0o600, 1, 0));
    assert_eq!((volume.blocks(), volume.blksize()), (8, 4096));
    let image = fs::metadata(fixture.path("images/i")).unwrap();
    assert_eq!((image.len(), image.mode()), (10000, libc::S_IFREG | 0o400));
    let listing = shell_ok(&fixture, "ls -ls --time-style=+ $(dirname $F)");
    assert!(listing.contains(&format!("4 -rw------- 1 root root {VOLUME_SIZE}  v")), "{listing}");
}

#[test]
fn the_mount_modes_are_the_files_modes_and_an_image_is_never_writable() {
    let mode = |bits| Mode::new(bits).unwrap();
    let options = MountOptions { volume_mode: mode(0o660), image_mode: mode(0o664), ..options() };
    let fixture = Fixture::with_options(options);
    fixture.namespace.add(IMAGE, "i", MemoryDevice::image(vec![7; 100]));
    let bits = |path: &str| fs::metadata(fixture.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(bits("volumes/v"), 0o660);
    assert_eq!(bits("images/i"), 0o444);
}

#[test]
fn a_volume_that_is_read_only_shows_no_write_bit_and_does_not_open_for_writing() {
    let fixture = Fixture::new();
    let file = FileId::volume(Uuid::from_u128(9));
    fixture.namespace.add(file, "r", MemoryDevice::image(vec![1; 8192]));
    let path = fixture.path("volumes/r");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
    assert_eq!(errno(fs::OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(fixture.namespace.open_count(file), 0, "a refused opening holds nothing");
    assert_eq!(fs::read(&path).unwrap(), vec![1; 8192]);
}

#[test]
fn names_are_neither_made_nor_taken_nor_changed_through_the_mount() {
    let fixture = Fixture::new();
    let (volume, new) = (fixture.volume_path(), fixture.path("volumes/new"));
    let refusals = [
        ("create", errno(fs::File::create_new(&new))),
        ("mkdir", errno(fs::create_dir(&new))),
        ("symlink", errno(symlink("v", &new))),
        ("link", errno(fs::hard_link(&volume, &new))),
        ("mkfifo", errno(nix::unistd::mkfifo(&new, FileMode::S_IRUSR).map_err(Into::into))),
        ("unlink", errno(fs::remove_file(&volume))),
        ("rmdir", errno(fs::remove_dir(fixture.path("volumes")))),
        ("rename", errno(fs::rename(&volume, &new))),
        ("chmod", errno(fs::set_permissions(&volume, fs::Permissions::from_mode(0o666)))),
        ("chown", errno(std::os::unix::fs::chown(&volume, Some(1), None))),
    ];
    for (operation, number) in refusals {
        assert_eq!(number, libc::EPERM, "{operation}");
    }
    assert_eq!(names(&fixture.path("volumes")), ["v"]);
}

#[test]
fn times_may_be_set_and_stay_what_they_are() {
    let fixture = Fixture::new();
    let before = fs::metadata(fixture.volume_path()).unwrap().modified().unwrap();
    shell_ok(&fixture, "touch -d 2001-01-01 $F");
    assert_eq!(fs::metadata(fixture.volume_path()).unwrap().modified().unwrap(), before);
}

#[test]
fn statfs_has_blocks_of_4096() {
    let fixture = Fixture::new();
    let stat = statvfs(&fixture.volume_path()).unwrap();
    assert_eq!((stat.block_size(), stat.fragment_size()), (4096, 4096));
}

#[test]
fn inode_numbers_are_the_same_in_two_mounts_and_differ_between_kinds() {
    let uuid = Uuid::from_u128(77);
    let numbers = || {
        let fixture = Fixture::new();
        fixture.namespace.add(FileId { kind: Kind::Image, uuid }, "x", MemoryDevice::image(vec![1; 10]));
        fixture.namespace.add(FileId { kind: Kind::Volume, uuid }, "x", MemoryDevice::volume(4096));
        let number = |path: &str| fs::metadata(fixture.path(path)).unwrap().ino();
        (number("images/x"), number("volumes/x"))
    };
    let (first, second) = (numbers(), numbers());
    assert_eq!(first, second);
    assert_ne!(first.0, first.1);
}

#[test]
fn a_name_that_is_given_to_another_volume_gets_another_number() {
    let fixture = Fixture::new();
    let before = fs::metadata(fixture.volume_path()).unwrap().ino();
    fixture.namespace.remove(VOLUME);
    fixture.namespace.add(FileId::volume(Uuid::from_u128(50)), "v", MemoryDevice::volume(8192));
    // The kernel has not been told: it still finds the old number, is told that it is stale, and looks again.
    let content = fs::read(fixture.volume_path()).unwrap();
    assert_eq!(content.len(), 8192);
    assert_ne!(fs::metadata(fixture.volume_path()).unwrap().ino(), before);
}

#[test]
fn a_mount_knows_what_stat_says_of_its_files_without_asking() {
    let fixture = Fixture::new();
    let identity = fixture.mount().identity(VOLUME).unwrap();
    let found = fs::metadata(fixture.volume_path()).unwrap();
    assert_eq!(identity.inode, found.ino());
    let (major, minor) = (libc::major(found.dev()), libc::minor(found.dev()));
    assert_eq!(identity.file_system, format!("{major}:{minor}"));
    assert_eq!(fixture.mount().file_system(), identity.file_system);
}
