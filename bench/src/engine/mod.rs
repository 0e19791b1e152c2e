//! The engine in a process of its own, without a mount: what the rest of the path is held against.
//!
//! Owns [`Spec`], what such a process is told, and [`run`], which is that process: it opens the disk, makes the volume
//! when it is not there, measures and ends. Each executor has a file, and its place in [`load`].

mod blocking;
mod ring;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::Result as EngineResult,
    image::{self, BaseImage, BaseSource, qcow2::View},
    units::to_usize,
    volume::{disk::Disk, life::Origin, record::ImageRef},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    figure::{Measure, float},
    process::succeed,
    sample::Sample,
    target::Executor,
    workload::{Content, LAYERED_LEN, Pattern},
};

/// How long such a process may take, filling included.
const PATIENCE: Duration = Duration::from_secs(600);
const PIECE_LEN: u64 = 1 << 20;
const BLOCK_LEN: u64 = 4096;
/// Odd and prime: its multiples meet every block of a volume once before they repeat.
const STRIDE: u64 = 2_654_435_761;
/// Latencies that one thread keeps; the rest of them are like these.
const LATENCIES_MAX: usize = 1 << 18;

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    pub executor: Executor,
    /// A directory of its own; a disk is made there.
    pub disk: PathBuf,
    pub base: PathBuf,
    pub content: Content,
    pub pattern: Pattern,
    pub block: u64,
    pub depth: u32,
    pub clients: u32,
    pub seconds: u32,
    pub is_single_pass: bool,
}

/// Why this machine does not have such an executor.
pub fn check(executor: Executor) -> Result<()> {
    match executor {
        Executor::Blocking => Ok(()),
        Executor::Ring => Ok(bedplate_engine::exec::ring::probe()?),
    }
}

/// Measure in a process of its own.
pub fn sample(program: &Path, spec: &Spec) -> Result<Sample> {
    let text = serde_json::to_string(spec)?;
    let said = succeed(Command::new(program).args(["bench", "engine-lane", &text]), PATIENCE)?;
    Ok(serde_json::from_str(&said)?)
}

/// The base of every volume here.
struct OneBase(PathBuf);

impl BaseSource for OneBase {
    fn open_base(&self, _: &ImageRef) -> EngineResult<Arc<dyn BaseImage>> {
        let file = File::open(&self.0)
            .map_err(|source| bedplate_engine::error::Error::io("open", &self.0, source))?;
        image::open(file, &self.0, image::Format::Raw, &View::Active)
    }
}

/// This process measures and prints its sample.
pub fn run(text: &str) -> Result<()> {
    let spec: Spec = serde_json::from_str(text).context("what to measure")?;
    fs::create_dir_all(&spec.disk)?;
    let disk = Disk::open(&spec.disk, Arc::new(OneBase(spec.base.clone())))?;
    let name = volume(&disk, spec.content)?;
    let sample = load(disk.volume(&name)?, &spec)?;
    if spec.content == Content::Fresh {
        disk.delete_volume(&name)?;
    }
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

/// The volume with this content, made when it is not there.
fn volume(disk: &Disk, content: Content) -> Result<String> {
    let name = match content {
        Content::Base => "base".to_owned(),
        Content::Own => "own".to_owned(),
        Content::Fresh => "fresh".to_owned(),
        Content::Layers(count) => format!("layers{count}"),
        Content::Storm(_) => bail!("one process has one volume"),
    };
    if disk.volume(&name).is_ok() {
        return Ok(name);
    }
    if let Content::Layers(count) = content {
        disk.create_volume(&name, Origin::Empty, Some(bedplate_engine::units::ByteLen(LAYERED_LEN)))?;
        let volume = disk.volume(&name)?;
        for layer in 0..count {
            for block in (layer..LAYERED_LEN / BLOCK_LEN).step_by(to_usize(count)) {
                volume.write_at(&[1; 4096], block * BLOCK_LEN, Durability::Volatile)?;
            }
            disk.create_snapshot(&name, &format!("s{layer}"))?;
        }
        return Ok(name);
    }
    let image = ImageRef { name: "base".to_owned(), uuid: Uuid::nil(), sha512: "0".repeat(128) };
    disk.create_volume(&name, Origin::Image(image), None)?;
    if content == Content::Own {
        let volume = disk.volume(&name)?;
        let len = volume.geometry().size.0;
        let piece = vec![7; to_usize(PIECE_LEN)];
        for at in (0..len).step_by(to_usize(PIECE_LEN)) {
            let count = to_usize((len - at).min(PIECE_LEN));
            volume.write_at(piece.get(..count).context("a piece")?, at, Durability::Volatile)?;
        }
        volume.flush()?;
    }
    Ok(name)
}

/// The load of the spec's executor.
fn load(volume: Arc<dyn BlockDevice>, spec: &Spec) -> Result<Sample> {
    match spec.executor {
        Executor::Blocking => blocking::threads(&*volume, spec),
        Executor::Ring => ring::workers(&volume, spec),
    }
}

/// Where the next request goes.
struct Walk<'a> {
    spec: &'a Spec,
    blocks: u64,
    /// Requests of all threads.
    next: &'a AtomicU64,
    state: u64,
}

impl Walk<'_> {
    /// The offset of the next request; none when all was met once.
    fn next(&mut self) -> Option<u64> {
        let in_order = matches!(self.spec.pattern, Pattern::SequentialRead | Pattern::SequentialWrite);
        if !in_order && !self.spec.is_single_pass {
            return Some(self.random() % self.blocks * self.spec.block);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if self.spec.is_single_pass && number >= self.blocks {
            return None;
        }
        let block = if in_order { number % self.blocks } else { (number * STRIDE) % self.blocks };
        Some(block * self.spec.block)
    }

    /// Whether the next request is a write.
    fn writes(&mut self) -> bool {
        match self.spec.pattern {
            Pattern::Mixed => self.random() % 10 >= 7,
            pattern => pattern.writes(),
        }
    }

    fn random(&mut self) -> u64 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.state >> 33
    }
}

/// The measures of `ops` requests that took `spent` seconds and `cpu` seconds on cores.
fn sample_of(ops: u64, spent: f64, cpu: f64, block: u64, latencies: Vec<u64>) -> Sample {
    let mut sample = Sample::of(ops);
    sample.set(Measure::Iops, float(ops) / spent);
    sample.set(Measure::BytesPerS, float(ops * block) / spent);
    sample.set(Measure::ClientCpuUsPerOp, cpu * 1e6 / float(ops));
    sample.set_latencies(latencies);
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dir: &Path, content: Content, pattern: Pattern, is_single_pass: bool) -> Spec {
        let base = dir.join("base.raw");
        fs::write(&base, vec![5; 1 << 20]).unwrap();
        Spec {
            executor: Executor::Blocking,
            disk: dir.join("disk"),
            base,
            content,
            pattern,
            block: 4096,
            depth: 2,
            clients: 1,
            seconds: 10,
            is_single_pass,
        }
    }

    #[test]
    fn a_single_pass_meets_every_block_once() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), Content::Fresh, Pattern::RandomWrite, true);
        let next = AtomicU64::new(0);
        let mut walk = Walk { spec: &spec, blocks: 250, next: &next, state: 1 };
        let mut met: Vec<u64> = std::iter::from_fn(|| walk.next()).collect();
        met.sort_unstable();
        assert_eq!(met, (0..250).map(|n| n * 4096).collect::<Vec<_>>());
    }

    #[test]
    fn the_engine_is_measured_over_a_base_and_on_blocks_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        for (content, pattern) in [
            (Content::Base, Pattern::RandomRead),
            (Content::Own, Pattern::Mixed),
            (Content::Fresh, Pattern::RandomWrite),
        ] {
            for executor in [Executor::Blocking, Executor::Ring] {
                if let Err(error) = check(executor) {
                    eprintln!("{executor:?} is not measured: {error}");
                    continue;
                }
                let spec = Spec { executor, ..spec(dir.path(), content, pattern, true) };
                fs::create_dir_all(&spec.disk).unwrap();
                let disk = Disk::open(&spec.disk, Arc::new(OneBase(spec.base.clone()))).unwrap();
                let name = volume(&disk, content).unwrap();
                let sample = load(disk.volume(&name).unwrap(), &spec).unwrap();
                assert_eq!(sample.ops(), 256);
                assert!(sample.get(Measure::LatencyP99Us).is_some());
            }
        }
    }
}
