//! One thread with one ring: its loop, its tables, and what a front end sees of it.
//!
//! The loop keeps the disk busy rather than its own batches large: of what has arrived, new commands go first, a few at
//! a time, then a few completions, and the kernel is entered in between. It waits only when nothing is left.

use std::{
    collections::VecDeque,
    marker::PhantomData,
    sync::Arc,
    time::{Duration, Instant},
};

use io_uring::squeue;

use super::{
    Handle, Window,
    change::Change,
    flight::{Bounces, Flight, Landing, Task},
    slab::Slab,
    submission::{Ring, Tag},
    wake::{Letter, Post},
    window::Lent,
};
use crate::{
    device::{BlockDevice, Durability},
    error::{Error, Result},
    exec::{
        carrier::{ChangeId, Message},
        executor::CLOSE_WAIT_MAX,
        fair::{Key, Limits, Places, key_of},
        pool::Pool,
    },
    units::ByteRange,
};

/// Requests that a worker carries out at a time. Others wait, and devices take turns.
pub const IN_FLIGHT_MAX: usize = 512;
/// Those of one device: one whose medium hangs leaves places for the others.
pub const IN_FLIGHT_OF_DEVICE_MAX: usize = 128;
/// Commands of the front end that are handled between two entries of the kernel: each may start a read.
const COMMANDS_PER_ENTER: usize = 8;
/// Completions of reads and writes that are handled in between.
const LANDED_PER_ENTER: usize = 4;
/// Requests whose end the front end is told in between.
const ENDED_PER_ENTER: usize = 8;

/// What a front end asks of a device.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Fill the window from `offset`.
    Read {
        offset: u64,
        window: Window,
    },
    Write {
        offset: u64,
        window: Window,
        durability: Durability,
    },
    Zero {
        range: ByteRange,
        durability: Durability,
    },
    Flush,
}

/// A [`Job`] whose caller has promised that its memory stays.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lease {
    Read { offset: u64, into: Lent },
    Write { offset: u64, data: Lent, durability: Durability },
    Zero { range: ByteRange, durability: Durability },
    Flush,
}

impl Lease {
    /// All of it by the calling thread, which waits.
    pub fn carry_out(self, device: &dyn BlockDevice) -> Result<()> {
        match self {
            Lease::Read { offset, into } => device.read_at(into.bytes_mut(), offset),
            Lease::Write { offset, data, durability } => device.write_at(data.bytes(), offset, durability),
            Lease::Zero { range, durability } => device.zero(range, durability),
            Lease::Flush => device.flush(),
        }
    }
}

/// What runs on a worker besides the engine itself.
pub trait FrontEnd {
    /// A command of [`Worker::push_command`] has completed with this result: not negative, or an error number negated.
    fn command_ended(&mut self, worker: &mut Worker, token: u32, result: i32);

    /// A request of [`Worker::start`] has ended; its window is the front end's again.
    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>);

    /// Somebody called [`Handle::wake`], or [`Handle::stop`]: once for any number of calls.
    fn woken(&mut self, worker: &mut Worker);
}

/// A request that waits for a free place.
#[derive(Debug)]
struct Waiting {
    device: Arc<dyn BlockDevice>,
    lease: Lease,
    token: u32,
}

/// A request of whose end the front end does not know yet.
struct Ended {
    key: Key,
    token: u32,
    result: Result<()>,
}

impl std::fmt::Debug for dyn BlockDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.geometry())
    }
}

/// One thread's ring with the requests that are under way on it. Dropping it waits for these.
pub struct Worker {
    pub(super) ring: Ring,
    pub(super) handle: Handle,
    pub(super) pool: Arc<Pool>,
    pub(super) flights: Slab<Flight>,
    pub(super) tasks: Slab<Task>,
    pub(super) changes: Slab<Change>,
    pub(super) bounces: Bounces,
    /// What cores ask of this worker.
    pub(super) messages: VecDeque<(ChangeId, Message)>,
    /// Of requests that were begun and of whose end the front end does not know, and of those that wait.
    places: Places<Waiting>,
    commands: VecDeque<(u32, i32)>,
    landed: VecDeque<(u32, Landing)>,
    /// Flights that have landed so far.
    landings: u64,
    pub(super) stopping: Stopping,
    /// Why the ring is not used any more, if so.
    pub(super) stranded: Option<Error>,
    /// Requests that have ended and whose front end does not know yet.
    ended: VecDeque<Ended>,
    /// The kernel takes submissions from the thread that made the ring only.
    _own_thread: PhantomData<*const ()>,
}

impl Worker {
    /// A worker for the calling thread. What has to wait runs in `pool`, which workers may share.
    pub fn new(pool: Arc<Pool>) -> Result<Worker> {
        let mut ring = Ring::new()?;
        let handle = Handle::new()?;
        ring.watch(handle.post().event());
        Ok(Worker {
            ring,
            handle,
            pool,
            flights: Slab::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            tasks: Slab::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            changes: Slab::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            bounces: Bounces::default(),
            messages: VecDeque::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            places: Places::new(Limits { all: IN_FLIGHT_MAX, each: IN_FLIGHT_OF_DEVICE_MAX }),
            commands: VecDeque::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            landed: VecDeque::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            landings: 0,
            stopping: Stopping { patience: CLOSE_WAIT_MAX, last: None },
            stranded: None,
            ended: VecDeque::with_capacity(IN_FLIGHT_OF_DEVICE_MAX),
            _own_thread: PhantomData,
        })
    }

    /// For other threads.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(super) fn post(&self) -> &Arc<Post> {
        self.handle.post()
    }

    /// Submit a command of the front end, soon; its end comes to [`FrontEnd::command_ended`] with `token`.
    ///
    /// # Safety
    ///
    /// Whatever the entry points to stays valid, and nobody's else, until then.
    #[expect(unsafe_code, reason = "the kernel follows the pointers of an entry")]
    pub unsafe fn push_command(&mut self, entry: squeue::Entry128, token: u32) {
        // SAFETY: the caller's promise.
        unsafe { self.ring.push_command(entry, token) }
    }

    /// Start a request on a device; its end comes to [`FrontEnd::request_ended`] with `token`, never from within this
    /// call. More than [`IN_FLIGHT_MAX`], or than
    /// [`IN_FLIGHT_OF_DEVICE_MAX`] of one device, wait; devices take turns.
    ///
    /// # Safety
    ///
    /// The job's window stays valid, and nobody's else, until then. If [`Worker::run`] ends with an error or a panic,
    /// that is for ever.
    #[expect(unsafe_code, reason = "the kernel, or another thread, follows the window's pointer")]
    pub unsafe fn start(&mut self, device: &Arc<dyn BlockDevice>, job: Job, token: u32) {
        let lease = match job {
            // SAFETY: the caller's promise.
            Job::Read { offset, window } => Lease::Read { offset, into: unsafe { window.lend() } },
            Job::Write { offset, window, durability } => {
                // SAFETY: the caller's promise.
                Lease::Write { offset, data: unsafe { window.lend() }, durability }
            }
            Job::Zero { range, durability } => Lease::Zero { range, durability },
            Job::Flush => Lease::Flush,
        };
        self.start_leased(device.clone(), lease, token);
    }

    pub(super) fn start_leased(&mut self, device: Arc<dyn BlockDevice>, lease: Lease, token: u32) {
        let key = key_of(&device);
        if let Some(Waiting { device, lease, token }) =
            self.places.take(key, Waiting { device, lease, token })
        {
            self.begin(device, lease, token);
        }
    }

    fn begin(&mut self, device: Arc<dyn BlockDevice>, lease: Lease, token: u32) {
        match lease {
            _ if device.asynchronous().is_none() => self.leave_to_thread(device, lease, token),
            Lease::Read { offset, into } => self.begin_read(device, offset, into, token),
            Lease::Write { .. } | Lease::Zero { .. } | Lease::Flush => {
                self.begin_change(device, lease, token);
            }
        }
    }

    /// A request that was begun has ended. Nothing of it is held any more but its place, until the front end knows.
    pub(super) fn end(&mut self, device: Arc<dyn BlockDevice>, token: u32, result: Result<()>) {
        let key = key_of(&device);
        self.let_go(device);
        self.ended.push_back(Ended { key, token, result });
    }

    /// Serve until [`Handle::stop`] was called and nothing is under way. Commands of the front end that never end do
    /// not count: they end with the ring. An error, also that of a medium that does not answer for
    /// [`CLOSE_WAIT_MAX`] after the stop, leaves requests under way.
    pub fn run(&mut self, front: &mut impl FrontEnd) -> Result<()> {
        loop {
            self.read_post();
            if self.post().take_woken() {
                front.woken(self);
            }
            self.admit();
            let patience = match self.post().is_stopping() {
                true if self.is_quiet() => return Ok(()),
                true => Some(self.stopping.patience(self.landings)?),
                false => None,
            };
            self.enter(patience)?;
            for _ in 0..COMMANDS_PER_ENTER {
                let Some((token, result)) = self.commands.pop_front() else { break };
                front.command_ended(self, token, result);
            }
            self.land_some();
            for _ in 0..ENDED_PER_ENTER {
                let Some(Ended { key, token, result }) = self.ended.pop_front() else { break };
                self.places.give_back(key);
                front.request_ended(self, token, result);
            }
        }
    }

    /// Let the kernel work; wait for it, or for other threads, if there is nothing else to do.
    fn enter(&mut self, patience: Option<Duration>) -> Result<()> {
        let busy = !self.commands.is_empty()
            || !self.landed.is_empty()
            || !self.ended.is_empty()
            || !self.messages.is_empty();
        let sleeps = !busy && self.post().may_sleep();
        let entered = match (&self.stranded, sleeps) {
            (None, true) => self.ring.wait(patience),
            (None, false) => self.ring.enter(),
            (Some(_), true) => self.post().wait(patience),
            (Some(_), false) => Ok(()),
        };
        if sleeps {
            self.post().awake();
        }
        if let Err(error) = entered {
            self.strand(&error);
            return Err(error);
        }
        while let Some(completion) = self.ring.next() {
            match completion.tag {
                Tag::Command(token) => self.commands.push_back((token, completion.result)),
                Tag::Flight(flight) => self.landed.push_back((flight, Landing::Ring(completion.result))),
                Tag::Wake => {
                    // Readable no more; whoever writes from now on wakes it again.
                    let _ = self.post().event().read();
                    if !completion.more {
                        self.ring.watch(self.handle.post().event());
                    }
                }
            }
        }
        Ok(())
    }

    fn land_some(&mut self) {
        for _ in 0..LANDED_PER_ENTER {
            let Some((flight, landing)) = self.landed.pop_front() else { break };
            self.landings += 1;
            self.land(flight, landing);
        }
        self.read_post();
    }

    /// Do what cores and threads say.
    fn read_post(&mut self) {
        loop {
            while let Some((change, message)) = self.messages.pop_front() {
                self.follow(change, message);
            }
            match self.post().next() {
                Some(Letter::Change(change, message)) => self.messages.push_back((change, message)),
                Some(Letter::Landed { flight, result }) => {
                    self.landings += 1;
                    self.land(flight, Landing::Thread(result));
                }
                None => return,
            }
        }
    }

    /// Begin what waits for a place.
    fn admit(&mut self) {
        while let Some(Waiting { device, lease, token }) = self.places.next() {
            self.begin(device, lease, token);
        }
    }

    fn is_quiet(&self) -> bool {
        self.places.is_quiet() && self.flights.is_empty()
    }

    /// Wait until nothing is under way, without a front end. An error if something is that has no end: see
    /// [`Worker::held`].
    pub(super) fn finish(&mut self) -> Result<()> {
        // What has not begun does not begin any more.
        self.places.turn_away();
        loop {
            self.read_post();
            self.ended.drain(..).for_each(|ended| self.places.give_back(ended.key));
            self.commands.clear();
            if self.is_quiet() {
                return Ok(());
            }
            if let Some(error) = &self.stranded
                && self.is_only_stranded()
            {
                return Err(error.clone());
            }
            let patience = self.stopping.patience(self.landings)?;
            // Without its ring it goes on.
            let _ = self.enter(Some(patience));
            self.land_some();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "a worker was closed with requests that do not end");
            // The kernel, or a thread, may still write to what these own.
            std::mem::forget(std::mem::replace(&mut self.flights, Slab::with_capacity(0)));
            std::mem::forget(std::mem::replace(&mut self.tasks, Slab::with_capacity(0)));
            std::mem::forget(std::mem::replace(&mut self.changes, Slab::with_capacity(0)));
            // Nobody waits for a thread that it has for ever.
            std::mem::forget(self.pool.clone());
        }
    }
}

#[cfg(test)]
impl Worker {
    /// A request has ended with all that came of it, and nothing was asked of the ring or of a thread.
    pub(super) fn settle_without_ring(&mut self, token: u32) {
        while let Some((change, message)) = self.messages.pop_front() {
            assert!(self.flights.is_empty());
            self.follow(change, message);
        }
        assert!(self.flights.is_empty());
        let ended = self.ended.pop_front().expect("it has ended");
        assert!(ended.token == token && ended.result.is_ok());
        self.places.give_back(ended.key);
    }

    /// Carry on until a request that was never begun has ended.
    pub(super) fn wait_for_end(&mut self, token: u32) -> Result<()> {
        loop {
            self.read_post();
            if let Some(ended) = self.ended.pop_front() {
                assert_eq!(ended.token, token);
                return ended.result;
            }
            self.enter(Some(CLOSE_WAIT_MAX)).expect("the ring works");
            self.land_some();
        }
    }
}

/// How long to wait for what is under way: a medium that goes on answering has all the time it takes.
#[derive(Debug)]
pub(super) struct Stopping {
    pub patience: Duration,
    /// When something landed last, and how many had by then.
    last: Option<(Instant, u64)>,
}

impl Stopping {
    fn patience(&mut self, landings: u64) -> Result<Duration> {
        let now = Instant::now();
        let (since, _) = *match &mut self.last {
            Some(last) if last.1 == landings => last,
            last => last.insert((now, landings)),
        };
        let left = self.patience.saturating_sub(now.duration_since(since));
        if left.is_zero() { Err(Error::Busy { limit: "CLOSE_WAIT_MAX" }) } else { Ok(left) }
    }
}
