//! Damage to the files of a volume: what is refused, what is still read, and the way out.

use std::{fs, path::PathBuf};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::Error,
    units::ByteLen,
    volume::{device::VolumeState, life::Origin},
};

use crate::util::{Fixture, assert_same, content, served};

const SIZE: u64 = 1 << 20;

/// The file `name` of the only layer.
fn layer_file(fixture: &Fixture, name: &str) -> PathBuf {
    let mut layers = fs::read_dir(fixture.path().join("disk/layers")).expect("a directory");
    layers.next().expect("one layer").expect("readable").path().join(name)
}

/// A disk with one volume of which two commits are in the log.
fn written() -> (Fixture, Vec<u8>) {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    let volume = served(&disk, "v");
    volume.write_at(&[1; 4096], 0, Durability::Fua).expect("written");
    volume.write_at(&[2; 4096], 40_960, Durability::Fua).expect("written");
    let bytes = content(&volume);
    drop((volume, disk));
    (fixture, bytes)
}

#[test]
fn a_record_damaged_in_mid_log_makes_the_volume_read_only_and_recovery_brings_its_blocks_back() {
    let (fixture, expected) = written();
    let map = layer_file(&fixture, "map");
    let mut bytes = fs::read(&map).expect("a map");
    let log = 4096;
    assert_eq!(&bytes[log..log + 4], b"BLOG");
    bytes[log + 50] ^= 1;
    fs::write(&map, bytes).expect("damaged");

    let disk = fixture.disk();
    let volume = served(&disk, "v");
    assert!(matches!(volume.state(), VolumeState::ReadOnly { .. }), "{:?}", volume.state());
    let mut block = [0; 4096];
    assert!(matches!(volume.read_at(&mut block, 0), Err(Error::Lost { .. })));
    volume.read_at(&mut block, 40_960).expect("a later record states this block");
    assert_eq!(block, [2; 4096]);
    assert!(matches!(volume.write_at(&block, 0, Durability::Volatile), Err(Error::Failed { .. })));
    drop(volume);

    let recovered = disk.recover("v").expect("recovered");
    assert_eq!(recovered.layers.len(), 1);
    assert!(!recovered.layers[0].guessed.is_empty(), "what is a guess is said");
    let volume = served(&disk, "v");
    assert_same(&content(&volume), &expected, "after recovery");
    volume.write_at(&[3; 100], 5000, Durability::Fua).expect("it takes writes again");
    drop((volume, disk));
    let volume = served(&fixture.disk(), "v");
    assert_eq!(volume.state(), VolumeState::Ready);
    assert_eq!(&content(&volume)[5000..5100], &[3; 100]);
}

#[test]
fn a_damaged_header_fails_the_volume_alone_and_recovery_finds_its_blocks() {
    let (fixture, expected) = written();
    let map = layer_file(&fixture, "map");
    let mut bytes = fs::read(&map).expect("a map");
    bytes[3] ^= 0xff;
    fs::write(&map, bytes).expect("damaged");

    let disk = fixture.disk();
    disk.create_volume("w", Origin::Empty, Some(ByteLen(SIZE))).expect("the others go on");
    let info = disk.volumes().into_iter().find(|info| info.name == "v").expect("listed");
    assert!(matches!(info.state, VolumeState::Failed { .. }), "{:?}", info.state);
    disk.recover("v").expect("recovered");
    assert_same(&content(&served(&disk, "v")), &expected, "after recovery");
}

/// A written volume in whose map a byte is damaged.
fn with_damaged_map() -> Fixture {
    let (fixture, _) = written();
    let map = layer_file(&fixture, "map");
    let mut bytes = fs::read(&map).expect("a map");
    bytes[4096 + 50] ^= 1;
    fs::write(&map, bytes).expect("damaged");
    fixture
}

#[test]
fn what_is_viewed_of_a_damaged_volume_is_not_recovered_and_written_to_beneath_the_view() {
    let fixture = with_damaged_map();
    let disk = fixture.disk();
    let view = disk.view("v", None).expect("viewed");
    assert!(matches!(disk.recover("v"), Err(Error::InUse { .. })));
    drop(view);
    disk.recover("v").expect("recovered");
}

#[test]
fn a_damaged_volume_does_not_keep_the_layers_of_another_from_being_merged() {
    let fixture = with_damaged_map();
    let disk = fixture.disk();
    disk.create_volume("other", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    let other = served(&disk, "other");
    other.write_at(&[1; 65536], 0, Durability::Volatile).expect("written");
    disk.create_snapshot("other", "large").expect("taken");
    other.write_at(&[2; 4096], 8192, Durability::Volatile).expect("written");
    disk.create_snapshot("other", "small").expect("taken");
    let expected = content(&other);
    disk.delete_snapshot("other", "large").expect("deleted");
    disk.reclaim(|| true).expect("reclaimed");
    assert!(matches!(served(&disk, "v").state(), VolumeState::ReadOnly { .. }));
    assert_eq!(other.info().layer_count, 2, "the small layer went down into the large one");
    assert_same(&content(&other), &expected, "after the merge");
}

#[test]
fn recovering_a_sound_volume_under_use_changes_nothing() {
    let (fixture, expected) = written();
    let disk = fixture.disk();
    let volume = served(&disk, "v");
    volume.write_at(&[9; 512], 0, Durability::Volatile).expect("written");
    assert!(disk.recover("v").expect("nothing to do").layers.is_empty());
    assert_eq!(&content(&volume)[..512], &[9; 512]);
    assert_same(&content(&served(&disk, "v"))[512..], &expected[512..], "the rest");
}

#[test]
fn an_unreadable_record_is_listed_with_its_reason_and_stops_collection_only() {
    let (fixture, _) = written();
    let volumes = fixture.path().join("disk/volumes");
    let dir = fs::read_dir(&volumes).expect("a directory").next().expect("one").expect("readable").path();
    let record = fs::read_to_string(dir.join("volume.json")).expect("a record");
    fs::write(dir.join("volume.json"), record.replace("\"format_version\": 1", "\"format_version\": 77"))
        .expect("changed");
    let disk = fixture.disk();
    let info = disk.volumes().pop().expect("listed");
    assert!(
        matches!(&info.state, VolumeState::Failed { reason } if reason.contains("77")),
        "{:?}",
        info.state
    );
    let any_image = fixture.image(&[7; 8192]).uuid;
    assert_eq!(disk.users_of(any_image), [info.name], "it may stand on any image");
    disk.create_volume("w", Origin::Empty, Some(ByteLen(SIZE))).expect("created");
    disk.delete_volume("w").expect("deleted");
    assert!(layer_file(&fixture, "map").exists(), "nothing of the unreadable volume is collected");
}

#[test]
fn a_volume_whose_image_is_gone_is_opened_again_when_it_is_back_and_can_be_deleted_when_it_is_not() {
    let fixture = Fixture::new();
    let image = fixture.image(&[7; 8192]);
    let disk = fixture.disk();
    for name in ["a", "b"] {
        disk.create_volume(name, Origin::Image(image.clone()), None).expect("created");
    }
    drop(disk);
    let file = fixture.path().join(image.uuid.to_string());
    let aside = fixture.path().join("aside");
    std::fs::rename(&file, &aside).expect("moved");
    let disk = fixture.disk();
    assert!(disk.volumes().iter().all(|info| matches!(info.state, VolumeState::Failed { .. })));
    assert!(disk.reopen("a").is_err(), "the reason has not passed");

    disk.delete_volume("b").expect("a way out");
    assert_eq!(disk.volumes().len(), 1);
    std::fs::rename(&aside, &file).expect("moved back");
    disk.reopen("a").expect("the reason has passed");
    let mut block = [0; 4096];
    served(&disk, "a").read_at(&mut block, 4096).expect("read");
    assert_eq!(block, [7; 4096]);
    let layers = std::fs::read_dir(fixture.path().join("disk/layers")).expect("listed").count();
    assert_eq!(layers, 1, "the deleted volume's layer is collected");
}
