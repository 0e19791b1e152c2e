//! What goes on after something failed: full disks, syncs that fail in the middle of a switch, damaged neighbours.

use std::{
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::Error,
    exec::{
        pauses::Pauses,
        simulated::Planning,
        storage::{
            Open, Storage,
            memory::{CallKind, Effect, Fault, MemoryStorage},
        },
    },
    units::{ByteLen, ByteRange},
    volume::{
        device::{Volume, VolumeState},
        disk::{Disk, Held},
        life::Origin,
    },
};

use crate::util::{Fixture, content, served};

fn open(storage: &Arc<MemoryStorage>) -> Arc<Disk> {
    crate::util::open(Held::over(storage.clone()), Arc::default())
}

/// A disk in memory with an empty volume.
fn disk(size: u64) -> (Arc<MemoryStorage>, Arc<Disk>) {
    let storage = Arc::new(MemoryStorage::new(512));
    let disk = open(&storage);
    disk.create_volume("v", Origin::Empty, Some(ByteLen(size))).expect("created");
    (storage, disk)
}

/// Bytes taken by anything but the reserve.
fn used(storage: &MemoryStorage) -> u64 {
    let reserve = storage.open("reserve", Open::Read).expect("there");
    storage.used_bytes() - reserve.len().expect("known")
}

fn first_byte(disk: &Disk) -> u8 {
    let mut byte = [0];
    served(disk, "v").read_at(&mut byte, 0).expect("read");
    byte[0]
}

#[test]
fn what_is_flushed_after_recovering_from_an_uncertain_revert_survives_a_kill() {
    let (storage, disk) = disk(65536);
    disk.create_snapshot("v", "s").expect("taken");
    storage.set_faults(|call| {
        let switch = call.kind == CallKind::SyncDir && call.path.starts_with("volumes/v-");
        switch.then_some(Fault::Error(ErrorKind::Other))
    });
    assert!(matches!(disk.revert("v", "s", None), Err(Error::Uncertain { .. })));
    storage.clear_faults();
    disk.recover("v").expect("recovered");
    served(&disk, "v").write_at(&[7; 4096], 0, Durability::Fua).expect("written");
    assert_eq!(first_byte(&disk), 7);
    drop(disk);
    assert_eq!(first_byte(&open(&Arc::new(storage.kill()))), 7);
}

#[test]
fn nothing_is_collected_while_a_record_names_a_layer_that_is_missing() {
    let (storage, disk) = disk(65536);
    let path = format!("volumes/{}/volume.json", served(&disk, "v").record().dir_name());
    disk.create_snapshot("v", "s").expect("taken");
    let older = storage.bytes(&path).expect("there");
    served(&disk, "v").write_at(&[7; 4096], 0, Durability::Fua).expect("written");
    disk.create_snapshot("v", "kept").expect("taken");
    disk.delete_snapshot("v", "s").expect("deleted");
    disk.reclaim(|| true).expect("merged");
    drop(disk);
    let newest = storage.bytes(&path).expect("there");
    storage.damage(&path, |bytes| *bytes = older).expect("an older record is put back");
    let disk = open(&storage);
    assert!(matches!(disk.volume("v"), Err(Error::Failed { .. })));
    drop(disk);
    storage.damage(&path, |bytes| *bytes = newest).expect("the right one comes back");
    assert_eq!(first_byte(&open(&storage)), 7);
}

#[test]
fn a_record_for_which_there_is_no_room_leaves_nothing_of_it_on_the_disk() {
    let (storage, disk) = disk(65536);
    disk.create_snapshot("v", "s").expect("taken");
    storage.set_faults(|call| {
        let is_record = call.kind == CallKind::Write && call.path.ends_with("volume.json.new");
        is_record.then_some(Fault::Error(ErrorKind::StorageFull))
    });
    assert!(matches!(disk.delete_snapshot("v", "s"), Err(Error::NoSpace { .. })));
    storage.clear_faults();
    let dir = format!("volumes/{}", served(&disk, "v").record().dir_name());
    let names: Vec<String> = storage.list(&dir).expect("listed").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["volume.json"]);
    disk.delete_snapshot("v", "s").expect("deleted");
}

/// A flush fails, and that could not be noted on the medium.
fn fail_and_stay_unmarked(storage: &MemoryStorage, volume: &Volume) {
    storage.set_faults(|call| {
        let fails = (call.kind == CallKind::Sync && call.path.ends_with("/data"))
            || (call.kind == CallKind::Create && call.path.ends_with("/failed"));
        fails.then_some(Fault::Error(ErrorKind::Other))
    });
    volume.flush().expect_err("the medium fails");
    storage.clear_faults();
}

#[test]
fn recovery_names_what_may_be_older_also_where_the_failure_could_not_be_marked() {
    let (storage, disk) = disk(65536);
    let volume = served(&disk, "v");
    volume.write_at(&[1; 8192], 0, Durability::Fua).expect("written");
    volume.write_at(&[2; 4096], 0, Durability::Volatile).expect("written in place");
    volume.write_at(&[2; 4096], 12288, Durability::Volatile).expect("written");
    fail_and_stay_unmarked(&storage, &volume);
    let lost = |offset| matches!(volume.read_at(&mut [0; 4096], offset), Err(Error::Lost { .. }));
    assert_eq!([0, 4096, 8192, 12288].map(lost), [true, false, false, true]);
    drop(volume);
    let dropped = Arc::new(AtomicU32::new(0));
    let seen = dropped.clone();
    storage.set_faults(move |call| {
        let is_data = call.kind == CallKind::DropCache && call.path.ends_with("/data");
        seen.fetch_add(u32::from(is_data), Ordering::Relaxed);
        None
    });
    let recovered = disk.recover("v").expect("recovered");
    storage.clear_faults();
    assert_eq!(dropped.load(Ordering::Relaxed), 1, "what is read from now on comes from the medium");
    let guessed: Vec<ByteRange> = recovered.layers.into_iter().flat_map(|layer| layer.guessed).collect();
    assert_eq!(guessed, [ByteRange::new(0, 4096), ByteRange::new(12288, 4096)]);
    // What is shown now stays, also what came to the medium's cache and was never answered.
    let shown = content(&served(&disk, "v"));
    let left = crate::util::open(Held::over(Arc::new(storage.crash_losing_all())), Arc::default());
    assert!(content(&served(&left, "v")) == shown);
    served(&disk, "v").write_at(&[3; 4096], 0, Durability::Fua).expect("it takes writes again");
}

#[test]
fn a_volume_on_a_full_disk_is_recovered_by_the_reserve() {
    let storage = Arc::new(MemoryStorage::new(512));
    storage.limit(128 << 20);
    let disk = open(&storage);
    disk.create_volume("v", Origin::Empty, Some(ByteLen(65536))).expect("created");
    let volume = served(&disk, "v");
    volume.write_at(&[1; 4096], 0, Durability::Fua).expect("written");
    volume.write_at(&[2; 4096], 4096, Durability::Volatile).expect("written");
    let free = storage.free_bytes().expect("known");
    storage.allocate("stray", free).expect("there is room");
    fail_and_stay_unmarked(&storage, &volume);
    drop(volume);
    disk.recover("v").expect("recovered");
    assert_eq!(first_byte(&disk), 1);
}

/// Write the first sector's worth of entries of a record, and `last` into its second sector; of the record only the
/// sector with this number in the log reaches the medium before the machine dies.
fn flush_torn(storage: &Arc<MemoryStorage>, disk: &Disk, last: u64, kept: u64) -> Arc<MemoryStorage> {
    const LOG_FIRST_SECTOR: u64 = 4096 / 512;
    let volume = served(disk, "v");
    for run in (0..39).map(|n| n * 2).chain([last]) {
        volume.write_at(&[9; 4096], run * 4096, Durability::Volatile).expect("written");
    }
    let mut dead = false;
    storage.set_faults(move |call| {
        dead |= call.kind == CallKind::Sync && call.path.contains("/map");
        dead.then_some(Fault::Error(ErrorKind::Other))
    });
    volume.flush().expect_err("the machine dies");
    Arc::new(storage.crash(|effect, outcomes| match effect {
        Effect::Sector { sector, .. } if sector == LOG_FIRST_SECTOR + kept => outcomes - 1,
        Effect::Sector { .. } | Effect::Length { .. } | Effect::Name { .. } => 0,
    }))
}

#[test]
fn a_record_that_begins_like_an_earlier_torn_one_does_not_bring_that_ones_end_back() {
    let block = |disk: &Disk, n: u64| {
        let mut bytes = [0];
        served(disk, "v").read_at(&mut bytes, n * 4096).expect("read");
        bytes[0]
    };
    let (storage, made) = disk(1 << 20);
    let storage = flush_torn(&storage, &made, 100, 1);
    let disk = open(&storage);
    assert_eq!(block(&disk, 100), 0, "the record was torn");
    served(&disk, "v").flush().expect("what is read now stays");
    let storage = flush_torn(&storage, &disk, 200, 0);
    let disk = open(&storage);
    assert_eq!(served(&disk, "v").state(), VolumeState::Ready);
    assert_eq!((block(&disk, 100), block(&disk, 200)), (0, 0));
}

#[test]
fn a_resize_that_finds_no_room_for_its_record_leaves_the_volume_as_it_was_and_writable() {
    let (storage, disk) = disk(65536);
    storage.set_faults(|call| {
        let record = call.kind == CallKind::Create && call.path.ends_with("volume.json.new");
        record.then_some(Fault::Error(ErrorKind::StorageFull))
    });
    assert!(matches!(disk.resize("v", ByteLen(1 << 20)), Err(Error::NoSpace { .. })));
    storage.clear_faults();
    let volume = served(&disk, "v");
    assert_eq!(volume.geometry().size, ByteLen(65536));
    volume.write_at(&[7; 4096], 61440, Durability::Fua).expect("written");
    assert!(volume.write_at(&[7; 4096], 65536, Durability::Fua).is_err());
    disk.resize("v", ByteLen(1 << 20)).expect("there is room now");
}

/// Calls of `work` that wait for the medium.
fn syncs_of(storage: &MemoryStorage, work: impl FnOnce()) -> u32 {
    let count = Arc::new(AtomicU32::new(0));
    let seen = count.clone();
    storage.set_faults(move |call| {
        if matches!(call.kind, CallKind::Sync | CallKind::SyncDir) {
            seen.fetch_add(1, Ordering::Relaxed);
        }
        None
    });
    work();
    storage.clear_faults();
    count.load(Ordering::Relaxed)
}

#[test]
fn creating_a_volume_takes_six_syncs_whatever_its_size_and_cloning_a_snapshot_no_more() {
    let (storage, disk) = disk(65536);
    for size in [1 << 20, 1 << 40] {
        let create = || {
            disk.create_volume(&format!("v{size}"), Origin::Empty, Some(ByteLen(size))).expect("created");
        };
        // The map, the layer's directory, the layers'; the record, its directory, the volumes'.
        assert_eq!(syncs_of(&storage, create), 6);
    }
    disk.create_snapshot("v", "s").expect("taken");
    assert_eq!(syncs_of(&storage, || drop(disk.clone_volume("v", Some("s"), "c").expect("cloned"))), 6);
}

#[test]
fn the_pause_of_a_snapshot_is_measured_and_a_volume_that_had_none_says_so() {
    let (_, disk) = disk(65536);
    let volume = served(&disk, "v");
    assert_eq!(volume.info().pauses, Pauses::default());
    let info = disk.create_snapshot("v", "s").expect("taken");
    assert_eq!(info.pauses.count, 1);
    assert!(info.pauses.last > Duration::ZERO && info.pauses.longest == info.pauses.total);
    disk.clone_volume("v", None, "c").expect("cloned");
    assert_eq!((volume.info().pauses.count, served(&disk, "c").info().pauses.count), (2, 0));
}

#[test]
fn a_volume_is_looked_up_while_the_maps_of_another_are_being_read() {
    let (storage, made) = disk(65536);
    made.create_snapshot("v", "old").expect("taken");
    made.create_snapshot("v", "new").expect("taken");
    drop(made);
    let storage = Arc::new(storage.kill());
    let disk = open(&storage);
    let (looked_up, waited) = mpsc::channel();
    let other = disk.clone();
    storage.set_faults(move |call| {
        if call.kind == CallKind::Read && call.path.ends_with("/map") {
            let (other, found) = (other.clone(), mpsc::channel());
            std::thread::spawn(move || found.0.send(other.volume("v").is_ok()));
            // Told only while the map is being read: this call waits for it.
            let _ = looked_up.send(found.1.recv_timeout(Duration::from_secs(10)));
        }
        None
    });
    // Its index was not needed so far.
    drop(disk.view("v", Some("old")).expect("viewed"));
    storage.clear_faults();
    let found: Vec<_> = waited.try_iter().collect();
    assert!(!found.is_empty() && found.iter().all(|found| *found == Ok(true)), "{found:?}");
}

#[test]
fn a_full_disk_flushes_discards_and_deletes_a_snapshot() {
    let storage = Arc::new(MemoryStorage::new(512));
    storage.limit(64 << 20);
    let disk = open(&storage);
    disk.create_volume("v", Origin::Empty, Some(ByteLen(128 << 20))).expect("created");
    let volume = served(&disk, "v");
    volume.write_at(&[1; 4096], 0, Durability::Fua).expect("written");
    disk.create_snapshot("v", "s").expect("taken");
    let full = (0..).find_map(|n| volume.write_at(&[2; 4096], n * 4096, Durability::Volatile).err());
    assert!(matches!(full, Some(Error::NoSpace { .. })), "{full:?}");
    volume.flush().expect("what was acknowledged is flushed");
    disk.delete_snapshot("v", "s").expect("deleted");
    disk.reclaim(|| true).expect("reclaimed");
    volume.discard(ByteRange::new(0, 1 << 20)).expect("discarded");
    volume.flush().expect("flushed");
    volume.write_at(&[3; 4096], 0, Durability::Fua).expect("there is room again");
}

#[test]
fn a_snapshot_of_more_than_the_reserve_is_deleted_on_a_disk_without_a_free_byte() {
    let storage = Arc::new(MemoryStorage::new(512));
    storage.limit(64 << 20);
    let disk = open(&storage);
    disk.create_volume("v", Origin::Empty, Some(ByteLen(16 << 20))).expect("created");
    let volume = served(&disk, "v");
    for mib in 0..6 {
        volume.write_at(&[mib + 1; 1 << 20], u64::from(mib) << 20, Durability::Volatile).expect("written");
    }
    disk.create_snapshot("v", "s").expect("taken");
    let expected = content(&volume);
    let free = storage.free_bytes().expect("known");
    storage.allocate("stray", free).expect("there is room");
    disk.delete_snapshot("v", "s").expect("deleted");
    disk.reclaim(|| true).expect("each step gives back what the next one needs");
    assert_eq!(volume.info().layer_count, 1);
    assert!(content(&volume) == expected);
}

/// A disk of so many bytes with a reserve of 1/64 of them, just under 3 MiB more for volumes, and no room left. Its volume
/// has a large layer, a smaller one over it of which every third block hides one of the large layer's, and a head.
fn layered_and_full(bytes: u64) -> (Arc<MemoryStorage>, Arc<Disk>) {
    const BLOCKS: u64 = 1024;
    let storage = Arc::new(MemoryStorage::new(512));
    storage.limit(bytes);
    let disk = open(&storage);
    storage
        .allocate("stray", (bytes - bytes / 64).saturating_sub((3 << 20) - (48 << 10)))
        .expect("there is room");
    disk.create_volume("v", Origin::Empty, Some(ByteLen(BLOCKS * 4096))).expect("created");
    let volume = served(&disk, "v");
    let write = |block: u64, value: u8| volume.write_at(&[value; 4096], block * 4096, Durability::Volatile);
    (0..300).for_each(|n| write(n, 1).expect("there is room"));
    disk.create_snapshot("v", "large").expect("taken");
    (0..150).for_each(|n| write(if n % 3 == 0 { n } else { 400 + n * 2 }, 2).expect("there is room"));
    volume.discard(ByteRange::new(200 * 4096, 5 * 4096)).expect("discarded");
    disk.create_snapshot("v", "small").expect("taken");
    let full = (700..BLOCKS).find_map(|n| write(n, 3).err());
    assert!(matches!(full, Some(Error::NoSpace { .. })), "{full:?}");
    volume.flush().expect("a full disk flushes");
    drop(volume);
    (storage, disk)
}

/// What the volume and its snapshot of [`layered_and_full`] read as.
fn contents(disk: &Disk) -> [Vec<u8>; 2] {
    let volume = served(disk, "v");
    [content(&volume), content(&disk.view("v", Some("small")).expect("viewed"))]
}

#[test]
fn a_snapshot_deleted_on_a_full_disk_gives_its_space_back_step_by_step_and_a_crash_at_any_step_loses_nothing()
{
    let (storage, made) = layered_and_full(32 << 20);
    let expected = contents(&made);
    made.delete_snapshot("v", "large").expect("deleted");
    let before = used(&storage);
    storage.record_cuts();
    made.reclaim(|| true).expect("there is always room for a step");
    let cuts = storage.take_cuts();
    let given_back = before - used(&storage);
    assert!(given_back >= (50 + 5) * 4096, "only {given_back} bytes");
    assert_eq!(served(&made, "v").info().layer_count, 2);
    assert!(contents(&made) == expected);
    let punched = cuts.len();
    for (n, cut) in cuts.into_iter().enumerate().filter(|(n, _)| n % 5 == 0 || n + 1 == punched) {
        for newest in [false, true] {
            let left = Arc::new(cut.crash(|_, outcomes| if newest { outcomes - 1 } else { 0 }));
            let disk = open(&left);
            assert!(contents(&disk) == expected, "cut {n} of {punched}, newest {newest}");
            if n % 50 == 0 {
                disk.reclaim(|| true).expect("what is left is done");
                assert!(contents(&disk) == expected, "cut {n} of {punched}, newest {newest}, reclaimed");
                assert_eq!(served(&disk, "v").info().layer_count, 2);
            }
        }
    }
}

/// A full disk with three layers below a head, each of which comes up into the one above it: first the second, then the
/// lowest. Layers are merged in the order of their ids, which are drawn.
fn to_be_merged_up() -> (Arc<MemoryStorage>, Arc<Disk>) {
    let layers = [("lowest", 1, 100), ("second", 2, 200), ("third", 3, 500)];
    loop {
        let storage = Arc::new(MemoryStorage::new(512));
        storage.limit(64 << 20);
        let disk = open(&storage);
        disk.create_volume("v", Origin::Empty, Some(ByteLen(4 << 20))).expect("created");
        let mut start = 0;
        for (name, byte, blocks) in layers {
            let data = vec![byte; blocks * 4096];
            served(&disk, "v").write_at(&data, start, Durability::Fua).expect("written");
            start += data.len() as u64;
            disk.create_snapshot("v", name).expect("taken");
        }
        let record = served(&disk, "v").record();
        let [lowest, second, third] = layers.map(|(name, ..)| record.snapshot(name).expect("there").layer);
        if second < lowest && !(second < third && third < lowest) {
            for (name, ..) in layers {
                disk.delete_snapshot("v", name).expect("deleted");
            }
            let free = storage.free_bytes().expect("known");
            storage.allocate("stray", free).expect("there is room");
            return (storage, disk);
        }
    }
}

#[test]
fn nothing_moves_between_layers_of_which_the_record_on_the_disk_may_lack_one() {
    let (storage, disk) = to_be_merged_up();
    let expected = content(&served(&disk, "v"));
    storage.record_cuts();
    storage.set_faults(|call| {
        let switch = call.kind == CallKind::SyncDir && call.path.starts_with("volumes/v-");
        switch.then_some(Fault::Error(ErrorKind::Other))
    });
    disk.reclaim(|| true).expect_err("no record is durable");
    storage.clear_faults();
    assert!(disk.has_unnamed_layers(), "it is tried again");
    let cuts = storage.take_cuts();
    for (n, cut) in cuts.iter().enumerate() {
        for newest in [false, true] {
            let left = Arc::new(cut.crash(|_, outcomes| if newest { outcomes - 1 } else { 0 }));
            assert!(content(&served(&open(&left), "v")) == expected, "cut {n} of {}, {newest}", cuts.len());
        }
    }
    storage.limit(128 << 20);
    disk.reclaim(|| true).expect("there is room");
    assert_eq!(served(&disk, "v").info().layer_count, 1);
    assert!(content(&served(&disk, "v")) == expected);
}

#[test]
fn a_disk_with_no_room_for_a_step_worth_its_maps_refuses_to_merge_and_does_so_once_there_is_room() {
    // The reserve is all that there is, and a step of a few blocks would fit into it.
    let (storage, disk) = layered_and_full(3 << 20);
    let expected = contents(&disk);
    disk.delete_snapshot("v", "large").expect("deleted");
    assert!(matches!(disk.reclaim(|| true), Err(Error::NoSpace { .. })));
    assert!(contents(&disk) == expected);
    storage.limit(8 << 20);
    disk.reclaim(|| true).expect("there is room");
    assert_eq!(served(&disk, "v").info().layer_count, 2);
    assert!(contents(&disk) == expected);
}

#[test]
fn a_layer_goes_down_into_a_larger_one_beside_a_view_of_another_volume_but_not_beneath_one_of_its_own() {
    let (_, disk) = disk(1 << 20);
    let volume = served(&disk, "v");
    volume.write_at(&[1; 64 * 4096], 0, Durability::Fua).expect("written");
    disk.create_snapshot("v", "large").expect("taken");
    volume.write_at(&[2; 4096], 4096, Durability::Fua).expect("written");
    disk.create_snapshot("v", "small").expect("taken");
    disk.create_volume("w", Origin::Empty, Some(ByteLen(65536))).expect("created");
    served(&disk, "w").write_at(&[3; 4096], 0, Durability::Fua).expect("written");
    let other = disk.view("w", None).expect("viewed");
    let own = disk.view("v", Some("large")).expect("viewed");
    let expected = [content(&volume), content(&own), content(&other)];
    disk.delete_snapshot("v", "large").expect("deleted");
    disk.reclaim(|| true).expect("reclaimed");
    assert_eq!(volume.info().layer_count, 3);
    assert!([content(&volume), content(&own), content(&other)] == expected);
    drop(own);
    disk.reclaim(|| true).expect("reclaimed");
    assert_eq!(volume.info().layer_count, 2);
    assert!(content(&volume) == expected[0] && content(&other) == expected[2]);
}

#[test]
fn reclaiming_ends_beside_a_volume_that_cannot_be_opened() {
    let (storage, disk) = disk(65536);
    let volume = served(&disk, "v");
    volume.write_at(&[1; 4096], 0, Durability::Fua).expect("written");
    disk.create_snapshot("v", "s").expect("taken");
    volume.write_at(&[2; 8192], 8192, Durability::Fua).expect("written");
    disk.create_snapshot("v", "t").expect("taken");
    disk.clone_volume("v", Some("t"), "c").expect("cloned");
    disk.delete_snapshot("v", "s").expect("deleted");
    let head = served(&disk, "c").record().head;
    drop((volume, disk));
    let storage = Arc::new(storage.kill());
    let map = storage.open(&format!("layers/{head}/map"), Open::ReadWrite).expect("opened");
    map.write_at(&[9; 512], 0).expect("damaged");
    let disk = open(&storage);
    let asked = AtomicU32::new(0);
    disk.reclaim(|| asked.fetch_add(1, Ordering::Relaxed) < 100).expect("reclaimed");
    assert!(asked.load(Ordering::Relaxed) < 100);
    assert_eq!(first_byte(&disk), 1);
}

/// Merge below `v` and `w`; the record of `v` is switched, that of `w` cannot be written.
fn cut_off_at_the_second_record(storage: &MemoryStorage, disk: &Disk) {
    storage.set_faults(|call| {
        let second = call.path.starts_with("volumes/w-") && call.kind == CallKind::Create;
        second.then_some(Fault::Error(ErrorKind::Other))
    });
    disk.reclaim(|| true).expect_err("the second record is not written");
    storage.clear_faults();
}

#[test]
fn a_fold_that_is_cut_off_between_two_records_is_finished_later_and_loses_neither_volume() {
    let (storage, disk) = disk(256 << 10);
    let write = |byte, blocks: u64| {
        let data = vec![byte; usize::try_from(blocks * 4096).expect("small")];
        served(&disk, "v").write_at(&data, 0, Durability::Volatile).expect("written");
    };
    // Three frozen layers, each smaller than the one below it, with two volumes on them.
    for (name, byte, blocks) in [("s", 1, 32), ("t", 2, 8)] {
        write(byte, blocks);
        disk.create_snapshot("v", name).expect("taken");
    }
    write(3, 2);
    disk.clone_volume("v", None, "w").expect("cloned");
    for name in ["s", "t"] {
        disk.delete_snapshot("v", name).expect("deleted");
    }
    let both = |disk: &Disk| ["v", "w"].map(|name| content(&served(disk, name)));
    let before = both(&disk);
    cut_off_at_the_second_record(&storage, &disk);
    assert!(both(&disk) == before);
    drop(disk);
    let disk = open(&Arc::new(storage.kill()));
    assert!(both(&disk) == before);
    disk.reclaim(|| true).expect("merged");
    assert!(both(&disk) == before);
    assert!(
        ["v", "w"].iter().all(|name| served(&disk, name).info().layer_count == 2),
        "one frozen layer is left"
    );
}

/// Let every read of the map of a snapshot's layer fail.
fn fail_maps_of(storage: &MemoryStorage, disk: &Disk, snapshot: &str) {
    let record = served(disk, "v").record();
    let layer = record.snapshot(snapshot).expect("there").layer;
    storage.set_faults(move |call| {
        let is_map = call.kind == CallKind::Read && call.path == format!("layers/{layer}/map");
        is_map.then_some(Fault::Error(ErrorKind::Other))
    });
}

#[test]
fn a_merge_after_one_whose_maps_could_not_be_read_again_loses_nothing_of_what_came_up() {
    let (storage, disk) = disk(65536);
    let volume = || served(&disk, "v");
    volume().write_at(&[7; 16384], 0, Durability::Fua).expect("written");
    disk.create_snapshot("v", "kept").expect("taken");
    volume().zero(ByteRange::new(0, 4096), Durability::Fua).expect("zeroed");
    for name in ["s", "t"] {
        disk.create_snapshot("v", name).expect("taken");
    }
    for name in ["s", "t"] {
        disk.delete_snapshot("v", name).expect("deleted");
    }
    // The zeros come up into the layer above them, then into the head.
    fail_maps_of(&storage, &disk, "kept");
    disk.reclaim(|| true).expect_err("the maps below cannot be read");
    storage.clear_faults();
    disk.reclaim(|| true).expect("merged");
    volume().flush().expect("flushed");
    assert_eq!(first_byte(&disk), 0);
    assert_eq!(volume().info().layer_count, 2);
    drop(disk);
    assert_eq!(first_byte(&open(&Arc::new(storage.kill()))), 0);
}

#[test]
fn what_a_head_comes_to_hide_while_space_is_given_back_below_it_is_kept_until_it_is_flushed() {
    const BLOCKS: u64 = 4200;
    let (storage, disk) = disk(BLOCKS * 4096);
    // So many that a merge leaves them where they are, and gives back what the head hides.
    let all: Vec<u8> = vec![7; usize::try_from(BLOCKS * 4096).expect("17 MiB")];
    for (piece, n) in all.chunks(1 << 20).zip(0u64..) {
        served(&disk, "v").write_at(piece, n << 20, Durability::Volatile).expect("written");
    }
    disk.create_snapshot("v", "s").expect("taken");
    served(&disk, "v").write_at(&[1; 4096], 0, Durability::Volatile).expect("written");
    disk.delete_snapshot("v", "s").expect("deleted");

    let head = served(&disk, "v").record().head;
    let reader = disk.volume("v").expect("there").step_read(ByteRange::new(8192, 4096), Planning::AtStart);
    let (synced, syncs) = mpsc::channel();
    storage.set_faults(move |call| {
        if call.kind == CallKind::Sync && call.path.starts_with(&format!("layers/{head}/map")) {
            let _ = synced.send(());
        }
        None
    });
    std::thread::scope(|scope| {
        let merging = scope.spawn(|| disk.reclaim(|| true));
        // It flushes, and then it waits for the reader.
        syncs.recv_timeout(Duration::from_secs(60)).expect("the head is flushed");
        served(&disk, "v").write_at(&[2; 4096], 4096, Durability::Volatile).expect("written");
        drop(reader);
        merging.join().expect("it does not panic").expect("given back");
    });
    storage.clear_faults();
    drop(disk);
    let disk = open(&Arc::new(storage.kill()));
    let byte = |offset| {
        let mut byte = [0];
        served(&disk, "v").read_at(&mut byte, offset).expect("read");
        byte[0]
    };
    assert_eq!([byte(0), byte(8192)], [1, 7]);
    assert!(matches!(byte(4096), 2 | 7), "flushed or not, it holds {}", byte(4096));
}

#[test]
fn volumes_whose_records_disagree_on_what_lies_below_one_layer_each_read_by_their_own() {
    let fixture = Fixture::new();
    let storage = Arc::new(MemoryStorage::new(512));
    let reopened =
        |storage: &Arc<MemoryStorage>| crate::util::open(Held::over(storage.clone()), fixture.images.clone());
    let disk = reopened(&storage);
    disk.create_volume("v", Origin::Image(fixture.image(&[9; 32768])), None).expect("created");
    let write = |block: u64, byte| {
        served(&disk, "v").write_at(&[byte; 4096], block * 4096, Durability::Volatile).expect("written");
    };
    write(0, 1);
    disk.create_snapshot("v", "s").expect("taken");
    write(1, 2);
    write(2, 3);
    disk.clone_volume("v", None, "w").expect("cloned");
    disk.delete_snapshot("v", "s").expect("deleted");
    let both = |disk: &Disk| ["v", "w"].map(|name| content(&served(disk, name)));
    let before = both(&disk);
    cut_off_at_the_second_record(&storage, &disk);
    let layers = || ["v", "w"].map(|name| served(&disk, name).info().layer_count);
    assert_eq!(layers(), [2, 3]);
    // The image's bytes go to the layer that only this one still lists.
    disk.flatten("w", |_, _| true).expect("flattened");
    assert!(both(&disk) == before);
    disk.reclaim(|| true).expect("merged");
    assert_eq!(layers(), [2, 2]);
    assert!(both(&disk) == before);
    drop(disk);
    assert!(both(&reopened(&Arc::new(storage.kill()))) == before);
}
