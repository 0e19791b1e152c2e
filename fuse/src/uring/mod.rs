//! The second transport: requests that the kernel puts into rings instead of onto `/dev/fuse`.
//!
//! Owns [`Rings`], the workers of one mount: made before INIT, so that it is asked for only if it can be had; registered
//! after it; gone with the connection. From the first registration on the kernel holds requests back until the queue of
//! every possible processor has an entry; should it refuse one, they come on `/dev/fuse` as ever, whose readers can
//! serve every operation and go on for the life of the mount. FORGET, INTERRUPT and notifications are always theirs.
//! Kernel documentation: `filesystems/fuse/fuse-io-uring`; how the numbers were chosen: `docs/transports.md`.

mod answer;
mod entry;
mod protocol;
mod sizes;
mod worker;

use std::{
    fs, io,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bedplate_engine::exec::{pool::Pool, ring::Worker};

use self::{
    entry::Entries,
    sizes::{Processors, Sizes},
    worker::Requests,
};
use crate::{connection, mount::serve_io, mountinfo::DeviceNumber, served::Served};

/// The kernel's switch for all mounts of the machine.
pub const RINGS_PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// How long the workers may take to be ready.
const PREPARE_MAX: Duration = Duration::from_secs(10);

/// Why a mount is not served by rings.
#[derive(Debug, thiserror::Error)]
pub enum NoRings {
    #[error("this kernel has no FUSE over io_uring, which came with 6.14")]
    Unknown,
    #[error("FUSE over io_uring is switched off on this machine: echo Y > {RINGS_PARAMETER}")]
    Off,
    #[error("FUSE over io_uring: the processors could not be counted: {0}")]
    Processors(#[source] io::Error),
    #[error("FUSE over io_uring: a ring could not be made: {0}")]
    Ring(#[source] bedplate_engine::error::Error),
    #[error("FUSE over io_uring: no memory for the rings: {0}")]
    Memory(#[source] io::Error),
    #[error("FUSE over io_uring: no thread for a ring: {0}")]
    Thread(#[source] io::Error),
    #[error("the kernel did not offer FUSE over io_uring to this mount")]
    NotOffered,
    #[error("FUSE over io_uring: the kernel took no ring of this mount; its log says why")]
    NotTaken,
}

/// The workers of one mount.
pub(crate) struct Rings {
    workers: Vec<Ringer>,
    sizes: Sizes,
}

/// One worker's thread, which waits for its connection.
struct Ringer {
    start: SyncSender<()>,
    thread: JoinHandle<()>,
}

/// What a worker's thread needs.
struct Task {
    served: Arc<Served>,
    device: Arc<OwnedFd>,
    connection: DeviceNumber,
    queues: Vec<u16>,
    payload_len: usize,
    /// For what a device cannot do without waiting, and for calls: those of one do not wait for those of the other.
    waiters: Arc<Pool>,
    callers: Arc<Pool>,
}

/// Whether the kernel would serve a new mount by rings.
pub fn rings_offered() -> Result<(), NoRings> {
    match fs::read_to_string(RINGS_PARAMETER) {
        Ok(value) if value.trim() == "Y" => Ok(()),
        Ok(_) => Err(NoRings::Off),
        Err(_) => Err(NoRings::Unknown),
    }
}

impl Rings {
    /// Make everything that can be made before the kernel is asked: threads, rings and memory.
    pub(crate) fn prepare(
        served: &Arc<Served>,
        device: &Arc<OwnedFd>,
        connection: DeviceNumber,
    ) -> Result<Rings, NoRings> {
        rings_offered()?;
        let sizes = Sizes::of(&Processors::read().map_err(NoRings::Processors)?);
        let threads = served.options.threads.get();
        let waiters = Pool::start_shared("fuse-wait", threads, serve_io).map_err(NoRings::Ring)?;
        let callers = Pool::start("fuse-call", threads, serve_io).map_err(NoRings::Ring)?;
        let (waiters, callers) = (Arc::new(waiters), Arc::new(callers));
        let (ready, prepared) = mpsc::sync_channel(sizes.workers.len());
        let mut workers = Vec::with_capacity(sizes.workers.len());
        for (index, queues) in sizes.workers.iter().enumerate() {
            let task = Task {
                served: served.clone(),
                device: device.clone(),
                connection,
                queues: queues.clone(),
                payload_len: sizes.request_bytes,
                waiters: waiters.clone(),
                callers: callers.clone(),
            };
            let (start, started) = mpsc::sync_channel(1);
            let ready = ready.clone();
            let builder = thread::Builder::new().name(format!("fuse-ring-{index}"));
            let thread = builder.spawn(move || task.run(&ready, &started)).map_err(NoRings::Thread)?;
            workers.push(Ringer { start, thread });
        }
        for _ in &workers {
            prepared
                .recv_timeout(PREPARE_MAX)
                .unwrap_or_else(|_| Err(NoRings::Thread(io::ErrorKind::TimedOut.into())))?;
        }
        Ok(Rings { workers, sizes })
    }

    /// Longest read or write that the kernel is to send.
    pub(crate) fn request_bytes(&self) -> usize {
        self.sizes.request_bytes
    }

    /// Requests that can be in work at once.
    pub(crate) fn depth(&self) -> usize {
        self.sizes.entry_count()
    }

    /// Register with the kernel, which has answered INIT.
    pub(crate) fn start(&self) {
        for worker in &self.workers {
            // It waits for nothing else.
            let _ = worker.start.try_send(());
        }
        tracing::debug!(workers = self.workers.len(), entries = self.depth(), "registering rings");
    }

    /// Wait for the workers to end; once they are registered, that is when the connection has.
    pub(crate) fn join(self) {
        for Ringer { start, thread } in self.workers {
            drop(start);
            if thread.join().is_err() {
                tracing::error!("a ring's thread has panicked");
            }
        }
    }
}

impl Task {
    fn run(self, ready: &SyncSender<Result<(), NoRings>>, started: &Receiver<()>) {
        serve_io();
        let entries = Entries::map(self.device, &self.queues, self.payload_len).map_err(NoRings::Memory);
        let made =
            entries.and_then(|entries| Ok((entries, Worker::new(self.waiters).map_err(NoRings::Ring)?)));
        let (entries, mut worker) = match made {
            Ok(made) => made,
            Err(error) => {
                // Nobody listens if it was given up.
                let _ = ready.send(Err(error));
                return;
            }
        };
        let mut requests = Requests::new(self.served, entries, self.callers);
        let _ = ready.send(Ok(()));
        if started.recv().is_err() {
            return;
        }
        let result = catch_unwind(AssertUnwindSafe(|| requests.run(&mut worker)));
        let failure = match &result {
            Ok(Ok(())) if requests.has_ended() => None,
            Ok(Ok(())) => Some("entries were lost".into()),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("it panicked".into()),
        };
        if let Some(failure) = failure {
            tracing::error!(failure, "a ring serves no more; its mount is cut off");
            // No request is to wait for it.
            if let Err(error) = connection::abort(self.connection) {
                tracing::warn!(%error, "the connection was not cut");
            }
        }
        // Before the memory that it may use.
        drop(worker);
    }
}
