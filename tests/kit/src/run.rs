//! Programs that end: each has a deadline, and is killed with its children when that has passed.

use std::{
    fs::File,
    io::{Read, Seek},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// How long a test waits for what has to happen, on a machine that is busy with other things.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(5);

/// What a program left.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

/// A program that runs, in a process group of its own. Dropped, it is killed.
pub struct Running {
    what: String,
    child: Child,
    stdout: File,
    stderr: File,
}

impl Running {
    pub fn start(command: &mut Command) -> Running {
        use std::os::unix::process::CommandExt;
        let what = format!("{command:?}");
        let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdin(Stdio::null()).env("LC_ALL", "C").process_group(0);
        command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        let child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        Running { what, child, stdout, stderr }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it left when it has ended by itself.
    pub fn wait(mut self, patience: Duration) -> Ended {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let stderr = String::from_utf8_lossy(&content(&mut self.stderr)).into_owned();
                return Ended { status, stdout: content(&mut self.stdout), stderr };
            }
            if Instant::now() > deadline {
                let said = String::from_utf8_lossy(&content(&mut self.stderr)).into_owned();
                panic!("{} did not end within {patience:?}; it said: {said}", self.what);
            }
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let group = i32::try_from(self.child.id()).expect("process ids fit");
            // It may end between the look and the signal.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn content(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Run a program to its end.
pub fn run(command: &mut Command) -> Ended {
    Running::start(command).wait(DEADLINE)
}

/// Wait until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        thread::sleep(LOOK);
    }
}
