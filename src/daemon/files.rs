//! The node's images and volumes as files of the mount.
//!
//! Owns the link from the front end's questions to the table of volumes and the image service. An image is a file once
//! it is ready, a volume once it is open. Every opening holds what it opens, so that it is neither deleted nor reverted
//! beneath its user.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use bedplate_engine::{
    device::Access,
    error::{Error, Result},
    volume::device::VolumeState,
};
use bedplate_fuse::{FileEntry, FileId, Kind, ListedFile, Namespace, OpenFile};
use jiff::Timestamp;

use super::volumes::{Located, Volumes};
use crate::images::{self, ImageInfo, ImageState, Images};

/// What the mount serves.
pub struct Files {
    volumes: Arc<Volumes>,
    images: Images,
    mount: PathBuf,
}

impl Files {
    pub fn new(volumes: Arc<Volumes>, images: Images, mount: PathBuf) -> Files {
        Files { volumes, images, mount }
    }

    fn open_image(&self, file: FileId) -> Result<OpenFile> {
        let name = file.uuid.to_string();
        let hold = self.images.hold(&name, "an open file of the mount").map_err(image_error)?;
        let device = self.images.open_device(&name).map_err(image_error)?;
        // The kernel may read the file itself where that is the same, byte for byte and in length.
        let passthrough = self.images.file_of_content(file.uuid).map_err(image_error)?.map(Arc::new);
        Ok(OpenFile { device, passthrough, hold: Box::new(hold) })
    }

    fn open_volume(&self, file: FileId) -> Result<OpenFile> {
        let gone = || Error::NotFound { kind: "volume", name: file.uuid.to_string() };
        let located = self.volumes.find_uuid(file.uuid).ok_or_else(gone)?;
        let volume = located.open()?;
        let path = self.mount.join(Kind::Volume.directory()).join(&located.served);
        let hold = volume.hold(format!("an open file, {}", path.display()))?;
        Ok(OpenFile { device: volume, passthrough: None, hold: Box::new(hold) })
    }
}

impl Namespace for Files {
    fn list(&self, kind: Kind) -> Vec<ListedFile> {
        let listed = |(name, uuid)| ListedFile { name, id: FileId { kind, uuid } };
        match kind {
            Kind::Image => self.images.served().into_iter().map(listed).collect(),
            Kind::Volume => {
                let open = self.volumes.all().into_iter().filter(|located| located.open().is_ok());
                open.map(|located| listed((located.served, located.uuid))).collect()
            }
        }
    }

    fn lookup(&self, kind: Kind, name: &str) -> Option<FileEntry> {
        match kind {
            // The service finds by uuid, too; a file has its name only.
            Kind::Image => image_entry(self.images.get(name).ok()?).filter(|entry| entry.name == name),
            Kind::Volume => volume_entry(&self.volumes.find_name(name)?),
        }
    }

    fn stat(&self, file: FileId) -> Option<FileEntry> {
        match file.kind {
            Kind::Image => image_entry(self.images.get(&file.uuid.to_string()).ok()?),
            Kind::Volume => volume_entry(&self.volumes.find_uuid(file.uuid)?),
        }
    }

    fn open(&self, file: FileId) -> Result<OpenFile> {
        match file.kind {
            Kind::Image => self.open_image(file),
            Kind::Volume => self.open_volume(file),
        }
    }
}

fn image_entry(info: ImageInfo) -> Option<FileEntry> {
    if info.state != ImageState::Ready {
        return None;
    }
    Some(FileEntry {
        name: info.name,
        id: FileId::image(info.uuid?),
        size: info.virtual_size_bytes?,
        allocated_bytes: info.allocated_bytes,
        modified: time(info.created_at),
        access: Access::ReadOnly,
    })
}

fn volume_entry(located: &Located) -> Option<FileEntry> {
    let volume = located.open().ok()?;
    let info = volume.info();
    let access = match info.state {
        VolumeState::Ready => Access::ReadWrite,
        VolumeState::ReadOnly { .. } | VolumeState::Failed { .. } => Access::ReadOnly,
    };
    Some(FileEntry {
        name: located.served.clone(),
        id: FileId::volume(info.uuid),
        size: info.size.0,
        allocated_bytes: info.allocated.0,
        modified: time(Some(info.created_at)),
        access,
    })
}

fn time(at: Option<Timestamp>) -> SystemTime {
    at.map_or(SystemTime::UNIX_EPOCH, SystemTime::from)
}

/// What the front end can tell apart; the text is for the log.
fn image_error(error: images::Error) -> Error {
    match error {
        images::Error::NotFound(name) => Error::NotFound { kind: "image", name },
        images::Error::Storage(error) => error,
        images::Error::Busy(limit) => Error::Busy { limit },
        images::Error::ShuttingDown => Error::Closed,
        error @ (images::Error::Invalid(_)
        | images::Error::Name { .. }
        | images::Error::DiskNotFound(_)
        | images::Error::Exists(_)
        | images::Error::InUse { .. }
        | images::Error::NotReady { .. }
        | images::Error::NotRunning(_)
        | images::Error::Failed { .. }
        | images::Error::TimedOut { .. }) => Error::Invalid(error.to_string()),
    }
}
