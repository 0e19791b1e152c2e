//! A disk in memory with one volume, and the orders that a test is tried in.

use std::{env, sync::Arc};

use bedplate_engine::{
    device::BlockDevice,
    error::Result,
    exec::storage::memory::MemoryStorage,
    image::{BaseImage, BaseSource},
    units::{ByteLen, ByteRange},
    volume::{
        device::Volume,
        disk::{Disk, Held},
        life::Origin,
        record::ImageRef,
    },
};
use shuttle::{
    Config, MaxSteps, Runner,
    scheduler::{PctScheduler, RandomScheduler},
};

/// Orders that each test tries, half of them with few changes of thread.
const SCHEDULES: usize = 2000;
/// More than any sound run takes; one that goes on waits for something that never comes.
const STEPS_MAX: usize = 1_000_000;
/// Changes of thread, of the half that has few.
const SWITCHES: usize = 4;

pub const BLOCK: u64 = 4096;
pub const SECTOR: usize = 512;
pub const VOLUME: &str = "v";
pub const SIZE: u64 = 4 * BLOCK;

struct NoImages;

impl BaseSource for NoImages {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        unreachable!("no volume here stands on {image:?}")
    }
}

/// Try `test` in many orders, or in the one that is named.
pub fn each_schedule(test: impl Fn() + Send + Sync + Copy + 'static) {
    if let Ok(schedule) = env::var("SCHEDULE") {
        return shuttle::replay(test, &schedule);
    }
    let count = env::var("SCHEDULES").map_or(SCHEDULES, |count| count.parse().expect("a number"));
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.stack_size = 512 << 10;
    Runner::new(RandomScheduler::new(count / 2), config.clone()).run(test);
    Runner::new(PctScheduler::new(SWITCHES, count / 2), config).run(test);
}

/// An empty disk with an empty volume.
pub fn create() -> (Arc<MemoryStorage>, Arc<Disk>, Arc<Volume>) {
    let storage = Arc::new(MemoryStorage::new(512));
    let disk = open(&storage);
    disk.create_volume(VOLUME, Origin::Empty, Some(ByteLen(SIZE))).expect("no faults");
    let volume = disk.volume(VOLUME).expect("it exists");
    (storage, disk, volume)
}

pub fn open(storage: &Arc<MemoryStorage>) -> Arc<Disk> {
    Held::over(storage.clone()).and_then(|held| held.serve(Arc::new(NoImages))).expect("the disk opens")
}

/// The byte that every byte of the sector is.
pub fn sector(device: &dyn BlockDevice, at: u64) -> u8 {
    let mut found = [0; SECTOR];
    device.read_at(&mut found, at).expect("no faults");
    assert!(found.iter().all(|byte| *byte == found[0]), "the sector at {at} is of two minds");
    found[0]
}

pub fn write(device: &dyn BlockDevice, at: u64, byte: u8) {
    device.write_at(&[byte; SECTOR], at, bedplate_engine::device::Durability::Volatile).expect("no faults");
}

pub fn discard(device: &dyn BlockDevice, at: u64) {
    device.discard(ByteRange::new(at, SECTOR as u64)).expect("no faults");
}
