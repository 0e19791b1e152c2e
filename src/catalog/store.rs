//! The directories of images on one disk: `images/<name>-<uuid8>/{image,image.json,partial.*}`.
//!
//! Owns which files there are, and the order of the steps that make a crash leave before or after: a record is durable
//! before anything else is (so that a directory without a record is litter), an arrival becomes `image` by a rename
//! that is durable before the record says *ready*, and a deletion takes the record away first. Does not know jobs.
//! Litter is collected only where every record of the disk was readable (invariant 10), and each removal is logged.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{
    error::{Error, Result},
    planted::{self, Bug},
};
use uuid::Uuid;

use super::record::{ImageRecord, Stamp};
use crate::directory::{Directory, HeldFile, Open, Removed};

/// Name of the directory of all images on a disk.
const IMAGES: &str = "images";
/// The verified file.
pub const IMAGE: &str = "image";
const RECORD: &str = "image.json";
/// What the record is called while its image is being removed.
const DELETED: &str = "deleted.json";
/// The arriving file.
pub const PARTIAL_DATA: &str = "partial.data";
/// What is known about the arriving file.
pub const PARTIAL_RECORD: &str = "partial.json";
/// What an image that is ready has no use for.
const LEFTOVERS: [&str; 4] = [PARTIAL_RECORD, PARTIAL_DATA, "image.json.new", "partial.json.new"];
/// Everything that this program ever puts into an image's directory.
const OURS: [&str; 7] =
    [IMAGE, RECORD, DELETED, PARTIAL_DATA, PARTIAL_RECORD, "image.json.new", "partial.json.new"];

/// A disk, as far as images are concerned. Cheap to clone; the descriptor stays the directory's.
#[derive(Clone, Debug)]
pub struct DiskDir {
    id: Uuid,
    directory: Arc<Directory>,
}

impl DiskDir {
    /// Hold the directory of the disk with this id. The caller has its lock and has seen its id (invariant 11).
    pub fn open(id: Uuid, path: &Path) -> Result<DiskDir> {
        Ok(DiskDir { id, directory: Arc::new(Directory::open(path)?) })
    }

    /// The same of a directory that is held already, for a simulated machine.
    pub fn of(id: Uuid, directory: Arc<Directory>) -> DiskDir {
        DiskDir { id, directory }
    }

    pub fn id(&self) -> Uuid {
        self.id
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn free_bytes(&self) -> Result<u64> {
        self.directory.free_bytes()
    }

    /// Whether files on it can be read past the page cache.
    pub fn takes_direct_reads(&self) -> bool {
        self.directory.takes_direct_reads()
    }
}

/// The images of one disk.
#[derive(Clone, Debug)]
pub struct ImageStore {
    disk: DiskDir,
    images: Arc<Directory>,
}

/// What lies under one name in `images/`.
#[derive(Debug)]
pub enum Found {
    Image(Box<ImageRecord>, ImageDir),
    /// It has a record that this program cannot read: it is listed, and keeps its name.
    Unreadable {
        directory: String,
        path: PathBuf,
        error: Error,
    },
}

impl ImageStore {
    pub fn open(disk: DiskDir) -> Result<ImageStore> {
        let images = Arc::new(disk.directory.ensure_dir(IMAGES)?);
        Ok(ImageStore { disk, images })
    }

    pub fn disk(&self) -> &DiskDir {
        &self.disk
    }

    /// Everything on the disk; what a crash left behind is cleared away.
    pub fn scan(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        let mut litter = Vec::new();
        for name in self.images.names()? {
            let path = self.images.path().join(&name);
            match self.look(&name) {
                Ok(Some((record, dir))) => found.push(Found::Image(Box::new(record), dir)),
                Ok(None) => litter.push(name),
                Err(error) => found.push(Found::Unreadable { directory: name, path, error }),
            }
        }
        let unreadable = found.iter().any(|f| matches!(f, Found::Unreadable { .. }));
        if unreadable && !planted::is(Bug::CollectedAllTheSame) {
            if !litter.is_empty() {
                tracing::warn!(disk = %self.disk.id, ?litter, "not collected: a record of this disk is unreadable");
            }
            return Ok(found);
        }
        for name in litter {
            // One that cannot be removed stops nobody: it is tried again at the next start.
            match self.collect(&name) {
                Ok(()) => {
                    tracing::info!(disk = %self.disk.id, directory = name, "collected an image without a record")
                }
                Err(error) => tracing::warn!(disk = %self.disk.id, directory = name, %error, "not collected"),
            }
        }
        Ok(found)
    }

    /// Make the directory of a new image, with its record.
    pub fn create(&self, record: &ImageRecord) -> Result<ImageDir> {
        let name = record.directory_name();
        self.images.create_dir(&name)?;
        let dir = ImageDir { name, images: self.images.clone() };
        dir.write_record(record)?;
        self.images.sync()?;
        Ok(dir)
    }

    /// Remove an image: its record first, then everything.
    pub fn delete(&self, image: &ImageDir) -> Result<()> {
        let dir = match image.directory() {
            // An earlier try came to its last step.
            Err(e) if e.is_not_found() => return self.images.sync(),
            opened => opened?,
        };
        if planted::is(Bug::BytesBeforeRecord) {
            dir.remove_file(IMAGE)?;
        }
        if dir.exists(RECORD)? {
            dir.rename(RECORD, DELETED)?;
            dir.sync()?;
        }
        self.collect(&image.name)
    }

    fn look(&self, name: &str) -> Result<Option<(ImageRecord, ImageDir)>> {
        let dir = self.images.open_dir(name)?;
        let path = dir.path().join(RECORD);
        let json = match dir.read_small(RECORD) {
            Ok(json) => json,
            Err(e) if e.is_not_found() => {
                // A verified file without a record was not left by a crash of ours, unless it is being deleted.
                if dir.exists(IMAGE)? && !dir.exists(DELETED)? {
                    return Err(e);
                }
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let record = ImageRecord::parse(&json, &path)?;
        if record.directory_name() != name {
            let what = format!("a record that belongs to the directory {:?}", record.directory_name());
            return Err(Error::Unsupported { path, what });
        }
        // Of a deletion that failed, before the image was asked for again: it must not vouch for another one.
        if let Err(error) = dir.remove_file(DELETED) {
            tracing::warn!(path = %dir.path().display(), %error, "the mark of an earlier deletion is not cleared away");
        }
        Ok(Some((record, ImageDir { name: name.to_owned(), images: self.images.clone() })))
    }

    fn collect(&self, name: &str) -> Result<()> {
        let dir = self.images.open_dir(name)?;
        for file in OURS.iter().filter(|file| **file != DELETED) {
            dir.remove_file(file)?;
        }
        // Last, and not before the others are gone for certain: it vouches for their removal.
        dir.sync()?;
        dir.remove_file(DELETED)?;
        self.images.remove_dir(name)?;
        self.images.sync()
    }
}

/// The directory of one image. It is opened when something is done in it: held, ten thousand images would take as many
/// of the process's open files.
#[derive(Clone, Debug)]
pub struct ImageDir {
    name: String,
    /// The directory of all images.
    images: Arc<Directory>,
}

impl ImageDir {
    pub fn directory(&self) -> Result<Arc<Directory>> {
        Ok(Arc::new(self.images.open_dir(&self.name)?))
    }

    /// Where the verified file is.
    pub fn image_path(&self) -> PathBuf {
        self.images.path().join(&self.name).join(IMAGE)
    }

    pub fn write_record(&self, record: &ImageRecord) -> Result<()> {
        self.directory()?.replace(RECORD, &record.to_json())
    }

    pub fn open_image(&self, how: Open) -> Result<File> {
        self.directory()?.open_system_file(IMAGE, how)
    }

    pub fn has_record(&self) -> Result<bool> {
        self.directory()?.exists(RECORD)
    }

    pub fn has_image(&self) -> Result<bool> {
        self.directory()?.exists(IMAGE)
    }

    /// Give the arrived, synced file its name and make that durable; the record follows.
    pub fn publish_file(&self, file: &HeldFile) -> Result<Stamp> {
        file.set_mode(0o444)?;
        file.sync_all()?;
        let dir = self.directory()?;
        dir.rename(PARTIAL_DATA, IMAGE)?;
        if !planted::is(Bug::ReadyBeforeName) {
            dir.sync()?;
        }
        match file.system() {
            Some(file) => stamp(file, &self.image_path()),
            // A simulated file has nothing else that tells.
            None => Ok(Stamp { size_bytes: file.len()?, mtime_ns: 0, inode: 0 }),
        }
    }

    /// Take back a publication whose record was never written: the arrival goes on where it was.
    pub fn unpublish_file(&self) -> Result<()> {
        // Whoever is not root could not write it otherwise.
        let dir = self.directory()?;
        let file = dir.open_file(IMAGE, Open::Read)?;
        file.set_mode(0o600)?;
        dir.rename(IMAGE, PARTIAL_DATA)?;
        dir.sync()
    }

    /// Remove what is left of an arrival, and of records that a crash or a full disk kept from their names.
    pub fn discard_partial(&self) -> Result<()> {
        self.discard(&LEFTOVERS)
    }

    /// The same of an image that was never ready: nothing stays but its record.
    pub fn discard_unpublished(&self) -> Result<()> {
        self.discard(&[&[IMAGE], &LEFTOVERS[..]].concat())
    }

    fn discard(&self, names: &[&str]) -> Result<()> {
        let dir = self.directory()?;
        let mut removed = Removed::Nothing;
        for name in names {
            if dir.remove_file(name)? == Removed::File {
                removed = Removed::File;
            }
        }
        match removed {
            Removed::Nothing => Ok(()),
            Removed::File => dir.sync(),
        }
    }

    /// Bytes that the image, or what has arrived of it, takes on the disk.
    pub fn allocated_bytes(&self) -> u64 {
        let Ok(dir) = self.directory() else { return 0 };
        let files = [IMAGE, PARTIAL_DATA].iter().filter_map(|name| dir.open_file(name, Open::Read).ok());
        files.map(|file| file.allocated()).sum()
    }
}

/// What identifies the content of an open file from outside.
pub fn stamp(file: &File, path: &Path) -> Result<Stamp> {
    let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
    let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
    Ok(Stamp { size_bytes: meta.len(), mtime_ns, inode: meta.ino() })
}

#[cfg(test)]
mod tests {
    use bedplate_engine::{
        exec::storage::{
            Open as StorageOpen, Storage,
            memory::{CallKind, Effect, Fault, MemoryStorage},
        },
        image::Format,
    };

    use super::*;
    use crate::catalog::{
        record::{Published, RecordState},
        testing::{record, store_over},
    };

    #[test]
    fn what_is_taken_back_can_be_written_by_whoever_owns_it() {
        let dir = tempfile::tempdir().unwrap();
        let images = Arc::new(Directory::open(dir.path()).unwrap());
        let held = images.create_dir("a-01234567").unwrap();
        let image = ImageDir { name: "a-01234567".to_owned(), images };
        let file = held.open_file(PARTIAL_DATA, Open::CreateWrite).unwrap();
        image.publish_file(&file).unwrap();
        let mode = || file.system().unwrap().metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(), 0o444);
        image.unpublish_file().unwrap();
        assert_eq!(mode(), 0o600);
    }

    /// A store with one image that is ready, and where that image lies.
    fn store_with_an_image(storage: &Arc<MemoryStorage>) -> (ImageStore, ImageDir, String) {
        let store = store_over(storage);
        let mut record = record();
        let dir = store.create(&record).unwrap();
        let file = dir.directory().unwrap().open_file(PARTIAL_DATA, Open::CreateWrite).unwrap();
        file.write_all_at(&[7; 512], 0).unwrap();
        let stamp = dir.publish_file(&file).unwrap();
        let sha512 = "0".repeat(128);
        record.state = RecordState::Ready(Published {
            format: Format::Raw,
            virtual_size_bytes: 512,
            sha512,
            stamp,
            sources: Vec::new(),
        });
        dir.write_record(&record).unwrap();
        let path = format!("images/{}", record.directory_name());
        (store, dir, path)
    }

    /// Every subset of what a power cut may lose.
    fn outcomes(medium: &MemoryStorage) -> Vec<MemoryStorage> {
        let effects: Vec<Effect> = medium.unsynced().into_iter().map(|(effect, _)| effect).collect();
        let kept = |subset: usize, effect: Effect| {
            let n = effects.iter().position(|other| *other == effect).unwrap();
            subset >> n & 1 == 1
        };
        let after = |subset| medium.crash(|effect, n| if kept(subset, effect) { n - 1 } else { 0 });
        (0..1 << effects.len()).map(after).collect()
    }

    #[test]
    fn a_power_cut_in_a_deletion_leaves_the_image_or_nothing_that_stops_a_start() {
        let storage = Arc::new(MemoryStorage::new(512));
        let (store, dir, path) = store_with_an_image(&storage);
        storage.record_cuts();
        store.delete(&dir).unwrap();
        let (mut whole, mut gone) = (0, 0);
        for medium in storage.take_cuts().iter().flat_map(outcomes).map(Arc::new) {
            match store_over(&medium).scan().unwrap().as_slice() {
                [] => {
                    assert!(medium.list(IMAGES).unwrap().is_empty());
                    gone += 1;
                }
                [Found::Image(record, _)] => {
                    assert!(matches!(record.state, RecordState::Ready(_)));
                    assert_eq!(medium.bytes(&format!("{path}/{IMAGE}")).unwrap(), [7; 512]);
                    whole += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(whole > 0 && gone > 0);
    }

    #[test]
    fn a_deletion_that_failed_at_its_last_step_can_be_tried_again() {
        let storage = Arc::new(MemoryStorage::new(512));
        let (store, dir, _) = store_with_an_image(&storage);
        storage.set_faults(|call| {
            let last = call.kind == CallKind::SyncDir && call.path == IMAGES;
            last.then_some(Fault::Error(std::io::ErrorKind::Other))
        });
        assert!(store.delete(&dir).is_err());
        storage.clear_faults();
        store.delete(&dir).unwrap();
        assert!(store.scan().unwrap().is_empty());
    }

    #[test]
    fn the_mark_of_a_deletion_that_failed_goes_where_the_image_has_a_record_again() {
        let storage = Arc::new(MemoryStorage::new(512));
        let (store, _, path) = store_with_an_image(&storage);
        drop(storage.open(&format!("{path}/{DELETED}"), StorageOpen::Create).unwrap());
        assert!(matches!(store.scan().unwrap().as_slice(), [Found::Image(..)]));
        let names: Vec<String> = storage.list(&path).unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&IMAGE.to_owned()) && !names.contains(&DELETED.to_owned()), "{names:?}");
    }

    #[test]
    fn nothing_is_left_of_an_arrival_and_a_verified_file_stays() {
        let storage = Arc::new(MemoryStorage::new(512));
        let (_, dir, path) = store_with_an_image(&storage);
        let names = || {
            let list = storage.list(&path).unwrap();
            let mut names: Vec<String> = list.into_iter().map(|(name, _)| name).collect();
            names.sort();
            names
        };
        for name in ["partial.data", "partial.json", "partial.json.new", "image.json.new"] {
            drop(storage.open(&format!("{path}/{name}"), StorageOpen::Create).unwrap());
        }
        dir.discard_partial().unwrap();
        assert_eq!(names(), [IMAGE, RECORD]);
        dir.discard_unpublished().unwrap();
        assert_eq!(names(), [RECORD]);
    }
}
