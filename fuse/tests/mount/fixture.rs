//! A mount with one volume and one image, gone when the test is over; and waiting for conditions.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bedplate_fuse::{FileId, Mount, MountError, MountOptions, Namespace};
use nix::libc;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    TRANSPORT,
    memory::{MemoryDevice, MemoryNamespace},
    switch,
};

pub const VOLUME: FileId = FileId::volume(Uuid::from_u128(1));
pub const IMAGE: FileId = FileId::image(Uuid::from_u128(2));
pub const VOLUME_SIZE: u64 = 64 << 20;

/// How long a test waits for what has to happen.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Fixture {
    // Dropped first: the directory goes after its mount.
    mount: Option<Mount>,
    dir: TempDir,
    pub namespace: Arc<MemoryNamespace>,
    pub volume: Arc<MemoryDevice>,
}

impl Fixture {
    pub fn new() -> Fixture {
        Fixture::with_options(options())
    }

    pub fn with_options(options: MountOptions) -> Fixture {
        let namespace: Arc<MemoryNamespace> = Arc::default();
        let dir = tempfile::tempdir().unwrap();
        let volume = MemoryDevice::volume(VOLUME_SIZE);
        namespace.add(VOLUME, "v", volume.clone());
        let mount = start(&dir.path().join("mnt"), namespace.clone(), options).unwrap();
        Fixture { mount: Some(mount), dir, namespace, volume }
    }

    pub fn mount(&self) -> &Mount {
        self.mount.as_ref().expect("the test has not stopped it")
    }

    pub fn take_mount(&mut self) -> Mount {
        self.mount.take().expect("the test has not stopped it")
    }

    /// Mount the same files again.
    pub fn remount(&mut self, dir: &Path) {
        self.mount = Some(start(dir, self.namespace.clone(), options()).unwrap());
    }

    /// A path beside the mount.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the mount is.
    pub fn dir(&self) -> PathBuf {
        self.scratch("mnt")
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir().join(below)
    }

    pub fn volume_path(&self) -> PathBuf {
        self.path("volumes/v")
    }

    /// The volume, opened for reading and writing with further flags.
    pub fn open(&self, flags: libc::c_int) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(self.volume_path()).unwrap()
    }
}

/// The defaults, on the transport that this test program is about.
pub fn options() -> MountOptions {
    MountOptions { transport: TRANSPORT, ..MountOptions::default() }
}

/// Mount, with the machine's switch as the transport needs it.
pub fn start(dir: &Path, namespace: Arc<dyn Namespace>, options: MountOptions) -> Result<Mount, MountError> {
    switch::with_rings(|| Mount::start(dir, namespace, options))
}

/// Wait until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen within {DEADLINE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Run a shell command with `$F` as the volume's path and `$T` as a scratch directory; the tools speak English.
pub fn shell(fixture: &Fixture, script: &str) -> Output {
    let mut command = Command::new("bash");
    command.args(["-ec", script]).env("LC_ALL", "C");
    command.env("F", fixture.volume_path()).env("T", fixture.scratch(""));
    command.output().unwrap()
}

/// The same; it has to succeed. Returns what it printed.
pub fn shell_ok(fixture: &Fixture, script: &str) -> String {
    let output = shell(fixture, script);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {}: {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes that differ from block to block and from seed to seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64 (Marsaglia).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.write_all(&state.to_le_bytes()).unwrap();
    }
    bytes.truncate(len);
    bytes
}

/// The number of an I/O error.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}
