//! Image files: passed through or cached, one way per inode while any handle is open, and never written.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
};

use bedplate_fuse::IoPath;
use nix::{libc, sys::utsname::uname};

use crate::{
    fixture::{Fixture, IMAGE, errno, pattern, until},
    memory::{Asked, MemoryDevice},
};

/// What a raw image is served by on this kernel: passthrough came with 6.9.
fn raw_path() -> IoPath {
    let release = uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 9) { IoPath::Passthrough } else { IoPath::Cached }
}

fn fixture_with_raw_image(content: &[u8], file_content: &[u8]) -> (Fixture, std::sync::Arc<MemoryDevice>) {
    let fixture = Fixture::new();
    let backing = fixture.scratch("raw");
    fs::write(&backing, file_content).unwrap();
    let device = MemoryDevice::image(content.to_vec());
    fixture.namespace.add_backed(IMAGE, "i", device.clone(), Some(backing));
    (fixture, device)
}

#[test]
fn a_raw_image_is_passed_through_and_reads_as_itself() {
    let content = pattern((3 << 20) + 1234, 1);
    let (fixture, device) = fixture_with_raw_image(&content, &content);
    let first = File::open(fixture.path("images/i")).unwrap();
    let second = File::open(fixture.path("images/i")).unwrap();
    assert_eq!(fixture.mount().io_path(IMAGE), Some(raw_path()));
    for file in [&first, &second] {
        let mut back = vec![0; content.len()];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == content);
        assert_eq!(file.read_at(&mut [0; 10], content.len().try_into().unwrap()).unwrap(), 0);
    }
    if raw_path() == IoPath::Passthrough {
        assert_eq!(device.take_asked(), [], "we were asked");
    }
    drop((first, second));
    until("the release", || fixture.mount().io_path(IMAGE).is_none());
    assert!(fs::read(fixture.path("images/i")).unwrap() == content, "and so again after the last release");
}

#[test]
fn a_file_that_is_not_as_long_as_its_image_is_not_passed_through() {
    let content = pattern(10_000, 1);
    let (fixture, _) = fixture_with_raw_image(&content, &content[..9_000]);
    let file = File::open(fixture.path("images/i")).unwrap();
    assert_eq!(fixture.mount().io_path(IMAGE), Some(IoPath::Cached));
    let mut back = vec![0; content.len()];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == content);
}

#[test]
fn a_file_that_the_kernel_refuses_to_pass_through_is_cached() {
    // A file of a FUSE mount is stacked already.
    let content = pattern(10_000, 1);
    let (inner, _) = fixture_with_raw_image(&content, &content);
    let outer = Fixture::new();
    let device = MemoryDevice::image(content.clone());
    outer.namespace.add_backed(IMAGE, "i", device, Some(inner.path("images/i")));
    let file = File::open(outer.path("images/i")).unwrap();
    assert_eq!(outer.mount().io_path(IMAGE), Some(IoPath::Cached));
    let mut back = vec![0; content.len()];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == content);
}

#[test]
fn the_first_opening_decides_the_path_of_all_that_overlap_it() {
    let content = pattern(100_000, 1);
    let (fixture, device) = fixture_with_raw_image(&content, &content);
    let (path, backing) = (fixture.path("images/i"), fixture.scratch("raw"));
    let set_backing = |backing| fixture.namespace.add_backed(IMAGE, "i", device.clone(), backing);
    for (first, then, expected) in
        [(None, Some(backing.clone()), IoPath::Cached), (Some(backing.clone()), None, raw_path())]
    {
        set_backing(first);
        let one = File::open(&path).unwrap();
        set_backing(then);
        let two = File::open(&path).unwrap();
        assert_eq!(fixture.mount().io_path(IMAGE), Some(expected));
        for file in [&one, &two] {
            let mut back = vec![0; content.len()];
            file.read_exact_at(&mut back, 0).unwrap();
            assert!(back == content);
        }
        // The second still reads when the one that decided has gone.
        drop(one);
        until("the first release", || fixture.mount().open_files() == [IMAGE]);
        assert_eq!(two.read_at(&mut [0; 4096], 50_000).unwrap(), 4096);
        drop(two);
        until("the last release", || fixture.mount().open_files().is_empty());
    }
}

#[test]
fn a_cached_image_is_read_from_us_once_also_over_reopening() {
    let fixture = Fixture::new();
    let content = pattern(300_000, 1);
    let device = MemoryDevice::image(content.clone());
    fixture.namespace.add(IMAGE, "i", device.clone());
    assert!(fs::read(fixture.path("images/i")).unwrap() == content);
    let reads = |asked: Vec<Asked>| asked.iter().any(|asked| matches!(asked, Asked::Read { .. }));
    assert!(reads(device.take_asked()));
    assert!(fs::read(fixture.path("images/i")).unwrap() == content);
    assert!(!reads(device.take_asked()), "the second reading came from the page cache");
}

#[test]
fn an_image_does_not_open_for_writing_and_does_not_truncate() {
    let fixture = Fixture::new();
    fixture.namespace.add(IMAGE, "i", MemoryDevice::image(vec![1; 5000]));
    let path = fixture.path("images/i");
    assert_eq!(errno(OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&path)), libc::EROFS);
    assert_eq!(errno(nix::unistd::truncate(&path, 0).map_err(Into::into)), libc::EROFS);
    assert_eq!(fixture.namespace.open_count(IMAGE), 0);
    assert_eq!(fs::read(&path).unwrap(), vec![1; 5000]);
}
