//! What a process makes of the images that it finds, held against the reference.

use std::{collections::BTreeSet, sync::Arc};

use bedplate::{
    catalog::{
        record::{FailureCode, ImageRecord, RecordState},
        store::{DiskDir, Found, ImageStore},
    },
    directory::Directory,
    images::steps::{Left, NAMES, take_up},
    prep::partial::Kept,
};
use bedplate_engine::{
    error::Result,
    exec::storage::{Storage, memory::MemoryStorage},
};
use uuid::Uuid;

use super::{Entry, Presence, Reference, directory, kept};
use crate::world::World;

/// The directory of what nobody made, on a disk with a record that cannot be read.
const LITTER: &str = "images/i0000-00000000";

/// The images of a medium.
fn open(storage: Arc<dyn Storage>) -> Result<ImageStore> {
    let root = Arc::new(Directory::simulated(storage));
    ImageStore::open(DiskDir::of(Uuid::nil(), root))
}

/// What a directory holds.
pub(super) fn names(storage: &MemoryStorage, path: &str) -> BTreeSet<String> {
    storage.list(path).unwrap_or_default().into_iter().map(|(name, _)| name).collect()
}

impl World {
    /// The process ends now: what is kept and durable by now must not be fetched again.
    pub fn remember_what_is_kept(&mut self) {
        let unready = |known: &Reference| !known.ready && known.presence == Presence::Known;
        if !self.arrivals.known.values().any(unready) {
            return;
        }
        let durable = self.medium.storage().crash_losing_all();
        for known in self.arrivals.known.values_mut().filter(|known| unready(known)) {
            known.floor = kept(&durable, &known.directory).min(kept(self.medium.storage(), &known.directory));
        }
    }

    /// A start that is cut off.
    pub fn begin_to_take_up_images(&mut self) {
        let Ok(store) = open(Arc::new(self.medium.clone())) else { return };
        for found in store.scan().unwrap_or_default() {
            if let Found::Image(record, dir) = found {
                take_up(&record, &dir);
            }
        }
    }

    /// Read the disk's images, and check what is found.
    pub fn take_up_images(&mut self) -> Result<(), String> {
        let failed = |error| format!("the images are not read: {error}");
        let store = open(Arc::new(self.medium.clone())).map_err(failed)?;
        let mut seen = BTreeSet::new();
        for found in store.scan().map_err(failed)? {
            match found {
                Found::Unreadable { directory, error, .. } => {
                    return Err(format!("{directory} has a record that cannot be read: {error}"));
                }
                Found::Image(record, dir) => {
                    seen.insert(record.uuid);
                    let entry = Entry { record: *record, dir };
                    self.take_up_image(entry)
                        .map_err(|(name, what)| format!("image {name} after a restart: {what}"))?;
                }
            }
        }
        self.arrivals.store = Some(store);
        let gone = self
            .arrivals
            .known
            .iter()
            .find(|(uuid, known)| !seen.contains(uuid) && known.presence == Presence::Known);
        if let Some((_, known)) = gone {
            return Err(format!("{} is gone", known.directory));
        }
        self.arrivals.known.retain(|uuid, _| seen.contains(uuid));
        let directories = names(self.medium.storage(), "images");
        if directories.len() != seen.len() {
            return Err(format!("images are {directories:?}, of which {} have a record", seen.len()));
        }
        if self.seed.one_in(4) {
            self.hide_a_record()?;
        }
        Ok(())
    }

    fn take_up_image(&mut self, entry: Entry) -> Result<(), (String, String)> {
        let Entry { record, dir } = &entry;
        let uuid = record.uuid;
        let Some(known) = self.arrivals.known.get_mut(&uuid) else {
            return Err((record.name.to_string(), "nobody made it, or it was deleted".into()));
        };
        let failed = |what: String| (record.name.to_string(), what);
        known.presence = Presence::Known;
        let directory = directory(record);
        let storage = self.medium.storage();
        match &record.state {
            RecordState::Ready(published) => {
                known.check_ready(storage, &directory, published).map_err(failed)?;
                known.ready = true;
            }
            state if known.ready => return Err(failed(format!("it was ready, and is {state:?}"))),
            RecordState::Failed { failure, .. } => {
                if known.failed.is_some_and(|code| code != failure.code) {
                    return Err(failed(format!("it failed for another reason: {failure:?}")));
                }
            }
            state if known.failed.is_some() => {
                return Err(failed(format!("it had failed, and is {state:?}")));
            }
            RecordState::Pending | RecordState::InProgress => {}
        }
        let is_whole = is_whole(storage, &directory);
        let left = take_up(record, dir);
        if left == Left::Unfinished {
            self.arrivals.unfinished.push(uuid);
        }
        let is_kept = may_be_kept(record, known, is_whole);
        let now = kept(storage, &directory);
        if is_kept && now < known.floor {
            return Err(failed(format!("{} bytes were kept, and {now} are left", known.floor)));
        }
        let names = names(storage, &directory);
        let allowed: &[&str] = match &record.state {
            RecordState::Ready(_) => &["image", "image.json"],
            // They end in one of the other two.
            _ if is_kept => return self.enter(entry),
            _ => &["image.json"],
        };
        if names.iter().any(|name| !allowed.contains(&name.as_str())) {
            return Err(failed(format!("{:?} and {names:?}", record.state)));
        }
        known.floor = 0;
        self.enter(entry)
    }

    fn enter(&mut self, entry: Entry) -> Result<(), (String, String)> {
        self.arrivals.table.insert(entry.record.uuid, entry);
        Ok(())
    }

    /// A record cannot be read: nothing is collected then, and the others are found (invariants 10 and 12). On a copy of
    /// the medium, so that the history goes on with the sound one.
    fn hide_a_record(&mut self) -> Result<(), String> {
        let uuids: Vec<Uuid> = self.arrivals.known.keys().copied().collect();
        if uuids.is_empty() {
            return Ok(());
        }
        let hidden = uuids[self.seed.index(uuids.len())];
        let path = format!("{}/image.json", self.arrivals.known[&hidden].directory);
        let copy = self.medium.storage().fork();
        let shorter = copy.damage(&path, |bytes| bytes.truncate(bytes.len() / 2));
        shorter.and_then(|()| copy.create_dir(LITTER)).map_err(|error| error.to_string())?;
        let copy = Arc::new(copy);
        let what = |error: String| format!("{path} is cut short: {error}");
        let store = open(copy.clone()).map_err(|error| what(error.to_string()))?;
        let found = store.scan().map_err(|error| what(error.to_string()))?;
        if !names(&copy, "images").contains(&LITTER["images/".len()..]) {
            return Err(what("something is collected all the same".into()));
        }
        let read = found.iter().filter(|found| matches!(found, Found::Image(..))).count();
        if read + 1 != uuids.len() {
            return Err(what(format!("{read} of {} images are found", uuids.len())));
        }
        Ok(())
    }
}

/// Whether everything has arrived, by what is recorded of it.
pub(super) fn is_whole(storage: &MemoryStorage, directory: &str) -> bool {
    let json = storage.bytes(&format!("{directory}/{}", NAMES.record)).ok();
    json.and_then(|json| Kept::parse(&json)).is_some_and(|kept| kept.complete)
}

/// Whether another try may go on with what is kept: not where that is known to be wrong or unwanted, and where the medium
/// was full not of a source that does not say how much there is, unless that is all.
pub(super) fn may_be_kept(record: &ImageRecord, known: &Reference, is_whole: bool) -> bool {
    use FailureCode::*;
    match &record.state {
        RecordState::Pending | RecordState::InProgress => true,
        RecordState::Ready(_) => false,
        RecordState::Failed { failure, .. } => match failure.code {
            Checksum | Corrupt | Unsupported | Cancelled => false,
            NoSpace => known.origin.says_length || is_whole,
            Source | TimedOut | Storage => true,
        },
    }
}
