//! The images that the service knows, in memory: their records, doubts, holds and jobs.
//!
//! Owns [`Table`] (behind one short lock, never held over a disk operation or a wait) and how an entry looks from
//! outside. The records on disk are the truth; this follows them. Does not start or end jobs.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Weak},
};

use bedplate_engine::image::BaseImage;
use uuid::Uuid;

use super::{
    info::{CopyInfo, Error, ImageInfo, ImageState, Result, Verification},
    origin::UPLOAD,
};
use crate::{
    catalog::{
        record::{ImageRecord, Published, RecordState, Stamp},
        store::{ImageDir, ImageStore},
    },
    prep::{progress::Meter, source::upload::Parts, stop::Stop},
};

/// Images of a node.
pub const IMAGES_MAX: usize = 16_384;
/// Jobs of a node, running and waiting.
pub const JOBS_MAX: usize = 256;
/// Uploads at once. They do not wait for a turn, as their senders are there.
pub const UPLOADS_MAX: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Table {
    /// By the name under which it is served.
    entries: BTreeMap<String, Entry>,
    /// The served name of each image that has a readable record: volumes and open files know uuids only.
    names: HashMap<Uuid, String>,
    /// Set once: the node goes down, nothing new begins.
    pub closing: bool,
}

#[derive(Debug)]
pub(super) enum Entry {
    Image(Box<Image>),
    /// Listed so that people see it, and so that its name stays taken.
    Unreadable {
        disk: Uuid,
        path: PathBuf,
        reason: String,
    },
}

/// An image with a readable record.
#[derive(Debug)]
pub(super) struct Image {
    pub record: ImageRecord,
    pub dir: ImageDir,
    pub store: ImageStore,
    /// Why a *ready* image is not served for now.
    pub doubt: Option<String>,
    pub job: Option<Job>,
    /// Where its bytes go, until somebody comes to send them.
    pub upload: Option<Parts>,
    /// How its last verification ended; forgotten when another begins.
    pub verification: Option<Verification>,
    /// Bytes that its file takes on the disk, once it is ready: it does not change any more.
    pub allocated_bytes: Option<u64>,
    /// Its content, while somebody has it open, and the file that it was opened from.
    pub base: Option<(Stamp, Weak<dyn BaseImage>)>,
    /// Somebody deletes it at this moment.
    pub deleting: bool,
    /// Who keeps it from being deleted, apart from volumes on disk.
    pub holds: Vec<Arc<str>>,
}

/// A job that runs or waits for its turn.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub kind: JobKind,
    pub meter: Arc<Meter>,
    pub stop: Arc<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobKind {
    Arrival,
    Verification,
}

impl Table {
    /// Everything, in the order of served names.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &Entry)> {
        self.entries.iter()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// What is served under exactly this name.
    pub fn named(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Serve `entry` under a name that is free.
    pub fn put(&mut self, name: String, entry: Entry) {
        if let Entry::Image(image) = &entry {
            // Of two disks with one image, the first is found by its uuid.
            self.names.entry(image.record.uuid).or_insert_with(|| name.clone());
        }
        self.entries.insert(name, entry);
    }

    pub fn take(&mut self, name: &str) -> Option<Entry> {
        let taken = self.entries.remove(name)?;
        if let Entry::Image(image) = &taken
            && self.names.get(&image.record.uuid).is_some_and(|known| known == name)
        {
            let uuid = image.record.uuid;
            self.names.remove(&uuid);
            let twin = |entry: &Entry| matches!(entry, Entry::Image(image) if image.record.uuid == uuid);
            if let Some((name, _)) = self.entries.iter().find(|(_, entry)| twin(entry)) {
                self.names.insert(uuid, name.clone());
            }
        }
        Some(taken)
    }

    /// The served name and the entry for a uuid or a name. The uuid goes first: who has one must get that image (a
    /// volume, an open file), whatever another is called.
    pub fn find(&self, name: &str) -> Result<(&str, &Entry)> {
        let by_uuid = Uuid::try_parse(name).ok().and_then(|uuid| self.names.get(&uuid));
        let found = self.entries.get_key_value(by_uuid.map_or(name, String::as_str));
        found.map(|(name, entry)| (name.as_str(), entry)).ok_or_else(|| Error::NotFound(name.to_owned()))
    }

    /// An image that has a readable record.
    pub fn image(&self, name: &str) -> Result<(&str, &Image)> {
        match self.find(name)? {
            (name, Entry::Image(image)) => Ok((name, image)),
            (name, Entry::Unreadable { path, reason, .. }) => Err(Error::NotReady {
                name: name.to_owned(),
                state: format!(
                    "unreadable ({reason}); repair {} or move it away, then restart the node",
                    path.display()
                ),
            }),
        }
    }

    pub fn image_mut(&mut self, name: &str) -> Result<(String, &mut Image)> {
        let name = self.image(name)?.0.to_owned();
        match self.entries.get_mut(&name) {
            Some(Entry::Image(image)) => Ok((name, image)),
            Some(Entry::Unreadable { .. }) | None => Err(Error::NotFound(name)),
        }
    }

    pub fn by_uuid(&mut self, uuid: Uuid) -> Option<&mut Image> {
        match self.entries.get_mut(self.names.get(&uuid)?)? {
            Entry::Image(image) => Some(&mut **image),
            Entry::Unreadable { .. } => None,
        }
    }

    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.entries.values().filter_map(|entry| match entry {
            Entry::Image(image) => Some(&**image),
            Entry::Unreadable { .. } => None,
        })
    }

    pub fn jobs_count(&self) -> usize {
        self.images().filter(|image| image.job.is_some()).count()
    }

    /// Images that are being sent, or wait for that.
    pub fn uploads(&self) -> impl Iterator<Item = &Job> {
        let uploads = self.images().filter(|image| image.record.source == UPLOAD);
        // What was uploaded once may be verified now.
        uploads.filter_map(|image| image.job.as_ref()).filter(|job| job.kind == JobKind::Arrival)
    }

    /// Put in what was found on a disk. A name that another disk brought already gets its uuid behind it.
    pub fn insert(&mut self, name: &str, uuid8: &str, entry: Entry) {
        let served = if self.entries.contains_key(name) {
            let served = format!("{name}~{uuid8}");
            tracing::warn!(
                name,
                served,
                "two disks bring an image of this name; the second is served under another"
            );
            served
        } else {
            name.to_owned()
        };
        if self.entries.contains_key(&served) {
            tracing::error!(name = served, "the same image is on two disks; only one of them is served");
            return;
        }
        self.put(served, entry);
    }
}

impl Image {
    /// One that nothing happens to yet.
    pub fn new(record: ImageRecord, dir: ImageDir, store: ImageStore) -> Image {
        let (doubt, job, upload, verification) = (None, None, None, None);
        Image {
            record,
            dir,
            store,
            doubt,
            job,
            upload,
            verification,
            allocated_bytes: None,
            base: None,
            deleting: false,
            holds: Vec::new(),
        }
    }

    pub fn state(&self) -> ImageState {
        match (&self.record.state, &self.doubt) {
            (RecordState::Pending, _) => ImageState::Pending,
            (RecordState::InProgress, _) => ImageState::InProgress,
            (RecordState::Ready(_), None) => ImageState::Ready,
            (RecordState::Ready(_), Some(reason)) => ImageState::Unknown(reason.clone()),
            (RecordState::Failed { failure, .. }, _) => ImageState::Failed(failure.clone()),
        }
    }

    /// The verified copy, if it is one that may be served.
    pub fn ready(&self, name: &str) -> Result<&Published> {
        let refused = |state: String| Err(Error::NotReady { name: name.to_owned(), state });
        if self.deleting {
            return refused("being deleted".to_owned());
        }
        match (self.state(), &self.record.state) {
            (ImageState::Ready, RecordState::Ready(published)) => Ok(published),
            (ImageState::Failed(failure), _) => Err(Error::Failed { name: name.to_owned(), failure }),
            (ImageState::Unknown(reason), _) => refused(format!("unknown ({reason})")),
            (ImageState::Pending, _) => refused("pending; wait for it".to_owned()),
            (ImageState::InProgress | ImageState::Ready, _) => {
                refused("still in progress; wait for it".to_owned())
            }
        }
    }
}

/// What is needed to describe an entry once the lock is gone, as asking for its space may take disk operations.
pub(super) struct Described {
    info: ImageInfo,
    /// Of one whose space has to be asked for.
    dir: Option<ImageDir>,
}

impl Described {
    pub fn new(name: &str, entry: &Entry) -> Described {
        match entry {
            Entry::Image(image) => Described::image(name, image),
            Entry::Unreadable { disk, path, reason } => {
                let state = ImageState::Unknown(reason.clone());
                let copy = CopyInfo {
                    disk: *disk,
                    path: path.clone(),
                    state: state.clone(),
                    progress: None,
                    verification: None,
                };
                let info = ImageInfo {
                    name: name.to_owned(),
                    uuid: None,
                    state,
                    format: None,
                    size_bytes: None,
                    internal_snapshot: None,
                    virtual_size_bytes: None,
                    allocated_bytes: 0,
                    sha512: None,
                    source: String::new(),
                    sources: Vec::new(),
                    copies: vec![copy],
                    created_at: None,
                };
                Described { info, dir: None }
            }
        }
    }

    fn image(name: &str, image: &Image) -> Described {
        let state = image.state();
        let published = image.record.published();
        let copy = CopyInfo {
            disk: image.store.disk().id(),
            path: image.dir.image_path(),
            state: state.clone(),
            progress: image.job.as_ref().map(|job| job.meter.progress()),
            verification: image.verification.clone(),
        };
        let info = ImageInfo {
            name: name.to_owned(),
            uuid: Some(image.record.uuid),
            state,
            format: published.map(|p| p.format),
            size_bytes: published.map(|p| p.stamp.size_bytes),
            internal_snapshot: image.record.internal_snapshot.clone(),
            virtual_size_bytes: published.map(|p| p.virtual_size_bytes),
            allocated_bytes: image.allocated_bytes.unwrap_or(0),
            sha512: published.map(|p| p.sha512.clone()),
            source: image.record.source.clone(),
            sources: published.map(|p| p.sources.clone()).unwrap_or_default(),
            copies: vec![copy],
            created_at: Some(image.record.created_at),
        };
        let dir = image.allocated_bytes.is_none().then(|| image.dir.clone());
        Described { info, dir }
    }

    /// The picture, with what the disk says.
    pub fn complete(mut self) -> ImageInfo {
        if let Some(dir) = self.dir {
            self.info.allocated_bytes = dir.allocated_bytes();
        }
        self.info
    }
}
