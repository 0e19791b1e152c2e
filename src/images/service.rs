//! What the image service is made of, and the steps that its calls and its jobs share.
//!
//! Owns [`Service`]: the table, the turns of jobs, the bell that waiters listen to; reading the disks at start, doubt,
//! and opening a file that must be as it was verified (invariant 5: size, mtime and inode agree at each open, or it is
//! verified again, from the medium, before it serves).

use std::{
    fs::File,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bedplate_engine::{
    exec::pool::Pool,
    image::{self, BaseImage, follow::Followed, qcow2::View},
};
use nix::{
    errno::Errno,
    fcntl::{PosixFadviseAdvice, posix_fadvise},
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};
use uuid::Uuid;

use super::{
    info::{BaseCache, Error, Host, Result, Settings},
    job::Work,
    origin::From as Origin,
    steps::{Left, end_arrival, take_up},
    table::{Entry, Image, Table},
};
use crate::{
    catalog::{
        record::{ImageRecord, Published, RecordState},
        store::{DiskDir, Found, ImageDir, ImageStore, stamp},
    },
    directory::{Open, allocated},
    prep::failure::Failure,
};

/// Threads that ask for what is read ahead of readers that must not wait.
const ASKERS: usize = 2;

pub(super) struct Service {
    pub settings: Settings,
    pub host: Arc<dyn Host>,
    pub runtime: Handle,
    pub stores: Vec<ImageStore>,
    table: Mutex<Table>,
    /// Names are given one at a time, over disk operations, without holding the table.
    pub naming: Mutex<()>,
    /// Rung whenever a job ends or an image goes.
    bell: watch::Sender<u64>,
    pub turns: Arc<Semaphore>,
    /// Threads that ask for what is read ahead; without any, readers that must not wait have nothing read ahead.
    askers: Option<Arc<Pool>>,
}

impl Service {
    /// Read the disks. One that cannot be read is left out, and said so; the others are served.
    pub fn open(
        disks: Vec<DiskDir>,
        settings: Settings,
        host: Arc<dyn Host>,
        runtime: Handle,
    ) -> Arc<Service> {
        let mut table = Table::default();
        let mut stores = Vec::new();
        for disk in disks {
            let (id, path) = (disk.id(), disk.path().to_owned());
            let scanned = ImageStore::open(disk).and_then(|store| Ok((store.scan()?, store)));
            match scanned {
                Ok((found, store)) => {
                    if settings.base_cache == BaseCache::Direct && !store.disk().takes_direct_reads() {
                        tracing::warn!(
                            disk = %id, path = %path.display(),
                            "base_cache is direct, which this disk's file system cannot do: its images are cached"
                        );
                    }
                    found.into_iter().for_each(|found| enter(&mut table, &store, found));
                    stores.push(store);
                }
                Err(error) => {
                    tracing::error!(disk = %id, path = %path.display(), %error, "the images of this disk are not served");
                }
            }
        }
        let turns = Arc::new(Semaphore::new(settings.jobs_running_max.max(1)));
        let askers = Pool::start_shared("read-ahead", ASKERS, || {})
            .inspect_err(|error| tracing::warn!(%error, "nothing of images is read ahead for rings"));
        let service = Arc::new(Service {
            settings,
            host,
            runtime,
            stores,
            table: Mutex::new(table),
            naming: Mutex::new(()),
            bell: watch::Sender::new(0),
            turns,
            askers: askers.ok().map(Arc::new),
        });
        service.take_up();
        service
    }

    /// Start what was unfinished or is in doubt, and clear away what failures left.
    fn take_up(self: &Arc<Self>) {
        let known: Vec<(String, Uuid)> = self
            .lock()
            .entries()
            .filter_map(|(name, entry)| match entry {
                Entry::Image(image) => Some((name.clone(), image.record.uuid)),
                Entry::Unreadable { .. } => None,
            })
            .collect();
        for (name, uuid) in known {
            let Ok((record, dir)) = self.look_up(uuid) else { continue };
            match (take_up(&record, &dir), record.published()) {
                (Left::Unfinished, _) => match Origin::parse(&record.source) {
                    Ok(origin) => {
                        tracing::info!(image = name, "its arrival goes on");
                        self.start(uuid, Work::Arrival(origin));
                    }
                    Err(reason) => self.give_up(uuid, &reason),
                },
                (Left::Ready, Some(published)) => match look(&dir, published) {
                    Ok(allocated_bytes) => {
                        if let Some(image) = self.lock().by_uuid(uuid) {
                            image.allocated_bytes = Some(allocated_bytes);
                        }
                    }
                    Err(reason) => self.doubt(&name, &reason),
                },
                (Left::Ready | Left::Failed, _) => {}
            }
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn notify(&self) {
        self.bell.send_modify(|rung| *rung = rung.wrapping_add(1));
    }

    pub fn listen(&self) -> watch::Receiver<u64> {
        self.bell.subscribe()
    }

    /// The record and directory of an image.
    pub fn look_up(&self, uuid: Uuid) -> Result<(ImageRecord, ImageDir), Failure> {
        let mut table = self.lock();
        let image = table.by_uuid(uuid).ok_or(Failure::Cancelled)?;
        Ok((image.record.clone(), image.dir.clone()))
    }

    /// Enter a record in the table.
    pub fn know(&self, record: &ImageRecord) {
        if let Some(image) = self.lock().by_uuid(record.uuid) {
            image.record = record.clone();
        }
    }

    /// Open the file of a ready image, if it is as it was verified. If not, it is verified again.
    pub fn open_ready(self: &Arc<Self>, name: &str, how: Open) -> Result<Ready> {
        let (name, published, view, dir) = {
            let table = self.lock();
            let (name, image) = table.image(name)?;
            (name.to_owned(), image.ready(name)?.clone(), image.record.view(), image.dir.clone())
        };
        let path = dir.image_path();
        let reason = match dir.open_image(how) {
            Ok(file) => {
                if stamp(&file, &path)? == published.stamp {
                    return Ok(Ready { file, path, published, view });
                }
                CHANGED.to_owned()
            }
            Err(e) if e.is_not_found() => "its file is gone".to_owned(),
            Err(e) => return Err(e.into()),
        };
        self.doubt(&name, &reason);
        Err(Error::NotReady { name, state: format!("unknown ({reason})") })
    }

    /// The content of a ready image, for one reader, whose runs are read ahead of.
    pub fn open_base(self: &Arc<Self>, name: &str) -> Result<(Arc<dyn BaseImage>, Published)> {
        let (base, published) = self.open_shared(name)?;
        Ok((Arc::new(Followed::new(base, self.askers.clone())), published))
    }

    /// Whoever has an image open shares it: its tables and decoded clusters are in memory once.
    pub fn open_shared(self: &Arc<Self>, name: &str) -> Result<(Arc<dyn BaseImage>, Published)> {
        let Ready { file, path, published, view } = match self.settings.base_cache {
            BaseCache::Shared => {
                let ready = self.open_ready(name, Open::Read)?;
                // Which readers read in order is known better than where they share one file.
                let _ = posix_fadvise(&ready.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
                ready
            }
            BaseCache::Direct => match self.open_ready(name, Open::ReadDirect) {
                // The file system has no such thing, as the log of the start says.
                Err(Error::Storage(error)) if is_not_supported(&error) => {
                    self.open_ready(name, Open::Read)?
                }
                opened => {
                    let ready = opened?;
                    // What its arrival left there is nobody's; that is advice, and may be ignored.
                    let _ = posix_fadvise(&ready.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                    ready
                }
            },
        };
        let shared = |table: &Table| {
            let (_, image) = table.image(name).ok()?;
            let (stamp, base) = image.base.as_ref()?;
            base.upgrade().filter(|_| *stamp == published.stamp)
        };
        if let Some(base) = shared(&self.lock()) {
            return Ok((base, published));
        }
        let base = image::open(file, &path, published.format, &view)?;
        let mut table = self.lock();
        // Somebody may have been faster.
        if let Some(base) = shared(&table) {
            return Ok((base, published));
        }
        if let Ok((_, image)) = table.image_mut(name) {
            image.base = Some((published.stamp, Arc::downgrade(&base)));
        }
        Ok((base, published))
    }

    /// Do not serve a ready image until it has been verified again, which begins now.
    pub fn doubt(self: &Arc<Self>, name: &str, reason: &str) {
        let uuid = {
            let mut table = self.lock();
            let Ok((name, image)) = table.image_mut(name) else { return };
            if !matches!(image.record.state, RecordState::Ready(_)) {
                return;
            }
            tracing::warn!(image = name, reason, "not served until it is verified again");
            image.doubt = Some(format!("{reason}; it is verified again"));
            image.allocated_bytes = None;
            image.record.uuid
        };
        self.start(uuid, Work::Verification);
    }

    pub fn doubt_of(&self, uuid: Uuid) -> Option<String> {
        self.lock().by_uuid(uuid)?.doubt.clone()
    }

    /// An arrival that cannot go on.
    fn give_up(&self, uuid: Uuid, reason: &str) {
        let Ok((mut record, dir)) = self.look_up(uuid) else { return };
        end_arrival(&mut record, &dir, Err(Failure::Source(reason.to_owned())));
        self.know(&record);
    }
}

/// The file of a ready image.
pub struct Ready {
    pub file: File,
    pub path: PathBuf,
    pub published: Published,
    pub view: View,
}

const CHANGED: &str = "its file's size, time or inode is not what it was";

/// The space that a published file takes, or how it is not what its record says, from outside.
fn look(dir: &ImageDir, published: &Published) -> Result<u64, String> {
    let path = dir.image_path();
    let looked = dir.open_image(Open::Read).and_then(|file| Ok((stamp(&file, &path)?, allocated(&file))));
    match looked {
        Ok((found, allocated)) if found == published.stamp => Ok(allocated),
        Ok(_) => Err(CHANGED.to_owned()),
        Err(e) if e.is_not_found() => Err("its file is gone".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// Whether that is what a file system without `O_DIRECT` says.
fn is_not_supported(error: &bedplate_engine::error::Error) -> bool {
    matches!(error, bedplate_engine::error::Error::Io { source, .. } if source.raw_os_error() == Some(Errno::EINVAL as i32))
}

fn enter(table: &mut Table, store: &ImageStore, found: Found) {
    match found {
        Found::Image(record, dir) => {
            let name = record.name.to_string();
            let uuid8: String = record.uuid.simple().to_string().chars().take(8).collect();
            let image = Image::new(*record, dir, store.clone());
            table.insert(&name, &uuid8, Entry::Image(Box::new(image)));
        }
        Found::Unreadable { directory, path, error } => {
            tracing::error!(path = %path.display(), %error, "an image is not served, as its record cannot be read");
            let (name, uuid8) = directory.rsplit_once('-').unwrap_or((&directory, "unreadable"));
            let entry = Entry::Unreadable { disk: store.disk().id(), path, reason: error.to_string() };
            table.insert(name, uuid8, entry);
        }
    }
}
