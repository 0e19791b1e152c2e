//! Programs: those that end, and servers that run beside a measurement.
//!
//! Owns [`finish`] and [`Server`]. Every wait has a deadline and ends on a signal; a server goes with the thread that
//! started it, in order first (so that its mounts go), by force when that takes too long.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{figure::float, interrupt};

/// Between two looks at whether the run was interrupted.
const INTERRUPT_LOOK: Duration = Duration::from_millis(100);
/// Between two looks at a server that is to end.
const LOOK: Duration = Duration::from_millis(10);
/// How long a server may take until it serves.
const START_WITHIN: Duration = Duration::from_secs(60);
/// How long it may take to end in order.
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// What is shown of a log.
const TAIL_LEN: usize = 400;
/// `USER_HZ`, which Linux fixes for programs.
const TICKS_PER_S: u64 = 100;

/// Run a program to its end.
pub fn finish(command: &mut Command, patience: Duration) -> Result<Output> {
    let what = command.get_program().to_string_lossy().into_owned();
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.env("LC_ALL", "C").spawn().with_context(|| format!("start {what}"))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    // Waited for by a thread, so that its end is known at once and nothing polls beside a measurement.
    let (ended, end) = mpsc::channel();
    thread::spawn(move || ended.send(child.wait()));
    let deadline = Instant::now() + patience;
    let status = loop {
        match end.recv_timeout(INTERRUPT_LOOK) {
            Ok(status) => break status?,
            Err(RecvTimeoutError::Disconnected) => bail!("{what} cannot be waited for"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let late = Instant::now() > deadline;
        if let Err(error) = interrupt::check().and_then(|()| {
            ensure!(!late, "{what} did not end within {} s", patience.as_secs());
            Ok(())
        }) {
            // It may have ended since; its number is not given to another before the thread has seen that.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = end.recv();
            return Err(error);
        }
    };
    Ok(Output { status, stdout: content(&mut stdout)?, stderr: content(&mut stderr)? })
}

/// Run a program that has to succeed; what it printed.
pub fn succeed(command: &mut Command, patience: Duration) -> Result<String> {
    let output = finish(command, patience)?;
    if !output.status.success() {
        let what = command.get_program().to_string_lossy().into_owned();
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let said = if said.is_empty() { output.status.to_string() } else { tail(&said) };
        bail!("{what}: {said}");
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether a program of this name is installed.
pub fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

fn content(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The end of what a program said, on one line.
fn tail(said: &str) -> String {
    let text = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    let skipped = text.chars().count().saturating_sub(TAIL_LEN);
    text.chars().skip(skipped).collect()
}

/// A program that serves until it is told to stop.
#[derive(Debug)]
pub struct Server {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Start `program`; what it says goes to `log`.
    pub fn start(
        name: &str,
        program: &OsStr,
        args: &[String],
        env: &[(&str, &Path)],
        log: &Path,
    ) -> Result<Server> {
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        // Killed without a chance to clear up, this process takes its servers with it all the same.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(program).args(args).process_group(0);
        command.envs(env.iter().copied()).env("LC_ALL", "C").env("NO_COLOR", "1");
        // The user's settings are for the user's node.
        for (setting, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"BEDPLATE_"))
        {
            command.env_remove(setting);
        }
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child =
            command.spawn().with_context(|| format!("start {name} through setpriv, of util-linux"))?;
        Ok(Server { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Wait until it serves. Ends early when the process does, with what it said.
    pub fn wait_until(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        while !ready() {
            interrupt::check()?;
            if let Some(status) = self.child.try_wait()? {
                let said = tail(&fs::read_to_string(&self.log).unwrap_or_default());
                bail!("{} ended at its start ({status}): {said}", self.name);
            }
            ensure!(
                Instant::now() < deadline,
                "{} does not serve after {} s: {}",
                self.name,
                START_WITHIN.as_secs(),
                tail(&fs::read_to_string(&self.log).unwrap_or_default())
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0));
        if pid.as_raw() == 0 || !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // It may end between the look and the signal.
        let _ = kill(pid, Signal::SIGTERM);
        let deadline = Instant::now() + STOP_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("{} does not end; it is killed", self.name);
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            thread::sleep(LOOK);
        }
    }
}

/// Seconds that a process has been on cores, with the threads that have ended.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    parse_cpu(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_cpu(stat: &str) -> Option<f64> {
    // The fields after the name, which may hold anything.
    let fields = stat.rsplit_once(')')?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().ok());
    Some(float(ticks.sum::<Option<u64>>()?) / float(TICKS_PER_S))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_is_user_and_system_whatever_its_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 3 0";
        assert_eq!(parse_cpu(stat), Some(2.0));
        assert!(cpu_seconds(std::process::id()).is_some());
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let error = succeed(Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"]), STOP_WITHIN)
            .unwrap_err();
        assert_eq!(error.to_string(), "sh: no such luck");
    }

    #[test]
    fn a_server_that_ends_at_its_start_is_an_error_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-c".to_owned(), "echo port in use; exit 1".to_owned()];
        let mut server = Server::start("peer", "sh".as_ref(), &args, &[], &dir.path().join("log")).unwrap();
        let error = server.wait_until(|| false).unwrap_err().to_string();
        assert!(error.contains("peer ended at its start") && error.contains("port in use"), "{error}");
    }

    #[test]
    fn a_server_is_gone_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let server =
            Server::start("sleeper", "sleep".as_ref(), &["60".to_owned()], &[], &dir.path().join("log"))
                .unwrap();
        let pid = server.pid();
        drop(server);
        assert_eq!(cpu_seconds(pid), None);
    }
}
