//! Threads for actions that no request waits for: checkpoints, commits under pressure of the log, marks.
//!
//! Owns [`Housekeeper`]. The queue is bounded by what cores ask for: at most [`PER_VOLUME_MAX`] such actions of one
//! volume exist at a time.

use std::thread::JoinHandle;

use crossbeam::channel::{Sender, unbounded};

use crate::error::{Error, Result};

/// A running commit, a checkpoint and a mark.
pub const PER_VOLUME_MAX: usize = 3;
const THREADS: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// A small pool of threads; dropping it waits for what was queued.
#[derive(Debug)]
pub struct Housekeeper {
    queue: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

/// Run by each thread before its first job. A front end makes its threads what the write path needs (see
/// [`Held::on_thread_start`](crate::volume::disk::Held::on_thread_start)), and these are on it: requests wait for them.
pub type ThreadStart = fn();

impl Housekeeper {
    pub fn start(on_start: ThreadStart) -> Result<Housekeeper> {
        let (queue, jobs) = unbounded::<Job>();
        let threads = (0..THREADS)
            .map(|n| {
                let jobs = jobs.clone();
                let work = move || {
                    on_start();
                    jobs.iter().for_each(|job| job());
                };
                std::thread::Builder::new().name(format!("housekeeper-{n}")).spawn(work)
            })
            .collect::<std::io::Result<_>>()
            .map_err(|e| Error::io("start", "housekeeper thread", e))?;
        Ok(Housekeeper { queue: Some(queue), threads })
    }

    /// Run `job` soon, on a thread of the pool.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(queue) = &self.queue {
            // The receivers live as long as `self`.
            let _ = queue.send(Box::new(job));
        }
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        self.queue = None;
        let me = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last owner may be a job of ours; that thread ends by itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}
