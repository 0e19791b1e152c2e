//! Life operations of a disk that meet others: at the worst moment, which a hook of the storage holds open, and under
//! the load of several clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::Error,
    exec::{simulated::Seed, storage::memory::CallKind},
    units::{ByteLen, ByteRange},
    volume::{
        device::{Volume, VolumeState},
        disk::Disk,
    },
};

use crate::life::{Images, VOLUME, create_volume};

/// How long a test waits for another thread before it fails.
const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn a_merge_found_in_the_middle_of_a_clone_leaves_the_clone_its_layer() {
    let (storage, disk) = create_volume();
    let volume = disk.volume(VOLUME).expect("it exists");
    volume.write_at(&[7; 4096], 4096, Durability::Volatile).expect("no faults");
    // The clone freezes the head under a new one, then makes its own: at that second directory a merge begins.
    let (begin, begun) = mpsc::channel();
    let (found, merge_found) = mpsc::channel();
    let merging = std::thread::spawn({
        let disk = disk.clone();
        move || {
            begun.recv_timeout(DEADLINE).expect("the clone makes a layer");
            // Asked when the candidate is known and nothing is locked yet.
            disk.reclaim(|| {
                let _ = found.send(());
                true
            })
        }
    });
    let mut made = 0;
    storage.set_faults(move |call| {
        made += u64::from(call.kind == CallKind::CreateDir);
        if call.kind == CallKind::CreateDir && made == 2 {
            begin.send(()).expect("the merging thread waits");
            match merge_found.recv_timeout(DEADLINE) {
                // It may as well have found nothing to merge.
                Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
                Err(RecvTimeoutError::Timeout) => panic!("the merge neither begins nor ends"),
            }
        }
        None
    });
    disk.clone_volume(VOLUME, None, "clone").expect("no faults");
    merging.join().expect("no panic").expect("no faults");
    storage.clear_faults();
    disk.reclaim(|| true).expect("no faults");
    let clone = disk.volume("clone").expect("it exists");
    for device in [&volume, &clone] {
        let mut found = vec![0; 4096];
        device.read_at(&mut found, 4096).expect("readable");
        assert!(found == [7; 4096], "a block of the layer below is gone");
    }
    drop((volume, clone));
    drop(disk);
    let left = Arc::new(storage.crash_losing_all());
    let disk = Disk::open_storage(left, Arc::new(Images)).expect("opens");
    let mut found = vec![0; 4096];
    disk.volume("clone").expect("it exists").read_at(&mut found, 4096).expect("readable");
    assert!(found == [7; 4096], "the clone is not what it was after a crash");
}

/// Bytes of one client's part of the volume: block borders lie within it and at its ends.
const PART: u64 = 5 * 4096 + 2048;
const CLIENTS: u64 = 4;

/// One client: writes and discards in its own part, and always reads what it left there. Returns that.
fn client(volume: &Volume, number: u64, life_goes_on: &AtomicBool) -> Vec<u8> {
    let start = number * PART;
    let mut seed = Seed(number);
    let mut model = vec![0; usize::try_from(PART).expect("small")];
    volume.zero(ByteRange::new(start, PART), Durability::Volatile).expect("no faults");
    while life_goes_on.load(Ordering::Relaxed) {
        let at = seed.below(PART / 512) * 512;
        let len = 512 * (1 + seed.below(((PART - at) / 512).min(20)));
        let place = usize::try_from(at).expect("small")..usize::try_from(at + len).expect("small");
        let durability = if seed.one_in(9) { Durability::Fua } else { Durability::Volatile };
        match seed.below(5) {
            0 => {
                volume.zero(ByteRange::new(start + at, len), durability).expect("no faults");
                model[place].fill(0);
            }
            1 | 2 => {
                let byte = seed.number().to_le_bytes()[0];
                model[place.clone()].fill(byte);
                volume.write_at(&model[place], start + at, durability).expect("no faults");
            }
            3 if seed.one_in(8) => volume.flush().expect("no faults"),
            _ => {
                let mut found = vec![0; place.len()];
                volume.read_at(&mut found, start + at).expect("no faults");
                assert!(found == model[place], "client {number} reads what it did not write at {at}+{len}");
            }
        }
    }
    model
}

/// Ends the clients also when a life operation panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

#[test]
fn clients_read_what_they_wrote_while_life_goes_on_around_them() {
    const LIVES: u64 = 60;
    let (storage, disk) = create_volume();
    disk.resize(VOLUME, ByteLen(CLIENTS * PART)).expect("no faults");
    let volume = disk.volume(VOLUME).expect("it exists");
    let life_goes_on = AtomicBool::new(true);
    let parts: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn({
                    let (volume, life_goes_on) = (volume.clone(), &life_goes_on);
                    move || client(&volume, number, life_goes_on)
                })
            })
            .collect();
        let merging = scope.spawn(|| {
            while life_goes_on.load(Ordering::Relaxed) {
                disk.reclaim(|| true).expect("no faults");
                std::thread::yield_now();
            }
        });
        let end = End(&life_goes_on);
        let mut seed = Seed(crate::setting("BEDPLATE_SEED", 3));
        for n in 0..LIVES {
            let names: Vec<String> = volume.info().snapshots.into_iter().map(|s| s.name).collect();
            let done = match seed.below(6) {
                0 | 1 => disk.create_snapshot(VOLUME, &format!("s{n}")).map(drop),
                2 | 3 if !names.is_empty() => {
                    disk.delete_snapshot(VOLUME, &names[seed.index(names.len())]).map(drop)
                }
                4 => disk.clone_volume(VOLUME, None, "clone").and_then(|_| disk.delete_volume("clone")),
                _ if n == LIVES / 2 => disk.flatten(VOLUME, |_, _| true).map(drop),
                _ => disk
                    .full_clone(VOLUME, None, "clone", |_, _| true)
                    .and_then(|_| disk.delete_volume("clone")),
            };
            match done {
                // Flatten says so when a snapshot was taken meanwhile.
                Ok(()) | Err(Error::Invalid(_)) => {}
                Err(error) => panic!("life operation {n}: {error}"),
            }
        }
        drop(end);
        merging.join().expect("no panic");
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    });
    assert_eq!(volume.state(), VolumeState::Ready);
    volume.flush().expect("no faults");
    drop(volume);
    drop(disk);
    let disk = Disk::open_storage(Arc::new(storage.crash_losing_all()), Arc::new(Images)).expect("opens");
    let mut found = vec![0; usize::try_from(CLIENTS * PART).expect("small")];
    disk.volume(VOLUME).expect("it exists").read_at(&mut found, 0).expect("readable");
    assert!(found == parts.concat(), "what was flushed is there after a crash");
}
