//! The images that the service knows, in memory: their records, doubts, holds and jobs.
//!
//! Owns [`Table`] (behind one short lock, never held over a disk operation or a wait) and how an entry looks from
//! outside. The records on disk are the truth; this follows them. Does not start or end jobs.

use std::{
    collections::BTreeMap,
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
pub const IMAGES_MAX: usize = 4096;
/// Jobs of a node, running and waiting.
pub const JOBS_MAX: usize = 256;
/// Uploads at once. They do not wait for a turn, as their senders are there.
pub const UPLOADS_MAX: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Table {
    /// By the name under which it is served.
    pub entries: BTreeMap<String, Entry>,
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
    /// The served name and the entry for a name or a uuid.
    pub fn find(&self, name: &str) -> Result<(&str, &Entry)> {
        if let Some((name, entry)) = self.entries.get_key_value(name) {
            return Ok((name, entry));
        }
        let by_uuid = Uuid::try_parse(name).ok().and_then(|uuid| {
            self.entries
                .iter()
                .find(|(_, entry)| matches!(entry, Entry::Image(image) if image.record.uuid == uuid))
        });
        by_uuid.map(|(name, entry)| (name.as_str(), entry)).ok_or_else(|| Error::NotFound(name.to_owned()))
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
        self.entries.values_mut().find_map(|entry| match entry {
            Entry::Image(image) if image.record.uuid == uuid => Some(&mut **image),
            Entry::Image(_) | Entry::Unreadable { .. } => None,
        })
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
        self.images().filter(|image| image.record.source == UPLOAD).filter_map(|image| image.job.as_ref())
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
        self.entries.insert(served, entry);
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

/// What is needed to describe an entry once the lock is gone, as asking for its space takes disk operations.
pub(super) struct Described {
    info: ImageInfo,
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
            allocated_bytes: 0,
            sha512: published.map(|p| p.sha512.clone()),
            source: image.record.source.clone(),
            copies: vec![copy],
            created_at: Some(image.record.created_at),
        };
        Described { info, dir: Some(image.dir.clone()) }
    }

    /// The picture, with what the disk says.
    pub fn complete(mut self) -> ImageInfo {
        self.info.allocated_bytes = self.dir.map_or(0, |dir| dir.allocated_bytes());
        self.info
    }
}
