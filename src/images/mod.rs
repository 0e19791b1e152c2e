//! The image service of a node: where the catalog (records) and prep (jobs) are wired together.
//!
//! Owns [`Images`], the calls that the API and the rest of the node make. A call that changes something has happened on
//! disk when it returns, except for the jobs that it starts, which [`Images::wait`] waits for. Which image may be
//! deleted is decided here, with the word of the [`Host`] and of [`ImageHold`]s. Serving and volumes live elsewhere.

mod info;
mod job;
mod joined;
mod origin;
mod remove;
mod served;
mod service;
pub mod steps;
mod table;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    sync::{Arc, PoisonError},
    time::Duration,
};

use bedplate_engine::{
    device::BlockDevice,
    error::Error as Storage,
    image::{BaseImage, device::ImageDevice},
};
use jiff::Timestamp;
use tokio::{runtime::Handle, time::Instant};
use uuid::Uuid;

use crate::{
    catalog::{
        name::ImageName,
        record::{ImageRecord, RecordState},
        store::ImageStore,
    },
    directory::Open,
    prep::{
        checksum::Expected,
        source::upload::{Parts as UploadParts, UploadSource},
    },
};
pub use crate::{
    catalog::{
        record::{FailureCode, FailureRecord, Parts},
        sources::SourceFile,
        store::DiskDir,
    },
    prep::{
        progress::{Phase, Progress},
        source::http::HttpSettings,
    },
};
pub use bedplate_engine::image::Format;
pub use info::{
    BaseCache, CopyInfo, CreateImage, Error, Host, ImageInfo, ImageState, Result, Settings, Verification,
};
use job::Work;
use origin::From as Origin;
pub use remove::{ImageHold, RELEASE_WITHIN};
use service::{Ready, Service};
use steps::begin_again;
use table::{Described, Entry, Image, JobKind};
pub use table::{IMAGES_MAX, JOBS_MAX, UPLOADS_MAX};

/// The service; cheap to clone. Methods that are not `async` block for a few small disk operations, and those that wait
/// for a job to end, say so: call them where blocking is allowed.
#[derive(Clone)]
pub struct Images(Arc<Service>);

impl Images {
    /// Read the records of all disks, go on with what was unfinished, verify what changed. A disk whose images cannot
    /// be listed is left out and logged. `runtime` carries jobs and network.
    pub fn open(disks: Vec<DiskDir>, settings: Settings, host: Arc<dyn Host>, runtime: Handle) -> Images {
        Images(Service::open(disks, settings, host, runtime))
    }

    /// Begin an image; returns with the image *pending*. Creating one again that failed, from the same source, goes on
    /// with what is kept of it, if the source proves that it still serves the same.
    pub fn create(&self, request: &CreateImage) -> Result<ImageInfo> {
        let bad_name = |reason| Error::Name { name: request.name.clone(), reason };
        let name = ImageName::parse(&request.name).map_err(bad_name)?;
        let expected =
            request.checksum.as_deref().map(Expected::parse).transpose().map_err(Error::Invalid)?;
        let mut origin = Origin::parse(&request.from).map_err(Error::Invalid)?;
        if let (Origin::Volume { name, .. }, Some(snapshot)) = (&origin, &request.internal_snapshot) {
            let what = "only qcow2 files have internal snapshots";
            return Err(Error::Invalid(format!(
                "{what}; for one of a volume, write volume:{name}@{snapshot}"
            )));
        }
        if request.parts != Parts::default() && !matches!(origin, Origin::Path(_)) {
            let what = "--backing and --allow-references are for files and directories of this machine";
            return Err(Error::Invalid(what.to_owned()));
        }
        if let Some(relative) = request.parts.relative() {
            return Err(Error::Invalid(format!("{relative:?} is no absolute path")));
        }
        self.check_origin(&origin)?;
        let service = &self.0;
        let _naming = service.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = self.check_free(name.as_str(), &origin)?;
        let record = ImageRecord {
            name,
            uuid: failed.as_ref().map_or_else(Uuid::new_v4, |(old, ..)| old.uuid),
            created_at: Timestamp::now(),
            source: origin.for_record(),
            expected: expected.as_ref().map(Expected::to_string),
            deadline_s: request.deadline.map(|deadline| deadline.as_secs().max(1)),
            internal_snapshot: request.internal_snapshot.clone(),
            parts: request.parts.clone(),
            state: RecordState::Pending,
        };
        let (dir, store) = match failed {
            Some((failed, dir, store)) => {
                begin_again(&failed, &record, &dir)?;
                (dir, store)
            }
            None => {
                let store = self.place(request.disk)?;
                (store.create(&record)?, store)
            }
        };
        let uuid = record.uuid;
        let name = record.name.to_string();
        let mut image = Image::new(record, dir, store);
        if let Origin::Upload(source) = &mut origin {
            let (parts, queue) = UploadSource::new(service.runtime.clone());
            (image.upload, *source) = (Some(parts), Some(queue));
        }
        let mut table = service.lock();
        if let Some(Entry::Image(failed)) = table.take(&name) {
            // Whoever holds the name goes on holding it.
            image.holds = failed.holds;
        }
        table.put(name.clone(), Entry::Image(Box::new(image)));
        drop(table);
        service.start(uuid, Work::Arrival(origin));
        self.get(&name)
    }

    /// Where the bytes of an image go that was created to be uploaded. There is one sender, once.
    pub fn upload(&self, name: &str) -> Result<UploadParts> {
        let mut table = self.0.lock();
        let (name, image) = table.image_mut(name)?;
        let state = "not waiting for an upload; create it with the source \"upload\" first".to_owned();
        image.upload.take().ok_or(Error::NotReady { name, state })
    }

    /// End all uploads: the node goes down, and they cannot go on later.
    pub fn end_uploads(&self) {
        self.0.lock().uploads().for_each(|job| job.stop.stop());
    }

    pub fn list(&self) -> Vec<ImageInfo> {
        let described: Vec<Described> =
            self.0.lock().entries().map(|(name, entry)| Described::new(name, entry)).collect();
        described.into_iter().map(Described::complete).collect()
    }

    /// Names and uuids of those that are ready, without a look at any disk.
    pub fn served(&self) -> Vec<(String, Uuid)> {
        let table = self.0.lock();
        let named = table.entries().filter_map(|(name, entry)| match entry {
            Entry::Image(image) => {
                (image.state() == ImageState::Ready).then(|| (name.clone(), image.record.uuid))
            }
            Entry::Unreadable { .. } => None,
        });
        named.collect()
    }

    /// By name or uuid.
    pub fn get(&self, name: &str) -> Result<ImageInfo> {
        let described = {
            let table = self.0.lock();
            let (name, entry) = table.find(name)?;
            Described::new(name, entry)
        };
        Ok(described.complete())
    }

    /// Start to read it back from the medium; [`Images::wait`] gives the result. It is served meanwhile, unless it is
    /// in doubt or failed.
    pub fn verify(&self, name: &str) -> Result<ImageInfo> {
        let (name, uuid) = {
            let table = self.0.lock();
            let (name, image) = table.image(name)?;
            let refused =
                |state: &str| Err(Error::NotReady { name: name.to_owned(), state: state.to_owned() });
            match (&image.record.state, &image.job) {
                _ if table.closing => return Err(Error::ShuttingDown),
                _ if image.deleting => return refused("being deleted"),
                (_, Some(job)) if job.kind == JobKind::Verification => {}
                (_, Some(_)) | (RecordState::Pending | RecordState::InProgress, None) => {
                    return refused("still in progress; wait for it");
                }
                (RecordState::Failed { failure, published: None }, None) => {
                    return Err(Error::Failed { name: name.to_owned(), failure: failure.clone() });
                }
                (RecordState::Ready(_) | RecordState::Failed { published: Some(_), .. }, None) => {
                    self.check_room_for_job(table.jobs_count())?;
                }
            }
            (name.to_owned(), image.record.uuid)
        };
        self.0.start(uuid, Work::Verification);
        self.get(&name)
    }

    /// Until no job is at it. Then it is ready, or the answer is [`Error::Failed`] or [`Error::NotReady`];
    /// [`Error::TimedOut`] when that takes longer than `timeout`.
    pub async fn wait(&self, name: &str, timeout: Duration) -> Result<ImageInfo> {
        let deadline = Instant::now().checked_add(timeout);
        let mut bell = self.0.listen();
        loop {
            bell.borrow_and_update();
            let info = {
                let table = self.0.lock();
                let (name, image) = table.image(name)?;
                if image.job.is_none() && !image.deleting {
                    image.ready(name)?;
                    Some(Described::new(name, table.find(name)?.1))
                } else if table.closing {
                    return Err(Error::ShuttingDown);
                } else {
                    None
                }
            };
            if let Some(info) = info {
                return Ok(info.complete());
            }
            let timed_out = || Error::TimedOut { name: name.to_owned(), after: timeout };
            match deadline {
                Some(deadline) => {
                    let rung = tokio::time::timeout_at(deadline, bell.changed()).await;
                    rung.map_err(|_| timed_out())?.map_err(|_| Error::ShuttingDown)?;
                }
                None => bell.changed().await.map_err(|_| Error::ShuttingDown)?,
            }
        }
    }

    /// A read-only device over a ready image, by name or uuid. It reads on even if the image is deleted.
    pub fn open_device(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        let (base, _) = self.0.open_base(name)?;
        Ok(Arc::new(ImageDevice::new(base)))
    }

    /// The file of a ready image whose content is, byte for byte, what the device over it gives; for passthrough.
    pub fn file_of_content(&self, uuid: Uuid) -> Result<Option<File>> {
        let Ready { file, published, .. } = self.0.open_ready(&uuid.to_string(), Open::Read)?;
        let is_content = match published.format {
            Format::Raw => published.stamp.size_bytes == published.virtual_size_bytes,
            Format::Qcow2 => false,
        };
        Ok(is_content.then_some(file))
    }

    /// The content of a ready image, for volumes to stand on, and the SHA-512 of its file.
    pub fn open_base(&self, uuid: Uuid) -> Result<(Arc<dyn BaseImage>, String)> {
        let (base, published) = self.0.open_base(&uuid.to_string())?;
        Ok((base, published.sha512))
    }

    /// Stop all jobs, keeping what has arrived; they go on at the next open. Whether all had ended by the deadline.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        let deadline = Instant::now() + deadline;
        let mut bell = self.0.listen();
        {
            let mut table = self.0.lock();
            table.closing = true;
            table.images().filter_map(|image| image.job.as_ref()).for_each(|job| job.stop.stop());
        }
        self.0.notify();
        loop {
            bell.borrow_and_update();
            if self.0.lock().jobs_count() == 0 {
                return true;
            }
            if !matches!(tokio::time::timeout_at(deadline, bell.changed()).await, Ok(Ok(()))) {
                return false;
            }
        }
    }

    /// What can be told at once, so that nobody has to wait for a job to say it.
    fn check_origin(&self, origin: &Origin) -> Result<()> {
        match origin {
            Origin::Path(path) => {
                path.metadata().map_err(|e| Storage::io("open", path, e))?;
                Ok(())
            }
            Origin::Image(name) => {
                let table = self.0.lock();
                let (name, image) = table.image(name)?;
                image.ready(name).map(|_| ())
            }
            Origin::Upload(_) | Origin::Http(_) | Origin::Volume { .. } => Ok(()),
        }
    }

    /// Refuse a taken name. What is kept under it, when it failed earlier and this is another try.
    fn check_free(
        &self,
        name: &str,
        origin: &Origin,
    ) -> Result<Option<(ImageRecord, crate::catalog::store::ImageDir, ImageStore)>> {
        let table = self.0.lock();
        if table.closing {
            return Err(Error::ShuttingDown);
        }
        self.check_room_for_job(table.jobs_count())?;
        if matches!(origin, Origin::Upload(_)) && table.uploads().count() >= UPLOADS_MAX {
            return Err(Error::Busy("UPLOADS_MAX"));
        }
        if table.find(name).is_ok_and(|(served, _)| served != name) {
            // It is the uuid of another: nobody could tell which of the two is meant.
            return Err(Error::Exists(name.to_owned()));
        }
        match table.named(name) {
            None if table.len() >= IMAGES_MAX => Err(Error::Busy("IMAGES_MAX")),
            None => Ok(None),
            Some(Entry::Image(image)) => match &image.record.state {
                RecordState::Failed { published: None, .. }
                    if image.job.is_none()
                        && !image.deleting
                        && image.record.name.as_str() == name
                        && image.record.source == origin.for_record() =>
                {
                    Ok(Some((image.record.clone(), image.dir.clone(), image.store.clone())))
                }
                RecordState::Failed { .. }
                | RecordState::Pending
                | RecordState::InProgress
                | RecordState::Ready(_) => Err(Error::Exists(name.to_owned())),
            },
            Some(Entry::Unreadable { .. }) => Err(Error::Exists(name.to_owned())),
        }
    }

    fn check_room_for_job(&self, jobs: usize) -> Result<()> {
        if jobs >= JOBS_MAX { Err(Error::Busy("JOBS_MAX")) } else { Ok(()) }
    }

    /// The disk for a new image.
    fn place(&self, disk: Option<Uuid>) -> Result<ImageStore> {
        let stores = &self.0.stores;
        let store = match disk {
            Some(id) => stores.iter().find(|store| store.disk().id() == id).ok_or(Error::DiskNotFound(id))?,
            None => stores
                .iter()
                .max_by_key(|store| store.disk().free_bytes().unwrap_or(0))
                .ok_or_else(|| Error::Invalid("this node has no disk that takes images".to_owned()))?,
        };
        Ok(store.clone())
    }
}
