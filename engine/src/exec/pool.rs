//! Threads for what may wait, beside those that serve requests.
//!
//! Owns [`Pool`]. A disk has one for actions that no request waits for (checkpoints, commits under pressure of the log,
//! marks), and workers share one for what their ring cannot do. The queue is bounded by who fills it: of one volume at
//! most [`PER_VOLUME_MAX`] housekeeping actions exist at a time, and a worker's jobs belong to the requests that it has
//! admitted. Jobs have a key, and keys take turns.
//!
//! A simulated machine has one thread, so that a seed is a history: its pool has none ([`Pool::in_turns`]), and whoever
//! would wait for something lets others have their turn.

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
};

use super::fair::{Key, Limits, Places};
use crate::{
    error::{Error, Result},
    sync::{
        Condvar, Mutex, MutexGuard,
        thread::{self, JoinHandle},
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

/// Run by each thread before its first job. A front end makes its threads what the write path needs (see
/// [`Held::on_thread_start`](crate::volume::disk::Held::on_thread_start)), and these are on it: requests wait for them.
pub type ThreadStart = fn();

/// A small pool of threads; dropping it waits for what was queued.
#[derive(Debug)]
pub struct Pool {
    hands: Hands,
}

enum Hands {
    Threads { jobs: Arc<Jobs>, threads: Vec<JoinHandle<()>> },
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

/// What the threads of a pool share.
struct Jobs {
    state: Mutex<State>,
    /// Something is ready, or nothing comes any more.
    changed: Condvar,
}

struct State {
    /// A place is a thread's: what has one is ready or runs.
    places: Places<(Key, Job)>,
    ready: VecDeque<(Key, Job)>,
    closed: bool,
}

impl Pool {
    /// Start `count` threads, at most [`THREADS_MAX`], called `name-0` and so on, of which each may be anybody's.
    pub fn start(name: &str, count: usize, on_start: ThreadStart) -> Result<Pool> {
        let count = count.clamp(1, THREADS_MAX);
        Pool::limited(name, Limits { all: count, each: count }, on_start)
    }

    /// The same, of which jobs of one key have half at most: what hangs in a medium leaves threads for others.
    pub fn start_shared(name: &str, count: usize, on_start: ThreadStart) -> Result<Pool> {
        let count = count.clamp(1, THREADS_MAX);
        Pool::limited(name, Limits { all: count, each: count.div_ceil(2) }, on_start)
    }

    fn limited(name: &str, limits: Limits, on_start: ThreadStart) -> Result<Pool> {
        let state = State { places: Places::new(limits), ready: VecDeque::new(), closed: false };
        let jobs = Arc::new(Jobs { state: Mutex::new(state), changed: Condvar::new() });
        let threads = (0..limits.all)
            .map(|n| {
                let jobs = jobs.clone();
                let work = move || {
                    on_start();
                    jobs.serve();
                };
                thread::Builder::new().name(format!("{name}-{n}")).spawn(work)
            })
            .collect::<std::io::Result<_>>();
        let threads = threads.map_err(|e| {
            jobs.close();
            Error::io("start", format!("thread {name}"), e)
        })?;
        Ok(Pool { hands: Hands::Threads { jobs, threads } })
    }

    /// A pool without threads: its jobs are run in turns, whatever their keys.
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

    /// Run `job` soon, on a thread of the pool. Jobs of one key begin in their order; keys take turns.
    pub fn run(&self, key: Key, job: impl FnOnce() + Send + 'static) {
        match &self.hands {
            Hands::Threads { jobs, .. } => jobs.take(key, Box::new(job)),
            Hands::Turns(turns) => turns.queue(Box::new(job)),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Hands::Threads { jobs, threads } = &mut self.hands else { return };
        jobs.close();
        let me = thread::current().id();
        for thread in threads.drain(..) {
            // The last owner may be a job of ours; that thread ends by itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, key: Key, job: Job) {
        let mut state = self.lock();
        if let Some(job) = state.places.take(key, (key, job)) {
            state.ready.push_back(job);
            drop(state);
            self.changed.notify_one();
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// One thread's life.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            match state.ready.pop_front() {
                Some((key, job)) => {
                    drop(state);
                    // A job that panics has a way to say so to whoever waits; the others need its thread.
                    drop(catch_unwind(AssertUnwindSafe(job)));
                    state = self.lock();
                    state.places.give_back(key);
                    let next = state.places.next();
                    state.ready.extend(next);
                }
                // What waits for a place comes by the threads that have them.
                None if state.closed => return,
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    };

    use super::*;

    #[test]
    fn jobs_of_one_key_that_never_end_leave_threads_for_others_and_a_dropped_pool_runs_what_was_queued() {
        let pool = Pool::start_shared("waiter", 4, || {}).expect("threads");
        let (open, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (tell, told): (Sender<u32>, Receiver<u32>) = channel();
        for _ in 0..20 {
            let (gate, tell) = (gate.clone(), tell.clone());
            pool.run(1, move || {
                let _ = gate.lock().expect("no panic").recv();
                tell.send(1).expect("somebody waits");
            });
        }
        for _ in 0..20 {
            let tell = tell.clone();
            pool.run(2, move || tell.send(2).expect("somebody waits"));
        }
        let patience = std::time::Duration::from_secs(30);
        assert!((0..20).all(|_| told.recv_timeout(patience) == Ok(2)), "the other key's went on");
        drop(open);
        drop(pool);
        drop(tell);
        assert_eq!(told.iter().collect::<Vec<_>>(), [1; 20]);
    }
}
