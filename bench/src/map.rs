//! The map at full size: a volume of 1 TiB, empty and with every other block written; 1 layer and 200; clones.
//!
//! Each lane runs in a process of its own, prints its samples as JSON and ends. The disks are made once, through the
//! engine's own codec: writing 512 GiB is not needed to have a map that says so.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use bedplate_engine::{
    cow::{BlockState, LEAF_BLOCKS, map::checkpoint::LogLen},
    device::BlockDevice,
    error::Error,
    exec::{
        head::publish_map,
        storage::{Open, Storage, file::FileStorage},
    },
    image::{BaseImage, BaseSource},
    units::{Block, BlockCount, BlockRange, ByteLen},
    volume::{disk::Disk, layer, life::Origin, record::ImageRef},
};
use clap::ValueEnum;
use serde::Serialize;

use crate::{
    figure::{Figure, float},
    machine::{Machine, memory_bytes},
};

const TIB: u64 = 1 << 40;
const BLOCKS: u64 = TIB / 4096;
/// Volume of the layer lanes: small enough to hold its data in memory.
const SMALL: u64 = 64 << 20;
const LAYERS: u64 = 200;
const LOOKUPS: u64 = 400_000;
const CLONES: u64 = 20;

/// One measurement.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Lane {
    /// Open a disk with an empty volume of 1 TiB.
    OpenEmpty,
    /// The same with every other block written.
    OpenFull,
    /// Read the full volume's map file and nothing else.
    ReadCheckpoint,
    /// Clone the full volume, twenty times.
    Clone,
    /// Random 4 KiB reads of a volume of one layer.
    OneLayer,
    /// The same bytes under 200 layers.
    ManyLayers,
    /// The reads of [`Lane::OneLayer`] from one bare file, without the engine.
    OneBareFile,
    /// The reads of [`Lane::ManyLayers`] from as many bare, sparse files, without the engine.
    ManyBareFiles,
    /// Create volumes.
    Create,
}

struct NoImages;

impl BaseSource for NoImages {
    fn open_base(&self, image: &ImageRef) -> bedplate_engine::error::Result<Arc<dyn BaseImage>> {
        Err(Error::NotFound { kind: "image", name: image.name.clone() })
    }
}

fn open(path: &Path) -> Result<Arc<Disk>> {
    Ok(Disk::open(path, Arc::new(NoImages))?)
}

/// Run every lane `rounds` times, interleaved, and print the figures.
pub fn run(dir: &Path, memory_dir: &Path, rounds: usize) -> Result<()> {
    let disk_root = tempfile::tempdir_in(dir)?;
    let memory_root = tempfile::tempdir_in(memory_dir)?;
    let place = |lane: Lane| match lane {
        Lane::OpenEmpty => disk_root.path().join("empty"),
        Lane::OpenFull | Lane::ReadCheckpoint => disk_root.path().join("full"),
        Lane::Clone => disk_root.path().join("clone"),
        Lane::Create => disk_root.path().join("create"),
        Lane::OneLayer => memory_root.path().join("one"),
        Lane::ManyLayers => memory_root.path().join("many"),
        Lane::OneBareFile => memory_root.path().join("one-bare"),
        Lane::ManyBareFiles => memory_root.path().join("many-bare"),
    };
    make_empty(&place(Lane::OpenEmpty))?;
    make_full(&place(Lane::OpenFull))?;
    make_full(&place(Lane::Clone))?;
    make_layers(&place(Lane::OneLayer), 1)?;
    make_layers(&place(Lane::ManyLayers), LAYERS)?;
    make_bare(&place(Lane::OneBareFile), 1)?;
    make_bare(&place(Lane::ManyBareFiles), LAYERS)?;
    std::fs::create_dir(place(Lane::Create))?;

    let lanes = Lane::value_variants();
    let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let machine = Machine::look();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for lane in lanes {
            let found = run_child(*lane, &place(*lane))?;
            for (name, value) in found {
                samples.entry(name).or_default().push(value);
            }
        }
    }
    let ratio = |a: &str, b: &str| -> Vec<f64> {
        let pairs = samples[a].iter().zip(&samples[b]);
        pairs.map(|(a, b)| a / b).collect()
    };
    let derived = [
        ("open_full_to_read_checkpoint", ratio("open_full_ms", "read_checkpoint_ms")),
        ("many_layers_to_one", ratio("many_layers_reads_per_s", "one_layer_reads_per_s")),
        // What the file system alone makes of the same reads: the rest of the ratio above is the engine's.
        ("many_bare_files_to_one", ratio("many_bare_files_reads_per_s", "one_bare_file_reads_per_s")),
        ("many_layers_to_one_lookups", ratio("many_layers_lookups_per_s", "one_layer_lookups_per_s")),
    ];
    samples.extend(derived.map(|(name, values)| (name.to_owned(), values)));
    #[derive(Serialize)]
    struct Report {
        machine: Machine,
        rounds: usize,
        figures: BTreeMap<String, Figure>,
    }
    let figures = samples.into_iter().map(|(name, values)| (name, Figure::of(values))).collect();
    println!("{}", serde_json::to_string_pretty(&Report { machine, rounds, figures })?);
    Ok(())
}

fn run_child(lane: Lane, disk: &Path) -> Result<BTreeMap<String, f64>> {
    let name = lane.to_possible_value().context("every lane has a name")?;
    let output = Command::new(std::env::current_exe()?)
        .args(["bench", "map-lane", name.get_name()])
        .arg(disk)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "lane {} failed", name.get_name());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// One lane, in this process.
pub fn run_lane(lane: Lane, path: &Path) -> Result<()> {
    let figures = match lane {
        Lane::OpenEmpty => measure_open(path, "empty")?,
        Lane::OpenFull => measure_open(path, "full")?,
        Lane::ReadCheckpoint => measure_read(path)?,
        Lane::Clone => measure_clone(path)?,
        Lane::OneLayer => measure_reads(path, "one_layer")?,
        Lane::ManyLayers => measure_reads(path, "many_layers")?,
        Lane::OneBareFile => measure_bare(path, 1, "one_bare_file")?,
        Lane::ManyBareFiles => measure_bare(path, LAYERS, "many_bare_files")?,
        Lane::Create => measure_create(path)?,
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

type Figures = BTreeMap<String, f64>;

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn measure_open(path: &Path, name: &str) -> Result<Figures> {
    // The disk itself is opened first: what is measured is the volume.
    let before = memory_bytes();
    let start = Instant::now();
    let disk = open(path)?;
    let elapsed = millis(start);
    let volume = disk.volume("v")?;
    ensure!(volume.geometry().size == ByteLen(TIB));
    Ok(BTreeMap::from([
        (format!("open_{name}_ms"), elapsed),
        (format!("memory_{name}_mib"), float(memory_bytes() - before) / 1048576.0),
    ]))
}

/// The same reads, in the same pieces, that opening does, from the medium as well.
fn measure_read(path: &Path) -> Result<Figures> {
    let storage = FileStorage::open(path)?;
    let (layer, _) = storage.list(layer::LAYERS)?.into_iter().next().context("a layer")?;
    let start = Instant::now();
    let map = storage.open(&format!("{}/{layer}/map", layer::LAYERS), Open::ReadWrite)?;
    map.drop_cache()?;
    let len = map.len()?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let count = bedplate_engine::units::to_usize((len - at).min(1 << 20));
        map.read_at(&mut buffer[..count], at)?;
        at += count as u64;
    }
    Ok(BTreeMap::from([
        ("read_checkpoint_ms".into(), millis(start)),
        ("checkpoint_mib".into(), float(len) / 1048576.0),
    ]))
}

fn measure_clone(path: &Path) -> Result<Figures> {
    let disk = open(path)?;
    // The first clone freezes the head; what is asked is what one more costs. Nothing is deleted: merging the layers
    // would copy what the map claims.
    let first = format!("first{}", std::process::id());
    disk.clone_volume("v", None, &first)?;
    disk.create_snapshot(&first, "s")?;
    let before = memory_bytes();
    let start = Instant::now();
    for n in 0..CLONES {
        disk.clone_volume(&first, Some("s"), &format!("{first}.{n}"))?;
    }
    let elapsed = millis(start);
    let added = memory_bytes() - before;
    Ok(BTreeMap::from([
        ("clone_ms".into(), elapsed / float(CLONES)),
        ("memory_clone_kib".into(), float(added) / 1024.0 / float(CLONES)),
    ]))
}

/// The same sequence of blocks for every lane.
fn random_blocks() -> impl FnMut() -> Block {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        Block((state >> 33) % (SMALL / 4096))
    }
}

/// The name of a bare file that stands for a layer.
fn bare(layer: u64) -> String {
    format!("bare{layer}")
}

/// The reads of [`measure_reads`]: each block from the file of the layer that has it there.
fn measure_bare(path: &Path, count: u64, name: &str) -> Result<Figures> {
    let storage = FileStorage::open(path)?;
    let files = (0..count).map(|layer| storage.open(&bare(layer), Open::Direct));
    let files = files.collect::<bedplate_engine::error::Result<Vec<_>>>()?;
    let mut buffer = vec![0; 4096];
    let mut random_block = random_blocks();
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        let block = random_block();
        let file = files.get(bedplate_engine::units::to_usize(block.0 % count)).context("a file")?;
        file.read_at(&mut buffer, block.offset().0)?;
    }
    let reads = float(LOOKUPS) / start.elapsed().as_secs_f64();
    Ok(BTreeMap::from([(format!("{name}_reads_per_s"), reads)]))
}

fn measure_reads(path: &Path, name: &str) -> Result<Figures> {
    let disk = open(path)?;
    let volume = disk.volume("v")?;
    let mut buffer = vec![0; 4096];
    let mut random_block = random_blocks();
    let per_second = |start: Instant| float(LOOKUPS) / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        volume.read_at(&mut buffer, random_block().offset().0)?;
    }
    let reads = per_second(start);
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        ensure!(
            volume.extents(BlockRange { start: random_block(), count: BlockCount(1) }.bytes())?.len() == 1
        );
    }
    let lookups = per_second(start);
    Ok(BTreeMap::from([(format!("{name}_reads_per_s"), reads), (format!("{name}_lookups_per_s"), lookups)]))
}

fn measure_create(path: &Path) -> Result<Figures> {
    let disk = open(path)?;
    let mut times = Vec::new();
    for n in 0..9 {
        let start = Instant::now();
        disk.create_volume(&format!("v{n}"), Origin::Empty, Some(ByteLen(TIB)))?;
        times.push(millis(start));
    }
    // Without clients: what a snapshot itself makes changes wait.
    let mut pauses = Vec::new();
    for n in 0..9 {
        let info = disk.create_snapshot("v0", &format!("s{n}"))?;
        pauses.push(info.pauses.last.as_secs_f64() * 1e3);
    }
    for n in 0..9 {
        disk.delete_volume(&format!("v{n}"))?;
    }
    // What one sync of this disk costs, to hold the above against.
    let probe = FileStorage::open(path)?;
    let file = probe.open("probe", Open::Create)?;
    let start = Instant::now();
    for n in 0..8 {
        file.write_at(&[1; 4096], n * 4096)?;
        file.sync()?;
    }
    let sync = millis(start) / 8.0;
    probe.remove_file("probe")?;
    Ok(BTreeMap::from([
        ("create_ms".into(), Figure::of(times).median),
        ("snapshot_pause_ms".into(), Figure::of(pauses).median),
        ("sync_ms".into(), sync),
    ]))
}

fn make_empty(path: &Path) -> Result<()> {
    std::fs::create_dir(path)?;
    open(path)?.create_volume("v", Origin::Empty, Some(ByteLen(TIB)))?;
    Ok(())
}

/// A volume whose map says that every other block is data.
fn make_full(path: &Path) -> Result<()> {
    make_empty(path)?;
    let storage = FileStorage::open(path)?;
    let (name, _) = storage.list(layer::LAYERS)?.into_iter().next().context("a layer")?;
    let uuid = uuid::Uuid::try_parse(&name)?;
    let head = layer::open(&storage, uuid)?;
    for block in (0..BLOCKS).step_by(2) {
        head.index.set(BlockRange::new(block, 1), BlockState::Data);
    }
    ensure!(head.index.leaf(bedplate_engine::units::to_usize(BLOCKS / LEAF_BLOCKS - 1)).is_some());
    layer::stage_map(&storage, uuid, &head.log, &head.index, LogLen::LIVE)?;
    publish_map(&storage, &layer::dir(uuid))?;
    Ok(())
}

/// A volume written once whole, its blocks spread over `count` layers.
fn make_layers(path: &Path, count: u64) -> Result<()> {
    std::fs::create_dir(path)?;
    let disk = open(path)?;
    disk.create_volume("v", Origin::Empty, Some(ByteLen(SMALL)))?;
    let volume = disk.volume("v")?;
    for layer in 0..count {
        for block in (layer..SMALL / 4096).step_by(bedplate_engine::units::to_usize(count)) {
            volume.write_at(&[1; 4096], block * 4096, bedplate_engine::device::Durability::Volatile)?;
        }
        disk.create_snapshot("v", &format!("s{layer}"))?;
    }
    disk.flush()?;
    Ok(())
}

/// Files with the blocks that [`make_layers`] puts into each layer, at the same places.
fn make_bare(path: &Path, count: u64) -> Result<()> {
    std::fs::create_dir(path)?;
    let storage = FileStorage::open(path)?;
    for layer in 0..count {
        let file = storage.open(&bare(layer), Open::CreateDirect)?;
        file.set_len(SMALL)?;
        for block in (layer..SMALL / 4096).step_by(bedplate_engine::units::to_usize(count)) {
            file.write_at(&[1; 4096], block * 4096)?;
        }
    }
    Ok(())
}
