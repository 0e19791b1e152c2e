//! What a killed node leaves behind, and what the next one does about it. The victim is the example `memory_mount`.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

use bedplate_fuse::{Mount, MountError, Stopped, TransportChoice};
use nix::{
    libc,
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    TRANSPORT,
    fixture::{self, DEADLINE, VOLUME, errno, options, until},
    memory::{MemoryDevice, MemoryNamespace},
    switch,
};

/// A process that serves a mount; killed when the test is over, and its mount with it.
pub struct Victim(Child, BufReader<ChildStdout>, PathBuf);

impl Victim {
    pub fn start(dir: &Path) -> Victim {
        // target/PROFILE/deps/THIS -> target/PROFILE/examples/memory_mount, which `cargo test` builds as well.
        let program =
            env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("memory_mount");
        assert!(program.exists(), "{} is missing: cargo build --examples", program.display());
        let transport = match TRANSPORT {
            TransportChoice::Auto => "auto",
            TransportChoice::Uring => "uring",
            TransportChoice::Classic => "classic",
        };
        let mut command = Command::new(program);
        command.arg(dir).arg(transport).stdin(Stdio::piped()).stdout(Stdio::piped());
        switch::with_rings(|| {
            let mut child = command.spawn().unwrap();
            let mut line = String::new();
            let mut output = BufReader::new(child.stdout.take().unwrap());
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "mounted\n");
            Victim(child, output, dir.into())
        })
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }

    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // A test may have done all three already.
        let _ = (self.0.kill(), self.0.wait(), umount2(&self.2, MntFlags::MNT_DETACH));
    }
}

fn start(dir: &Path) -> Result<Mount, MountError> {
    let namespace = Arc::new(MemoryNamespace::default());
    namespace.add(VOLUME, "new", MemoryDevice::volume(4096));
    fixture::start(dir, namespace, options())
}

fn mounts_on(dir: &Path) -> usize {
    let needle = format!(" {} ", dir.display());
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().filter(|line| line.contains(&needle)).count()
}

fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn the_mount_of_a_killed_process_is_cleared_away_and_made_anew() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mnt");
    let mut victim = Victim::start(&dir);
    assert_eq!(names(&dir.join("images")), [dir.join("images/base")]);
    victim.kill();
    // Until the last of its threads is gone, the kernel may say so in other words.
    until("the end of its connection", || {
        fs::metadata(&dir).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
    });
    let mount = start(&dir).unwrap();
    assert_eq!(names(&dir.join("volumes")), [dir.join("volumes/new")]);
    assert_eq!(mounts_on(&dir), 1);
    assert_eq!(mount.stop(DEADLINE), Stopped::Unmounted);
    assert_eq!(mounts_on(&dir), 0);
}

#[test]
fn a_dead_mount_that_is_still_used_is_cleared_away_too() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mnt");
    let mut victim = Victim::start(&dir);
    let user = fs::File::open(dir.join("volumes/a")).unwrap();
    victim.kill();
    let mount = start(&dir).unwrap();
    assert!(fs::metadata(dir.join("volumes/new")).is_ok());
    assert_eq!(errno(user.metadata()), libc::ENOTCONN);
    assert_eq!(mount.stop(DEADLINE), Stopped::Unmounted);
}

#[test]
fn a_process_that_is_stopped_but_lives_is_refused_without_touching_its_mount() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mnt");
    let mut victim = Victim::start(&dir);
    // A `stat` of its mount would now wait for ever.
    victim.signal(Signal::SIGSTOP);
    let refused = start(&dir);
    assert!(matches!(refused, Err(MountError::Held { pid, .. }) if pid == victim.0.id()), "{refused:?}");
    victim.signal(Signal::SIGCONT);
    assert!(fs::metadata(dir.join("volumes/a")).is_ok(), "it goes on");
    victim.kill();
    drop(start(&dir).unwrap());
    assert_eq!(mounts_on(&dir), 0);
}

#[test]
fn a_mount_has_the_memory_of_its_requests_before_the_first_one() {
    let parent = tempfile::tempdir().unwrap();
    let victim = Victim::start(&parent.path().join("mnt"));
    let status = fs::read_to_string(format!("/proc/{}/status", victim.0.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    let expected = match TRANSPORT {
        // An entry for each of 32 requests of at least one processor.
        TransportChoice::Uring => 32 * 128,
        // Each thread receives a request into one buffer and reads into another.
        TransportChoice::Auto | TransportChoice::Classic => options().threads.get() * 2 * 1024,
    };
    assert!(kib >= expected, "{kib} KiB");
}

#[test]
fn the_example_ends_with_its_input_and_leaves_no_mount() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mnt");
    let mut victim = Victim::start(&dir);
    drop(victim.0.stdin.take());
    assert!(victim.0.wait().unwrap().success());
    let mut line = String::new();
    victim.1.read_line(&mut line).unwrap();
    assert_eq!(line, "Unmounted\n");
    assert_eq!(mounts_on(&dir), 0);
}
