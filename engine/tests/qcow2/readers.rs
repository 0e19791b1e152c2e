//! Many readers of one image.

use std::{
    sync::{Arc, Barrier},
    thread,
};

use bedplate_engine::{
    image::{
        BaseImage,
        qcow2::{Place, View},
    },
    units::{ByteRange, to_usize},
};

use super::images;

const READERS: usize = 8;

#[test]
fn readers_beside_one_another_read_what_one_alone_reads() {
    for image in images::all() {
        let alone = images::open(&image.bytes, &View::Active).unwrap();
        let mut expected = vec![0; to_usize(alone.len().0)];
        alone.read_at(&mut expected, 0).unwrap();
        let shared = Arc::new(images::open(&image.bytes, &View::Active).unwrap());
        let start = Barrier::new(READERS);
        thread::scope(|scope| {
            for reader in 0..READERS {
                let (shared, expected, start) = (shared.clone(), &expected, &start);
                scope.spawn(move || {
                    start.wait();
                    // Each with a stride of its own, so that they meet in some clusters and not in others.
                    let len = 1 + reader * 1537;
                    for (number, part) in expected.chunks(len).enumerate() {
                        let mut buffer = vec![0xa5; part.len()];
                        shared.read_at(&mut buffer, (number * len) as u64).unwrap();
                        assert!(buffer == part, "{} at {}", image.name, number * len);
                    }
                });
            }
        });
    }
}

#[test]
fn clusters_that_lie_next_to_one_another_are_one_segment() {
    let image = images::all().into_iter().find(|image| image.name == "v2").unwrap();
    let layer = images::open_layer(&image.bytes, &View::Active).unwrap();
    let segments = layer.map(ByteRange::new(100, (3 << 20) - 200), 10).unwrap();
    let found: Vec<_> =
        segments.iter().map(|segment| (segment.range.start.0, segment.range.end().0)).collect();
    let written =
        [(100, 64 << 10), (64 << 10, 2 << 20), (2 << 20, 2060 << 10), (2060 << 10, (3 << 20) - 100)];
    assert_eq!(found, written);
    let kinds = [0, 1, 2, 3].map(|n: usize| matches!(segments[n].place, Place::Data { .. }));
    assert_eq!(kinds, [true, false, true, false]);
    assert_eq!(layer.map(ByteRange::new(0, 3 << 20), 2).unwrap().len(), 2);
}
