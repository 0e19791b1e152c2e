//! Loop devices, through the system's `losetup`.
//!
//! Owns how the program is called and its answers read. A child process, because whatever touches a loop device may
//! wait for the file beneath it, and that file is served by this very process, or by one that hangs: a child can be
//! given up on after [`CALL_MAX`]. For the same reason devices are found in sysfs ([`bound`]), which touches no file,
//! and only those that may be ours are looked at. Which are is decided in [`super::attach`].

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use bedplate_engine::error::Error as Engine;
use serde::Deserialize;
use tokio::{process::Command, runtime::Handle, time::timeout};

use crate::api::problem::{Code, Refusal};

/// How long a call may take.
const CALL_MAX: Duration = Duration::from_secs(20);
const PROGRAM: &str = "losetup";
const SYSFS: &str = "/sys/block";
/// Beneath a device's directory; there while it has a file.
const BACKING_FILE: &str = "loop/backing_file";

/// A loop device that has a file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct LoopDevice {
    #[serde(rename = "name")]
    pub device: PathBuf,
    #[serde(rename = "back-ino")]
    pub inode: Option<u64>,
    /// `major:minor` of the file's file system.
    #[serde(rename = "back-maj:min")]
    pub file_system: Option<String>,
}

/// All devices that have a file, with its path as the kernel shows it: of a detached mount without where that was.
pub fn bound() -> Vec<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(SYSFS).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let file = fs::read_to_string(entry.path().join(BACKING_FILE)).ok()?;
            Some((Path::new("/dev").join(entry.file_name()), PathBuf::from(file.trim_end())))
        })
        .collect()
}

/// Whether the device has a file.
pub fn is_bound(device: &Path) -> bool {
    sysfs(device).join(BACKING_FILE).exists()
}

/// The directory of a block device in sysfs.
pub fn sysfs(device: &Path) -> PathBuf {
    Path::new(SYSFS).join(device.file_name().unwrap_or_default())
}

/// The program, called from threads that may block.
#[derive(Clone, Debug)]
pub struct Losetup(Handle);

impl Losetup {
    pub fn new(runtime: Handle) -> Losetup {
        Losetup(runtime)
    }

    /// What is behind a device; `None` when nothing is.
    pub fn look(&self, device: &Path) -> Result<Option<LoopDevice>, Refusal> {
        if !is_bound(device) {
            return Ok(None);
        }
        let columns = "NAME,BACK-INO,BACK-MAJ:MIN";
        let text = self.call(&["--list", "--json", "--output", columns, &device.to_string_lossy()])?;
        let found =
            parse(&text).map_err(|e| Refusal::new(Code::Storage, format!("{PROGRAM} --list: {e}")))?;
        Ok(found.into_iter().next())
    }

    /// Give `file` a device with direct I/O.
    pub fn attach(&self, file: &Path) -> Result<PathBuf, Refusal> {
        let file = file.to_string_lossy();
        let device = self.call(&["--find", "--show", "--direct-io=on", "--partscan", &file])?;
        Ok(PathBuf::from(device.trim()))
    }

    /// Take the device's file away; while something has it open, the kernel does that when it is closed.
    pub fn detach(&self, device: &Path) -> Result<(), Refusal> {
        self.call(&["--detach", &device.to_string_lossy()]).map(drop)
    }

    /// Have the device take the size that its `file` has now.
    pub fn follow_size(&self, device: &Path, file: &Path) -> Result<(), Refusal> {
        // The kernel learns the file's size by a look at it.
        self.call_program("stat", &["--dereference", "--format=%s", &file.to_string_lossy()])?;
        self.call(&["--set-capacity", &device.to_string_lossy()]).map(drop)
    }

    fn call(&self, arguments: &[&str]) -> Result<String, Refusal> {
        self.call_program(PROGRAM, arguments)
    }

    fn call_program(&self, program: &str, arguments: &[&str]) -> Result<String, Refusal> {
        let line = || format!("{program} {}", arguments.join(" "));
        let refuse = |why: &str| Refusal::new(Code::Storage, format!("{}: {why}", line()));
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true).env("LC_ALL", "C");
        let output = self.0.block_on(async { timeout(CALL_MAX, command.output()).await });
        let output = output
            .map_err(|_| {
                let detail = format!("{} was not done within {} s", line(), CALL_MAX.as_secs());
                Refusal::new(Code::TimedOut, detail)
            })?
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => refuse(&format!("{error}; install util-linux")),
                _ => Engine::io("start", program, error).into(),
            })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(refuse(said.trim().trim_start_matches(&format!("{program}: "))));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn parse(text: &str) -> Result<Vec<LoopDevice>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Listing {
        loopdevices: Vec<LoopDevice>,
    }
    // Without any device it prints nothing at all.
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut devices = serde_json::from_str::<Listing>(text)?.loopdevices;
    for device in &mut devices {
        device.file_system = device.file_system.take().map(|numbers| numbers.trim().to_owned());
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_as_util_linux_prints_it() {
        assert_eq!(parse("").unwrap(), []);
        let text = r#"{"loopdevices": [
            {"name": "/dev/loop0", "back-ino": 8694342718854356630, "back-maj:min": "       0:39 "}]}"#;
        let expected = LoopDevice {
            device: "/dev/loop0".into(),
            inode: Some(8_694_342_718_854_356_630),
            file_system: Some("0:39".to_owned()),
        };
        assert_eq!(parse(text).unwrap(), [expected]);
        assert!(parse("no JSON").is_err());
    }
}
