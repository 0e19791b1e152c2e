//! The blocking executor as a lane: a thread for each request in flight.
//!
//! Buffers are aligned, as a mount's are, so that direct reads and writes need no copy.

use std::{
    sync::atomic::AtomicU64,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bedplate_engine::{
    buffer::AlignedBuffer,
    device::{BlockDevice, Durability},
    error::Result as EngineResult,
    units::to_usize,
};

use super::{LATENCIES_MAX, Spec, Walk, sample_of};
use crate::{process::cpu_seconds, sample::Sample};

/// A thread for each request in flight.
pub fn threads(volume: &(impl BlockDevice + ?Sized), spec: &Spec) -> Result<Sample> {
    let blocks = volume.geometry().size.0 / spec.block;
    ensure!(blocks > 0, "the volume is smaller than one request");
    let next = AtomicU64::new(0);
    let cpu = cpu_seconds(std::process::id()).unwrap_or(f64::NAN);
    let start = Instant::now();
    let deadline = start + Duration::from_secs(spec.seconds.into());
    let work = |seed: u64| -> EngineResult<(u64, Vec<u64>)> {
        let mut walk = Walk { spec, blocks, next: &next, state: seed };
        let mut buffer = AlignedBuffer::new(to_usize(spec.block));
        buffer.fill(3);
        let (mut ops, mut latencies) = (0, Vec::new());
        let mut now = Instant::now();
        while now < deadline {
            let Some(offset) = walk.next() else { break };
            if walk.writes() {
                volume.write_at(&buffer, offset, Durability::Volatile)?;
            } else {
                volume.read_at(&mut buffer, offset)?;
            }
            ops += 1;
            let began = std::mem::replace(&mut now, Instant::now());
            if latencies.len() < LATENCIES_MAX {
                latencies.push(u64::try_from((now - began).as_nanos()).unwrap_or(u64::MAX));
            }
        }
        Ok((ops, latencies))
    };
    let found: Vec<(u64, Vec<u64>)> = thread::scope(|scope| {
        let seeds = 1..=u64::from(spec.depth * spec.clients);
        let threads: Vec<_> = seeds.map(|seed| scope.spawn(move || work(seed))).collect();
        let ended = threads.into_iter().map(|thread| thread.join().expect("a client does not panic"));
        ended.collect::<EngineResult<_>>()
    })?;
    let spent = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds(std::process::id()).unwrap_or(f64::NAN) - cpu;
    let ops: u64 = found.iter().map(|(ops, _)| ops).sum();
    Ok(sample_of(ops, spent, cpu, spec.block, found.into_iter().flat_map(|(_, nanos)| nanos).collect()))
}
