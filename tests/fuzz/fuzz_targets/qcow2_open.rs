//! Opening: the header, its extensions, the L1 table, and the lists that opening leaves alone.
#![no_main]

use std::path::Path;

use bedplate_engine::image::qcow2::{Qcow2Image, Qcow2Layer, View};
use bedplate_fuzz_targets::file_of;
use libfuzzer_sys::fuzz_target;

/// Views that are opened of one input: each reads the whole list of snapshots, and an L1 table of its own.
const SNAPSHOTS_MAX: usize = 8;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz");
    let _ = Qcow2Image::open(file_of(bytes), path, &View::Active);
    let Ok(layer) = Qcow2Layer::open(file_of(bytes), path, &View::Active) else { return };
    let _ = layer.bitmaps();
    for snapshot in layer.snapshots().unwrap_or_default().into_iter().take(SNAPSHOTS_MAX) {
        let _ = Qcow2Layer::open(file_of(bytes), path, &View::Snapshot(snapshot.id));
    }
    if let Ok(refcounts) = layer.refcounts() {
        for index in 0..refcounts.block_count().min(16) {
            let _ = refcounts.read_block(index);
        }
    }
});
