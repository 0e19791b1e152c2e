//! Where a run takes place: the grounds, the node for each transport, the peers, started when they are first needed.
//!
//! Owns [`Field`], which takes one sample of one lane: it brings the target up to the content, warms or drops what the
//! page cache holds, measures, and reads the servers' time on cores before and after. What fails here is why a lane is
//! missing, in words for the report.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    io::{Seek, SeekFrom},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use super::{
    Executor, Kind, Library, Transport, is_nbd,
    node::{Node, Program},
    peer::{self, Peer},
};
use crate::{
    content::{Ground, Medium, cool, disk_read_bytes, fill, mount_of, warm},
    engine,
    figure::{Measure, float},
    fio::{self, Client, Lasts, Load, Subject},
    process::{cpu_seconds, succeed},
    report::TargetInfo,
    sample::Sample,
    workload::{Content, LAYERED_LEN, Pattern, Place, Work, Workload},
};

/// A single pass may take so many times what another sample takes.
const PASS_SAMPLES_MAX: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(600);
/// The program with other qcow2 libraries, beside this one.
const LIBRARIES: &str = "bedplate-bench-peers";

/// What a user may decide.
#[derive(Clone, Debug)]
pub struct Places {
    pub disk: PathBuf,
    pub memory: PathBuf,
    pub len: u64,
    pub may_write_user_targets: bool,
}

/// What is measured when a lane is ready.
struct Ready {
    subject: Way,
    pids: Vec<u32>,
    /// Files that the page cache may hold.
    backing: Vec<PathBuf>,
    client: Client,
    len: u64,
}

/// How the content is reached.
enum Way {
    Fio(Subject),
    Engine { executor: Executor, disk: PathBuf },
    Library { library: Library, overlay: PathBuf },
}

/// Everything that a run has started.
pub struct Field {
    places: Places,
    program: Program,
    // Servers go before the ground that they stand on.
    nodes: BTreeMap<(Transport, Medium), Node>,
    peers: BTreeMap<(Kind, Medium), Peer>,
    grounds: BTreeMap<Medium, Ground>,
}

impl Field {
    /// Nothing is started yet; `serve_flags` are for every node.
    pub fn new(places: Places, serve_flags: &str) -> Result<Field> {
        let program = Program::look(serve_flags)?;
        Ok(Field {
            places,
            program,
            nodes: BTreeMap::new(),
            peers: BTreeMap::new(),
            grounds: BTreeMap::new(),
        })
    }

    /// The best transport that volumes can have here.
    pub fn best_transport(&self) -> Transport {
        match self.program.flags(Transport::Uring) {
            Ok(_) => Transport::Uring,
            Err(_) => Transport::Classic,
        }
    }

    /// One sample of one lane.
    pub fn sample(&mut self, kind: &Kind, workload: &Workload, seconds: u32, round: u64) -> Result<Sample> {
        ensure!(!kind.needs_root() || geteuid().is_root(), "only root may mount and make devices");
        let Work::Requests { pattern, block, depth, clients } = workload.work else {
            return self.step(kind, workload);
        };
        let ready = self.ready(kind, workload)?;
        match workload.place {
            Place::PageCache => warm(&ready.backing)?,
            Place::Cold => cool(&ready.backing)?,
            Place::Disk | Place::Memory => {}
        }
        let cpu_of = |pids: &[u32]| pids.iter().map(|pid| cpu_seconds(*pid)).sum::<Option<f64>>();
        let (cpu, read) = (cpu_of(&ready.pids), disk_read_bytes(&self.places.disk));
        let lasts = if workload.is_single_pass() {
            Lasts::OnePass { seconds_max: seconds * PASS_SAMPLES_MAX }
        } else {
            Lasts::Seconds(seconds)
        };
        let mut sample = match ready.subject {
            Way::Fio(subject) => {
                let (client, len) = (ready.client, ready.len);
                Load { subject, pattern, block, depth, clients, client, lasts, len, seed: round + 1 }.run()?
            }
            Way::Engine { executor, disk } => {
                let spec = engine::Spec {
                    executor,
                    disk,
                    base: self.ground(medium(workload))?.base(),
                    content: workload.content,
                    pattern,
                    block,
                    depth,
                    clients,
                    seconds,
                    is_single_pass: workload.is_single_pass(),
                };
                engine::sample(self.program.path(), &spec)?
            }
            Way::Library { library, overlay } => {
                let program = self.program.path().with_file_name(LIBRARIES);
                let in_order = if pattern == Pattern::SequentialRead { "sequential" } else { "random" };
                let mut command = Command::new(program);
                command.env("RUST_BACKTRACE", "0");
                command.arg(Kind::Library(library).name()).arg(overlay).arg(in_order);
                command.args([block, u64::from(depth * clients), u64::from(seconds)].map(|n| n.to_string()));
                serde_json::from_str(&succeed(&mut command, PATIENCE)?)?
            }
        };
        if let (Some(before), Some(after), false) = (cpu, cpu_of(&ready.pids), ready.pids.is_empty()) {
            sample.set(Measure::ServerCpuUsPerOp, (after - before) * 1e6 / float(sample.ops()));
        }
        if let (Content::Storm(_), Some(before), Some(after)) =
            (workload.content, read, disk_read_bytes(&self.places.disk))
        {
            sample.set(Measure::DiskReadRatio, float(after - before) / float(ready.len));
        }
        self.release(kind, workload)?;
        Ok(sample)
    }

    fn step(&mut self, kind: &Kind, workload: &Workload) -> Result<Sample> {
        let Work::Life(step) = workload.work else { bail!("{} is no step", workload.name) };
        let medium = medium(workload);
        let millis = match kind {
            Kind::Fuse(transport) => self.node(*transport, medium)?.step(step)?,
            _ => self.peer(kind, medium)?.step(step)?,
        };
        let mut sample = Sample::of(1);
        sample.set(Measure::Millis, millis);
        Ok(sample)
    }

    /// Give back what was made for this sample.
    fn release(&mut self, kind: &Kind, workload: &Workload) -> Result<()> {
        let medium = medium(workload);
        match kind {
            Kind::Fuse(transport) => self.node(*transport, medium)?.release(workload.content),
            Kind::QemuFuse(_) | Kind::QemuNbd(_) | Kind::NbdkitCow => {
                self.peer(kind, medium)?.release(workload.content);
                Ok(())
            }
            Kind::Bare
            | Kind::Engine(_)
            | Kind::Passthrough
            | Kind::Loop(_)
            | Kind::Library(_)
            | Kind::User(_) => Ok(()),
        }
    }

    fn ready(&mut self, kind: &Kind, workload: &Workload) -> Result<Ready> {
        let (content, place, medium) = (workload.content, workload.place, medium(workload));
        let base_len = self.places.len;
        let len = if matches!(content, Content::Layers(_)) { LAYERED_LEN } else { base_len };
        // Only the bare file, and what the kernel reads for itself, has a page cache of its own.
        let own_cache = if place == Place::Disk { Client::Direct } else { Client::Buffered };
        let mut ready = Ready {
            subject: Way::Fio(Subject::Files(Vec::new())),
            pids: Vec::new(),
            backing: Vec::new(),
            client: Client::Direct,
            len,
        };
        match kind {
            Kind::Bare => {
                let files = self.bare(content, medium)?;
                ready.backing = files.clone();
                ready.subject = Way::Fio(Subject::Files(files));
                ready.client = own_cache;
            }
            Kind::Fuse(transport) => {
                let node = self.node(*transport, medium)?;
                ready.subject = Way::Fio(Subject::Files(node.volumes(content)?));
                (ready.pids, ready.backing) = (node.pids(), node.base_files());
            }
            Kind::Passthrough => {
                let node = self.node(Transport::Classic, medium)?;
                ready.subject = Way::Fio(Subject::Files(vec![node.image()?]));
                (ready.pids, ready.backing) = (node.pids(), node.base_files());
                ready.client = own_cache;
            }
            Kind::Loop(transport) => {
                let node = self.node(*transport, medium)?;
                ready.subject = Way::Fio(Subject::Files(vec![node.attached(content)?]));
                (ready.pids, ready.backing) = (node.pids(), node.base_files());
            }
            Kind::QemuFuse(_) | Kind::QemuNbd(_) | Kind::NbdkitCow => {
                let (subject, pid) = self.peer(kind, medium)?.serve(content, place)?;
                ready.subject = Way::Fio(subject);
                ready.pids = vec![pid];
                ready.backing = vec![self.ground(medium)?.base()];
            }
            Kind::Engine(executor) => {
                engine::check(*executor)?;
                let ground = self.ground(medium)?;
                ready.backing = vec![ground.base()];
                ready.subject = Way::Engine { executor: *executor, disk: ground.path("engine") };
            }
            Kind::Library(library) => {
                let program = self.program.path().with_file_name(LIBRARIES);
                ensure!(
                    program.exists(),
                    "{LIBRARIES} is not beside this program: cargo build --release -p bedplate-bench \
                     --features peers"
                );
                let ground = self.ground(medium)?;
                // qcow2-rs knows no raw backing file.
                let (below, overlay) = (ground.path("library-base.qcow2"), ground.path("library.qcow2"));
                if !overlay.exists() {
                    let mut convert = Command::new("qemu-img");
                    convert.args(["convert", "-q", "-f", "raw", "-O", "qcow2"]);
                    succeed(convert.arg(ground.base()).arg(&below), PATIENCE)?;
                    let mut create = Command::new("qemu-img");
                    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
                    succeed(create.arg(&below).arg(&overlay), PATIENCE)?;
                }
                ready.backing = vec![below];
                ready.subject = Way::Library { library: *library, overlay };
            }
            Kind::User(named) => self.user(named, workload, &mut ready)?,
        }
        Ok(ready)
    }

    fn user(&self, named: &str, workload: &Workload, ready: &mut Ready) -> Result<()> {
        ensure!(
            !workload.writes() || self.places.may_write_user_targets,
            "writing would destroy what it holds; --target-writes allows it"
        );
        if is_nbd(named) {
            ensure!(fio::speaks_nbd(), "this fio was built without its NBD engine");
            ready.subject = Way::Fio(Subject::Nbd(named.to_owned()));
            return Ok(());
        }
        let path = PathBuf::from(named);
        let len = File::open(&path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        ready.len = ready.len.min(len.with_context(|| format!("open {named}"))?);
        let Work::Requests { block, .. } = workload.work else { bail!("it has no life of its own") };
        ensure!(ready.len >= block, "it is smaller than one request");
        ready.client = if workload.place == Place::PageCache { Client::Buffered } else { Client::Direct };
        if fs::metadata(&path)?.is_file() {
            ready.backing = vec![path.clone()];
        }
        ready.subject = Way::Fio(Subject::Files(vec![path]));
        Ok(())
    }

    /// Plain files with this content.
    fn bare(&mut self, content: Content, medium: Medium) -> Result<Vec<PathBuf>> {
        let ground = self.ground(medium)?;
        Ok(match content {
            Content::Base => vec![ground.base()],
            Content::Storm(count) => (0..count).map(|_| ground.base()).collect(),
            Content::Own => {
                let path = ground.path("own.raw");
                if !path.exists() {
                    let file = File::create(&path)?;
                    fill(&file, ground.len)?;
                    file.sync_all()?;
                }
                vec![path]
            }
            Content::Fresh => {
                let path = ground.path("fresh.raw");
                let file = File::create(&path)?;
                file.set_len(ground.len)?;
                file.sync_all()?;
                vec![path]
            }
            Content::Layers(_) => bail!("a plain file has no layers"),
        })
    }

    fn ground(&mut self, medium: Medium) -> Result<&Ground> {
        match self.grounds.entry(medium) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let dir = match medium {
                    Medium::Disk => &self.places.disk,
                    Medium::Memory => &self.places.memory,
                };
                Ok(entry.insert(Ground::make(dir, self.places.len)?))
            }
        }
    }

    fn node(&mut self, transport: Transport, medium: Medium) -> Result<&mut Node> {
        let key = (transport, medium);
        if !self.nodes.contains_key(&key) {
            self.ground(medium)?;
            let ground = self.grounds.get(&medium).context("it has just been made")?;
            self.nodes.insert(key, Node::start(&self.program, transport, ground)?);
        }
        self.nodes.get_mut(&key).context("it has just been started")
    }

    fn peer(&mut self, kind: &Kind, medium: Medium) -> Result<&mut Peer> {
        let key = (kind.clone(), medium);
        if !self.peers.contains_key(&key) {
            self.ground(medium)?;
            let ground = self.grounds.get(&medium).context("it has just been made")?;
            self.peers.insert(key.clone(), Peer::find(kind, ground)?);
        }
        self.peers.get_mut(&key).context("it has just been found")
    }

    /// What a target was, for the report.
    pub fn describe(&self, kind: &Kind) -> TargetInfo {
        let node = |transport: Transport| {
            let mut nodes = [Medium::Disk, Medium::Memory].into_iter();
            nodes.find_map(|medium| self.nodes.get(&(transport, medium)))
        };
        let of_node =
            |transport: Transport| node(transport).map(|node| (node.flags(), mount_of(&node.mount())));
        let ours = Some(format!("bedplate {}", env!("CARGO_PKG_VERSION")));
        let (version, found) = match kind {
            Kind::Bare => (None, Some((String::new(), mount_of(&self.places.disk)))),
            Kind::Engine(_) => (ours, None),
            Kind::Fuse(transport) | Kind::Loop(transport) => (ours, of_node(*transport)),
            Kind::Passthrough => (ours, of_node(Transport::Classic)),
            Kind::QemuFuse(_) | Kind::QemuNbd(_) => (peer::version("qemu-storage-daemon"), None),
            Kind::NbdkitCow => (peer::version("nbdkit"), None),
            Kind::Library(_) => (None, None),
            Kind::User(named) => (None, Some((String::new(), mount_of(Path::new(named))))),
        };
        let (options, mount) = found.unwrap_or_default();
        TargetInfo {
            name: kind.name().to_owned(),
            about: kind.about().to_owned(),
            is_yardstick: kind.is_yardstick(),
            version,
            options,
            mount,
        }
    }
}

/// The ground that a workload's place lies on.
pub fn medium(workload: &Workload) -> Medium {
    match workload.place {
        Place::PageCache | Place::Cold | Place::Disk => Medium::Disk,
        Place::Memory => Medium::Memory,
    }
}
