//! Many volumes, many records: what a thousand volumes cost a node, idle and written to, and how fast one with ten
//! thousand images and volumes starts and lists them.
//!
//! The program that is running is measured, as a node of its own. The records of images are made here, as
//! `engine/docs/format.md` describes them, and volumes by the engine's codecs, because ten thousand calls of the command line
//! would take longer than what is measured. Each volume keeps two files open, so that the limit of open files bounds how
//! many there can be; the report says how many there were.

use std::{
    collections::BTreeMap,
    fs::{self, File, Permissions},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bedplate_engine::{
    cow::{
        head::HeadIndex,
        map::checkpoint::{self, LogLen},
    },
    error::Error,
    exec::head::{data_path, map_path},
    image::{BaseImage, BaseSource},
    units::ByteLen,
    volume::{
        disk::Disk,
        layer,
        record::{FORMAT_VERSION, ImageRef, LayerRef, VolumeRecord},
    },
};
use jiff::Timestamp;
use nix::{
    sys::{
        resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit},
        time::TimeValLike,
    },
    unistd::syncfs,
};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha512};
use uuid::Uuid;

use crate::{
    figure::Figure,
    machine::Machine,
    process::succeed,
    target::{
        Transport,
        node::{Node, Program, millis},
    },
};

/// What volumes promise; they take what is written to them.
const VOLUME_SIZE: u64 = 20 << 30;
const IMAGE_LEN: usize = 4096;
/// Images that volumes stand on; the others are only there.
const BASES: usize = 100;
/// Open files of a node apart from its volumes and what they stand on, and some more.
const OTHER_FILES: usize = 100;
/// The longest that a listing may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of everything.
pub struct Scale {
    /// Volumes of the node whose memory is measured and which are written to.
    pub volumes: usize,
    /// Images, and as many volumes, of the node that starts and lists.
    pub records: usize,
    /// How long each volume is written to once a second.
    pub seconds: usize,
    pub rounds: usize,
}

type Samples = BTreeMap<String, Vec<f64>>;

/// Measure nodes with disks made below `dir`, and print the figures.
pub fn run(dir: &Path, scale: &Scale) -> Result<()> {
    let program = &Program::look("")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let volumes_max = usize::try_from(hard)?.saturating_sub(BASES + OTHER_FILES) / 2;
    let machine = Machine::look();
    let mut samples = Samples::new();
    {
        let root = tempfile::tempdir_in(dir)?;
        let before = memory(&serve(program, root.path())?.0)?;
        make_disk(&root.path().join("disk"), 1, scale.volumes.min(volumes_max))?;
        for round in 0..scale.rounds {
            eprintln!("{} volumes, round {} of {}", scale.volumes, round + 1, scale.rounds);
            many_volumes(program, root.path(), scale, before, &mut samples)?;
        }
    }
    let many = scale.records.min(volumes_max);
    let root = tempfile::tempdir_in(dir)?;
    make_disk(&root.path().join("disk"), scale.records, many)?;
    for round in 0..scale.rounds {
        eprintln!("{} images, {many} volumes, round {} of {}", scale.records, round + 1, scale.rounds);
        many_records(program, root.path(), scale.records, many, &mut samples)?;
    }
    #[derive(Serialize)]
    struct Report {
        machine: Machine,
        rounds: usize,
        open_files_max: u64,
        volumes: usize,
        catalog_images: usize,
        catalog_volumes: usize,
        figures: BTreeMap<String, Figure>,
    }
    let figures = samples.into_iter().map(|(name, values)| (name, Figure::of(values))).collect();
    let report = Report {
        machine,
        rounds: scale.rounds,
        open_files_max: hard,
        volumes: scale.volumes.min(volumes_max),
        catalog_images: scale.records,
        catalog_volumes: many,
        figures,
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// Memory of a node whose volumes nobody uses, then opens, then writes to.
fn many_volumes(
    program: &Program,
    root: &Path,
    scale: &Scale,
    before: f64,
    samples: &mut Samples,
) -> Result<()> {
    let mut put = |name: &str, value: f64| samples.entry(name.to_owned()).or_default().push(value);
    let (node, ready_after) = serve(program, root)?;
    put("volumes_start_ms", ready_after);
    let mut files = Vec::new();
    for entry in fs::read_dir(root.join("mount/volumes"))? {
        files.push(File::options().write(true).open(entry?.path())?);
    }
    ensure!(files.len() == scale.volumes, "{} of {} volumes are served", files.len(), scale.volumes);
    let each = |memory: f64| Ok::<f64, anyhow::Error>((memory - before) / float(files.len())?);
    put("memory_open_kib_each", each(memory(&node)?)?);
    let core_before = core_time(&node)?;
    let written = write_each_second(&files, scale.seconds)?;
    let spent = core_time(&node)?.saturating_sub(core_before).as_secs_f64();
    put("write_p50_us", written.p50);
    put("write_p99_us", written.p99);
    put("write_late_max_ms", written.late_max_ms);
    put("writes_per_s", written.per_second);
    put("write_core_us", spent * 1e6 / float(files.len() * scale.seconds)?);
    put("memory_written_kib_each", each(memory(&node)?)?);
    drop(files);
    let start = Instant::now();
    drop(node);
    put("volumes_stop_ms", millis(start));
    let (node, _) = serve(program, root)?;
    put("memory_idle_kib_each", (memory(&node)? - before) / float(scale.volumes)?);
    Ok(())
}

fn many_records(
    program: &Program,
    root: &Path,
    images: usize,
    volumes: usize,
    samples: &mut Samples,
) -> Result<()> {
    let mut put = |name: &str, value: f64| samples.entry(name.to_owned()).or_default().push(value);
    let (node, ready_after) = serve(program, root)?;
    put("catalog_start_ms", ready_after);
    for (noun, count) in [("image", images), ("volume", volumes)] {
        // On cores, of client and server: what it takes where nobody else is at work.
        let before = core_time(&node)? + core_time_of_commands()?;
        let (table, took) = command(program, root, &[noun, "list"])?;
        let spent = (core_time(&node)? + core_time_of_commands()?).saturating_sub(before);
        put(&format!("{noun}_list_core_ms"), spent.as_secs_f64() * 1e3);
        ensure!(
            table.lines().count() == count + 1,
            "{noun} list has {} lines for {count}",
            table.lines().count()
        );
        put(&format!("{noun}_list_ms"), took);
        put(&format!("{noun}_list_json_ms"), command(program, root, &[noun, "list", "-o", "json"])?.1);
    }
    let start = Instant::now();
    drop(node);
    put("catalog_stop_ms", millis(start));
    Ok(())
}

struct Written {
    p50: f64,
    p99: f64,
    late_max_ms: f64,
    per_second: f64,
}

/// One write of 4 KiB to each file in each second, evenly spread.
fn write_each_second(files: &[File], seconds: usize) -> Result<Written> {
    let apart = Duration::from_secs(1) / u32::try_from(files.len())?;
    let mut latencies = Vec::with_capacity(files.len() * seconds);
    let (start, mut late_max) = (Instant::now(), Duration::ZERO);
    let mut due = start;
    for second in 0..seconds {
        // Another place each time, so that each is a first write.
        let place = u64::try_from(second)? * (1 << 20);
        for file in files {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let begin = Instant::now();
            file.write_all_at(&[7; 4096], place)?;
            latencies.push(begin.elapsed().as_secs_f64() * 1e6);
            due += apart;
            late_max = late_max.max(Instant::now().saturating_duration_since(due));
        }
    }
    let took = start.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let at = |part: usize| latencies.get(latencies.len() * part / 100).copied().unwrap_or(f64::NAN);
    Ok(Written {
        p50: at(50),
        p99: at(99),
        late_max_ms: late_max.as_secs_f64() * 1e3,
        per_second: float(latencies.len())? / took,
    })
}

/// A node, and after how many milliseconds it was ready.
fn serve(program: &Program, root: &Path) -> Result<(Node, f64)> {
    let start = Instant::now();
    let node = Node::serve_in(program, Transport::Classic, root.to_owned())?;
    Ok((node, millis(start)))
}

/// What a command prints, and how many milliseconds it takes.
fn command(program: &Program, root: &Path, words: &[&str]) -> Result<(String, f64)> {
    let start = Instant::now();
    let mut command = Command::new(program.path());
    let printed = succeed(command.arg("--socket").arg(root.join("socket")).args(words), PATIENCE)?;
    Ok((printed, millis(start)))
}

/// Resident memory in KiB, the program's own pages too.
fn memory(node: &Node) -> Result<f64> {
    let mut sum = 0.0;
    for pid in node.pids() {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        sum += field.trim().trim_end_matches(" kB").parse::<f64>()?;
    }
    Ok(sum)
}

/// How long its threads that live have been on cores.
fn core_time(node: &Node) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for pid in node.pids() {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let text = fs::read_to_string(thread?.path().join("schedstat"))?;
            let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
            sum += Duration::from_nanos(nanos.context("the time of a thread")?);
        }
    }
    Ok(sum)
}

/// How long the processes that have ended, and that this one waited for, were on cores.
fn core_time_of_commands() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?))
}

/// A disk with so many images and volumes, of which each stands on one of the first [`BASES`] images. Its files are
/// written as the program would, but synced together.
fn make_disk(path: &Path, images: usize, volumes: usize) -> Result<()> {
    eprintln!("making {images} images and {volumes} volumes");
    fs::create_dir_all(path)?;
    drop(Disk::open(path, Arc::new(NoImages))?);
    let at = path.join("images");
    let mut bases = Vec::new();
    for number in 0..images {
        let image = make_image(&at, &format!("image{number:05}"))?;
        if bases.len() < BASES {
            bases.push(image);
        }
    }
    for number in 0..volumes {
        let image = bases.get(number % bases.len()).context("an image")?.clone();
        make_volume(path, &format!("volume{number:05}"), image)?;
    }
    syncfs(File::open(path)?)?;
    Ok(())
}

/// The files of a ready image.
fn make_image(images: &Path, name: &str) -> Result<ImageRef> {
    let mut content = name.as_bytes().to_vec();
    content.resize(IMAGE_LEN, 0);
    let sha512 = Sha512::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let uuid = Uuid::new_v4();
    let id = uuid.simple().to_string();
    let dir = images.join(format!("{name}-{}", id.get(..8).context("a uuid has more")?));
    fs::create_dir(&dir)?;
    let file = dir.join("image");
    fs::write(&file, &content)?;
    fs::set_permissions(&file, Permissions::from_mode(0o444))?;
    let found = fs::metadata(&file)?;
    let record = json!({
        "format_version": 1,
        "name": name,
        "uuid": uuid,
        "state": "ready",
        "created_at": Timestamp::now().to_string(),
        "source": "/srv/images/source.raw",
        "format": "raw",
        "size_bytes": IMAGE_LEN,
        "virtual_size_bytes": IMAGE_LEN,
        "sha512": sha512,
        "mtime_ns": found.mtime() * 1_000_000_000 + found.mtime_nsec(),
        "inode": found.ino(),
    });
    fs::write(dir.join("image.json"), serde_json::to_vec(&record)?)?;
    Ok(ImageRef { name: name.to_owned(), uuid, sha512 })
}

/// A volume that nothing has been written to.
fn make_volume(disk: &Path, name: &str, image: ImageRef) -> Result<()> {
    let blocks = ByteLen(VOLUME_SIZE).blocks_ceil();
    let head = Uuid::new_v4();
    let dir = layer::dir(head);
    fs::create_dir(disk.join(&dir))?;
    File::create(disk.join(data_path(&dir)))?.set_len(blocks.len().0)?;
    let (mut map, header) = checkpoint::encode(head, 1, 0, &HeadIndex::new(blocks), LogLen::LIVE);
    map.resize(map.len() + usize::try_from(header.log_len)?, 0);
    fs::write(disk.join(map_path(&dir)), map)?;
    let record = VolumeRecord {
        format_version: FORMAT_VERSION,
        name: name.to_owned(),
        uuid: Uuid::new_v4(),
        size_bytes: VOLUME_SIZE,
        image: Some(image),
        head,
        layers: vec![LayerRef { uuid: head, parent: None }],
        snapshots: Vec::new(),
        created_at: Timestamp::now(),
    };
    let dir = disk.join("volumes").join(record.dir_name());
    fs::create_dir(&dir)?;
    fs::write(dir.join("volume.json"), serde_json::to_vec_pretty(&record)?)?;
    Ok(())
}

/// Of a disk without volumes.
struct NoImages;

impl BaseSource for NoImages {
    fn open_base(&self, image: &ImageRef) -> bedplate_engine::error::Result<Arc<dyn BaseImage>> {
        Err(Error::NotFound { kind: "image", name: image.name.clone() })
    }
}

fn float(count: usize) -> Result<f64> {
    Ok(f64::from(u32::try_from(count)?))
}
