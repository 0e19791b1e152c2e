//! A private node: `bedplate serve` with a state directory, a disk, a mount and a socket of its own.
//!
//! Owns [`Node`]. Everything is asked of it as a user would, through the command line of the program that is running,
//! so that what is measured is what is shipped. Whether the program knows a transport or an option is read from its
//! own help.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::Transport;
use crate::{
    content::{Ground, ensure_served, fill, large_files, unmount_below},
    fio::{Client, Lasts, Load, Subject},
    process::{Server, succeed},
    workload::{Content, LAYERED_LEN, Pattern, Step},
};

/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(600);
const IMAGE: &str = "base";
/// Steps of one sample of a volume's life; their median counts.
const STEPS: usize = 5;
/// Before steps under load are taken, the load has to run.
const LOAD_RUNS_AFTER: Duration = Duration::from_millis(500);
const BLOCK_LEN: u64 = 4096;
const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// The program that is running, as a command.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    serve_help: String,
    flags: Vec<String>,
}

impl Program {
    /// This program, and flags separated by blanks that every node gets.
    pub fn look(flags: &str) -> Result<Program> {
        let path = std::env::current_exe().context("find this program")?;
        let help = succeed(Command::new(&path).args(["serve", "--help"]), PATIENCE)?;
        Ok(Program { path, serve_help: help, flags: flags.split_whitespace().map(str::to_owned).collect() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The flags of a transport, or why it cannot be had.
    pub fn flags(&self, transport: Transport) -> Result<Vec<String>> {
        let knows = |flag: &str| self.serve_help.contains(flag);
        let mut flags = Vec::new();
        match transport {
            // A program without the choice has this one.
            Transport::Classic if !knows("--fuse-transport") => {}
            Transport::Classic => flags.extend(["--fuse-transport", "classic"]),
            Transport::Uring | Transport::UringLowLatency => {
                ensure!(knows("--fuse-transport"), "this bedplate has no FUSE over io_uring");
                match fs::read_to_string(PARAMETER) {
                    Ok(value) if value.trim() == "Y" => {}
                    Ok(_) => bail!("the kernel's FUSE over io_uring is off: echo Y > {PARAMETER}"),
                    Err(_) => bail!("this kernel has no FUSE over io_uring (6.14 and later have)"),
                }
                flags.extend(["--fuse-transport", "uring"]);
            }
        }
        if transport == Transport::UringLowLatency {
            ensure!(knows("--low-latency"), "this bedplate has no --low-latency");
            flags.push("--low-latency");
        }
        Ok(flags.into_iter().map(str::to_owned).chain(self.flags.clone()).collect())
    }
}

/// A node that runs.
#[derive(Debug)]
pub struct Node {
    program: PathBuf,
    flags: Vec<String>,
    dir: PathBuf,
    server: Option<Server>,
    base_len: u64,
    /// Volumes by what is in them.
    volumes: BTreeMap<Content, Vec<String>>,
    loops: BTreeMap<Content, PathBuf>,
    /// Of volumes that are made for one sample.
    made: u64,
}

impl Node {
    /// A node with the ground's base as its image.
    pub fn start(program: &Program, transport: Transport, ground: &Ground) -> Result<Node> {
        let dir = ground.path(match transport {
            Transport::Classic => "node-classic",
            Transport::Uring => "node-uring",
            Transport::UringLowLatency => "node-lowlat",
        });
        let mut node = Node::serve_in(program, transport, dir)?;
        node.base_len = ground.len;
        node.bring_in(&ground.base())?;
        Ok(node)
    }

    /// A node without an image.
    pub fn serve_in(program: &Program, transport: Transport, dir: PathBuf) -> Result<Node> {
        let flags = program.flags(transport)?;
        fs::create_dir_all(dir.join("disk"))?;
        let mut node = Node {
            program: program.path.clone(),
            flags,
            dir,
            server: None,
            base_len: 0,
            volumes: BTreeMap::new(),
            loops: BTreeMap::new(),
            made: 0,
        };
        node.serve()?;
        Ok(node)
    }

    /// Make an image of a file.
    pub fn bring_in(&self, source: &Path) -> Result<()> {
        self.run(&["image", "create", IMAGE, "--from", &source.display().to_string(), "--wait"]).map(drop)
    }

    pub fn delete_image(&self) -> Result<()> {
        self.run(&["image", "delete", IMAGE]).map(drop)
    }

    fn serve(&mut self) -> Result<()> {
        // Not the machine's configuration.
        let mut args = ["serve", "--config", "/dev/null"].map(str::to_owned).to_vec();
        for (flag, place) in
            [("--state", "state"), ("--disk", "disk"), ("--mount", "mount"), ("--socket", "socket")]
        {
            args.extend([flag.to_owned(), self.dir.join(place).display().to_string()]);
        }
        args.extend(self.flags.clone());
        let mut server =
            Server::start("bedplate serve", self.program.as_os_str(), &args, &[], &self.dir.join("log"))?;
        let (volumes, socket) = (self.dir.join("mount/volumes"), self.dir.join("socket"));
        server.wait_until(|| socket.exists() && volumes.is_dir())?;
        self.server = Some(server);
        Ok(())
    }

    /// One command of the program, spoken to this node.
    fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(self.dir.join("socket")).args(words);
        succeed(&mut command, PATIENCE).with_context(|| format!("bedplate {}", words.join(" ")))
    }

    pub fn pids(&self) -> Vec<u32> {
        self.server.iter().map(Server::pid).collect()
    }

    /// The flags it was started with.
    pub fn flags(&self) -> String {
        if self.flags.is_empty() { "defaults".to_owned() } else { self.flags.join(" ") }
    }

    pub fn mount(&self) -> PathBuf {
        self.dir.join("mount")
    }

    /// The files of the image, which the page cache may hold.
    pub fn base_files(&self) -> Vec<PathBuf> {
        large_files(&self.dir.join("disk/images"), self.base_len)
    }

    pub fn image(&self) -> Result<PathBuf> {
        let path = self.mount().join("images").join(IMAGE);
        ensure_served(&path, &self.dir, self.base_len)?;
        Ok(path)
    }

    /// The volumes with this content, one for each client; made when they are first asked for. A fresh one is new each
    /// time.
    pub fn volumes(&mut self, content: Content) -> Result<Vec<PathBuf>> {
        if content == Content::Fresh {
            self.release(content)?;
        }
        if !self.volumes.contains_key(&content) {
            let names = self.make(content)?;
            self.volumes.insert(content, names);
        }
        let len = if matches!(content, Content::Layers(_)) { LAYERED_LEN } else { self.base_len };
        let names = self.volumes.get(&content).into_iter().flatten();
        let paths: Vec<PathBuf> = names.map(|name| self.path_of(name)).collect();
        paths.iter().try_for_each(|path| ensure_served(path, &self.dir, len))?;
        Ok(paths)
    }

    /// Give back what was made for one sample.
    pub fn release(&mut self, content: Content) -> Result<()> {
        if content == Content::Fresh {
            for name in self.volumes.remove(&content).unwrap_or_default() {
                self.run(&["volume", "delete", &name])?;
            }
        }
        Ok(())
    }

    /// A loop device over the volume with this content.
    pub fn attached(&mut self, content: Content) -> Result<PathBuf> {
        if let Some(device) = self.loops.get(&content) {
            return Ok(device.clone());
        }
        self.volumes(content)?;
        let name = self.volumes.get(&content).and_then(|names| names.first()).context("a volume")?;
        let device = PathBuf::from(self.run(&["volume", "attach", name])?.trim());
        self.loops.insert(content, device.clone());
        Ok(device)
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.mount().join("volumes").join(name)
    }

    fn over_base(&mut self, name: &str) -> Result<String> {
        self.made += 1;
        let name = format!("{name}{}", self.made);
        self.run(&["volume", "create", &name, "--image", IMAGE])?;
        Ok(name)
    }

    fn make(&mut self, content: Content) -> Result<Vec<String>> {
        match content {
            Content::Base => Ok(vec![self.over_base("base")?]),
            Content::Fresh => Ok(vec![self.over_base("fresh")?]),
            Content::Own => {
                let name = self.over_base("own")?;
                let file = File::options().write(true).open(self.path_of(&name))?;
                fill(&file, self.base_len)?;
                file.sync_all()?;
                Ok(vec![name])
            }
            Content::Storm(count) => (0..count).map(|_| self.over_base("storm")).collect(),
            Content::Layers(count) => {
                let name = format!("layers{count}");
                self.run(&["volume", "create", &name, "--size", &LAYERED_LEN.to_string()])?;
                let file = File::options().write(true).open(self.path_of(&name))?;
                let block = [1; 4096];
                for layer in 0..count {
                    let blocks = (layer..LAYERED_LEN / BLOCK_LEN).step_by(usize::try_from(count)?);
                    for number in blocks {
                        file.write_all_at(&block, number * BLOCK_LEN)?;
                    }
                    self.run(&["snapshot", "create", &name, &format!("s{layer}")])?;
                }
                Ok(vec![name])
            }
        }
    }

    /// The milliseconds of one step of a volume's life.
    pub fn step(&mut self, step: Step) -> Result<f64> {
        match step {
            Step::Create => {
                let mut times = Vec::new();
                for _ in 0..STEPS {
                    let start = Instant::now();
                    let name = self.over_base("created")?;
                    times.push(millis(start));
                    self.run(&["volume", "delete", &name])?;
                }
                Ok(median(times))
            }
            Step::Snapshot => self.under_load(|node, volume, n| {
                let name = format!("s{n}");
                let start = Instant::now();
                node.run(&["snapshot", "create", volume, &name])?;
                Ok((millis(start), None))
            }),
            Step::Clone => self.under_load(|node, volume, n| {
                let name = format!("{volume}-clone{n}");
                let start = Instant::now();
                node.run(&["volume", "clone", volume, &name])?;
                Ok((millis(start), Some(name)))
            }),
            Step::Open => {
                self.volumes(Content::Base)?;
                for content in self.loops.keys().copied().collect::<Vec<_>>() {
                    self.detach(content)?;
                }
                let name = self.volumes.get(&Content::Base).and_then(|names| names.first());
                let path = self.path_of(name.context("a volume")?);
                self.server = None;
                let start = Instant::now();
                self.serve()?;
                let file = File::open(path)?;
                file.read_exact_at(&mut [0; 4096], 0)?;
                Ok(millis(start))
            }
        }
    }

    /// The median of some steps on a volume that is written to meanwhile, each with the volume that it made.
    fn under_load(
        &mut self,
        mut step: impl FnMut(&Node, &str, usize) -> Result<(f64, Option<String>)>,
    ) -> Result<f64> {
        let volume = self.over_base("loaded")?;
        let load = Load {
            subject: Subject::Files(vec![self.path_of(&volume)]),
            pattern: Pattern::RandomWrite,
            block: BLOCK_LEN,
            depth: 8,
            clients: 1,
            client: Client::Direct,
            lasts: Lasts::Seconds(60),
            len: self.base_len,
            seed: 1,
        };
        let (mut fio, began) = (load.start(&self.dir.join("load"))?, Instant::now());
        fio.wait_until(|| began.elapsed() > LOAD_RUNS_AFTER)?;
        let mut times = Vec::new();
        let mut made = Vec::new();
        for n in 0..STEPS {
            let (spent, name) = step(self, &volume, n)?;
            times.push(spent);
            made.extend(name);
        }
        // Still there, so every step was taken under load.
        fio.wait_until(|| true)?;
        drop(fio);
        for name in made.iter().chain([&volume]) {
            self.run(&["volume", "delete", name])?;
        }
        Ok(median(times))
    }

    fn detach(&mut self, content: Content) -> Result<()> {
        if self.loops.remove(&content).is_some() {
            let name = self.volumes.get(&content).and_then(|names| names.first()).context("a volume")?;
            self.run(&["volume", "detach", name])?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for content in self.loops.keys().copied().collect::<Vec<_>>() {
            if let Err(error) = self.detach(content) {
                eprintln!("a loop device stays: {error:#}");
            }
        }
        self.server = None;
        // What a node that had to be killed leaves.
        unmount_below(&self.dir);
    }
}

pub fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn median(times: Vec<f64>) -> f64 {
    crate::figure::Figure::of(times).median
}
