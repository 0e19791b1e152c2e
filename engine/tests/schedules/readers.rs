//! Readers beside life operations: what is published, and when what it named is given back.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use shuttle::thread;

use crate::setting::{BLOCK, VOLUME, create, each_schedule, sector, write};

#[test]
fn a_snapshot_holds_what_was_answered_before_it_and_a_reader_sees_no_switch() {
    each_schedule(a_snapshot_beside_writes);
}

pub fn a_snapshot_beside_writes() {
    let (_storage, disk, volume) = create();
    write(&*volume, BLOCK, 7);
    let answered = Arc::new(AtomicU8::new(0));
    let writing = thread::spawn({
        let (volume, answered) = (volume.clone(), answered.clone());
        move || {
            for byte in 1..=3 {
                write(&*volume, 0, byte);
                answered.store(byte, Ordering::SeqCst);
            }
        }
    });
    let reading = thread::spawn({
        let volume = volume.clone();
        move || (0..4).for_each(|_| assert_eq!(sector(&*volume, BLOCK), 7))
    });
    let before = answered.load(Ordering::SeqCst);
    disk.create_snapshot(VOLUME, "s").expect("no faults");
    let snapshot = disk.view(VOLUME, Some("s")).expect("it exists");
    let held = sector(&snapshot, 0);
    assert!(held >= before, "{before} was answered, the snapshot holds {held}");
    writing.join().expect("no panic");
    reading.join().expect("no panic");
    assert_eq!(sector(&snapshot, 0), held, "the snapshot changed");
    assert_eq!(sector(&*volume, 0), 3);
    drop((snapshot, volume, disk));
}

#[test]
fn who_reads_a_snapshot_reads_it_to_the_end_though_it_is_deleted_and_merged() {
    each_schedule(a_merge_beside_readers);
}

pub fn a_merge_beside_readers() {
    let (_storage, disk, volume) = create();
    // What merges does so into the older layer, which then holds the newer one's bytes.
    for (byte, name) in [(1, "old"), (2, "new")] {
        write(&*volume, 0, byte);
        disk.create_snapshot(VOLUME, name).expect("no faults");
    }
    write(&*volume, BLOCK, 3);
    let reading = thread::spawn({
        let disk = disk.clone();
        move || {
            if let Ok(snapshot) = disk.view(VOLUME, Some("old")) {
                (0..4).for_each(|_| assert_eq!(sector(&snapshot, 0), 1));
            }
        }
    });
    let following = thread::spawn({
        let volume = volume.clone();
        move || (0..4).for_each(|_| assert_eq!([0, BLOCK].map(|at| sector(&*volume, at)), [2, 3]))
    });
    // A reader may have it.
    if disk.delete_snapshot(VOLUME, "old").is_ok() {
        disk.reclaim(|| true).expect("no faults");
    }
    reading.join().expect("no panic");
    following.join().expect("no panic");
    disk.reclaim(|| true).expect("no faults");
    assert_eq!([0, BLOCK].map(|at| sector(&*volume, at)), [2, 3]);
    drop((volume, disk));
}
