//! Images to start from, one for each part of the format, as small as they can be.

use std::{
    fs::{self, File},
    io::{Seek, Write},
    path::Path,
    process::Command,
};

use bedplate_engine::{
    error::Result,
    image::qcow2::{Qcow2Image, Qcow2Layer, View},
};

/// A file's bytes, and what they are called.
pub struct Image {
    pub name: &'static str,
    pub bytes: Vec<u8>,
}

/// (name, options of qemu-img create, size, commands of qemu-io); `snapshot` among the commands takes one.
type Recipe = (&'static str, &'static str, &'static str, &'static [&'static str]);

const RECIPES: [Recipe; 8] = [
    ("v2", "compat=0.10,cluster_size=4k", "3M", &["write -P 1 0 64k", "write -P 2 2M 10k"]),
    (
        "tiny_clusters",
        "cluster_size=512",
        "200k",
        &["write -P 1 0 5k", "write -P 2 100k 7k", "write -z 8k 4k"],
    ),
    (
        "zlib",
        "cluster_size=4k",
        "1M",
        &["write -c -P 1 0 64k", "write -P 2 512k 8k", "write -c -P 3 1020k 4k"],
    ),
    (
        "zstd",
        "cluster_size=64k,compression_type=zstd",
        "5000000",
        &["write -c -P 1 0 256k", "write -z 256k 128k", "write -P 4 1M 64k"],
    ),
    (
        "extended",
        "cluster_size=16k,extended_l2=on",
        "1M",
        &["write -P 1 512 512", "write -z 20k 4k", "write -P 2 40k 10k", "write -c -P 3 64k 16k"],
    ),
    (
        "snapshots",
        "cluster_size=4k",
        "1M",
        &["write -P 1 0 32k", "snapshot", "write -P 2 16k 32k", "snapshot", "write -c -P 3 128k 8k"],
    ),
    ("refcounts", "cluster_size=1k,refcount_bits=1,lazy_refcounts=on", "300k", &["write -P 1 9k 20k"]),
    ("large_clusters", "cluster_size=256k,extended_l2=on", "9M", &["write -P 1 0 512"]),
];

/// Make all of them.
pub fn all() -> Vec<Image> {
    let scratch = tempfile::tempdir().unwrap();
    RECIPES
        .iter()
        .map(|(name, options, size, commands)| {
            let path = scratch.path().join(name);
            run(Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-o", options])
                .arg(&path)
                .arg(size));
            for (number, command) in commands.iter().enumerate() {
                if *command == "snapshot" {
                    let name = format!("s{number}");
                    run(Command::new("qemu-img").args(["snapshot", "-c", &name]).arg(&path));
                } else {
                    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(&path));
                }
            }
            if *name == "tiny_clusters" {
                run(Command::new("qemu-img").args(["bitmap", "--add"]).arg(&path).arg("b0"));
            }
            Image { name, bytes: fs::read(path).unwrap() }
        })
        .collect()
}

pub fn run(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A file of these bytes.
pub fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

pub fn open(bytes: &[u8], view: &View) -> Result<Qcow2Image> {
    Qcow2Image::open(file_of(bytes), Path::new("test.qcow2"), view)
}

pub fn open_layer(bytes: &[u8], view: &View) -> Result<Qcow2Layer> {
    Qcow2Layer::open(file_of(bytes), Path::new("test.qcow2"), view)
}
