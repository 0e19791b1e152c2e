//! Attached volumes: which loop device belongs to which volume, also after a node was killed.
//!
//! Owns that table and its record in the state directory. A device is a volume's when its file is the very file of this
//! mount: the file system's numbers and the inode agree; a path proves nothing, since mounts come and go. A device that
//! an earlier node of this state directory recorded is dead with that node's mount: it is detached at the start, or, if
//! somebody still has it mounted, listed as stale.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    losetup::{self, LoopDevice, Losetup, is_bound, sysfs},
    state::StateDir,
};
use crate::api::problem::{Code, Refusal};

const RECORD: &str = "attached.json";

/// A device and the file behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attachment {
    device: PathBuf,
    /// `major:minor` of the mount, which no other file system has while the device holds the file.
    file_system: String,
    inode: u64,
}

impl Attachment {
    fn is(&self, found: &LoopDevice) -> bool {
        found.device == self.device && self.has_file_of(found)
    }

    fn has_file_of(&self, found: &LoopDevice) -> bool {
        found.inode == Some(self.inode) && found.file_system.as_ref() == Some(&self.file_system)
    }
}

#[derive(Debug, Default)]
struct Table {
    /// By the volume's uuid.
    attached: BTreeMap<Uuid, Attachment>,
    stale: Vec<PathBuf>,
}

/// The loop devices of a node.
#[derive(Debug)]
pub struct Attachments {
    losetup: Losetup,
    state: StateDir,
    /// Held through a call of `losetup`, so that two requests for one volume end with one device.
    table: Mutex<Table>,
}

impl Attachments {
    /// Look after what an earlier node left. `mount` is served already.
    pub fn open(losetup: Losetup, state: StateDir, mount: &Path) -> Attachments {
        let earlier: BTreeMap<Uuid, Attachment> = state.load(RECORD);
        let stale = clear_dead(&losetup, earlier.values(), mount);
        let table = Mutex::new(Table { attached: BTreeMap::new(), stale });
        let attachments = Attachments { losetup, state, table };
        attachments.store(&attachments.lock().attached);
        attachments
    }

    /// The device of a volume. Somebody may have taken it away behind our back, which its file in sysfs tells.
    pub fn device(&self, volume: Uuid) -> Option<PathBuf> {
        let device = self.lock().attached.get(&volume)?.device.clone();
        is_bound(&device).then_some(device)
    }

    /// Devices of an earlier node that are still in use.
    pub fn stale(&self) -> Vec<PathBuf> {
        self.lock().stale.iter().filter(|device| is_bound(device)).cloned().collect()
    }

    /// Give the volume with this file a device, or say which it has.
    pub fn attach(&self, volume: Uuid, file: &Path) -> Result<PathBuf, Refusal> {
        let mut table = self.lock();
        if let Some(known) = table.attached.get(&volume)
            && self.losetup.look(&known.device)?.is_some_and(|found| known.is(&found))
        {
            return Ok(known.device.clone());
        }
        let (file_system, inode) = identity(file)?;
        let of_file = |device| Attachment { device, file_system: file_system.clone(), inode };
        let known = of_file(PathBuf::new());
        let mut existing = None;
        for (device, _) in losetup::bound().into_iter().filter(|(_, path)| path == file) {
            existing = existing.or(self.losetup.look(&device)?.filter(|found| known.has_file_of(found)));
        }
        let device = match existing {
            Some(found) => found.device,
            None => self.losetup.attach(file)?,
        };
        table.attached.insert(volume, of_file(device.clone()));
        self.store(&table.attached);
        Ok(device)
    }

    /// Take the volume's device away, unless it is in use. Without one there is nothing to do.
    pub fn detach(&self, volume: Uuid, name: &str) -> Result<(), Refusal> {
        let mut table = self.lock();
        let Some(attachment) = table.attached.get(&volume).cloned() else { return Ok(()) };
        if self.losetup.look(&attachment.device)?.is_some_and(|found| attachment.is(&found)) {
            let device = &attachment.device;
            let users = users(device);
            if !users.is_empty() {
                let detail =
                    format!("volume {name:?} is in use: {} is {}", device.display(), users.join(" and "));
                return Err(Refusal::new(Code::InUse, detail));
            }
            self.losetup.detach(device)?;
            if is_bound(device) {
                let detail = format!(
                    "volume {name:?} is in use: a process has {} open; it is detached when that ends",
                    device.display()
                );
                return Err(Refusal::new(Code::InUse, detail));
            }
        }
        table.attached.remove(&volume);
        self.store(&table.attached);
        Ok(())
    }

    /// The volume's size has changed, and the kernel knows that of its file.
    pub fn follow_size(&self, volume: Uuid) -> Result<(), Refusal> {
        match self.device(volume) {
            Some(device) => self.losetup.follow_size(&device),
            None => Ok(()),
        }
    }

    /// Detach everything that nobody uses; those that are in use come back.
    pub fn shut_down(&self) -> Vec<PathBuf> {
        let mut table = self.lock();
        let mut left = Vec::new();
        let attached = std::mem::take(&mut table.attached);
        for (volume, attachment) in attached {
            if !is_bound(&attachment.device) {
                continue;
            }
            // In use, the kernel detaches it when its last user goes.
            let detached = self.losetup.detach(&attachment.device);
            if detached.is_err() || is_bound(&attachment.device) {
                left.push(attachment.device.clone());
                table.attached.insert(volume, attachment);
            }
        }
        self.store(&table.attached);
        left
    }

    fn store(&self, attached: &BTreeMap<Uuid, Attachment>) {
        if let Err(error) = self.state.store(RECORD, attached) {
            // It costs the next start the knowledge of whose the device was.
            tracing::warn!(%error, "the attached volumes are not recorded");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Detach the devices of an earlier node's mount, and say which are still in use.
fn clear_dead<'a>(
    losetup: &Losetup,
    earlier: impl Iterator<Item = &'a Attachment>,
    mount: &Path,
) -> Vec<PathBuf> {
    let look = |device: &Path| {
        losetup.look(device).unwrap_or_else(|refusal| {
            tracing::warn!(device = %device.display(), %refusal, "a device of an earlier node is not looked at");
            None
        })
    };
    let mut stale = Vec::new();
    for attachment in earlier {
        let device = &attachment.device;
        if !look(device).is_some_and(|found| attachment.is(&found)) {
            continue;
        }
        tracing::info!(device = %device.display(), "detaching a device of a node that is gone");
        if let Err(refusal) = losetup.detach(device) {
            tracing::warn!(device = %device.display(), %refusal, "not detached");
        }
        if is_bound(device) {
            stale.push(device.clone());
        }
    }
    // Others that somebody made over files of an earlier mount are not ours to take away.
    let current = identity(mount).ok().map(|(file_system, _)| file_system);
    for (device, _) in losetup::bound().into_iter().filter(|(_, file)| file.starts_with(mount)) {
        if !stale.contains(&device) && look(&device).is_some_and(|found| found.file_system != current) {
            stale.push(device);
        }
    }
    for device in &stale {
        tracing::warn!(device = %device.display(), "a device of a node that is gone is still in use");
    }
    stale
}

/// What no other file has at the same time.
fn identity(file: &Path) -> Result<(String, u64), Refusal> {
    let found = fs::metadata(file)
        .map_err(|error| Refusal::new(Code::Storage, format!("{}: {error}", file.display())))?;
    let device = found.dev();
    Ok((format!("{}:{}", major(device), minor(device)), found.ino()))
}

/// Where the device or a partition of it is mounted, and what stands on it.
fn users(device: &Path) -> Vec<String> {
    let directory = sysfs(device);
    let mut numbers: Vec<String> = fs::read_to_string(directory.join("dev")).into_iter().collect();
    let mut holders = Vec::new();
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&name) {
            numbers.extend(fs::read_to_string(entry.path().join("dev")));
            holders.extend(fs::read_dir(entry.path().join("holders")).into_iter().flatten().flatten());
        }
    }
    holders.extend(fs::read_dir(directory.join("holders")).into_iter().flatten().flatten());
    let numbers: Vec<&str> = numbers.iter().map(|text| text.trim()).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let is_ours = fields.next().is_some_and(|number| numbers.contains(&number));
        is_ours.then(|| format!("mounted on {}", fields.nth(1).unwrap_or("?")))
    });
    let held = holders.iter().map(|holder| format!("held by {}", holder.file_name().to_string_lossy()));
    mounted.chain(held).collect()
}
