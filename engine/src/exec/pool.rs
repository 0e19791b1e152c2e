//! Threads for what may wait, beside those that serve requests.
//!
//! Owns [`Pool`]. A disk has one for actions that no request waits for (checkpoints, commits under pressure of the log,
//! marks), and workers share one for what their ring cannot do. The queue is bounded by who fills it: of one volume at
//! most [`PER_VOLUME_MAX`] housekeeping actions exist at a time, and a worker's jobs belong to the requests that it has
//! admitted.
//!
//! A simulated machine has one thread, so that a seed is a history: its pool has none ([`Pool::in_turns`]), and whoever
//! would wait for something lets others have their turn.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc};

use crate::{
    error::{Error, Result},
    sync::{
        Sender,
        thread::{self, JoinHandle},
        unbounded,
    },
};

/// A running commit, a checkpoint and a mark.
pub const PER_VOLUME_MAX: usize = 3;
/// Threads of one pool.
pub const THREADS_MAX: usize = 64;

pub type Job = Box<dyn FnOnce() + Send>;

/// Everything else on a machine with one thread.
pub trait Turns: Send + Sync + fmt::Debug {
    /// Run `job` in a turn to come.
    fn queue(&self, job: Job);

    /// Let something else happen. `false`: nothing can, so that waiting is in vain.
    fn next(&self) -> bool;
}

/// A small pool of threads; dropping it waits for what was queued.
#[derive(Debug)]
pub struct Pool {
    hands: Hands,
}

enum Hands {
    Threads { queue: Option<Sender<Job>>, threads: Vec<JoinHandle<()>> },
    Turns(Arc<dyn Turns>),
}

impl fmt::Debug for Hands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hands::Threads { threads, .. } => write!(f, "{} threads", threads.len()),
            Hands::Turns(turns) => turns.fmt(f),
        }
    }
}

/// Run by each thread before its first job. A front end makes its threads what the write path needs (see
/// [`Held::on_thread_start`](crate::volume::disk::Held::on_thread_start)), and these are on it: requests wait for them.
pub type ThreadStart = fn();

impl Pool {
    /// Start `count` threads, at most [`THREADS_MAX`], called `name-0` and so on.
    pub fn start(name: &str, count: usize, on_start: ThreadStart) -> Result<Pool> {
        let (queue, jobs) = unbounded::<Job>();
        let threads = (0..count.clamp(1, THREADS_MAX))
            .map(|n| {
                let jobs = jobs.clone();
                let work = move || {
                    on_start();
                    // A job that panics has a way to say so to whoever waits; the others need its thread.
                    jobs.iter().for_each(|job| drop(std::panic::catch_unwind(AssertUnwindSafe(job))));
                };
                thread::Builder::new().name(format!("{name}-{n}")).spawn(work)
            })
            .collect::<std::io::Result<_>>()
            .map_err(|e| Error::io("start", format!("thread {name}"), e))?;
        Ok(Pool { hands: Hands::Threads { queue: Some(queue), threads } })
    }

    /// A pool without threads: its jobs are run in turns.
    pub fn in_turns(turns: Arc<dyn Turns>) -> Pool {
        Pool { hands: Hands::Turns(turns) }
    }

    /// Without threads, whoever waits has to let others go on.
    pub(super) fn turns(&self) -> Option<&dyn Turns> {
        match &self.hands {
            Hands::Threads { .. } => None,
            Hands::Turns(turns) => Some(&**turns),
        }
    }

    /// Run `job` soon, on a thread of the pool.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        match &self.hands {
            // The receivers live as long as `self`.
            Hands::Threads { queue: Some(queue), .. } => drop(queue.send(Box::new(job))),
            Hands::Threads { queue: None, .. } => {}
            Hands::Turns(turns) => turns.queue(Box::new(job)),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Hands::Threads { queue, threads } = &mut self.hands else { return };
        *queue = None;
        let me = thread::current().id();
        for thread in threads.drain(..) {
            // The last owner may be a job of ours; that thread ends by itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}
