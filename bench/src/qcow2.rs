//! qcow2, read, written, compared and converted, beside `qemu-img` and the raw file.
//!
//! Everything lies in memory (a memory file system), so that the code is what is measured and not a disk. The lanes of
//! a round run one after another, and each ratio is of one round. `qemu-img` is a process, so its start is part of its
//! time; with the sizes that are used that is less than a hundredth. Where `bedplate-inspect` is what is measured, it is a
//! process, too: the one that was built beside this program.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use bedplate_engine::{
    error::Result as EngineResult,
    export::{
        Existing, Format, Monitor,
        qcow2::{Compression, Options},
        to_file,
    },
    image::{self, BaseImage, device::ImageDevice, qcow2::View},
    units::ByteRange,
};
use serde::Serialize;

use crate::machine::{Figure, Machine};

/// Bytes of one sequential read.
const PIECE_LEN: u64 = 1 << 20;
/// Random reads of one lane and thread.
const RANDOM_READS: u64 = 200_000;
/// Each fourth so many bytes of the image are a hole.
const RUN_LEN: usize = 16 << 20;

/// The qcow2 files that the raw one is made into.
const KINDS: [&str; 3] = ["plain", "zlib", "zstd"];

/// Read and write an image of `size_mib` of this machine's own files, `rounds` times, and print the figures.
pub fn run(memory_dir: &Path, size_mib: usize, rounds: usize) -> Result<()> {
    let dir = tempfile::tempdir_in(memory_dir)?;
    let at = |name: &str| dir.path().join(name);
    let raw = at("raw");
    make_source(&raw, size_mib << 20)?;
    for (name, words) in
        [("plain", &[][..]), ("zlib", &["-c"]), ("zstd", &["-c", "-o", "compression_type=zstd"])]
    {
        qemu_img(&["convert", "-m", "2", "-W", "-f", "raw", "-O", "qcow2"], words, &[&raw, &at(name)])?;
    }
    let machine = Machine::look();
    let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let mut lanes = Lanes { dir: dir.path(), size: (size_mib << 20) as u64, values: BTreeMap::new() };
        lanes.reads()?;
        lanes.random()?;
        lanes.exports()?;
        lanes.comparisons()?;
        lanes.conversions()?;
        for (name, value) in lanes.values {
            samples.entry(name).or_default().push(value);
        }
    }
    #[derive(Serialize)]
    struct Report {
        machine: Machine,
        rounds: usize,
        size_mib: usize,
        figures: BTreeMap<String, Figure>,
    }
    let figures = samples.into_iter().map(|(name, values)| (name, Figure::of(values))).collect();
    println!("{}", serde_json::to_string_pretty(&Report { machine, rounds, size_mib, figures })?);
    Ok(())
}

/// The lanes of one round.
struct Lanes<'a> {
    dir: &'a Path,
    size: u64,
    values: BTreeMap<String, f64>,
}

impl Lanes<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn enter(&mut self, name: impl Into<String>, value: f64) {
        self.values.insert(name.into(), value);
    }

    /// All of the content in order, by one thread and by two, and by `qemu-img` into nothing.
    fn reads(&mut self) -> Result<()> {
        for name in KINDS {
            let path = self.path(name);
            let target = format!("driver=null-co,size={}", self.size);
            let start = Instant::now();
            qemu_img(
                &["convert", "-n", "--target-image-opts", "-f", "qcow2"],
                &[],
                &[&path, Path::new(&target)],
            )?;
            let theirs = start.elapsed().as_secs_f64();
            let one = read_all(&*open(&path, image::Format::Qcow2)?, 1)?;
            let two = read_all(&*open(&path, image::Format::Qcow2)?, 2)?;
            self.enter(format!("read_{name}_1_thread_to_qemu_img"), theirs / one);
            self.enter(format!("read_{name}_2_threads_to_qemu_img"), theirs / two);
            self.enter(
                format!("read_{name}_1_thread_mib_per_s"),
                self.size as f64 / one / f64::from(1 << 20),
            );
        }
        Ok(())
    }

    /// 4 KiB at random places of the plain file, beside the same of the raw one.
    fn random(&mut self) -> Result<()> {
        let qcow2 = open(&self.path("plain"), image::Format::Qcow2)?;
        let raw = open(&self.path("raw"), image::Format::Raw)?;
        // Once over, so that no lane pays for tables.
        read_all(&*qcow2, 1)?;
        for threads in [1, 2] {
            let of_raw = random_reads(&*raw, threads)?;
            let of_qcow2 = random_reads(&*qcow2, threads)?;
            self.enter(format!("random_4k_{threads}_to_raw"), of_qcow2 / of_raw);
            self.enter(format!("random_4k_{threads}_iops"), of_qcow2);
        }
        let one = self.values.get("random_4k_1_iops").copied().unwrap_or(f64::NAN);
        let two = self.values.get("random_4k_2_iops").copied().unwrap_or(f64::NAN);
        self.enter("random_4k_2_threads_to_1", two / one);
        Ok(())
    }

    fn exports(&mut self) -> Result<()> {
        let raw = self.path("raw");
        let (ours, theirs) = (self.path("ours"), self.path("theirs"));
        let device = ImageDevice::new(open(&raw, image::Format::Raw)?);
        type Lane<'a> = (&'a str, Option<Compression>, &'a [(&'a str, &'a [&'a str])]);
        let lanes: [Lane<'_>; 3] = [
            ("plain", None, &[("defaults", &[]), ("m2_w", &["-m", "2", "-W"])]),
            ("zlib", Some(Compression::Zlib), &[("defaults", &["-c"])]),
            (
                "zstd",
                Some(Compression::Zstd),
                &[
                    ("defaults", &["-c", "-o", "compression_type=zstd"]),
                    ("m2_w", &["-c", "-o", "compression_type=zstd", "-m", "2", "-W"]),
                ],
            ),
        ];
        for (name, compression, peers) in lanes {
            let format = Format::Qcow2(Options { compression, ..Options::default() });
            let start = Instant::now();
            to_file(&device, &ours, Existing::Replace, format, &mut Silent)?;
            let spent = start.elapsed().as_secs_f64();
            self.enter(format!("export_{name}_mib_per_s"), self.size as f64 / spent / f64::from(1 << 20));
            for (peer, words) in peers {
                // A file that is replaced is given back first; that is not theirs to pay for.
                let _ = fs::remove_file(&theirs);
                let start = Instant::now();
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], words, &[&raw, &theirs])?;
                self.enter(
                    format!("export_{name}_to_qemu_img_{peer}"),
                    start.elapsed().as_secs_f64() / spent,
                );
                let sizes = (fs::metadata(&ours)?.len(), fs::metadata(&theirs)?.len());
                self.enter(format!("export_{name}_size_to_qemu_img"), sizes.0 as f64 / sizes.1 as f64);
            }
            qemu_img(&["compare", "-q"], &[], &[&ours, &raw])?;
            fs::remove_file(&ours)?;
        }
        let _ = fs::remove_file(&theirs);
        Ok(())
    }

    /// Whether a file holds what the raw one holds that it was made of: all of both is read.
    fn comparisons(&mut self) -> Result<()> {
        let raw = self.path("raw");
        for name in KINDS {
            let path = self.path(name);
            let start = Instant::now();
            qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw"], &[], &[&path, &raw])?;
            let theirs = start.elapsed().as_secs_f64();
            let start = Instant::now();
            inspect("compare", &[&path, &raw])?;
            self.enter(format!("compare_{name}_to_qemu_img"), theirs / start.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// A qcow2 file becomes a raw one.
    fn conversions(&mut self) -> Result<()> {
        let (ours, theirs) = (self.path("ours"), self.path("theirs"));
        for name in KINDS {
            let path = self.path(name);
            let start = Instant::now();
            inspect("convert", &[&path, &ours])?;
            let spent = start.elapsed().as_secs_f64();
            self.enter(format!("convert_{name}_mib_per_s"), self.size as f64 / spent / f64::from(1 << 20));
            qemu_img(&["compare", "-q", "-f", "raw", "-F", "raw"], &[], &[&ours, &self.path("raw")])?;
            fs::remove_file(&ours)?;
            for (peer, words) in [("defaults", &[][..]), ("m2_w", &["-m", "2", "-W"])] {
                let start = Instant::now();
                qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], words, &[&path, &theirs])?;
                let time = start.elapsed().as_secs_f64();
                self.enter(format!("convert_{name}_to_qemu_img_{peer}"), time / spent);
                fs::remove_file(&theirs)?;
            }
        }
        Ok(())
    }
}

struct Silent;

impl Monitor for Silent {
    fn reached(&mut self, _at: u64) -> EngineResult<()> {
        Ok(())
    }
}

fn open(path: &Path, format: image::Format) -> Result<Arc<dyn BaseImage>> {
    Ok(image::open(File::open(path)?, path, format, &View::Active)?)
}

/// Read all data, the threads taking pieces in order. Returns the seconds.
fn read_all(image: &dyn BaseImage, threads: usize) -> Result<f64> {
    let next = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        let work = || -> EngineResult<()> {
            let mut buffer = vec![0; usize::try_from(PIECE_LEN).unwrap_or(0)];
            loop {
                let at = next.fetch_add(PIECE_LEN, Ordering::Relaxed);
                if at >= image.len().0 {
                    return Ok(());
                }
                let len = PIECE_LEN.min(image.len().0 - at);
                let extents = image.extents(ByteRange::new(at, len))?;
                for extent in extents {
                    if extent.kind == bedplate_engine::device::ExtentKind::Data {
                        let len = usize::try_from(extent.range.len.0).unwrap_or(0);
                        image.read_at(buffer.get_mut(..len).unwrap_or_default(), extent.range.start.0)?;
                    }
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| Ok(thread.join().expect("a reader does not panic")?))
    })
    .map(|()| start.elapsed().as_secs_f64())
}

/// Reads of 4 KiB a second.
fn random_reads(image: &dyn BaseImage, threads: u64) -> Result<f64> {
    let blocks = image.len().0 / 4096;
    let start = Instant::now();
    thread::scope(|scope| {
        let work = |seed: u64| -> EngineResult<()> {
            let mut buffer = [0; 4096];
            let mut state = seed;
            for _ in 0..RANDOM_READS {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                image.read_at(&mut buffer, (state >> 33) % blocks * 4096)?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..threads).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().try_for_each(|thread| Ok(thread.join().expect("a reader does not panic")?))
    })
    .map(|()| (RANDOM_READS * threads) as f64 / start.elapsed().as_secs_f64())
}

/// An image of this machine's programs and libraries, with holes.
fn make_source(path: &Path, size: usize) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(size as u64)?;
    let list = Command::new("find").args(["/usr/lib", "/usr/bin", "-type", "f", "-size", "+8k"]).output()?;
    let mut files: Vec<&str> = std::str::from_utf8(&list.stdout)?.lines().collect();
    files.sort_unstable();
    let mut content = files.iter().cycle().take(1_000_000).filter_map(|file| File::open(file).ok());
    let mut current: Box<dyn Read> = Box::new(io::empty());
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        if at / RUN_LEN % 4 == 3 {
            at += RUN_LEN;
            continue;
        }
        let room = piece.len().min(size - at);
        let read = current.read(&mut piece[..room])?;
        if read == 0 {
            current = Box::new(content.next().context("too few files under /usr")?);
            continue;
        }
        file.write_all_at(&piece[..read], at as u64)?;
        at += read;
    }
    (&file).flush()?;
    Ok(())
}

/// A verb of `bedplate-inspect` over these files.
fn inspect(verb: &str, files: &[&Path]) -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("bedplate-inspect");
    let output = Command::new(&program)
        .arg(verb)
        .args(files)
        .output()
        .with_context(|| format!("{}; build it with -p bedplate-inspect", program.display()))?;
    ensure!(output.status.success(), "inspect {verb}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn qemu_img(before: &[&str], words: &[&str], files: &[&Path]) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(before)
        .args(words)
        .args(files)
        .output()
        .context("qemu-img, from the package qemu-utils")?;
    ensure!(output.status.success(), "qemu-img {before:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
