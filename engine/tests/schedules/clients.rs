//! Clients of one volume that change the same blocks: ownership, landing, group commit.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    exec::storage::memory::MemoryStorage,
    units::ByteRange,
};
use shuttle::thread;

use crate::setting::{BLOCK, SECTOR, VOLUME, create, discard, each_schedule, open, sector, write};

const CLIENTS: usize = 3;

/// Where a client writes, all of them in block 0, so that each fills what the others write.
fn place(client: usize) -> u64 {
    (client * SECTOR) as u64
}

/// What each client had been answered when a flush began, and a medium that lost its power when that had ended.
struct Cut {
    answered: [u8; CLIENTS],
    medium: Arc<MemoryStorage>,
}

#[test]
fn a_flush_keeps_what_any_client_was_answered_before_it() {
    each_schedule(flushes_beside_writes);
}

pub fn flushes_beside_writes() {
    let (storage, disk, volume) = create();
    let answered: Arc<[AtomicU8; CLIENTS]> = Arc::default();
    let clients = (0..CLIENTS).map(|client| {
        let (storage, volume, answered) = (storage.clone(), volume.clone(), answered.clone());
        thread::spawn(move || {
            let mut cuts = Vec::new();
            for byte in 1..=2 {
                write(&*volume, place(client), byte);
                answered[client].store(byte, Ordering::SeqCst);
                assert_eq!(sector(&*volume, place(client)), byte);
                let answered = std::array::from_fn(|client| answered[client].load(Ordering::SeqCst));
                volume.flush().expect("no faults");
                cuts.push(Cut { answered, medium: Arc::new(storage.crash_losing_all()) });
            }
            cuts
        })
    });
    let clients: Vec<_> = clients.collect();
    let cuts: Vec<Cut> = clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect();
    drop((volume, disk));
    for Cut { answered, medium } in cuts {
        let disk = open(&medium);
        let volume = disk.volume(VOLUME).expect("it exists");
        for (client, byte) in answered.into_iter().enumerate() {
            let found = sector(&*volume, place(client));
            assert!(found >= byte, "client {client} was answered {byte}, and {found} is left of it");
        }
    }
}

#[test]
fn a_discard_takes_nothing_that_is_written_after_it() {
    each_schedule(a_discard_beside_writes);
}

pub fn a_discard_beside_writes() {
    let (_storage, disk, volume) = create();
    volume.write_at(&[9; 4096], 0, Durability::Volatile).expect("no faults");
    let discarding = thread::spawn({
        let volume = volume.clone();
        move || volume.discard(ByteRange::new(0, BLOCK)).expect("no faults")
    });
    let mut discarded = false;
    for byte in 1..=3 {
        // Whether it has happened, though it may not have been answered: what is written from here on stays.
        discarded = sector(&*volume, SECTOR as u64) == 0;
        write(&*volume, 0, byte);
    }
    discarding.join().expect("no panic");
    let found = sector(&*volume, 0);
    assert!(found == 3 || (found == 0 && !discarded), "{found} is left of 3");
    let beside = sector(&*volume, SECTOR as u64);
    assert_eq!(beside, 0, "a write of one sector brought back what was discarded beside it");
    drop((volume, disk));
}

#[test]
fn two_parts_of_a_block_that_are_filled_at_once_both_stay() {
    each_schedule(two_fills_of_a_block);
}

pub fn two_fills_of_a_block() {
    let (_storage, disk, volume) = create();
    let writing = thread::spawn({
        let volume = volume.clone();
        move || {
            write(&*volume, SECTOR as u64, 2);
            discard(&*volume, 2 * SECTOR as u64);
        }
    });
    write(&*volume, 0, 1);
    assert_eq!(sector(&*volume, 0), 1);
    writing.join().expect("no panic");
    let found: Vec<u8> = (0..3).map(|n| sector(&*volume, n * SECTOR as u64)).collect();
    assert_eq!(found, [1, 2, 0]);
    drop((volume, disk));
}
