//! Life operations of a disk that meet at the worst moment, which a hook of the storage holds open.

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    exec::storage::memory::CallKind,
};

use crate::life::{VOLUME, create_volume};

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
    let disk = bedplate_engine::volume::disk::Disk::open_storage(left, Arc::new(crate::life::Images))
        .expect("opens");
    let mut found = vec![0; 4096];
    disk.volume("clone").expect("it exists").read_at(&mut found, 4096).expect("readable");
    assert!(found == [7; 4096], "the clone is not what it was after a crash");
}
