//! The JSON records of a disk. The first byte says which.
#![no_main]

use std::path::Path;

use bedplate::{
    catalog::record::ImageRecord,
    prep::{
        checksum::{Expected, Hasher},
        partial::Kept,
    },
};
use bedplate_engine::{
    exec::storage::{Open, Storage, memory::MemoryStorage},
    volume::record::{self, DiskRecord, Record, VolumeRecord},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, json)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => {
            stored::<DiskRecord>(json);
        }
        1 => {
            if let Some(volume) = stored::<VolumeRecord>(json) {
                every_change_keeps_the_rules(&volume);
            }
        }
        2 => image(json),
        _ => kept(json),
    }
});

/// The record as the engine reads it; what it writes of it is the same.
fn stored<R: Record + PartialEq + std::fmt::Debug>(json: &[u8]) -> Option<R> {
    let storage = MemoryStorage::new(512);
    let write = || storage.open("r.json", Open::Create)?.write_at(json, 0);
    write().expect("memory takes it");
    let read: R = record::read(&storage, "r.json").ok()?;
    storage.create_dir("d").expect("memory takes it");
    record::write_new(&storage, "d", "r.json", &read).expect("memory takes it");
    let again: R = record::read(&storage, "d/r.json").expect("what was written is read");
    assert_eq!(again, read);
    Some(read)
}

fn every_change_keeps_the_rules(volume: &VolumeRecord) {
    for layer in &volume.layers {
        let chain = volume.chain(layer.uuid);
        assert!(chain.len() <= volume.layers.len());
        if layer.uuid != volume.head && !volume.snapshots.iter().any(|s| s.layer == layer.uuid) {
            let mut without = volume.clone();
            without.splice(layer.uuid);
            assert_eq!(without.verify(), Ok(()));
        }
        if let Some(lower) = layer.parent
            && layer.uuid != volume.head
        {
            let mut folded = volume.clone();
            folded.fold(layer.uuid, lower);
            assert_eq!(folded.verify(), Ok(()));
        }
    }
    let mut pruned = volume.clone();
    pruned.prune();
    assert_eq!(pruned.verify(), Ok(()));
}

fn image(json: &[u8]) {
    let path = Path::new("image.json");
    let Ok(read) = ImageRecord::parse(json, path) else { return };
    let again = ImageRecord::parse(&read.to_json(), path).expect("what was written is read");
    assert_eq!(again, read);
    assert!(!read.directory_name().contains('/') && !read.directory_name().starts_with('.'));
}

/// What is kept of an arrival, also with a check that agrees.
fn kept(json: &[u8]) {
    let believed = Kept::parse(json);
    let Some(kept) = serde_json::from_slice(json).ok().or_else(|| believed.clone()) else { return };
    let again = Kept::parse(&kept.to_json());
    assert!(again.is_none_or(|again| again == kept));
    let sha256 = Expected::Sha256("0".repeat(64));
    for expected in [None, Some(&sha256)] {
        if let Some(mut hasher) = Hasher::resume(&kept.midstate, expected) {
            let again = hasher.midstate();
            assert!(Hasher::resume(&again, expected).is_some());
            hasher.update(b"and the rest");
            assert_eq!(hasher.finish().sha512.len(), 128);
        }
    }
}
