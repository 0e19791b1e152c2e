//! The programs of others: qemu-storage-daemon and nbdkit, over the same base.
//!
//! Owns how they are started. Each content has a process of its own, with a qcow2 overlay for each volume (qemu) or a
//! cow filter (nbdkit). A FUSE export needs a regular file to mount on, which has to be there first; whether something
//! was really mounted is looked at before anything is measured.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{Kind, Tuning, node::millis};
use crate::{
    content::{Ground, ensure_served, fill},
    fio::{Client, Lasts, Load, Subject},
    process::{Server, is_installed, succeed},
    workload::{Content, Pattern, Place, Step},
};

const PATIENCE: Duration = Duration::from_secs(600);
/// Filling an export may take this long.
const FILL_S: u32 = 600;

/// How blocks of a peer are cached on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum HostCache {
    Buffered,
    Direct,
}

/// A peer with its processes, by what they serve.
#[derive(Debug)]
pub struct Peer {
    kind: Kind,
    dir: PathBuf,
    base: PathBuf,
    len: u64,
    serving: BTreeMap<(Content, HostCache), Serving>,
}

/// One process.
#[derive(Debug)]
struct Serving {
    server: Server,
    subject: Subject,
}

impl Peer {
    /// Over the ground's base, when the program is installed.
    pub fn find(kind: &Kind, ground: &Ground) -> Result<Peer> {
        let (program, package) = match kind {
            Kind::NbdkitCow => ("nbdkit", "nbdkit"),
            _ => ("qemu-storage-daemon", "qemu-storage-daemon or qemu-utils"),
        };
        ensure!(is_installed(program), "{program} is not installed (package {package})");
        if *kind != Kind::NbdkitCow {
            ensure!(is_installed("qemu-img"), "qemu-img is not installed (package qemu-utils)");
        }
        if matches!(kind, Kind::NbdkitCow | Kind::QemuNbd(_)) {
            ensure!(crate::fio::speaks_nbd(), "this fio was built without its NBD engine");
        }
        let dir = ground.path(kind.name());
        fs::create_dir_all(&dir)?;
        Ok(Peer { kind: kind.clone(), dir, base: ground.base(), len: ground.len, serving: BTreeMap::new() })
    }

    /// What serves this content, started when it is first asked for; a fresh one is new each time. Its process as well.
    pub fn serve(&mut self, content: Content, place: Place) -> Result<(Subject, u32)> {
        let cache = if place == Place::Disk { HostCache::Direct } else { HostCache::Buffered };
        if content == Content::Fresh {
            self.release(content);
        }
        if !self.serving.contains_key(&(content, cache)) {
            let serving = self.start(content, cache)?;
            if content == Content::Own {
                self.fill(&serving.subject)?;
            }
            self.serving.insert((content, cache), serving);
        }
        let serving = self.serving.get(&(content, cache)).context("it has just been started")?;
        if let (Subject::Files(files), false) = (&serving.subject, matches!(content, Content::Layers(_))) {
            files.iter().try_for_each(|file| ensure_served(file, &self.dir, self.len))?;
        }
        Ok((serving.subject.clone(), serving.server.pid()))
    }

    /// End what was started for one sample.
    pub fn release(&mut self, content: Content) {
        if content == Content::Fresh {
            self.serving.retain(|(of, _), _| *of != content);
        }
    }

    /// The milliseconds of one step of a volume's life.
    pub fn step(&mut self, step: Step) -> Result<f64> {
        let start = Instant::now();
        match step {
            Step::Create => {
                self.overlay(&self.dir.join("created.qcow2"))?;
                Ok(millis(start))
            }
            Step::Open | Step::Snapshot | Step::Clone => {
                let key = (Content::Base, HostCache::Buffered);
                self.serving.remove(&key);
                let start = Instant::now();
                let serving = self.start(key.0, key.1)?;
                if let Subject::Files(files) = &serving.subject {
                    let file = File::open(files.first().context("an export")?)?;
                    file.read_exact_at(&mut [0; 4096], 0)?;
                }
                let spent = millis(start);
                self.serving.insert(key, serving);
                Ok(spent)
            }
        }
    }

    fn fill(&self, subject: &Subject) -> Result<()> {
        match subject {
            Subject::Files(files) => {
                let file = File::options().write(true).open(files.first().context("an export")?)?;
                fill(&file, self.len)?;
                Ok(file.sync_all()?)
            }
            Subject::Nbd(_) => {
                let load = Load {
                    subject: subject.clone(),
                    pattern: Pattern::SequentialWrite,
                    block: 1 << 20,
                    depth: 8,
                    clients: 1,
                    client: Client::Direct,
                    lasts: Lasts::OnePass { seconds_max: FILL_S },
                    len: self.len,
                    seed: 1,
                };
                load.run().map(drop)
            }
        }
    }

    fn start(&self, content: Content, cache: HostCache) -> Result<Serving> {
        let stem = match content {
            Content::Base => "base".to_owned(),
            Content::Own => "own".to_owned(),
            Content::Fresh => "fresh".to_owned(),
            Content::Storm(count) => format!("storm{count}"),
            Content::Layers(count) => format!("layers{count}"),
        };
        let stem = if cache == HostCache::Direct { format!("{stem}-direct") } else { stem };
        match &self.kind {
            Kind::NbdkitCow => self.nbdkit(&stem),
            _ => {
                let count = if let Content::Storm(count) = content { count } else { 1 };
                self.qemu(&stem, count, cache)
            }
        }
    }

    fn overlay(&self, path: &Path) -> Result<()> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&self.base).arg(path);
        succeed(&mut command, PATIENCE).map(drop)
    }

    fn qemu(&self, stem: &str, count: u64, cache: HostCache) -> Result<Serving> {
        let tuned = matches!(self.kind, Kind::QemuFuse(Tuning::Tuned) | Kind::QemuNbd(Tuning::Tuned));
        let is_nbd = matches!(self.kind, Kind::QemuNbd(_));
        let socket = self.dir.join(format!("{stem}.sock"));
        let direct = match cache {
            HostCache::Buffered => "",
            HostCache::Direct => ",cache.direct=on",
        };
        let aio = if tuned { ",aio=io_uring" } else { "" };
        let iothread = if tuned { ",iothread=io0" } else { "" };
        let mut args: Vec<String> = Vec::new();
        if tuned {
            args.extend(["--object".to_owned(), "iothread,id=io0".to_owned()]);
        }
        if is_nbd {
            // Left by the process before, it would be in the way.
            let _ = fs::remove_file(&socket);
            args.extend([
                "--nbd-server".to_owned(),
                format!("addr.type=unix,addr.path={}", socket.display()),
            ]);
        }
        let mut files = Vec::new();
        for n in 0..count {
            let overlay = self.dir.join(format!("{stem}{n}.qcow2"));
            self.overlay(&overlay)?;
            let (overlay, base) = (overlay.display(), self.base.display());
            for blockdev in [
                format!("driver=file,node-name=f{n},filename={overlay}{direct}{aio}"),
                format!("driver=file,node-name=b{n},filename={base},read-only=on{direct}{aio}"),
                format!("driver=raw,node-name=r{n},file=b{n},read-only=on"),
                format!("driver=qcow2,node-name=q{n},file=f{n},backing=r{n}"),
            ] {
                args.extend(["--blockdev".to_owned(), blockdev]);
            }
            args.push("--export".to_owned());
            if is_nbd {
                args.push(format!("type=nbd,id=e{n},node-name=q{n},name=v{n},writable=on{iothread}"));
            } else {
                let file = self.dir.join(format!("{stem}{n}.export"));
                File::create(&file)?;
                args.push(format!(
                    "type=fuse,id=e{n},node-name=q{n},mountpoint={},writable=on{iothread}",
                    file.display()
                ));
                files.push(file);
            }
        }
        let log = self.dir.join(format!("{stem}.log"));
        let mut server = Server::start(self.kind.name(), "qemu-storage-daemon".as_ref(), &args, &[], &log)?;
        if is_nbd {
            server.wait_until(|| socket.exists())?;
            let uri = format!("nbd+unix:///v0?socket={}", socket.display());
            return Ok(Serving { server, subject: Subject::Nbd(uri) });
        }
        server.wait_until(|| files.iter().all(|file| ensure_served(file, &self.dir, self.len).is_ok()))?;
        Ok(Serving { server, subject: Subject::Files(files) })
    }

    fn nbdkit(&self, stem: &str) -> Result<Serving> {
        let socket = self.dir.join(format!("{stem}.sock"));
        // Left by the process before, it would be in the way.
        let _ = fs::remove_file(&socket);
        let words = ["-f", "-U", &socket.display().to_string(), "--filter=cow", "file"].map(str::to_owned);
        let args = [words.as_slice(), &[self.base.display().to_string()]].concat();
        let log = self.dir.join(format!("{stem}.log"));
        // Its overlay lies there.
        let env = [("TMPDIR", self.dir.as_path())];
        let mut server = Server::start(self.kind.name(), "nbdkit".as_ref(), &args, &env, &log)?;
        server.wait_until(|| socket.exists())?;
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Ok(Serving { server, subject: Subject::Nbd(uri) })
    }
}

/// What a peer says of its version.
pub fn version(program: &str) -> Option<String> {
    let text = succeed(Command::new(program).arg("--version"), PATIENCE).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}
