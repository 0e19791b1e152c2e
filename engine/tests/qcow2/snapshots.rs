//! Snapshots whose entry says less than it may.

use std::{fs, process::Command};

use bedplate_engine::{
    error::Error,
    image::{BaseImage, qcow2::View},
    units::ByteLen,
};

use super::images::{self, run};

/// An image of 3 MiB with 4 KiB clusters, so of two L2 tables, and one snapshot whose entry has no extra data and an L1
/// table of one entry.
fn with_a_short_entry(compat: &str) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("image");
    let options = format!("compat={compat},cluster_size=4k");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(&path).arg("3M"));
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 1 0 64k"]).arg(&path));
    run(Command::new("qemu-img").args(["snapshot", "-c", "old"]).arg(&path));
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 2 0 64k"]).arg(&path));
    let mut bytes = fs::read(path).unwrap();
    let table = usize::try_from(u64::from_be_bytes(bytes[64..72].try_into().unwrap())).unwrap();
    let entry = &mut bytes[table..table + 128];
    let extra = usize::try_from(u32::from_be_bytes(entry[36..40].try_into().unwrap())).unwrap();
    entry[8..12].copy_from_slice(&1_u32.to_be_bytes());
    entry[36..40].fill(0);
    entry.copy_within(40 + extra..40 + extra + 4, 40);
    bytes
}

#[test]
fn a_snapshot_of_version_2_without_a_size_is_as_long_as_its_table_maps() {
    let bytes = with_a_short_entry("0.10");
    let snapshot = images::open(&bytes, &View::Snapshot("old".into())).unwrap();
    assert_eq!(snapshot.len(), ByteLen(2 << 20));
    let mut start = [0; 4096];
    snapshot.read_at(&mut start, 60 << 10).unwrap();
    assert_eq!(start, [1; 4096]);
}

#[test]
fn a_snapshot_of_version_3_without_a_size_is_corrupt_and_the_image_reads() {
    let bytes = with_a_short_entry("1.1");
    let snapshot = images::open(&bytes, &View::Snapshot("old".into()));
    assert!(matches!(snapshot, Err(Error::Corrupt { .. })), "{snapshot:?}");
    let mut start = [0; 4096];
    images::open(&bytes, &View::Active).unwrap().read_at(&mut start, 0).unwrap();
    assert_eq!(start, [2; 4096]);
}

#[test]
fn a_snapshot_that_is_not_there_is_not_found() {
    let bytes = with_a_short_entry("1.1");
    let missing = images::open(&bytes, &View::Snapshot("older".into()));
    assert!(matches!(missing, Err(Error::NotFound { kind: "internal snapshot", .. })));
}
