//! Many readers of one image.

use std::{
    sync::{Arc, Barrier},
    thread,
};

use bedplate_engine::{
    image::{BaseImage, qcow2::View},
    units::to_usize,
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
