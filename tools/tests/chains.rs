//! Images that are several files: what they read, and which names are not followed.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

use std::{
    fs::{self, File},
    ops::ControlFlow,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
};

use bedplate_engine::{
    device::{BlockDevice, ExtentKind},
    error::{Error, Result},
    image::{
        qcow2::{Qcow2Image, View},
        references::CHAIN_DEPTH_MAX,
    },
    units::{ByteRange, to_usize},
};
use bedplate_inspect::{
    source::{self, FileArgs, OpenArgs},
    stack::{Kind, Stack},
};

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn create(path: &Path, options: &str, size: &str, writes: &[&str]) {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-u", "-f", "qcow2", "-o", options])
        .arg(path)
        .arg(size));
    for write in writes {
        run(Command::new("qemu-io").args(["-f", "qcow2", "-c", write]).arg(path));
    }
}

fn open(path: &Path, allowed: Option<&Path>) -> Result<Stack> {
    let files = FileArgs { allow_references: allowed.map(Path::to_owned), backing: None };
    source::open(path, &OpenArgs { files, ..OpenArgs::default() })
}

fn content(stack: &Stack) -> Vec<u8> {
    let mut bytes = vec![0xa5; to_usize(stack.size())];
    // Pieces that do not care for clusters.
    for (number, part) in bytes.chunks_mut(70_001).enumerate() {
        stack.read_at(part, number as u64 * 70_001).unwrap();
    }
    bytes
}

fn as_qemu_reads(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("converted");
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(path).arg(&raw));
    fs::read(raw).unwrap()
}

#[test]
fn a_chain_reads_as_qemu_reads_it_also_where_files_are_shorter_or_odd() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("base.raw"), vec![7; 700_000 + 512]).unwrap();
    create(
        &dir.join("middle.qcow2"),
        "backing_file=base.raw,backing_fmt=raw,cluster_size=4k",
        "1M",
        &["write -P 1 100k 20k", "write -z 300k 64k", "write -c -P 2 400k 8k"],
    );
    let top = dir.join("sub/top.qcow2");
    create(
        &top,
        "backing_file=../middle.qcow2,backing_fmt=qcow2,extended_l2=on",
        "3000000",
        &["write -P 3 110k 1k", "write -z 690k 4k", "write -P 4 2M 10k"],
    );
    let chain = open(&top, Some(dir)).unwrap();
    assert_eq!(chain.names().len(), 3);
    let expected = as_qemu_reads(&top);
    assert!(content(&chain) == expected, "the chain reads otherwise than qemu-img");

    let whole = ByteRange::new(0, chain.size());
    let (mut end, mut depths) = (0, [0; 3]);
    chain
        .each(whole, |run| {
            assert_eq!(run.range.start.0, end);
            end = run.range.end().0;
            if run.kind != Kind::Absent {
                depths[run.depth] += run.range.len.0;
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(end, whole.len.0);
    assert!(depths.iter().all(|bytes| *bytes > 0), "{depths:?}");
    for extent in chain.extents(whole).unwrap() {
        let range = to_usize(extent.range.start.0)..to_usize(extent.range.end().0);
        if extent.kind == ExtentKind::Zero {
            assert!(expected[range].iter().all(|byte| *byte == 0), "{}", extent.range);
        }
    }
}

#[test]
fn an_external_data_file_is_read_and_one_that_is_too_short_is_corruption() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let image = dir.join("image.qcow2");
    let options = format!("data_file={}", dir.join("image.data").display());
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(&image).arg("1M"));
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 1 0 128k"]).arg(&image));
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 2 512k 4k"]).arg(&image));
    assert!(content(&open(&image, Some(dir)).unwrap()) == as_qemu_reads(&image));
    let base = Qcow2Image::open(File::open(&image).unwrap(), &image, &View::Active);
    assert!(matches!(base, Err(Error::Unsupported { what, .. }) if what.contains("image.data")));
    let alone = open(&image, None).unwrap().read_at(&mut [0; 512], 0);
    assert!(matches!(alone, Err(Error::Unsupported { what, .. }) if what.contains("image.data")));
    File::options().write(true).open(dir.join("image.data")).unwrap().set_len(513 << 10).unwrap();
    let cut = open(&image, Some(dir)).unwrap();
    let mut buffer = [0; 4096];
    cut.read_at(&mut buffer[..512], 512 << 10).unwrap();
    assert!(matches!(cut.read_at(&mut buffer, 512 << 10), Err(Error::Corrupt { .. })));
}

#[test]
fn a_backing_file_is_probed_only_where_the_header_does_not_say() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    create(&dir.join("base"), "cluster_size=4k", "64k", &["write -P 9 0 64k"]);
    create(&dir.join("told.qcow2"), "backing_file=base,backing_fmt=raw", "4k", &[]);
    create(&dir.join("untold.qcow2"), "backing_file=base,backing_fmt=qcow2", "4k", &[]);
    // The extension with the format becomes one that nobody knows.
    let path = dir.join("untold.qcow2");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0x12;
    fs::write(&path, bytes).unwrap();
    assert!(content(&open(&dir.join("told.qcow2"), Some(dir)).unwrap()).starts_with(b"QFI\xfb"));
    assert_eq!(content(&open(&path, Some(dir)).unwrap()), [9; 4096]);
}

#[test]
fn names_that_lead_out_or_are_no_files_are_not_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let (outside, allowed) = (scratch.path().join("outside"), scratch.path().join("allowed"));
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&allowed).unwrap();
    fs::write(outside.join("secret"), [1; 4096]).unwrap();
    fs::write(allowed.join("base"), [2; 4096]).unwrap();
    symlink(outside.join("secret"), allowed.join("link")).unwrap();
    symlink("../outside/secret", allowed.join("relative_link")).unwrap();
    symlink("/dev/zero", allowed.join("device")).unwrap();
    nix::unistd::mkfifo(&allowed.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let secret = outside.join("secret");
    let image = allowed.join("image.qcow2");
    let named = |name: &str| {
        create(&image, &format!("backing_file={name},backing_fmt=raw"), "4k", &[]);
        open(&image, Some(&allowed))
    };
    for name in [
        "../outside/secret",
        "./../outside/secret",
        secret.to_str().unwrap(),
        "/etc/passwd",
        "/dev/zero",
        "link",
        "relative_link",
        "device",
        "pipe",
        ".",
        "nbd://localhost/x",
        "file:base",
        "json:{\"driver\":\"file\"}",
        "image.qcow2",
    ] {
        let refused = named(name).err();
        assert!(matches!(refused, Some(Error::Unsupported { .. })), "{name}: {refused:?}");
    }
    let missing = named("missing");
    assert!(missing.is_err_and(|error| error.is_not_found()));
    assert_eq!(content(&named("base").unwrap()), [2; 4096]);
    assert_eq!(content(&named(allowed.join("base").to_str().unwrap()).unwrap()), [2; 4096]);
    let alone = open(&image, None).unwrap().read_at(&mut [0; 512], 0);
    assert!(matches!(alone, Err(Error::Unsupported { .. })), "nothing is allowed by itself: {alone:?}");
}

#[test]
fn a_loop_and_a_chain_that_is_too_long_end() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    create(&dir.join("a"), "backing_file=b,backing_fmt=qcow2", "64k", &[]);
    create(&dir.join("b"), "backing_file=a,backing_fmt=qcow2", "64k", &[]);
    assert!(matches!(open(&dir.join("a"), Some(dir)), Err(Error::Unsupported { .. })));
    create(&dir.join("0"), "cluster_size=4k", "64k", &["write -P 5 0 4k"]);
    for number in 1..=CHAIN_DEPTH_MAX {
        let options = format!("cluster_size=4k,backing_file={},backing_fmt=qcow2", number - 1);
        create(&dir.join(number.to_string()), &options, "64k", &[]);
    }
    let longest = open(&dir.join((CHAIN_DEPTH_MAX - 1).to_string()), Some(dir)).unwrap();
    let mut start = [0; 4096];
    longest.read_at(&mut start, 0).unwrap();
    assert_eq!((start, longest.size()), ([5; 4096], 65536));
    let refused = open(&dir.join(CHAIN_DEPTH_MAX.to_string()), Some(dir));
    assert!(matches!(refused, Err(Error::Unsupported { what, .. }) if what.contains("CHAIN_DEPTH_MAX")));
}
