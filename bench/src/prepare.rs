//! Preparing an image: bytes arrive, are hashed, written and made durable, beside what one core hashes at all.
//!
//! Private nodes of the program that is running bring the image in, one with its disk in memory, one on the disk; the
//! time is that of `bedplate image create --wait`, from its start to its end. The source is a file in memory, so that
//! nothing but the hash (disk in memory) or the disk can be the limit. The lanes of a round run one after another, and
//! each ratio is of one round.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use sha2::{Digest, Sha512};

use crate::{
    figure::Figure,
    machine::Machine,
    process::cpu_seconds,
    target::{
        Transport,
        node::{Node, Program},
    },
};

/// Bytes of one update of the lane that only hashes; what an arrival uses, too.
const PIECE_LEN: usize = 1 << 20;
/// Prepare an image of `size_mib` in memory and on the disk of `dir`, `rounds` times, and print the figures.
pub fn run(dir: &Path, memory_dir: &Path, size_mib: usize, rounds: usize) -> Result<()> {
    let disk = tempfile::tempdir_in(dir)?;
    let memory = tempfile::tempdir_in(memory_dir)?;
    let source = memory.path().join("source");
    make_source(&source, size_mib)?;
    let program = Program::look("")?;
    let in_memory = Node::serve_in(&program, Transport::Classic, memory.path().join("node"))?;
    let on_disk = Node::serve_in(&program, Transport::Classic, disk.path().join("node"))?;
    let machine = Machine::look();
    let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    // The first one pays for memory that the machine has never used.
    prepare(&source, &in_memory)?;
    let memory_node_time = || in_memory.pids().into_iter().filter_map(cpu_seconds).sum::<f64>();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let one_core = openssl(&["-elapsed"])?;
        let openssl_on_core = openssl(&[])?;
        let (hash, hash_on_core) = hash(&source)?;
        let began = memory_node_time();
        let to_memory = prepare(&source, &in_memory)?;
        let on_cores = rate(size_mib << 20, Duration::from_secs_f64(memory_node_time() - began))?;
        let written = write(&source, &disk.path().join("written"))?;
        let to_disk = prepare(&source, &on_disk)?;
        for (name, value) in [
            ("openssl_mb_per_s", one_core),
            ("openssl_on_core_mb_per_s", openssl_on_core),
            ("hash_on_core_to_openssl_on_core", hash_on_core / openssl_on_core),
            ("hash_mb_per_s", hash),
            ("hash_on_core_mb_per_s", hash_on_core),
            ("prepare_in_memory_mb_per_s", to_memory),
            ("prepare_on_disk_mb_per_s", to_disk),
            // All threads together: what is above the hash runs beside it, as long as it is less than the hash.
            ("prepare_in_memory_on_cores_mb_per_s", on_cores),
            ("work_beside_the_hash_to_hash", hash_on_core / on_cores - 1.0),
            ("prepare_in_memory_to_openssl", to_memory / one_core),
            ("prepare_in_memory_to_hash", to_memory / hash),
            ("write_on_disk_mb_per_s", written),
            ("prepare_on_disk_to_slowest", to_disk / one_core.min(written)),
        ] {
            samples.entry(name).or_default().push(value);
        }
    }
    #[derive(Serialize)]
    struct Report<'a> {
        machine: Machine,
        rounds: usize,
        size_mib: usize,
        figures: BTreeMap<&'a str, Figure>,
    }
    let figures = samples.into_iter().map(|(name, values)| (name, Figure::of(values))).collect();
    println!("{}", serde_json::to_string_pretty(&Report { machine, rounds, size_mib, figures })?);
    Ok(())
}

/// Bytes without zeros, so that all of them are written.
fn make_source(path: &Path, size_mib: usize) -> Result<()> {
    let mut file = File::create(path)?;
    let mut random = File::open("/dev/urandom")?;
    let mut piece = vec![0; PIECE_LEN];
    for _ in 0..size_mib {
        random.read_exact(&mut piece)?;
        file.write_all(&piece)?;
    }
    Ok(())
}

/// What one core of this machine hashes, as others see it: in the time of a clock, or that on its core.
fn openssl(time: &[&str]) -> Result<f64> {
    let output = Command::new("openssl")
        .args(["speed", "-evp", "sha512", "-bytes", "1048576", "-seconds", "3"])
        .args(time)
        .output()
        .context("openssl, from the package of that name")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().rev().find(|line| line.to_ascii_lowercase().starts_with("sha512"));
    let thousands =
        last.and_then(|line| line.split_whitespace().nth(1)?.strip_suffix('k')?.parse::<f64>().ok());
    Ok(thousands.with_context(|| format!("openssl speed says {text:?}"))? / 1000.0)
}

/// What the library that this program hashes with does with bytes that are there, in the time of a clock and on its core.
fn hash(source: &Path) -> Result<(f64, f64)> {
    let mut file = File::open(source)?;
    let mut piece = vec![0; PIECE_LEN];
    let mut hasher = Sha512::new();
    let (mut spent, mut on_core, mut bytes) = (Duration::ZERO, Duration::ZERO, 0);
    loop {
        let len = file.read(&mut piece)?;
        if len == 0 {
            break;
        }
        let (start, began) = (Instant::now(), core_time()?);
        hasher.update(&piece[..len]);
        on_core += core_time()?.saturating_sub(began);
        spent += start.elapsed();
        bytes += len;
    }
    ensure!(hasher.finalize().iter().any(|byte| *byte != 0));
    Ok((rate(bytes, spent)?, rate(bytes, on_core)?))
}

/// What the disk takes: the same bytes written in order and made durable, and nothing else.
fn write(source: &Path, target: &Path) -> Result<f64> {
    let mut from = File::open(source)?;
    let mut to = File::create(target)?;
    let mut piece = vec![0; PIECE_LEN];
    let mut bytes = 0;
    let start = Instant::now();
    loop {
        let len = from.read(&mut piece)?;
        if len == 0 {
            break;
        }
        to.write_all(&piece[..len])?;
        bytes += len;
    }
    to.sync_all()?;
    let spent = start.elapsed();
    fs::remove_file(target)?;
    rate(bytes, spent)
}

/// How long this thread has been on a core.
fn core_time() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Ok(Duration::from_nanos(nanos.context("the time of a thread")?))
}

/// The whole of it: from the command until the image is durable, verified and recorded.
fn prepare(source: &Path, node: &Node) -> Result<f64> {
    let bytes = fs::metadata(source)?.len();
    let start = Instant::now();
    node.bring_in(source)?;
    let spent = start.elapsed();
    node.delete_image()?;
    rate(bytes.try_into()?, spent)
}

/// Megabytes (10^6) a second, as openssl counts them.
fn rate(bytes: usize, spent: Duration) -> Result<f64> {
    let millis = u32::try_from(spent.as_millis())?.max(1);
    let kilobytes = u32::try_from(bytes / 1000).map_err(|_| anyhow!("the source is too large"))?;
    Ok(f64::from(kilobytes) / f64::from(millis))
}
