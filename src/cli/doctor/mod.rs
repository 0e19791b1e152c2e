//! `bedplate doctor`: what of this machine and its settings stands in a node's way, and what to do about it.
//!
//! Owns the checks. They look and try, they repair nothing; the one thing that is written is a nameless file of 4 KiB
//! in a disk's directory, to see whether direct I/O works there. A warning costs speed or convenience, a failure keeps
//! a node from working.

mod memory;

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bedplate_fuse::{NoRings, Sharing};
use clap::Args;
use nix::{
    libc,
    sys::{
        resource::{Resource, getrlimit},
        statfs::statfs,
        utsname::uname,
    },
};
use serde::Serialize;

use super::{
    exit::Failure,
    output::{self, OutputArgs},
    size,
};
use crate::{
    api::{
        client::{Client, Error},
        types::DiskState,
    },
    config::{Config, Settings},
};

/// Say what of this machine and its settings stands in a node's way, and what to do about it
#[derive(Args, Debug)]
#[command(
    after_long_help = "Takes the settings that `bedplate serve` takes, and checks the machine for them. Exits \
with 1 when a check fails; a warning is no failure.

Examples:
  bedplate doctor
  bedplate doctor --disk /srv/bedplate -o json"
)]
pub struct DoctorArgs {
    /// Settings in TOML [default: /etc/bedplate/bedplate.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "BEDPLATE_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    output: OutputArgs,
}

/// Open files that a node should be allowed: two for each layer of each open volume.
const FILES_MIN: u64 = 65_536;
/// Free space on a disk below which it is worth a word.
const FREE_BYTES_MIN: u64 = 1 << 30;
const FREE_PERCENT_MIN: u64 = 5;
/// The file systems that the engine is tested on, by their magic.
const FILE_SYSTEMS: [(i64, &str); 3] = [(0xef53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683e, "btrfs")];

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: String,
    status: Status,
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warn,
    Fail,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Check {
        Check { name: name.into(), status: Status::Ok, found: found.into(), advice: None }
    }

    fn warn(name: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { status: Status::Warn, advice: Some(advice.into()), ..Check::ok(name, found) }
    }

    fn fail(name: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { status: Status::Fail, advice: Some(advice.into()), ..Check::ok(name, found) }
    }
}

pub async fn run(args: DoctorArgs, socket: Option<PathBuf>) -> Result<(), Failure> {
    let settings = Settings { socket, ..args.settings };
    let mut checks =
        vec![kernel(), fuse(), privileges(), loop_devices(), open_files(), io_uring(), fuse_rings()];
    match settings.load(args.config.as_deref()) {
        Ok(config) => {
            checks.push(settings_check(&config));
            let (node, places) = node(&config).await;
            checks.push(memory::check(places.node));
            checks.extend(places.disks.iter().map(|disk| disk_directory(disk)));
            checks.push(mount(&places.mount));
            checks.extend(node);
        }
        Err(error) => {
            checks.push(Check::fail(
                "settings",
                error.to_string(),
                "correct them; see `bedplate serve --help`",
            ));
        }
    }
    args.output.print(&checks, |checks| report(checks))?;
    match checks.iter().filter(|check| check.status == Status::Fail).count() {
        0 => Ok(()),
        count => Err(Failure::Findings { count }),
    }
}

fn report(checks: &[Check]) -> String {
    let lines = checks.iter().map(|check| {
        let line = format!("{:<5} {}: {}", output::word(check.status), check.name, check.found);
        match &check.advice {
            Some(advice) => format!("{line}\n      {advice}"),
            None => line,
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn kernel() -> Check {
    let release = match uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => return Check::warn("kernel", error.to_string(), "see whether `uname -r` works"),
    };
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 15) {
        Check::fail("kernel", release, "use Linux 5.15 or later")
    } else if version < (6, 9) {
        let advice = "from 6.9 on the kernel reads raw images without asking the node";
        Check::warn("kernel", release, advice)
    } else {
        Check::ok("kernel", release)
    }
}

fn fuse() -> Check {
    let device = "/dev/fuse";
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Check::ok("fuse", format!("{device} opens")),
        Err(error) => {
            let advice = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load the module: modprobe fuse; in a container, give it --device /dev/fuse"
                }
                io::ErrorKind::PermissionDenied => {
                    "run the node as root; in a container, give it --device /dev/fuse"
                }
                _ => "load the module: modprobe fuse",
            };
            Check::fail("fuse", format!("{device}: {error}"), advice)
        }
    }
}

/// The node mounts by itself, not through `fusermount3`; what /etc/fuse.conf allows to users does not matter to it.
fn privileges() -> Check {
    const NAME: &str = "privileges";
    /// CAP_SYS_ADMIN (linux/capability.h).
    const MOUNT_BIT: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    match capabilities(&status) {
        Some(bits) if bits >> MOUNT_BIT & 1 == 1 => Check::ok(NAME, "may mount"),
        Some(_) => Check::fail(
            NAME,
            "this user may not mount",
            "run the node (and this check) as root, or give it CAP_SYS_ADMIN",
        ),
        None => Check::warn(NAME, "unknown", "mount /proc"),
    }
}

/// The effective ones, in a /proc/PID/status.
fn capabilities(status: &str) -> Option<u64> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(effective.trim(), 16).ok()
}

/// Settings that can be served, and yet may not do what was meant.
fn settings_check(config: &Config) -> Check {
    let mode = config.mount_mode.bits();
    match config.sharing {
        Sharing::Owner if mode & 0o077 != 0 => Check::warn(
            "settings",
            format!("mount_mode {mode:04o} lets others in, but without allow_other the kernel does not"),
            "set allow_other = true (--allow-other), or mount_mode 0600",
        ),
        Sharing::Owner | Sharing::Others => Check::ok("settings", "sound"),
    }
}

fn loop_devices() -> Check {
    let control = "/dev/loop-control";
    let advice = "only `volume attach` needs loop devices: modprobe loop, and install util-linux";
    if !fs::metadata(control).is_ok_and(|found| found.file_type().is_char_device()) {
        return Check::warn("loop", format!("{control} is not there"), advice);
    }
    let losetup =
        Command::new("losetup").arg("--version").stdout(Stdio::piped()).stderr(Stdio::null()).output();
    match losetup {
        Ok(out) if out.status.success() => Check::ok("loop", String::from_utf8_lossy(&out.stdout).trim()),
        Ok(out) => Check::warn("loop", format!("losetup: {}", out.status), advice),
        Err(error) => Check::warn("loop", format!("losetup: {error}"), advice),
    }
}

fn open_files() -> Check {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        // The node raises the soft limit to the hard one itself.
        Ok((_, hard)) if hard < FILES_MIN => Check::warn(
            "open files",
            format!("at most {hard}"),
            format!("allow {FILES_MIN} or more: LimitNOFILE= of the unit, or ulimit -Hn"),
        ),
        Ok((_, hard)) => Check::ok("open files", format!("at most {hard}")),
        Err(error) => Check::warn("open files", error.to_string(), "see whether `ulimit -Hn` works"),
    }
}

fn io_uring() -> Check {
    let Err(error) = bedplate_engine::exec::ring::probe() else {
        return Check::ok("io_uring", "usable: requests run on workers");
    };
    let switch = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let advice = match switch.trim() {
        "" | "0" => "use Linux 6.1 or later, and a container runtime that lets io_uring through",
        _ => "sysctl kernel.io_uring_disabled=0 makes it usable",
    };
    Check::warn("io_uring", format!("{error}: requests run blocking"), advice)
}

/// The switch is the machine's, for every FUSE file system: that is for its administrator to set.
fn fuse_rings() -> Check {
    const NAME: &str = "fuse over io_uring";
    match bedplate_fuse::rings_offered() {
        Ok(()) => Check::ok(NAME, "switched on"),
        Err(NoRings::Off) => Check::warn(
            NAME,
            "switched off: volumes are served on /dev/fuse",
            format!(
                "echo Y > {}; to keep it so: echo 'options fuse enable_uring=1' > /etc/modprobe.d/fuse.conf; \
                 then restart the node",
                bedplate_fuse::RINGS_PARAMETER
            ),
        ),
        Err(reason) => {
            Check::warn(NAME, reason.to_string(), "volumes are served on /dev/fuse, with less speed")
        }
    }
}

fn disk_directory(disk: &Path) -> Check {
    let name = format!("disk {}", disk.display());
    let refused = |error: &dyn std::fmt::Display, advice: &str| Check::fail(&name, error.to_string(), advice);
    if !disk.exists() {
        return Check::warn(
            &name,
            "not there",
            "the node makes it; if it is to be a mounted disk, mount it first",
        );
    }
    let found = match statfs(disk) {
        Ok(found) => found,
        Err(error) => return refused(&error, "name a directory of a local file system"),
    };
    let magic = found.filesystem_type().0;
    let kind = FILE_SYSTEMS.iter().find(|(known, _)| *known == magic).map(|(_, kind)| *kind);
    if let Err(error) = try_direct_io(disk) {
        return refused(
            &format!("direct I/O: {error}"),
            "use ext4, XFS or btrfs on a local disk, writable by the node",
        );
    }
    let block = u64::try_from(found.block_size()).unwrap_or(0);
    let (free, size) = (found.blocks_available() * block, found.blocks() * block);
    let space = format!("{} of {} free", size::show(free), size::show(size));
    match kind {
        None => Check::warn(
            &name,
            format!("an untried file system ({magic:#x}), {space}"),
            "ext4, XFS and btrfs are what it is tested on",
        ),
        Some(kind) if free < FREE_BYTES_MIN || free / 100 * 100 < size / 100 * FREE_PERCENT_MIN => {
            Check::warn(&name, format!("{kind}, {space}"), "make room before it is full")
        }
        Some(kind) => Check::ok(&name, format!("{kind}, direct I/O works, {space}")),
    }
}

/// Write an aligned block past the page cache, into a file without a name.
fn try_direct_io(dir: &Path) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_TMPFILE | libc::O_DIRECT)
        .mode(0o600)
        .open(dir)?;
    let buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    let block = buffer.get(start..start + BLOCK).ok_or(io::ErrorKind::OutOfMemory)?;
    file.write_all(block)
}

/// What is mounted where the node will mount; found without a look beneath, which would hang on a dead mount.
fn mount(dir: &Path) -> Check {
    let name = format!("mount {}", dir.display());
    let table = match fs::read_to_string("/proc/self/mountinfo") {
        Ok(table) => table,
        Err(error) => return Check::warn(name, error.to_string(), "mount /proc"),
    };
    let wanted = dir.display().to_string();
    let kinds: Vec<&str> = table
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some(wanted.as_str()))
        .filter_map(|line| line.split_once(" - ")?.1.split(' ').next())
        .collect();
    match kinds.as_slice() {
        [] => Check::ok(name, "free"),
        [.., kind] if kind.starts_with("fuse") && is_dead(dir) => Check::warn(
            name,
            "a mount whose node is gone",
            "the next `bedplate serve` clears it away; or umount -l it",
        ),
        [.., kind] if kind.starts_with("fuse") => Check::ok(name, "mounted"),
        [.., kind] => Check::fail(name, format!("a mount of {kind} is in the way"), "choose another --mount"),
    }
}

/// A dead mount answers at once that it is not connected.
fn is_dead(mount: &Path) -> bool {
    fs::metadata(mount).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
}

/// The directories that matter: those of the running node, or else those of the settings.
struct Places {
    /// The running node's process.
    node: Option<u32>,
    disks: Vec<PathBuf>,
    mount: PathBuf,
}

/// The running node, if there is one.
async fn node(config: &Config) -> (Vec<Check>, Places) {
    let name = format!("socket {}", config.socket.display());
    let configured = Places { node: None, disks: config.disks.clone(), mount: config.mount.clone() };
    let info = match Client::new(&config.socket).node().await {
        Ok(info) => info,
        Err(Error::Unreachable { .. }) => return (vec![Check::ok(name, "free; no node runs")], configured),
        Err(error) => {
            let advice = "look at the log of what answers there";
            return (vec![Check::fail(name, error.to_string(), advice)], configured);
        }
    };
    let places = Places {
        node: Some(info.pid),
        disks: info.disks.iter().map(|disk| PathBuf::from(&disk.path)).collect(),
        mount: info.mount.as_ref().map_or(configured.mount, PathBuf::from),
    };
    let mut checks =
        vec![Check::ok(name, format!("a node of version {} runs, process {}", info.version, info.pid))];
    for disk in info.disks {
        if disk.state == DiskState::Failed {
            let reason = disk.message.unwrap_or_else(|| "no reason is known".to_owned());
            let advice = "repair or mount it, then restart the node";
            checks.push(Check::fail(format!("served disk {}", disk.path), reason, advice));
        }
    }
    for device in info.stale_devices {
        let advice = format!("it belongs to a node that is gone: unmount it, then losetup -d {device}");
        checks.push(Check::warn("loop device", format!("{device} is stale"), advice));
    }
    (checks, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_a_line_for_each_check_and_the_advice_beneath() {
        let checks = [Check::ok("kernel", "6.18"), Check::fail("fuse", "missing", "load it")];
        assert_eq!(report(&checks), "ok    kernel: 6.18\nfail  fuse: missing\n      load it");
    }

    #[test]
    fn a_mode_for_others_whom_the_kernel_keeps_out_is_a_warning() {
        for (mode, allow_other, status) in
            [("0600", false, Status::Ok), ("0660", false, Status::Warn), ("0660", true, Status::Ok)]
        {
            let settings = Settings {
                mount_mode: Some(mode.to_owned()),
                allow_other: Some(allow_other),
                ..Settings::default()
            };
            assert_eq!(settings_check(&settings.finish().unwrap()).status, status, "{mode} {allow_other}");
        }
    }

    #[test]
    fn a_directory_that_does_not_exist_is_a_warning_and_one_without_direct_io_fails() {
        assert_eq!(disk_directory(Path::new("/nonexistent/disk")).status, Status::Warn);
        assert_eq!(disk_directory(Path::new("/proc")).status, Status::Fail);
    }
}
