//! Attached volumes: which loop device belongs to which volume, also after a node was killed.
//!
//! Owns that table and its record in the state directory. A device is a volume's when its file is the very file of this
//! mount: the file system's numbers and the inode agree; a path proves nothing, since mounts come and go. Nothing here
//! looks at a file of the mount, which this very process serves: who serves it knows its numbers, and `losetup` looks
//! in a process of its own. A device that an earlier node of this state directory recorded is dead with that node's
//! mount: it is detached at the start, or, if somebody still has it mounted, listed as stale.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bedplate_fuse::FileIdentity;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    losetup::{self, LoopDevice, Losetup, is_bound, sysfs},
    state::StateDir,
};
use crate::api::problem::{Code, Refusal};

const RECORD: &str = "attached.json";
/// How long a request waits for another one of the same volume: that makes a few calls of `losetup`.
const TURN_MAX: Duration = Duration::from_secs(60);
/// How long a device that was detached may stay open elsewhere before that is an error, and how often that is looked at.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
const CLOSE_POLL: Duration = Duration::from_millis(10);

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

/// What there is of a volume.
#[derive(Debug)]
enum Entry {
    Attached(Attachment),
    /// Somebody attaches or detaches it at this moment; what it had before, until that is done.
    Changing(Option<Attachment>),
}

impl Entry {
    fn attachment(&self) -> Option<&Attachment> {
        match self {
            Entry::Attached(attachment) | Entry::Changing(Some(attachment)) => Some(attachment),
            Entry::Changing(None) => None,
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    /// By the volume's uuid.
    entries: BTreeMap<Uuid, Entry>,
    stale: Vec<PathBuf>,
}

/// The loop devices of a node.
#[derive(Debug)]
pub struct Attachments {
    losetup: Losetup,
    state: StateDir,
    /// Never held over a call of `losetup` or a look at a file: whoever lists volumes waits for it.
    table: Mutex<Table>,
    /// An entry is not [`Entry::Changing`] any more.
    changed: Condvar,
    /// One record is written at a time, so that the newest stays.
    recording: Mutex<()>,
}

/// The right to change the device of one volume. Dropped, the volume has what `attachment` says.
struct Turn<'a> {
    attachments: &'a Attachments,
    volume: Uuid,
    attachment: Option<Attachment>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut table = self.attachments.lock();
        match self.attachment.take() {
            Some(attachment) => drop(table.entries.insert(self.volume, Entry::Attached(attachment))),
            None => drop(table.entries.remove(&self.volume)),
        }
        drop(table);
        self.attachments.changed.notify_all();
    }
}

impl Attachments {
    /// Look after what an earlier node left, as far as `go_on` allows. `mount` is served already, as `file_system`.
    pub fn open(
        losetup: Losetup,
        state: StateDir,
        mount: &Path,
        file_system: &str,
        go_on: impl Fn() -> bool,
    ) -> Attachments {
        let mut earlier: BTreeMap<Uuid, Attachment> = state.load(RECORD);
        let stale = clear_dead(&losetup, &mut earlier, (mount, file_system), go_on);
        let table = Mutex::new(Table { entries: BTreeMap::new(), stale });
        let (changed, recording) = (Condvar::new(), Mutex::new(()));
        // Those that were not looked at are for the next start.
        record(&state, &earlier);
        Attachments { losetup, state, table, changed, recording }
    }

    /// The device of a volume. Somebody may have taken it away behind our back, which its file in sysfs tells.
    pub fn device(&self, volume: Uuid) -> Option<PathBuf> {
        let device = self.lock().entries.get(&volume)?.attachment()?.device.clone();
        is_bound(&device).then_some(device)
    }

    /// Devices of an earlier node that are still in use.
    pub fn stale(&self) -> Vec<PathBuf> {
        self.lock().stale.iter().filter(|device| is_bound(device)).cloned().collect()
    }

    /// Give the volume with this file a device, or say which it has. Whoever asks while another does waits for it.
    pub fn attach(&self, volume: Uuid, file: &Path, identity: FileIdentity) -> Result<PathBuf, Refusal> {
        let mut turn = self.turn(volume)?;
        if let Some(known) = &turn.attachment
            && self.losetup.look(&known.device)?.is_some_and(|found| known.is(&found))
        {
            return Ok(known.device.clone());
        }
        let FileIdentity { file_system, inode } = identity;
        let mut attachment = Attachment { device: PathBuf::new(), file_system, inode };
        let mut existing = None;
        for (device, _) in losetup::bound().into_iter().filter(|(_, path)| path == file) {
            existing = existing.or(self.losetup.look(&device)?.filter(|found| attachment.has_file_of(found)));
        }
        attachment.device = match existing {
            Some(found) => found.device,
            None => self.losetup.attach(file)?,
        };
        let device = attachment.device.clone();
        turn.attachment = Some(attachment);
        drop(turn);
        self.store();
        Ok(device)
    }

    /// Take the volume's device away, unless it is in use. Without one there is nothing to do.
    pub fn detach(&self, volume: Uuid, name: &str) -> Result<(), Refusal> {
        let mut turn = self.turn(volume)?;
        let Some(attachment) = &turn.attachment else { return Ok(()) };
        if self.losetup.look(&attachment.device)?.is_some_and(|found| attachment.is(&found)) {
            let device = &attachment.device;
            let users = users(device);
            if !users.is_empty() {
                let detail =
                    format!("volume {name:?} is in use: {} is {}", device.display(), users.join(" and "));
                return Err(Refusal::new(Code::InUse, detail));
            }
            self.losetup.detach(device)?;
            // Programs that look at every block device have it open for a moment; nobody tells when they close it.
            let deadline = Instant::now() + CLOSE_WITHIN;
            while is_bound(device) && Instant::now() < deadline {
                std::thread::sleep(CLOSE_POLL);
            }
            if is_bound(device) {
                let detail = format!(
                    "volume {name:?} is in use: a process has {} open; it is detached when that ends",
                    device.display()
                );
                return Err(Refusal::new(Code::InUse, detail));
            }
        }
        turn.attachment = None;
        drop(turn);
        self.store();
        Ok(())
    }

    /// The volume's size has changed, that of its `file` with it.
    pub fn follow_size(&self, volume: Uuid, file: &Path) -> Result<(), Refusal> {
        match self.device(volume) {
            Some(device) => self.losetup.follow_size(&device, file),
            None => Ok(()),
        }
    }

    /// Detach everything that nobody uses; those that are in use come back.
    pub fn shut_down(&self) -> Vec<PathBuf> {
        let attached: Vec<(Uuid, PathBuf)> = {
            let table = self.lock();
            let attached = table.entries.iter();
            attached.filter_map(|(uuid, entry)| Some((*uuid, entry.attachment()?.device.clone()))).collect()
        };
        let mut left = Vec::new();
        for (volume, device) in attached {
            // In use, the kernel detaches it when its last user goes.
            if is_bound(&device) && (self.losetup.detach(&device).is_err() || is_bound(&device)) {
                left.push(device);
            } else {
                self.lock().entries.remove(&volume);
            }
        }
        self.store();
        left
    }

    /// Wait until nobody else changes this volume's device.
    fn turn(&self, volume: Uuid) -> Result<Turn<'_>, Refusal> {
        let table = self.lock();
        let is_changing = |table: &mut Table| matches!(table.entries.get(&volume), Some(Entry::Changing(_)));
        let waited = self.changed.wait_timeout_while(table, TURN_MAX, is_changing);
        let (mut table, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let detail = format!("another request has been at this device for {} s", TURN_MAX.as_secs());
            return Err(Refusal::new(Code::Busy, detail));
        }
        let attachment = table.entries.get(&volume).and_then(|entry| entry.attachment().cloned());
        table.entries.insert(volume, Entry::Changing(attachment.clone()));
        Ok(Turn { attachments: self, volume, attachment })
    }

    fn store(&self) {
        let _recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let attached: BTreeMap<Uuid, Attachment> = {
            let table = self.lock();
            let attached = table.entries.iter();
            attached.filter_map(|(uuid, entry)| Some((*uuid, entry.attachment()?.clone()))).collect()
        };
        record(&self.state, &attached);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record(state: &StateDir, attached: &BTreeMap<Uuid, Attachment>) {
    if let Err(error) = state.store(RECORD, attached) {
        // It costs the next start the knowledge of whose the device was.
        tracing::warn!(%error, "the attached volumes are not recorded");
    }
}

/// Detach the devices of an earlier node's mount, and say which are still in use. What was looked at leaves `earlier`.
fn clear_dead(
    losetup: &Losetup,
    earlier: &mut BTreeMap<Uuid, Attachment>,
    (mount, file_system): (&Path, &str),
    go_on: impl Fn() -> bool,
) -> Vec<PathBuf> {
    let look = |device: &Path| {
        losetup.look(device).unwrap_or_else(|refusal| {
            tracing::warn!(device = %device.display(), %refusal, "a device of an earlier node is not looked at");
            None
        })
    };
    let mut stale = Vec::new();
    while go_on() {
        let Some((_, attachment)) = earlier.pop_first() else { break };
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
    for (device, _) in losetup::bound().into_iter().filter(|(_, file)| file.starts_with(mount)) {
        let is_other = |found: LoopDevice| found.file_system.as_deref() != Some(file_system);
        if go_on() && !stale.contains(&device) && look(&device).is_some_and(is_other) {
            stale.push(device);
        }
    }
    for device in &stale {
        tracing::warn!(device = %device.display(), "a device of a node that is gone is still in use");
    }
    stale
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
