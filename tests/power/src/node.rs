//! A node on the host over the file system of a cut disk: loop-mounted, served, asked, and taken down again.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::guest::run;

const DEADLINE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(10);

/// A disk image that is mounted. Dropped, it is not.
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// What a machine does with it when it starts again: the file system replays its journal.
    pub fn new(image: &Path, at: &Path) -> Result<Mounted> {
        fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at))?;
        Ok(Mounted { at: at.to_owned() })
    }

    pub fn unmount(self) -> Result<()> {
        run(Command::new("umount").arg(&self.at))?;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Not mounted any more after an orderly end; otherwise whatever still uses it goes with it.
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

pub struct Node {
    program: PathBuf,
    dir: PathBuf,
    process: Child,
}

impl Node {
    /// A node over `disk`, with everything of its own in `dir`; it is ready on return.
    pub fn start(program: &Path, executor: &str, disk: &Path, dir: &Path) -> Result<Node> {
        fs::create_dir_all(dir)?;
        let log = File::options().create(true).append(true).open(dir.join("log"))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program).arg("serve").arg("--disk").arg(disk);
        for (flag, name) in [("--state", "state"), ("--mount", "mount"), ("--socket", "socket")] {
            command.arg(flag).arg(dir.join(name));
        }
        command.args(["--executor", executor, "--fuse-transport", "classic"]).env("NO_COLOR", "1");
        let process = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut node = Node { program: program.to_owned(), dir: dir.to_owned(), process };
        let deadline = Instant::now() + DEADLINE;
        while node.cli("volume list").is_err() || !node.dir.join("mount/volumes").exists() {
            if let Some(status) = node.process.try_wait()? {
                bail!("the node ended at its start with {status}: {}", node.log());
            }
            ensure!(Instant::now() < deadline, "the node is not ready: {}", node.log());
            thread::sleep(LOOK);
        }
        Ok(node)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn cli(&self, line: &str) -> Result<String> {
        let mut command = Command::new(&self.program);
        run(command.args(line.split_whitespace()).env("BEDPLATE_SOCKET", self.dir.join("socket")))
    }

    pub fn json(&self, line: &str) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.cli(&format!("{line} -o json"))?)?)
    }

    pub fn volume(&self, name: &str) -> PathBuf {
        self.dir.join("mount/volumes").join(name)
    }

    pub fn read(&self, volume: &str) -> Result<Vec<u8>> {
        fs::read(self.volume(volume)).with_context(|| format!("volume {volume}"))
    }

    /// SIGTERM, and gone on return.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.process.id())?), Signal::SIGTERM)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "the node stopped with {status}: {}", self.log());
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the node does not stop: {}", self.log());
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            // A node that did not stop in order: nothing of it may stay.
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ =
                Command::new("umount").arg("-l").arg(self.dir.join("mount")).stderr(Stdio::null()).status();
        }
    }
}
