//! What tests of images begin with: a store on a simulated disk, and a record.

use std::sync::Arc;

use bedplate_engine::exec::storage::memory::MemoryStorage;
use jiff::Timestamp;
use uuid::Uuid;

use super::{
    name::ImageName,
    record::{ImageRecord, RecordState},
    store::{DiskDir, ImageStore},
};
use crate::directory::Directory;

pub fn store_over(storage: &Arc<MemoryStorage>) -> ImageStore {
    let root = Arc::new(Directory::simulated(storage.clone()));
    ImageStore::open(DiskDir::of(Uuid::nil(), root)).unwrap()
}

/// Of an image that somebody has just asked for.
pub fn record() -> ImageRecord {
    ImageRecord {
        name: ImageName::parse("a").unwrap(),
        uuid: Uuid::from_u128(1 << 96),
        created_at: Timestamp::UNIX_EPOCH,
        source: "/a".to_owned(),
        expected: None,
        deadline_s: None,
        internal_snapshot: None,
        parts: Default::default(),
        state: RecordState::Pending,
    }
}
