//! The life of volumes: each operation, and all of them at random.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::Error,
    units::{ByteLen, ByteRange, to_usize},
    volume::{
        device::VolumeState,
        disk::{Disk, Held},
        life::Origin,
    },
};

use crate::util::{Fixture, Rng, assert_same, content, served};

const SIZE: u64 = 300 * 1024 + 512;

#[test]
fn volumes_that_are_opened_at_once_over_one_snapshot_each_read_what_is_theirs() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("golden", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    disk.volume("golden").expect("there").write_at(&[1; 8192], 0, Durability::Volatile).expect("written");
    disk.create_snapshot("golden", "s").expect("created");
    let names: Vec<String> = (0..40).map(|number| format!("clone{number:02}")).collect();
    for (name, byte) in names.iter().zip(100..) {
        disk.clone_volume("golden", Some("s"), name).expect("cloned");
        disk.volume(name)
            .expect("there")
            .write_at(&[byte; 4096], 4096, Durability::Volatile)
            .expect("written");
    }
    let allocated = |disk: &Disk| disk.volumes().iter().map(|info| info.allocated.0).collect::<Vec<_>>();
    let before = allocated(&disk);
    disk.flush().expect("flushed");
    drop(disk);

    let disk = fixture.disk();
    let found: Vec<String> = disk.volumes().into_iter().map(|info| info.name).collect();
    assert_eq!(found[..40], names);
    assert_eq!(allocated(&disk), before);
    for (name, byte) in names.iter().zip(100..) {
        let mut read = [0; 12288];
        disk.volume(name).expect("there").read_at(&mut read, 0).expect("read");
        let expected = [[1; 4096], [byte; 4096], [0; 4096]].concat();
        assert_same(&read, &expected, name);
    }
}

#[test]
fn of_two_records_with_one_name_the_same_one_is_served_each_time_and_the_other_is_kept() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let first = disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created").uuid;
    drop(disk);
    // What somebody makes who copies a directory and gives the copy an identity of its own.
    let volumes = fixture.path().join("disk/volumes");
    let dir = |uuid: uuid::Uuid| volumes.join(format!("v-{}", &uuid.simple().to_string()[..8]));
    let second = uuid::Uuid::max();
    std::fs::create_dir(dir(second)).expect("a directory");
    let record = std::fs::read_to_string(dir(first).join("volume.json")).expect("read");
    let record = record.replace(&first.to_string(), &second.to_string());
    std::fs::write(dir(second).join("volume.json"), record).expect("written");
    for _ in 0..3 {
        let disk = fixture.disk();
        assert_eq!(disk.volume("v").expect("served").uuid(), first);
        let other = disk.volumes().into_iter().find(|info| info.uuid == second).expect("listed");
        let VolumeState::Failed { reason } = other.state else { panic!("{:?}", other.state) };
        assert!(reason.contains("another volume is called \"v\""), "{reason}");
        assert!(dir(second).exists());
    }
}

#[test]
fn a_volume_over_an_odd_sized_image_reads_it_and_then_zeros() {
    let fixture = Fixture::new();
    let image = Rng(1).bytes(10_000);
    let image_ref = fixture.image(&image);
    let disk = fixture.disk();
    disk.create_volume("small", Origin::Image(image_ref.clone()), None).expect("created");
    let info =
        disk.create_volume("large", Origin::Image(image_ref.clone()), Some(ByteLen(SIZE))).expect("created");
    assert_eq!(info.size.0, SIZE);
    let mut expected = image.clone();
    expected.resize(10_240, 0);
    assert_same(&content(&served(&disk, "small")), &expected, "small");
    expected.resize(to_usize(SIZE), 0);
    assert_same(&content(&served(&disk, "large")), &expected, "large");
    let refused = disk.create_volume("less", Origin::Image(image_ref), Some(ByteLen(512)));
    assert!(matches!(refused, Err(Error::Invalid(_))));
}

#[test]
fn what_was_written_is_there_after_reopening_and_a_second_opener_is_told_who_holds_the_disk() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    let volume = served(&disk, "v");
    volume.write_at(b"hello", 4094, Durability::Fua).expect("written");
    volume.zero(ByteRange::new(8192, 100), Durability::Volatile).expect("zeroed");
    volume.flush().expect("flushed");
    let before = content(&volume);
    assert_eq!(&before[4094..4099], b"hello");
    let second = Disk::open(&fixture.path().join("disk"), fixture.images.clone());
    assert!(
        matches!(&second, Err(Error::InUse { by, .. }) if by.contains(&std::process::id().to_string())),
        "{second:?}"
    );
    drop((volume, disk));
    let disk = fixture.disk();
    assert_same(&content(&served(&disk, "v")), &before, "after reopening");
}

#[test]
fn a_disk_stays_locked_while_a_volume_of_it_can_still_be_written_to() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    let volume = served(&disk, "v");
    drop(disk);
    volume.write_at(b"late", 0, Durability::Fua).expect("it still writes");
    let second = Disk::open(&fixture.path().join("disk"), fixture.images.clone());
    assert!(matches!(second, Err(Error::InUse { .. })), "{second:?}");
    drop(volume);
    assert_eq!(&content(&served(&fixture.disk(), "v"))[..4], b"late");
}

#[test]
fn every_thread_of_a_disk_runs_the_front_ends_hook_before_its_first_job() {
    static STARTED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    fn hook() {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        STARTED.lock().expect("nobody panics with it").push(name);
    }
    let fixture = Fixture::new();
    let held = Held::take(&fixture.path().join("disk")).expect("taken").on_thread_start(hook);
    let disk = held.serve(fixture.images.clone()).expect("served");
    // Dropping a disk waits for its threads.
    drop((held, disk));
    let mut started = STARTED.lock().expect("nobody panics with it").clone();
    started.sort();
    assert_eq!(started, ["housekeeper-0", "housekeeper-1"]);
}

#[test]
fn a_disk_that_was_closed_in_the_middle_of_a_checkpoint_opens_again_at_once() {
    const RUNS: u64 = 11_000;
    let fixture = Fixture::new();
    let image = fixture.image(&vec![0; to_usize(RUNS * 2 * 4096)]);
    fixture.disk().create_volume("v", Origin::Image(image), None).expect("created");
    for _ in 0..8 {
        // The fixture panics if the lock is still held.
        let disk = fixture.disk();
        let volume = served(&disk, "v");
        // Records of single blocks that do not touch, until more than half of the log is used.
        for n in 0..RUNS {
            volume.zero(ByteRange::new(n * 2 * 4096, 4096), Durability::Volatile).expect("zeroed");
        }
        volume.flush().expect("flushed");
        drop(disk);
        drop(volume);
    }
}

#[test]
fn a_held_volume_is_neither_reverted_nor_deleted_and_the_error_names_the_holder() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    disk.create_snapshot("v", "s").expect("taken");
    let hold = served(&disk, "v").hold("a test").expect("held");
    for refused in [disk.delete_volume("v"), disk.revert("v", "s", None).map(|_| ())] {
        assert!(matches!(&refused, Err(Error::InUse { by, .. }) if by == "a test"), "{refused:?}");
    }
    drop(hold);
    disk.revert("v", "s", None).expect("reverted");
    disk.delete_volume("v").expect("deleted");
    let left: Vec<_> = std::fs::read_dir(fixture.path().join("disk/layers")).expect("a directory").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_view_of_a_live_volume_stays_as_it_was_while_the_volume_goes_on() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    let volume = served(&disk, "v");
    volume.write_at(&[1; 20_000], 100, Durability::Volatile).expect("written");
    let before = content(&volume);
    let view = disk.view("v", None).expect("viewed");
    volume.write_at(&[2; 20_000], 0, Durability::Volatile).expect("written");
    disk.reclaim(|| true).expect("merged");
    assert_same(&content(&view), &before, "the view");
    assert_eq!(served(&disk, "v").info().layer_count, 1);
    assert!(served(&disk, "v").info().snapshots.is_empty());
}

#[test]
fn a_merge_whose_layers_a_revert_takes_away_meanwhile_ends_without_an_error() {
    // The one block goes down into the lower layer, the five of that come up to the ten.
    for upper in [4096, 40_960] {
        let fixture = Fixture::new();
        let disk = fixture.disk();
        disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
        let volume = served(&disk, "v");
        disk.create_snapshot("v", "first").expect("taken");
        volume.write_at(&[1; 20_480], 0, Durability::Volatile).expect("written");
        disk.create_snapshot("v", "lower").expect("taken");
        volume.write_at(&vec![2; upper], 0, Durability::Volatile).expect("written");
        disk.create_snapshot("v", "upper").expect("taken");
        disk.delete_snapshot("v", "lower").expect("deleted");
        let mut reverted = false;
        let merged = disk.reclaim(|| {
            if !std::mem::replace(&mut reverted, true) {
                disk.revert("v", "first", None).expect("reverted");
                disk.delete_snapshot("v", "upper").expect("deleted");
            }
            true
        });
        assert!(matches!(merged, Ok(())), "{merged:?}");
        assert!(reverted, "there was something to merge");
        assert_same(&content(&served(&disk, "v")), &vec![0; to_usize(SIZE)], "what was reverted");
    }
}

#[test]
fn a_view_that_cannot_be_had_leaves_no_snapshot_behind() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let image = fixture.image(&[7; 8192]);
    disk.create_volume("v", Origin::Image(image.clone()), None).expect("created");
    std::fs::remove_file(fixture.path().join(image.uuid.to_string())).expect("the image goes");
    disk.view("v", None).expect_err("nothing tells what the image held");
    assert!(served(&disk, "v").record().snapshots.is_empty());
}

#[test]
fn exporting_a_large_live_volume_again_and_again_copies_none_of_it() {
    let size = 96 << 20;
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(size))).expect("created");
    let volume = served(&disk, "v");
    for chunk in 0..size >> 20 {
        volume.write_at(&vec![7; 1 << 20], chunk << 20, Durability::Volatile).expect("written");
    }
    for round in 0..4u64 {
        let view = disk.view("v", None).expect("viewed");
        volume.write_at(&[9; 8192], round * 12_288, Durability::Volatile).expect("written");
        drop(view);
        disk.reclaim(|| true).expect("merged");
    }
    let info = served(&disk, "v").info();
    assert!(info.layer_count <= 2, "{} layers", info.layer_count);
    assert!(info.allocated.0 < size + (1 << 20), "{} bytes for {size}", info.allocated.0);
    let mut expected = vec![7; to_usize(size)];
    for round in 0..4 {
        expected[round * 12_288..round * 12_288 + 8192].fill(9);
    }
    assert_same(&content(&volume), &expected, "the volume");
    disk.flush().expect("flushed");
    drop((volume, disk));
    assert_same(&content(&served(&fixture.disk(), "v")), &expected, "after reopening");
}

/// What a volume and its snapshots should read.
#[derive(Clone, Default)]
struct Model {
    bytes: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

fn change(volume: &dyn BlockDevice, model: &mut Model, rng: &mut Rng) {
    let size = model.bytes.len() as u64;
    let start = rng.below(size);
    let len = match rng.below(3) {
        0 => 1 + rng.below(700),
        1 => 4096 * (1 + rng.below(8)),
        _ => 1 + rng.below(40_000),
    };
    let (start, len) = if rng.below(2) == 0 { (start / 4096 * 4096, len) } else { (start, len) };
    let len = len.min(size - start);
    let place = to_usize(start)..to_usize(start + len);
    let durability = if rng.below(8) == 0 { Durability::Fua } else { Durability::Volatile };
    match rng.below(10) {
        0..6 => {
            let data = rng.bytes(to_usize(len));
            volume.write_at(&data, start, durability).expect("written");
            model.bytes[place].copy_from_slice(&data);
        }
        6..8 => {
            volume.zero(ByteRange::new(start, len), durability).expect("zeroed");
            model.bytes[place].fill(0);
        }
        8 => {
            volume.discard(ByteRange::new(start, len)).expect("discarded");
            model.bytes[place].fill(0);
        }
        _ => volume.flush().expect("flushed"),
    }
}

/// One random operation of a volume's life.
fn live(disk: &Arc<Disk>, models: &mut BTreeMap<String, Model>, rng: &mut Rng, step: u64) {
    let names: Vec<String> = models.keys().cloned().collect();
    let name = names[to_usize(rng.below(names.len() as u64))].clone();
    let snapshots: Vec<String> = models[&name].snapshots.keys().cloned().collect();
    let snapshot = (!snapshots.is_empty())
        .then(|| snapshots[to_usize(rng.below(snapshots.len().max(1) as u64))].clone());
    let new = format!("n{step}");
    let verb = rng.below(10);
    println!("step {step}: {verb} on {name} ({snapshot:?})");
    match (verb, snapshot) {
        (0 | 1, _) => {
            disk.create_snapshot(&name, &new).expect("taken");
            let model = models.get_mut(&name).expect("there");
            model.snapshots.insert(new, model.bytes.clone());
        }
        (2, Some(snapshot)) => {
            let first = rng.below(2) == 0;
            disk.revert(&name, &snapshot, first.then_some(new.as_str())).expect("reverted");
            let model = models.get_mut(&name).expect("there");
            let before = model.bytes.clone();
            if first {
                model.snapshots.insert(new, before.clone());
            }
            model.bytes = model.snapshots[&snapshot].clone();
            model.bytes.resize(model.bytes.len().max(before.len()), 0);
        }
        (3 | 4, Some(snapshot)) => {
            disk.delete_snapshot(&name, &snapshot).expect("deleted");
            models.get_mut(&name).expect("there").snapshots.remove(&snapshot);
        }
        (5, snapshot) if models.len() < 6 => {
            let snapshot = snapshot.filter(|_| rng.below(2) == 0);
            let model = &models[&name];
            let bytes = snapshot.as_ref().map_or(&model.bytes, |snapshot| &model.snapshots[snapshot]).clone();
            if rng.below(3) == 0 {
                disk.full_clone(&name, snapshot.as_deref(), &new, |_, _| true).expect("copied");
            } else {
                disk.clone_volume(&name, snapshot.as_deref(), &new).expect("cloned");
            }
            models.insert(new, Model { bytes, snapshots: BTreeMap::new() });
        }
        (6, _) => disk.reclaim(|| true).expect("merged"),
        (7, _) => {
            disk.flatten(&name, |_, _| true).expect("flattened");
        }
        (8, _) => {
            let size = models[&name].bytes.len() as u64 + 512 * rng.below(20);
            disk.resize(&name, ByteLen(size)).expect("grown");
            models.get_mut(&name).expect("there").bytes.resize(to_usize(size), 0);
        }
        (9, _) if models.len() > 2 => {
            disk.delete_volume(&name).expect("deleted");
            models.remove(&name);
        }
        _ => {}
    }
}

#[test]
fn random_lives_of_many_volumes_read_like_plain_vectors_also_after_reopening() {
    let first: u64 = std::env::var("BEDPLATE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let seeds: u64 = std::env::var("BEDPLATE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(12);
    for seed in first..first + seeds {
        println!("BEDPLATE_SEED={seed}");
        let mut rng = Rng(seed);
        let fixture = Fixture::new();
        let image = rng.bytes(to_usize(150_000 + seed % 9000));
        let image_ref = fixture.image(&image);
        let mut disk = fixture.disk();
        let mut models = BTreeMap::new();
        for name in ["a", "b"] {
            disk.create_volume(name, Origin::Image(image_ref.clone()), Some(ByteLen(SIZE))).expect("created");
            let mut bytes = image.clone();
            bytes.resize(to_usize(SIZE), 0);
            models.insert(name.to_owned(), Model { bytes, snapshots: BTreeMap::new() });
        }
        for step in 0..60 {
            for _ in 0..6 {
                let names: Vec<String> = models.keys().cloned().collect();
                let name = &names[to_usize(rng.below(names.len() as u64))];
                let volume = served(&disk, name);
                change(&volume, models.get_mut(name).expect("there"), &mut rng);
            }
            live(&disk, &mut models, &mut rng, step);
            if rng.below(12) == 0 {
                disk.flush().expect("flushed");
                println!("reopened");
                drop(disk);
                disk = fixture.disk();
            }
            for (name, model) in &models {
                let volume = served(&disk, name);
                assert_same(&content(&volume), &model.bytes, &format!("seed {seed} step {step} {name}"));
            }
        }
        for (name, model) in &models {
            for (snapshot, bytes) in &model.snapshots {
                let view = disk.view(name, Some(snapshot)).expect("viewed");
                assert_same(&content(&view), bytes, &format!("seed {seed} {name}@{snapshot}"));
            }
        }
    }
}
