//! The node behind the API: each call, in terms of the engine, the image service, the mount and the loop devices.
//!
//! Owns the order of steps within a call, and what is refused while the node goes down. Everything here may block; the
//! API calls it where that is allowed. Longer work becomes a [job](super::jobs).

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bedplate_engine::{
    device::BlockDevice,
    error::Error as Engine,
    export::{self, qcow2},
    units::ByteLen,
    volume::{life::Origin as VolumeOrigin, record::ImageRef},
};
use bedplate_fuse::{Change, FileId, Kind, Mount};
use jiff::Timestamp;
use tokio::runtime::Handle;

use super::{
    attach::Attachments,
    disks::Disks,
    jobs::{Control, Jobs, Report},
    show,
    view::{Views, reclaim},
    volumes::{Located, Volumes},
};
use crate::{
    api::{
        node::{Node, Origin, Readiness, Result, UploadParts},
        problem::{Code, Refusal},
        types::{
            self, CloneMethod, CloneVolume, Compression, CreateImage, CreateSnapshot, CreateVolume, Existing,
            Export, ExportDigests, Format, Image, Job, JobKind, NodeInfo, ResizeVolume, RevertVolume,
            Snapshot, Volume,
        },
    },
    images::{self, ImageState, Images},
    prep::export::{Digests, Wanted, export_file},
};

/// A node that serves.
pub struct LocalNode {
    pub disks: Disks,
    pub volumes: Arc<Volumes>,
    pub views: Arc<Views>,
    pub images: Images,
    pub jobs: Arc<Jobs>,
    pub attachments: Attachments,
    pub mount_dir: PathBuf,
    pub state_dir: PathBuf,
    /// Taken when the node goes down.
    pub mount: Mutex<Option<Mount>>,
    pub closing: AtomicBool,
    pub started_at: Timestamp,
    pub runtime: Handle,
}

impl LocalNode {
    /// Refuse work that changes something from now on.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // They hold their connections for as long as they like, and cannot go on at the next start.
        self.images.end_uploads();
    }

    pub fn mount(&self) -> MutexGuard<'_, Option<Mount>> {
        self.mount.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuse while the node goes down.
    fn admit(&self) -> Result<()> {
        match self.closing.load(Ordering::Acquire) {
            true => Err(Refusal::new(Code::ShuttingDown, "the node is shutting down")),
            false => Ok(()),
        }
    }

    /// A volume that is open, so that it can be worked with.
    fn find_open(&self, name: &str) -> Result<Located> {
        let located = self.volumes.find(name)?;
        match located.open() {
            Ok(_) => Ok(located),
            Err(Engine::Failed { reason }) => {
                let name = &located.served;
                let detail = format!(
                    "volume {name:?} is not served: {reason}; once that is mended, `bedplate volume recover {name}` \
                     opens it"
                );
                Err(Refusal::new(Code::Faulted, detail))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn show(&self, located: &Located) -> Result<Volume> {
        let info = self.volumes.info(located)?;
        Ok(self.show_info(located, info))
    }

    fn show_info(&self, located: &Located, info: bedplate_engine::volume::device::VolumeInfo) -> Volume {
        let path = self.file(located).display().to_string();
        let device = self.attachments.device(located.uuid).map(|device| device.display().to_string());
        let io_path = self.io_path(FileId::volume(located.uuid));
        show::volume(located.served.clone(), info, &located.disk.path(), Some(path), device, io_path)
    }

    fn show_image(&self, info: images::ImageInfo) -> Image {
        let io_path = info.uuid.and_then(|uuid| self.io_path(FileId::image(uuid)));
        show::image(info, io_path, |disk| self.disks.path_of(disk))
    }

    /// Which way the bytes of a file of the mount go while it is open.
    fn io_path(&self, file: FileId) -> Option<types::IoPath> {
        let mount = self.mount();
        let mount = mount.as_ref()?;
        Some(show::io_path(mount.io_path(file)?, mount.transport()))
    }

    /// The volume's file in the mount.
    fn file(&self, located: &Located) -> PathBuf {
        self.mount_dir.join(Kind::Volume.directory()).join(&located.served)
    }

    /// Tell the kernel, if there is a mount.
    fn tell(&self, change: Change) {
        if let Some(mount) = self.mount().as_ref()
            && !mount.invalidate(change)
        {
            tracing::debug!("the kernel was not told of a change; it asks again by itself");
        }
    }

    fn tell_created(&self, located: &Located) {
        self.tell(Change::Created { kind: Kind::Volume, name: located.served.clone() });
    }

    /// Refuse what nobody may do beneath a user; an attached volume is named by its device. A file of the mount that
    /// was closed a moment ago is waited for.
    fn check_detached(&self, located: &Located) -> Result<()> {
        match self.attachments.device(located.uuid) {
            None => {
                if let Ok(volume) = located.open() {
                    volume.wait_released(images::RELEASE_WITHIN);
                }
                Ok(())
            }
            Some(device) => {
                let (name, device) = (&located.served, device.display());
                let detail = format!(
                    "volume {name:?} is in use: attached as {device} (`bedplate volume detach {name}`)"
                );
                Err(Refusal::new(Code::InUse, detail))
            }
        }
    }

    /// The image that a new volume is to stand on.
    fn ready_image(&self, name: &str) -> Result<(images::ImageInfo, ImageRef)> {
        let info = self.images.get(name)?;
        let not_ready = |state: String| {
            let detail = format!("image {name:?} is {state}; --wait waits for it");
            Refusal::new(Code::NotReady, detail)
        };
        match &info.state {
            ImageState::Ready => {}
            ImageState::Pending => return Err(not_ready("pending".to_owned())),
            ImageState::InProgress => return Err(not_ready("still in progress".to_owned())),
            ImageState::Unknown(reason) => return Err(not_ready(format!("not served: {reason}"))),
            ImageState::Failed(failure) => {
                let detail = format!("image {name:?} failed: {}", failure.message);
                return Err(Refusal::new(Code::NotReady, detail));
            }
        }
        match (info.uuid, info.sha512.clone()) {
            (Some(uuid), Some(sha512)) => {
                let image = ImageRef { name: info.name.clone(), uuid, sha512 };
                Ok((info, image))
            }
            (None, _) | (_, None) => Err(not_ready("without a record".to_owned())),
        }
    }

    /// The disk for a volume: where its image is, or else the one with the most room.
    fn place(&self, image: Option<&images::ImageInfo>) -> Result<Arc<bedplate_engine::volume::disk::Disk>> {
        let disks = self.volumes.disks();
        let chosen = match image {
            Some(image) => {
                let ready =
                    |id| image.copies.iter().any(|copy| copy.disk == id && copy.state == ImageState::Ready);
                disks.iter().find(|disk| ready(disk.id()))
            }
            None => disks.iter().max_by_key(|disk| disk.space().map_or(0, |(free, _)| free)),
        };
        chosen.cloned().ok_or_else(|| {
            Refusal::new(Code::Storage, "no disk is served that could hold it; see `bedplate doctor`")
        })
    }

    /// Refuse to write among the node's own files, whatever links lead there.
    fn check_target(&self, path: &Path) -> Result<()> {
        // One that is not there is refused when the file is made.
        let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
        let lies_in = |dir: &Path| {
            let real = dir.canonicalize();
            path.starts_with(dir)
                || parent.as_ref().zip(real.ok()).is_some_and(|(parent, real)| parent.starts_with(real))
        };
        let mut own = self.disks.paths().chain([self.state_dir.as_path(), &self.mount_dir]);
        match own.find(|dir| lies_in(dir)) {
            None => Ok(()),
            Some(dir) => {
                let dir = dir.display();
                Err(Refusal::new(Code::Invalid, format!("{path:?} lies in the node's own directory {dir}")))
            }
        }
    }

    /// Refuse at once a volume that is not there; other sources the image service looks at.
    fn check_source(&self, source: &str) -> Result<()> {
        let Some(volume) = source.strip_prefix("volume:") else { return Ok(()) };
        let (name, snapshot) = match volume.split_once('@') {
            None => (volume, None),
            Some((name, snapshot)) => (name, Some(snapshot)),
        };
        let volume = self.find_open(name)?.open()?;
        let Some(snapshot) = snapshot else { return Ok(()) };
        match volume.record().snapshot(snapshot).is_some() {
            true => Ok(()),
            false => {
                let detail = format!("snapshot {snapshot:?} of volume {name:?} not found");
                Err(Refusal::new(Code::NotFound, detail))
            }
        }
    }

    fn view(&self, origin: &Origin) -> Result<Arc<dyn BlockDevice>> {
        match origin {
            Origin::Image(name) => Ok(self.images.open_device(name)?),
            Origin::Volume { name, snapshot } => {
                let located = self.find_open(name)?;
                Ok(self.views.open(&located, snapshot.as_deref())?)
            }
        }
    }
}

impl Node for LocalNode {
    fn readiness(&self) -> Readiness {
        if self.closing.load(Ordering::Acquire) {
            return Readiness::NotReady("the node is shutting down".to_owned());
        }
        match self.mount().as_ref().map(Mount::ended) {
            Some(None) => Readiness::Ready,
            Some(Some(ended)) => {
                let dir = self.mount_dir.display();
                Readiness::NotReady(format!("the mount on {dir} is gone ({ended:?}); restart the node"))
            }
            None => Readiness::NotReady("nothing is mounted".to_owned()),
        }
    }

    fn info(&self) -> NodeInfo {
        let mount = self.mount();
        let transport = mount.as_ref().filter(|mount| mount.ended().is_none()).map(Mount::transport);
        drop(mount);
        NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: self.started_at,
            mount: transport.map(|_| self.mount_dir.display().to_string()),
            transport: transport.map(show::transport),
            disks: self.disks.show(),
            stale_devices: self
                .attachments
                .stale()
                .iter()
                .map(|device| device.display().to_string())
                .collect(),
        }
    }

    fn images(&self) -> Vec<Image> {
        self.images.list().into_iter().map(|info| self.show_image(info)).collect()
    }

    fn image(&self, name: &str) -> Result<Image> {
        Ok(self.show_image(self.images.get(name)?))
    }

    fn create_image(&self, request: CreateImage) -> Result<Image> {
        self.admit()?;
        self.check_source(&request.source)?;
        let info = self.images.create(&images::CreateImage {
            name: request.name,
            from: request.source,
            checksum: request.checksum,
            disk: None,
            deadline: request.deadline_s.map(Duration::from_secs),
            internal_snapshot: request.internal_snapshot,
            parts: images::Parts { backing: request.backing, allow_references: request.allow_references },
        })?;
        Ok(self.show_image(info))
    }

    fn upload_image(&self, name: &str) -> Result<UploadParts> {
        self.admit()?;
        Ok(self.images.upload(name)?)
    }

    fn delete_image(&self, name: &str) -> Result<()> {
        self.admit()?;
        let info = self.images.get(name)?;
        self.runtime.block_on(self.images.delete(name))?;
        if let Some(uuid) = info.uuid {
            self.tell(Change::Deleted { file: FileId::image(uuid), name: info.name });
        }
        Ok(())
    }

    fn cancel_image(&self, name: &str) -> Result<Image> {
        self.admit()?;
        Ok(self.show_image(self.runtime.block_on(self.images.cancel(name))?))
    }

    fn verify_image(&self, name: &str) -> Result<Image> {
        self.admit()?;
        Ok(self.show_image(self.images.verify(name)?))
    }

    fn volumes(&self) -> Vec<Volume> {
        self.volumes.infos().into_iter().map(|(located, info)| self.show_info(&located, info)).collect()
    }

    fn volume(&self, name: &str) -> Result<Volume> {
        self.show(&self.volumes.find(name)?)
    }

    fn create_volume(&self, request: CreateVolume) -> Result<Volume> {
        self.admit()?;
        let name = &request.name;
        let _name = self.volumes.reserve(name)?;
        let size = request.size_bytes.map(ByteLen);
        let (disk, info) = match &request.image {
            None => {
                let disk = self.place(None)?;
                let info = disk.create_volume(name, VolumeOrigin::Empty, size)?;
                (disk, info)
            }
            Some(image) => {
                // Between the look at it and the record that names it, nobody deletes it.
                let _image = self.images.hold(image, &format!("the creation of volume {name}"))?;
                let (image, reference) = self.ready_image(image)?;
                let disk = self.place(Some(&image))?;
                let info = disk.create_volume(name, VolumeOrigin::Image(reference), size)?;
                (disk, info)
            }
        };
        let located = self.volumes.add(&disk, &info);
        self.tell_created(&located);
        Ok(self.show_info(&located, info))
    }

    fn delete_volume(&self, name: &str) -> Result<()> {
        self.admit()?;
        let located = self.volumes.find(name)?;
        self.check_detached(&located)?;
        located.disk.delete_volume(&located.name)?;
        self.volumes.remove(&located);
        self.tell(Change::Deleted { file: FileId::volume(located.uuid), name: located.served });
        self.views.tidy(&located.disk);
        Ok(())
    }

    fn resize_volume(&self, name: &str, request: ResizeVolume) -> Result<Volume> {
        self.admit()?;
        let located = self.find_open(name)?;
        let info = located.disk.resize(&located.name, ByteLen(request.size_bytes))?;
        self.tell(Change::Content { file: FileId::volume(located.uuid) });
        if self.attachments.device(located.uuid).is_some() {
            self.attachments.follow_size(located.uuid, &self.file(&located))?;
        }
        Ok(self.show_info(&located, info))
    }

    fn clone_volume(&self, name: &str, request: CloneVolume) -> Result<Job> {
        self.admit()?;
        let located = self.find_open(name)?;
        let CloneVolume { name: new, snapshot, method } = request;
        // Refused at once where it can be; the job reserves the name for itself.
        drop(self.volumes.reserve(&new)?);
        let (volumes, views) = (self.volumes.clone(), self.views.clone());
        self.jobs.start(JobKind::VolumeClone, new.clone(), move |control| {
            let _name = volumes.reserve(&new)?;
            let Located { disk, name, .. } = &located;
            // The image needs no hold: its engine makes a linked clone and deletes its origin one after the other, so
            // that one of them stands on the image at any moment; a full clone has it open, and then needs it no more.
            let info = match method {
                CloneMethod::Linked => disk.clone_volume(name, snapshot.as_deref(), &new)?,
                CloneMethod::Full => disk
                    .full_clone(name, snapshot.as_deref(), &new, |done, total| control.go_on(done, total))?,
            };
            volumes.add(disk, &info);
            views.tidy(disk);
            Ok(Report::Nothing)
        })
    }

    fn flatten_volume(&self, name: &str) -> Result<Job> {
        self.admit()?;
        let located = self.find_open(name)?;
        self.jobs.start(JobKind::VolumeFlatten, located.served.clone(), move |control| {
            located.disk.flatten(&located.name, |done, total| control.go_on(done, total))?;
            Ok(Report::Nothing)
        })
    }

    fn recover_volume(&self, name: &str) -> Result<Job> {
        self.admit()?;
        let located = self.volumes.find(name)?;
        self.check_detached(&located)?;
        self.jobs.start(JobKind::VolumeRecover, located.served.clone(), move |_| {
            Ok(Report::Recovered(show::recovered(located.disk.recover(&located.name)?)))
        })
    }

    fn attach_volume(&self, name: &str) -> Result<Volume> {
        self.admit()?;
        let located = self.find_open(name)?;
        if let Readiness::NotReady(why) = self.readiness() {
            return Err(Refusal::new(Code::NotReady, format!("volume {name:?} has no file: {why}")));
        }
        let identity = self.mount().as_ref().and_then(|mount| mount.identity(FileId::volume(located.uuid)));
        let identity = identity.ok_or_else(|| {
            Refusal::new(Code::Busy, format!("volume {name:?} has no file: too many files have been served"))
        })?;
        self.attachments.attach(located.uuid, &self.file(&located), identity)?;
        self.show(&located)
    }

    fn detach_volume(&self, name: &str) -> Result<Volume> {
        let located = self.volumes.find(name)?;
        self.attachments.detach(located.uuid, &located.served)?;
        self.show(&located)
    }

    fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>> {
        Ok(self.volume(volume)?.snapshots)
    }

    fn create_snapshot(&self, volume: &str, request: CreateSnapshot) -> Result<Snapshot> {
        self.admit()?;
        let located = self.find_open(volume)?;
        let info = located.disk.create_snapshot(&located.name, &request.name)?;
        let made = info.snapshots.into_iter().find(|snapshot| snapshot.name == request.name);
        made.map(show::snapshot).ok_or_else(|| {
            Refusal::new(
                Code::NotFound,
                format!("snapshot {:?} was deleted as soon as it was made", request.name),
            )
        })
    }

    fn delete_snapshot(&self, volume: &str, name: &str) -> Result<Job> {
        self.admit()?;
        let located = self.find_open(volume)?;
        let object = format!("{}@{name}", located.served);
        let place = self.jobs.take(JobKind::SnapshotDelete, object)?;
        located.disk.delete_snapshot(&located.name, name)?;
        Ok(place.run(move |control| reclaim(&located.disk, control)))
    }

    fn revert_volume(&self, volume: &str, snapshot: &str, request: RevertVolume) -> Result<Volume> {
        self.admit()?;
        let located = self.find_open(volume)?;
        self.check_detached(&located)?;
        let info = located.disk.revert(&located.name, snapshot, request.snapshot_first.as_deref())?;
        self.tell(Change::Content { file: FileId::volume(located.uuid) });
        self.views.tidy(&located.disk);
        Ok(self.show_info(&located, info))
    }

    fn export(&self, origin: Origin, request: Export) -> Result<Job> {
        self.admit()?;
        let format = export_format(&request)?;
        let path = PathBuf::from(&request.path);
        if !path.is_absolute() {
            return Err(Refusal::new(Code::Invalid, format!("{path:?} is not an absolute path")));
        }
        self.check_target(&path)?;
        let existing = match request.existing {
            Existing::Refuse => export::Existing::Refuse,
            Existing::Replace => export::Existing::Replace,
        };
        let (kind, object) = match &origin {
            Origin::Image(name) => (JobKind::ImageExport, name.clone()),
            Origin::Volume { name, snapshot } => {
                let at = snapshot.as_ref().map(|snapshot| format!("@{snapshot}")).unwrap_or_default();
                (JobKind::VolumeExport, format!("{name}{at}"))
            }
        };
        // Before the view, which costs a layer.
        if existing == export::Existing::Refuse && path.symlink_metadata().is_ok() {
            return Err(Engine::Exists { kind: "file", name: request.path.clone() }.into());
        }
        let device = self.view(&origin)?;
        self.jobs.start(kind, object, move |control| {
            let wanted = Wanted { file: request.digest_file, guest: request.digest_guest };
            let Control { meter, stop } = control;
            let digests = export_file(device.as_ref(), &path, existing, format, wanted, meter, stop)?;
            let Digests { file, guest } = digests;
            Ok(Report::Exported(ExportDigests { file_sha512: file, guest_sha512: guest }))
        })
    }

    fn content(&self, origin: Origin) -> Result<Arc<dyn BlockDevice>> {
        self.admit()?;
        self.view(&origin)
    }

    fn jobs(&self) -> Vec<Job> {
        self.jobs.list()
    }

    fn job(&self, id: u64) -> Result<Job> {
        self.jobs.get(id)
    }

    fn cancel_job(&self, id: u64) -> Result<()> {
        self.jobs.cancel(id)
    }

    fn wait_job(&self, id: u64, patience: Duration) -> Result<types::Job> {
        self.jobs.wait(id, patience)
    }
}

/// What the file of an export is to be.
fn export_format(request: &Export) -> Result<export::Format> {
    match request.format {
        Format::Raw if request.compress.is_some() || request.cluster_size_bytes.is_some() => {
            let detail = "a raw file has no clusters and no compression; use the format qcow2";
            Err(Refusal::new(Code::Invalid, detail))
        }
        Format::Raw => Ok(export::Format::Raw),
        Format::Qcow2 => {
            let cluster = request.cluster_size_bytes.map(qcow2::ClusterSize::new).transpose()?;
            let compression = request.compress.map(|compression| match compression {
                Compression::Zlib => qcow2::Compression::Zlib,
                Compression::Zstd => qcow2::Compression::Zstd,
            });
            let cluster = cluster.unwrap_or_default();
            Ok(export::Format::Qcow2(qcow2::Options { cluster, compression }))
        }
    }
}
