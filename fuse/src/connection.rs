//! A FUSE connection from the outside: how it is mounted, to whom it belongs, how it is cut, and how a dead one at our
//! mount point is cleared away.
//!
//! Owns the mount's source name `bedplate-PID-STARTED`, which says who serves it; with the start time, because process
//! numbers are used again. A SIGKILLed node leaves a mount whose every `stat` fails or, while the process is still
//! dying, hangs. It is therefore recognised in `mountinfo` alone, its connection is aborted through `fusectl` (which is
//! mounted for us and nobody else, so that it need not be mounted at all), and it is detached.
//! Across PID namespaces a process number says nothing; there it is the node's own locks, taken before it mounts, that
//! keep two living nodes apart.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
    process,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{getgid, getuid},
};
use rustix::{
    fs::{Mode as FileMode, OFlags, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use crate::{
    error::{MountError, Result},
    mountinfo::{self, DeviceNumber, MountEntry},
    options::Sharing,
};

pub(crate) const DEVICE: &str = "/dev/fuse";
const FILE_SYSTEM: &str = "fuse.bedplate";
const SOURCE_PREFIX: &str = "bedplate";

/// Most dead mounts, one on top of another, that are cleared away at a start.
const STALE_MOUNTS_MAX: usize = 16;

/// How far the kernel reads ahead in a cached image: four requests of the longest kind. Its default for FUSE is
/// 128 KiB, whatever INIT answers.
const READ_AHEAD_KIB: u32 = 4096;

/// A process, told apart from others with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ProcessId {
    pid: u32,
    /// Clock ticks since boot, as in proc_pid_stat(5).
    started: u64,
}

/// Mount a connection of this process on `dir`, and return whose number it has.
pub(crate) fn attach(dir: &Path, device: BorrowedFd<'_>, sharing: Sharing) -> Result<MountEntry> {
    let allow = match sharing {
        Sharing::Owner => "",
        Sharing::Others => ",allow_other",
    };
    // `default_permissions`: the kernel checks the permission bits, so that we need not.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{allow}",
        device.as_raw_fd(),
        getuid(),
        getgid()
    );
    let source = source_name(this_process().map_err(|e| MountError::io("read", "/proc/self/stat", e))?);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some(source.as_str()), dir, Some(FILE_SYSTEM), flags, Some(data.as_str()))
        .map_err(|e| MountError::io("mount", dir, e))?;
    match look(dir)? {
        Some(entry) if entry.source == source => Ok(entry),
        other => {
            detach(dir).map_err(|e| MountError::io("unmount", dir, e))?;
            Err(match other {
                Some(entry) => foreign(dir, entry),
                None => MountError::io("find the mount on", dir, io::ErrorKind::NotFound),
            })
        }
    }
}

/// Make way for a mount on `dir`: clear dead mounts of ours away, refuse what lives and what is not ours. Does not touch
/// `dir` itself.
pub(crate) fn clear_stale(dir: &Path) -> Result<()> {
    for _ in 0..STALE_MOUNTS_MAX {
        let Some(entry) = look(dir)? else { return Ok(()) };
        let Some(server) = server_of(&entry) else { return Err(foreign(dir, entry)) };
        if is_alive(server) {
            return Err(MountError::Held { dir: dir.into(), pid: server.pid });
        }
        tracing::warn!(dir = %dir.display(), pid = server.pid, "clearing away the mount of a dead process");
        if let Err(error) = abort(entry.device) {
            // The kernel aborts it itself once the dead process has let go of its descriptors.
            tracing::warn!(connection = entry.device.minor, %error, "the old connection was not aborted");
        }
        detach(dir).map_err(|e| MountError::io("detach the dead mount on", dir, e))?;
    }
    Err(MountError::TooManyStale { dir: dir.into(), max: STALE_MOUNTS_MAX })
}

/// Unmount, unless it is in use (EBUSY).
pub(crate) fn unmount(dir: &Path) -> nix::Result<()> {
    umount2(dir, MntFlags::UMOUNT_NOFOLLOW)
}

/// Take the mount out of the name space now; it ends when its last user does.
pub(crate) fn detach(dir: &Path) -> nix::Result<()> {
    match umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Somebody else was faster.
        Err(Errno::EINVAL) => Ok(()),
        result => result,
    }
}

/// End a connection: every request on it, waiting or in work, fails now.
pub(crate) fn abort(device: DeviceNumber) -> io::Result<()> {
    let control = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&control)?;
    let control = fsmount(&control, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let path = format!("{}/abort", device.minor);
    match openat(&control, path, OFlags::WRONLY | OFlags::CLOEXEC, FileMode::empty()) {
        Ok(abort) => File::from(abort).write_all(b"1"),
        // It is gone already.
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Let the kernel read further ahead in cached files than it does by default. A machine that does not allow it only
/// reads images with smaller requests.
pub(crate) fn raise_read_ahead(device: DeviceNumber) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.major, device.minor);
    if let Err(error) = fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!(path, %error, "the kernel's read-ahead stays at its default");
    }
}

/// What is mounted on `dir`.
pub(crate) fn look(dir: &Path) -> Result<Option<MountEntry>> {
    mountinfo::topmost(dir).map_err(|e| MountError::io("read", mountinfo::MOUNTINFO, e))
}

/// Whether a connection is mounted anywhere.
pub(crate) fn is_mounted(device: DeviceNumber) -> bool {
    mountinfo::read().is_ok_and(|mounts| mounts.iter().any(|entry| entry.device == device))
}

fn foreign(dir: &Path, entry: MountEntry) -> MountError {
    MountError::Foreign { dir: dir.into(), file_system: entry.file_system, source_name: entry.source }
}

fn source_name(server: ProcessId) -> String {
    format!("{SOURCE_PREFIX}-{}-{}", server.pid, server.started)
}

/// The process that serves a mount of ours; `None` if it is not ours.
fn server_of(entry: &MountEntry) -> Option<ProcessId> {
    let rest = entry.source.strip_prefix(SOURCE_PREFIX)?.strip_prefix('-')?;
    let (pid, started) = rest.split_once('-')?;
    let server = ProcessId { pid: pid.parse().ok()?, started: started.parse().ok()? };
    (entry.file_system == FILE_SYSTEM).then_some(server)
}

fn this_process() -> io::Result<ProcessId> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    match parse_stat(&stat) {
        Some((_, started)) => Ok(ProcessId { pid: process::id(), started }),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether it still runs. A zombie has let go of its files, or is about to.
fn is_alive(server: ProcessId) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid)).unwrap_or_default();
    parse_stat(&stat).is_some_and(|(state, started)| started == server.started && !matches!(state, 'Z' | 'X'))
}

/// State and start time: fields 3 and 22, counted after the name, which may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn entry(file_system: &str, source: &str) -> MountEntry {
        MountEntry {
            device: DeviceNumber { major: 0, minor: 45 },
            mount_point: PathBuf::from("/m"),
            file_system: file_system.into(),
            source: source.into(),
        }
    }

    #[test]
    fn our_own_source_name_is_recognised_and_alive() {
        let this = this_process().unwrap();
        assert_eq!(server_of(&entry(FILE_SYSTEM, &source_name(this))), Some(this));
        assert!(is_alive(this));
    }

    #[test]
    fn a_process_with_the_same_number_that_started_later_is_another() {
        let this = this_process().unwrap();
        assert!(!is_alive(ProcessId { started: this.started + 1, ..this }));
    }

    #[test]
    fn mounts_of_others_are_not_taken_for_ours() {
        for source in ["bedplate", "bedplate-1", "bedplate-1-x", "bedplate-1-2-3", "sshfs-1-2"] {
            assert_eq!(server_of(&entry(FILE_SYSTEM, source)), None, "{source}");
        }
        assert_eq!(server_of(&entry("fuse.sshfs", "bedplate-1-2")), None);
    }

    #[test]
    fn the_start_time_is_found_behind_any_process_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4 9 0 0 0 0 0 0 0 20 0 1 0 4242 1 2 3";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (a"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_connection_that_is_gone_counts_as_aborted() {
        assert!(abort(DeviceNumber { major: 0, minor: u32::MAX }).is_ok());
    }
}
