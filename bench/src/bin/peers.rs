//! `bedplate-bench-peers LIBRARY FILE random|sequential BLOCK THREADS SECONDS`: other implementations of qcow2, in
//! process.
//!
//! A program of its own, behind the feature `peers`: what these libraries do to whatever they are linked into (qcow2-rs
//! turns its log off) stays out of `bedplate`. Each thread opens the image for itself, since neither is meant to be
//! shared between threads, and has one read in flight. Prints a sample as JSON.

use std::{
    fs,
    path::Path,
    pin::pin,
    task::{Context as TaskContext, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bedplate_bench::{
    figure::{Measure, float},
    sample::Sample,
};
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, file::File, qcow2::Qcow2};
use qcow2_rs::{dev::Qcow2DevParams, helpers::Qcow2IoBuf, utils::qcow2_setup_dev_sync};

/// A future over blocking calls is ready at once; one that is not after so many polls never will be.
const POLLS_MAX: usize = 1000;
/// Latencies that one thread keeps; the rest of them are like these.
const LATENCIES_MAX: usize = 1 << 18;

/// What one thread does.
struct Work {
    library: String,
    file: String,
    is_random: bool,
    block: usize,
    seconds: u64,
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [library, file, order, block, threads, seconds] = words.as_slice() else {
        bail!("LIBRARY FILE random|sequential BLOCK THREADS SECONDS");
    };
    let work = Work {
        library: library.clone(),
        file: file.clone(),
        is_random: order == "random",
        block: block.parse()?,
        seconds: seconds.parse()?,
    };
    let threads: u64 = threads.parse()?;
    let (start, before) = (Instant::now(), cpu_seconds()?);
    let found: Result<Vec<Vec<u64>>> = thread::scope(|scope| {
        let work = &work;
        let started: Vec<_> = (1..=threads).map(|seed| scope.spawn(move || work.run(seed))).collect();
        let ended = started.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("it panicked"))?);
        ended.collect()
    });
    let found = found?;
    let (spent, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - before);
    let ops: u64 = found.iter().map(|nanos| u64::try_from(nanos.len()).unwrap_or(0)).sum();
    ensure!(ops > 0, "no read was made");
    let mut sample = Sample::of(ops);
    sample.set(Measure::Iops, float(ops) / spent);
    sample.set(Measure::BytesPerS, float(ops * u64::try_from(work.block)?) / spent);
    sample.set(Measure::ClientCpuUsPerOp, cpu * 1e6 / float(ops));
    sample.set_latencies(found.into_iter().flatten().collect());
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

impl Work {
    /// The nanoseconds of each read.
    fn run(&self, seed: u64) -> Result<Vec<u64>> {
        let path = Path::new(&self.file);
        match self.library.as_str() {
            "imago" => {
                let image = Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default())?;
                let image = FormatAccess::new(image);
                let mut buffer = vec![0; self.block];
                self.reads(seed, image.size(), |at| Ok(image.read(&mut buffer[..], at)?))
            }
            "qcow2-rs" => {
                let params = Qcow2DevParams::new(9, None, None, true, false);
                let device = qcow2_setup_dev_sync(path, &params).map_err(|error| anyhow!("{error:?}"))?;
                now(device.qcow2_prep_io())?.map_err(|error| anyhow!("{error:?}"))?;
                let mut buffer = Qcow2IoBuf::<u8>::new(self.block);
                self.reads(seed, device.info.virtual_size(), |at| {
                    let count =
                        now(device.read_at(&mut buffer, at))?.map_err(|error| anyhow!("{error:?}"))?;
                    ensure!(count == self.block, "a short read");
                    Ok(())
                })
            }
            other => bail!("{other}: imago and qcow2-rs are known"),
        }
    }

    fn reads(&self, seed: u64, len: u64, mut read: impl FnMut(u64) -> Result<()>) -> Result<Vec<u64>> {
        let block = u64::try_from(self.block)?;
        let blocks = len / block;
        ensure!(blocks > 0, "the image is smaller than one read");
        let (mut state, mut number, mut nanos) = (seed, 0, Vec::with_capacity(LATENCIES_MAX));
        let mut now = Instant::now();
        let deadline = now + Duration::from_secs(self.seconds);
        while now < deadline {
            let place = if self.is_random {
                state = u64::wrapping_mul(state, 6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                state >> 33
            } else {
                number += 1;
                number
            };
            read(place % blocks * block)?;
            let began = std::mem::replace(&mut now, Instant::now());
            nanos.push(u64::try_from((now - began).as_nanos())?);
        }
        Ok(nanos)
    }
}

/// The outcome of a future that waits for nothing.
fn now<T>(future: impl Future<Output = T>) -> Result<T> {
    let mut future = pin!(future);
    let mut context = TaskContext::from_waker(Waker::noop());
    for _ in 0..POLLS_MAX {
        if let Poll::Ready(outcome) = future.as_mut().poll(&mut context) {
            return Ok(outcome);
        }
    }
    bail!("it waits for something that never happens")
}

/// Seconds that this process has been on cores.
fn cpu_seconds() -> Result<f64> {
    /// `USER_HZ`, which Linux fixes for programs.
    const TICKS_PER_S: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').context("a name")?.1.split_whitespace();
    let ticks = fields.skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(float(ticks) / TICKS_PER_S)
}
