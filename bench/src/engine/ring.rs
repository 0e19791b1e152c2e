//! The ring executor as a lane: a worker for each client, with all of its requests in flight at once.
//!
//! Owns the closed loop that runs on a worker. Its buffers are aligned, as a mount's are, so that direct reads and
//! writes need no copy.

use std::{
    mem,
    ptr::NonNull,
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bedplate_engine::{
    buffer::AlignedBuffer,
    device::{BlockDevice, Durability},
    error::{Error, Result as EngineResult},
    exec::{
        pool::Pool,
        ring::{FrontEnd, Job, Window, Worker},
    },
    units::to_usize,
};

use super::{LATENCIES_MAX, Spec, Walk, sample_of};
use crate::{process::cpu_seconds, sample::Sample};

/// Threads for what must wait, of all workers.
const WAITERS: usize = 4;

/// One request in flight.
struct Slot {
    buffer: AlignedBuffer,
    began: Instant,
}

/// What one client keeps going.
struct Loop<'a> {
    device: Arc<dyn BlockDevice>,
    walk: Walk<'a>,
    slots: Vec<Slot>,
    in_flight: usize,
    deadline: Instant,
    ops: u64,
    latencies: Vec<u64>,
    failed: Option<Error>,
}

impl Loop<'_> {
    /// Start the next request of a slot, if there is one and time for it.
    fn next(&mut self, worker: &mut Worker, token: u32, now: Instant) {
        let offset = if now < self.deadline && self.failed.is_none() { self.walk.next() } else { None };
        let slot = usize::try_from(token).ok().and_then(|at| self.slots.get_mut(at));
        let (Some(offset), Some(slot)) = (offset, slot) else { return };
        slot.began = now;
        let window = Window { start: NonNull::from(&mut *slot.buffer).cast(), len: slot.buffer.len() };
        let job = if self.walk.writes() {
            Job::Write { offset, window, durability: Durability::Volatile }
        } else {
            Job::Read { offset, window }
        };
        self.in_flight += 1;
        #[expect(unsafe_code, reason = "the buffer is lent to the worker")]
        // SAFETY: each slot has one request at a time, and its buffer lives until the loop has ended, or for ever.
        unsafe {
            worker.start(&self.device, job, token)
        };
    }
}

impl FrontEnd for Loop<'_> {
    fn command_ended(&mut self, _: &mut Worker, _: u32, _: i32) {}

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: EngineResult<()>) {
        self.in_flight -= 1;
        let now = Instant::now();
        match result {
            Ok(()) => self.ops += 1,
            Err(error) => self.failed = Some(error),
        }
        let began = usize::try_from(token).ok().and_then(|at| self.slots.get(at)).map(|slot| slot.began);
        if let Some(began) = began
            && self.latencies.len() < LATENCIES_MAX
        {
            self.latencies.push(u64::try_from((now - began).as_nanos()).unwrap_or(u64::MAX));
        }
        self.next(worker, token, now);
        if self.in_flight == 0 {
            worker.handle().stop();
        }
    }

    fn woken(&mut self, _: &mut Worker) {}
}

/// A worker for each client.
pub fn workers(device: &Arc<dyn BlockDevice>, spec: &Spec) -> Result<Sample> {
    let blocks = device.geometry().size.0 / spec.block;
    ensure!(blocks > 0, "the volume is smaller than one request");
    let pool = Arc::new(Pool::start("waiter", WAITERS, || {})?);
    let next = AtomicU64::new(0);
    let (start, cpu) = (Instant::now(), cpu_seconds(std::process::id()).unwrap_or(f64::NAN));
    let deadline = start + Duration::from_secs(spec.seconds.into());
    let work = |seed: u64| -> EngineResult<(u64, Vec<u64>)> {
        let mut worker = Worker::new(pool.clone())?;
        let slots =
            (0..spec.depth).map(|_| Slot { buffer: AlignedBuffer::new(to_usize(spec.block)), began: start });
        let mut front = Loop {
            device: device.clone(),
            walk: Walk { spec, blocks, next: &next, state: seed },
            slots: slots.collect(),
            in_flight: 0,
            deadline,
            ops: 0,
            latencies: Vec::new(),
            failed: None,
        };
        for token in 0..spec.depth {
            front.next(&mut worker, token, Instant::now());
        }
        if front.in_flight == 0 {
            return Ok((0, Vec::new()));
        }
        if let Err(error) = worker.run(&mut front) {
            // Requests may be under way for ever, and their buffers are theirs.
            mem::forget(mem::take(&mut front.slots));
            return Err(error);
        }
        front.failed.map_or(Ok((front.ops, front.latencies)), Err)
    };
    let found: Vec<(u64, Vec<u64>)> = thread::scope(|scope| {
        let work = &work;
        let clients: Vec<_> =
            (1..=u64::from(spec.clients)).map(|seed| scope.spawn(move || work(seed))).collect();
        let ended = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
        ended.collect::<EngineResult<_>>()
    })?;
    let spent = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds(std::process::id()).unwrap_or(f64::NAN) - cpu;
    let ops = found.iter().map(|(ops, _)| ops).sum();
    Ok(sample_of(ops, spent, cpu, spec.block, found.into_iter().flat_map(|(_, nanos)| nanos).collect()))
}
