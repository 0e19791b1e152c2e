//! A node of the built program in a temporary directory, and the command line that speaks to it.
//!
//! Owns the directory, with a disk, a mount, a socket and a `scratch` for the test's own files, and the process. When
//! it is dropped, also by a test that panics, nothing is left: what is mounted beneath the directory is unmounted, loop
//! devices over files beneath it are detached, and the process is killed; should the test itself be killed, the kernel
//! kills the node (`setpriv --pdeathsig`). `BEDPLATE_KEEP=1` keeps the directory of a test that failed.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

use super::run::{DEADLINE, Ended, Running, run, until};

/// The program under test: the one beside this one, as cargo puts it, unless `BEDPLATE_PROGRAM` names another.
pub fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("BEDPLATE_PROGRAM") {
        return PathBuf::from(named);
    }
    let own = std::env::current_exe().unwrap();
    let beside = own.parent().expect("a program is in a directory");
    // Tests are one directory deeper.
    let beside = if beside.ends_with("deps") { beside.parent().expect("it ends with one") } else { beside };
    let program = beside.join("bedplate");
    assert!(program.exists(), "{} is not there: build the program first", program.display());
    program
}

/// A directory with everything of one node, which runs or not.
pub struct Node {
    process: Option<Child>,
    /// Words before `bedplate serve`: a tracer, a control group.
    wrapper: Vec<String>,
    disks: Vec<String>,
    dir: TempDir,
}

impl Node {
    /// A node that is ready.
    pub fn start() -> Node {
        let mut node = Node::idle();
        node.restart();
        node
    }

    /// Have another program start it from now on, such as a tracer.
    pub fn wrap(&mut self, wrapper: &[&str]) {
        self.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Only the directories.
    pub fn idle() -> Node {
        let dir = tempfile::Builder::new().prefix("bedplate-test-").tempdir().unwrap();
        for name in ["scratch", "disk"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Node { process: None, wrapper: Vec::new(), disks: vec!["disk".to_owned()], dir }
    }

    /// One more disk from the next start on, in a directory of this name.
    pub fn add_disk(&mut self, name: &str) {
        self.disks.push(name.to_owned());
    }

    /// Start it again; it is ready on return.
    pub fn restart(&mut self) {
        self.spawn();
        until("the node is ready", || {
            let process = self.process.as_mut().expect("it has just been started");
            if let Some(status) = process.try_wait().unwrap() {
                panic!("the node ended at its start with {status}: {}", self.log());
            }
            self.http("GET", "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
        });
    }

    /// Start it, and do not wait.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let log = File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut words = vec!["setpriv".to_owned(), "--pdeathsig".to_owned(), "KILL".to_owned()];
        words.extend(self.wrapper.clone());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(self.serve_words());
        // Whatever the machine has free.
        command.env("BEDPLATE_IMAGE_RESERVE", "0");
        command.env("BEDPLATE_LOG", "info").env("LC_ALL", "C").env("NO_COLOR", "1");
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.process = Some(command.spawn().unwrap());
    }

    /// `bedplate serve` with the places of this node.
    pub fn serve_words(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let mut words = vec![program().display().to_string(), "serve".to_owned()];
        let disks = self.disks.iter().map(|disk| ("--disk", disk.as_str()));
        let places = [("--state", "state"), ("--mount", "mount"), ("--socket", "socket")];
        for (flag, place) in disks.chain(places) {
            words.extend([flag.to_owned(), path(place)]);
        }
        words
    }

    /// The process of `bedplate` itself.
    pub fn pid(&self) -> Pid {
        let text = self.http("GET", "/v1/node").expect("the node runs");
        let body = text.split_once("\r\n\r\n").expect("an answer has a head").1;
        let info: Value = serde_json::from_str(body).unwrap();
        Pid::from_raw(i32::try_from(info["pid"].as_i64().unwrap()).unwrap())
    }

    /// SIGKILL, and gone on return.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.kill().unwrap();
        until("the killed node is gone", || process.try_wait().unwrap().is_some());
    }

    /// The names of its threads, for one that may not answer yet.
    pub fn threads(&self) -> Vec<String> {
        let process = self.process.as_ref().expect("it runs").id();
        let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        // One may end while it is asked.
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.map(|name| name.trim_end().to_owned()).collect()
    }

    /// Tell it to stop, and wait for that.
    pub fn stop(&mut self, signal: Signal) -> ExitStatus {
        kill(self.pid(), signal).unwrap();
        self.wait_end()
    }

    /// Tell it to stop while it may not answer yet; not for one in a wrapper that does not become it.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        kill(Pid::from_raw(i32::try_from(process.id()).unwrap()), signal).unwrap();
    }

    /// Wait until it has ended by itself.
    pub fn wait_end(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("it runs");
        let mut status = None;
        until("the node stops", || {
            status = process.try_wait().unwrap();
            status.is_some()
        });
        status.expect("the wait is over")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    // ---- places

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub fn scratch(&self, name: &str) -> PathBuf {
        self.path("scratch").join(name)
    }

    pub fn volume(&self, name: &str) -> PathBuf {
        self.path("mount/volumes").join(name)
    }

    pub fn image(&self, name: &str) -> PathBuf {
        self.path("mount/images").join(name)
    }

    /// Everything below the disk that is a file, relative to it.
    pub fn files_on_disk(&self) -> Vec<String> {
        let mut files = Vec::new();
        walk(&self.path("disk"), &mut |path| {
            let relative = path.strip_prefix(self.path("disk")).unwrap();
            files.push(relative.display().to_string());
        });
        files.sort();
        files
    }

    /// What the disk's files take.
    pub fn allocated_on_disk(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut sum = 0;
        walk(&self.path("disk"), &mut |path| {
            sum += fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512);
        });
        sum
    }

    /// Every layer that is on the disk is in a record, and nothing has a temporary name.
    pub fn assert_nothing_is_left_over(&self) {
        let files = self.files_on_disk();
        let temporary = |file: &&String| {
            let name = file.rsplit('/').next().unwrap_or_default();
            name.contains(".new") || name.contains("partial") || file.contains("/.") || name.contains(".tmp")
        };
        assert_eq!(files.iter().filter(temporary).collect::<Vec<_>>(), Vec::<&String>::new());
        let records: Vec<String> = files
            .iter()
            .filter(|file| file.ends_with("/volume.json"))
            .map(|file| fs::read_to_string(self.path("disk").join(file)).unwrap())
            .collect();
        let layers: BTreeSet<&str> =
            files.iter().filter_map(|file| file.strip_prefix("layers/")?.split('/').next()).collect();
        for layer in layers {
            assert!(records.iter().any(|record| record.contains(layer)), "layer {layer} is in no record");
        }
    }

    // ---- the command line

    /// `bedplate` with these words.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(program());
        command.args(line.split_whitespace()).env("BEDPLATE_SOCKET", self.path("socket"));
        command.current_dir(self.path("scratch"));
        command
    }

    pub fn try_run(&self, line: &str) -> Ended {
        run(&mut self.command(line))
    }

    /// A command that does what it is told; what it printed.
    pub fn run(&self, line: &str) -> String {
        let ended = self.try_run(line);
        assert!(
            ended.status.success(),
            "bedplate {line}: {}: {}\nlog: {}",
            ended.status,
            ended.stderr,
            self.log()
        );
        ended.text()
    }

    /// A command that is refused with this exit code; the line that says why.
    pub fn refused(&self, line: &str, code: i32) -> String {
        let ended = self.try_run(line);
        assert_eq!(ended.status.code(), Some(code), "bedplate {line}: {}{}", ended.text(), ended.stderr);
        ended.stderr
    }

    /// The same as `-o json`.
    pub fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.run(&format!("{line} -o json"))).unwrap()
    }

    /// A command that runs beside the test.
    pub fn begin(&self, line: &str) -> Running {
        Running::start(&mut self.command(line))
    }

    /// Names of what `list` lists.
    pub fn names(&self, noun: &str) -> Vec<String> {
        let list = self.json(&format!("{noun} list"));
        list.as_array().unwrap().iter().map(|object| object["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The node's jobs.
    pub fn jobs(&self) -> Vec<Value> {
        let text = self.http("GET", "/v1/jobs").expect("the node runs");
        let body = text.split_once("\r\n\r\n").expect("an answer has a head").1;
        serde_json::from_str::<Value>(body).unwrap().as_array().unwrap().clone()
    }

    /// Wait until no job runs.
    pub fn idle_jobs(&self) {
        until("every job ends", || self.jobs().iter().all(|job| job["state"] != "running"));
    }

    /// One request on the socket; `None` while nobody answers.
    pub fn http(&self, method: &str, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.path("socket")).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    // ---- other programs

    /// A shell script with `$V` and `$I` as the directories of volumes and images, `$T` as the scratch directory and
    /// `$B` as the program.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-euc", script]).current_dir(self.path("scratch"));
        command.env("V", self.path("mount/volumes")).env("I", self.path("mount/images"));
        command.env("T", self.path("scratch")).env("D", self.path("disk")).env("B", program());
        command.env("BEDPLATE_SOCKET", self.path("socket"));
        command
    }

    /// A script that succeeds; what it printed.
    pub fn sh(&self, script: &str) -> String {
        self.sh_within(script, DEADLINE)
    }

    pub fn sh_within(&self, script: &str, patience: Duration) -> String {
        let ended = Running::start(&mut self.shell(script)).wait(patience);
        let said = format!("{}{}", String::from_utf8_lossy(&ended.stdout), ended.stderr);
        assert!(ended.status.success(), "{script}: {}: {said}\nlog: {}", ended.status, self.log());
        ended.text()
    }

    /// Write over a part of a volume.
    pub fn write(&self, volume: &str, at: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(self.volume(volume)).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    /// The SHA-512 of a file, as `sha512sum` says.
    pub fn sha512(&self, file: &Path) -> String {
        let text = self.sh(&format!("sha512sum < '{}'", file.display()));
        text.split_whitespace().next().unwrap().to_owned()
    }

    /// What is still mounted beneath the directory, the deepest last.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(self.dir.path())
    }

    /// Loop devices over files of this node's mount or directory.
    pub fn loops(&self) -> Vec<PathBuf> {
        loops_below(self.dir.path())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the node:\n{}", self.log());
            if std::env::var_os("BEDPLATE_KEEP").is_some() {
                eprintln!("its files are kept: {}", self.dir.path().display());
                self.dir.disable_cleanup(true);
            }
        }
        let mount = self.path("mount");
        // While the node still answers, so that file systems over its volumes come off cleanly.
        let own = self.mounts().into_iter().rev().filter(|dir| *dir != mount);
        own.for_each(|dir| attempt("umount", &["-l".as_ref(), dir.as_os_str()]));
        let loops = self.loops();
        loops.iter().for_each(|device| attempt("losetup", &["-d".as_ref(), device.as_os_str()]));
        if let Some(mut process) = self.process.take() {
            // A wrapper's child is not ours to wait for, but ours to end.
            if !self.wrapper.is_empty()
                && let Ok(pid) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.pid()))
            {
                let _ = kill(pid, Signal::SIGKILL);
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        for dir in self.mounts().into_iter().rev() {
            attempt("umount", &["-l".as_ref(), dir.as_os_str()]);
        }
    }
}

/// Clearing up goes on when one step fails; the next shows what is left.
fn attempt(program: &str, words: &[&std::ffi::OsStr]) {
    drop(Running::start(Command::new(program).args(words)).wait(DEADLINE));
}

fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    places.filter(|place| place.starts_with(dir)).collect()
}

fn loops_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            fs::read_to_string(entry.path().join("loop/backing_file"))
                .is_ok_and(|file| Path::new(file.trim_end()).starts_with(dir))
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

fn walk(dir: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), visit),
            Ok(_) => visit(&entry.path()),
            // Gone since it was listed.
            Err(_) => {}
        }
    }
}
