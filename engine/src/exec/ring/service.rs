//! Workers that carry out what other threads submit.
//!
//! Owns [`Workers`]: threads with a worker each, and the bounded queues in front of them. Requests of one device go to
//! one worker, so that its core is not fought for. A device that has too many under way makes its submitters wait, and
//! nobody else's. Requests come with buffers of their own, or with a caller's who waits.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{FrontEnd, Handle, Worker, slab::Slab, window::Lent, worker::Lease};
use crate::{
    device::{BlockDevice, Complete, Durability, Reply, Request},
    error::{Error, Result},
    exec::pool::{Pool, ThreadStart},
    sync::{Condvar, Mutex},
    units::ByteRange,
};

/// Requests of one device that are submitted and have not ended.
pub const SUBMITTED_MAX: usize = 256;
/// Requests that wait for one worker to take them.
pub const HAND_IN_MAX: usize = 1024;
/// How long a submitter waits for either.
pub const HAND_IN_WAIT_MAX: Duration = Duration::from_secs(10);
/// Threads for what a ring cannot do.
const WAITERS: usize = 8;

thread_local! {
    /// Whether this thread serves requests, so that it must not wait for their end.
    static SERVES: Cell<bool> = const { Cell::new(false) };
}

/// This thread serves requests from now on.
pub(super) fn begin_serving() {
    SERVES.set(true);
}

/// Whose requests workers carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taking {
    /// What is submitted; who calls and waits does it himself, which takes no change of threads.
    Submissions,
    /// Everything.
    All,
}

/// The places of one device: [`SUBMITTED_MAX`].
#[derive(Debug, Default)]
pub struct Gate {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// One of them, until this is dropped.
#[derive(Debug)]
struct Place(Arc<Gate>);

impl Gate {
    fn enter(self: &Arc<Self>) -> Result<Place> {
        let patience = if SERVES.get() { Duration::ZERO } else { HAND_IN_WAIT_MAX };
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(taken, patience, |taken| *taken >= SUBMITTED_MAX);
        let (mut taken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *taken >= SUBMITTED_MAX {
            return Err(Error::Busy { limit: "SUBMITTED_MAX" });
        }
        *taken += 1;
        Ok(Place(self.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

/// Answers exactly once, also when nobody carried the request out.
struct Answer {
    complete: Option<Complete>,
    place: Option<Place>,
}

impl Answer {
    fn give(mut self, reply: Reply) {
        // So that whoever hears of it can submit the next.
        self.place = None;
        if let Some(complete) = self.complete.take() {
            complete(reply);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.place = None;
        if let Some(complete) = self.complete.take() {
            complete(Reply { result: Err(Error::Closed), buffer: Vec::new() });
        }
    }
}

/// What is to be done, and whose memory it takes.
enum Handed {
    Owned(Request),
    /// Its caller waits for the answer, whatever happens.
    Lent(Lease),
}

pub(super) struct Submission {
    device: Arc<dyn BlockDevice>,
    handed: Handed,
    answer: Answer,
}

/// Threads with a worker each. Dropping them waits for what was submitted.
pub struct Workers {
    queues: Vec<(Sender<Submission>, Handle)>,
    threads: Vec<JoinHandle<()>>,
    taking: Taking,
    /// Outlives the workers: the last owner of these may be a job of this pool, for which no worker may wait.
    _pool: Arc<Pool>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("count", &self.queues.len()).finish()
    }
}

impl Workers {
    /// Start `count` workers; each thread, and each that waits for them, runs `on_start` first. Fails where the kernel
    /// has no io_uring, or does not let us.
    pub fn start(count: usize, taking: Taking, on_start: ThreadStart) -> Result<Workers> {
        let pool = Arc::new(Pool::start_shared("waiter", WAITERS, on_start)?);
        let mut workers = Workers { queues: Vec::new(), threads: Vec::new(), taking, _pool: pool.clone() };
        for n in 0..count.max(1) {
            let (sender, receiver) = bounded(HAND_IN_MAX);
            let (tell, told) = bounded(1);
            let pool = pool.clone();
            let serve = move || {
                on_start();
                begin_serving();
                match Worker::new(pool) {
                    Ok(worker) => {
                        let _ = tell.send(Ok(worker.handle().clone()));
                        serve(worker, receiver);
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            };
            let thread = std::thread::Builder::new().name(format!("worker-{n}")).spawn(serve);
            workers.threads.push(thread.map_err(|e| Error::io("start", "worker thread", e))?);
            let handle = told.recv().map_err(|_| Error::Closed)??;
            workers.queues.push((sender, handle));
        }
        Ok(workers)
    }

    /// Have a worker carry `request` out; `complete` is called by it, or here when it cannot be handed in.
    pub fn submit(
        &self,
        device: Arc<dyn BlockDevice>,
        gate: &Arc<Gate>,
        request: Request,
        complete: Complete,
    ) {
        match gate.enter() {
            Ok(place) => {
                let answer = Answer { complete: Some(complete), place: Some(place) };
                self.hand_in(gate, Submission { device, handed: Handed::Owned(request), answer });
            }
            Err(error) => complete(Reply { result: Err(error), buffer: buffer_of(request) }),
        }
    }

    /// Whether a call of this thread is for a worker, too.
    pub fn take_calls(&self) -> bool {
        self.taking == Taking::All && !SERVES.get()
    }

    /// Have a worker fill `buffer`, and wait.
    pub fn read(
        &self,
        device: Arc<dyn BlockDevice>,
        gate: &Arc<Gate>,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        #[expect(unsafe_code, reason = "the buffer is lent to a worker")]
        // SAFETY: this thread waits until the request has ended, whatever happens.
        let into = unsafe { Lent::of(buffer) };
        self.call(device, gate, Lease::Read { offset, into })
    }

    /// Have a worker write `data`, and wait.
    pub fn write(
        &self,
        device: Arc<dyn BlockDevice>,
        gate: &Arc<Gate>,
        data: &[u8],
        offset: u64,
        durability: Durability,
    ) -> Result<()> {
        #[expect(unsafe_code, reason = "the bytes are lent to a worker")]
        // SAFETY: this thread waits until the request has ended, whatever happens.
        let data = unsafe { Lent::of_source(data) };
        self.call(device, gate, Lease::Write { offset, data, durability })
    }

    pub fn zero(
        &self,
        device: Arc<dyn BlockDevice>,
        gate: &Arc<Gate>,
        range: ByteRange,
        durability: Durability,
    ) -> Result<()> {
        self.call(device, gate, Lease::Zero { range, durability })
    }

    pub fn flush(&self, device: Arc<dyn BlockDevice>, gate: &Arc<Gate>) -> Result<()> {
        self.call(device, gate, Lease::Flush)
    }

    fn call(&self, device: Arc<dyn BlockDevice>, gate: &Arc<Gate>, lease: Lease) -> Result<()> {
        let place = gate.enter()?;
        let (tell, told) = bounded(1);
        let complete: Complete = Box::new(move |reply| drop(tell.send(reply.result)));
        let answer = Answer { complete: Some(complete), place: Some(place) };
        self.hand_in(gate, Submission { device, handed: Handed::Lent(lease), answer });
        // Answers are given or, where a medium does not answer, kept for ever; they are never lost.
        told.recv().unwrap_or(Err(Error::Closed))
    }

    fn hand_in(&self, gate: &Arc<Gate>, submission: Submission) {
        let spread = Arc::as_ptr(gate).addr() / size_of::<Gate>();
        let Some((queue, handle)) = self.queues.get(spread % self.queues.len().max(1)) else { return };
        let patience = if SERVES.get() { Duration::ZERO } else { HAND_IN_WAIT_MAX };
        match queue.send_timeout(submission, patience) {
            Ok(()) => handle.wake(),
            Err(unsent) => {
                let error = match unsent.is_timeout() {
                    true => Error::Busy { limit: "HAND_IN_MAX" },
                    false => Error::Closed,
                };
                let Submission { handed, answer, .. } = unsent.into_inner();
                let buffer = match handed {
                    Handed::Owned(request) => buffer_of(request),
                    Handed::Lent(_) => Vec::new(),
                };
                answer.give(Reply { result: Err(error), buffer });
            }
        }
    }
}

fn buffer_of(request: Request) -> Vec<u8> {
    match request {
        Request::Read { buffer, .. } | Request::Write { data: buffer, .. } => buffer,
        Request::Zero { .. } | Request::Discard { .. } | Request::Flush => Vec::new(),
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for (_, handle) in self.queues.drain(..) {
            handle.stop();
        }
        let me = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last owner may be a request of ours; that thread ends by itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}

/// The front end of a worker that has none: it takes what is handed in.
struct Intake {
    queue: Receiver<Submission>,
    requests: Slab<Taken>,
}

struct Taken {
    memory: Memory,
    answer: Answer,
}

enum Memory {
    Owned(Vec<u8>),
    Lent,
}

pub(super) fn serve(mut worker: Worker, queue: Receiver<Submission>) {
    let mut intake = Intake { queue, requests: Slab::with_capacity(SUBMITTED_MAX) };
    let quiet = match catch_unwind(AssertUnwindSafe(|| worker.run(&mut intake))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            tracing::error!(%error, "a worker has ended");
            worker.finish()
        }
        Err(_) => {
            tracing::error!("a worker has panicked");
            worker.finish()
        }
    };
    if quiet.is_err() {
        // The memory of these may still be used. A caller who lent it never hears of its end, as one whose own call to
        // the system hangs; the others do, but their buffers are lost.
        for token in worker.held() {
            let Some(Taken { memory, answer }) = intake.requests.remove(token) else { continue };
            match memory {
                Memory::Owned(buffer) => std::mem::forget(buffer),
                Memory::Lent => std::mem::forget(answer),
            }
        }
    }
}

impl FrontEnd for Intake {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}

    fn request_ended(&mut self, _worker: &mut Worker, token: u32, result: Result<()>) {
        if let Some(Taken { memory, answer }) = self.requests.remove(token) {
            let buffer = match memory {
                Memory::Owned(buffer) => buffer,
                Memory::Lent => Vec::new(),
            };
            answer.give(Reply { result, buffer });
        }
    }

    fn woken(&mut self, worker: &mut Worker) {
        while let Ok(Submission { device, handed, answer }) = self.queue.try_recv() {
            let (lease, memory) = match handed {
                Handed::Owned(request) => lease_of(request),
                Handed::Lent(lease) => (lease, Memory::Lent),
            };
            let token = self.requests.insert(Taken { memory, answer });
            worker.start_leased(device, lease, token);
        }
    }
}

/// A request in terms of its own buffer, which stays in the table until it has ended.
fn lease_of(request: Request) -> (Lease, Memory) {
    let lend = |buffer: &mut Vec<u8>| {
        #[expect(unsafe_code, reason = "the buffer is lent to the worker")]
        // SAFETY: it stays in its table, untouched, until the request has ended; its bytes do not move with it.
        unsafe {
            Lent::of(buffer)
        }
    };
    match request {
        Request::Read { offset, mut buffer } => {
            let into = lend(&mut buffer);
            (Lease::Read { offset, into }, Memory::Owned(buffer))
        }
        Request::Write { offset, mut data, durability } => {
            let lent = lend(&mut data);
            (Lease::Write { offset, data: lent, durability }, Memory::Owned(data))
        }
        Request::Zero { range, durability } => (Lease::Zero { range, durability }, Memory::Owned(Vec::new())),
        Request::Discard { range } => {
            (Lease::Zero { range, durability: Durability::Volatile }, Memory::Owned(Vec::new()))
        }
        Request::Flush => (Lease::Flush, Memory::Owned(Vec::new())),
    }
}
#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    };

    use super::*;
    use crate::{
        device::{Access, Extent, Geometry},
        units::{ByteLen, ByteRange},
    };

    /// Reads for as long as a second, or until somebody has its memory back, which it takes note of.
    struct Slow {
        begun: Mutex<mpsc::Sender<()>>,
        answered: Arc<AtomicBool>,
        answered_early: Arc<AtomicBool>,
    }

    impl BlockDevice for Slow {
        fn geometry(&self) -> Geometry {
            Geometry { size: ByteLen(4096), access: Access::ReadWrite }
        }

        fn submit(&self, _request: Request, _complete: Complete) {}

        fn extents(&self, _range: ByteRange) -> Result<Vec<Extent>> {
            Ok(Vec::new())
        }

        fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> Result<()> {
            self.begun.lock().expect("no panic").send(()).expect("somebody waits");
            for _ in 0..100 {
                std::thread::sleep(Duration::from_millis(10));
                let early = self.answered.load(Ordering::SeqCst);
                self.answered_early.fetch_or(early, Ordering::SeqCst);
            }
            Ok(())
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_worker_that_panics_answers_a_request_only_when_its_memory_is_not_used_any_more() {
        let workers = Workers::start(1, Taking::Submissions, || {}).expect("a ring");
        let (begun, begins) = mpsc::channel();
        let (answered, answered_early) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let device = Slow {
            begun: Mutex::new(begun),
            answered: answered.clone(),
            answered_early: answered_early.clone(),
        };
        let device: Arc<dyn BlockDevice> = Arc::new(device);
        let gate = Arc::default();
        let (tell, told) = mpsc::channel();
        let answer = move |reply: Reply| {
            answered.store(true, Ordering::SeqCst);
            tell.send(reply.result).expect("somebody waits");
        };
        workers.submit(
            device.clone(),
            &gate,
            Request::Read { offset: 0, buffer: vec![0; 4096] },
            Box::new(answer),
        );
        begins.recv().expect("it is being read");
        workers.submit(device, &gate, Request::Flush, Box::new(|_| panic!("a caller's own")));
        let result = told.recv_timeout(HAND_IN_WAIT_MAX).expect("it is answered");
        assert!(matches!(result, Err(Error::Closed)), "{result:?}");
        drop(workers);
        assert!(!answered_early.load(Ordering::SeqCst));
    }
}

/// Run by `cargo test -p bedplate-engine --features shuttle --lib schedules`, see [`crate::sync`].
#[cfg(all(test, feature = "shuttle"))]
mod schedules {
    use super::*;

    #[test]
    fn whoever_waits_for_a_place_gets_the_one_that_is_given_back() {
        let test = || {
            let gate: Arc<Gate> = Arc::default();
            let taken: Vec<Place> =
                (2..SUBMITTED_MAX).map(|_| gate.enter().expect("there is room")).collect();
            // Four for two places, which waits without end if a place that was given back is not told of.
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let gate = gate.clone();
                    shuttle::thread::spawn(move || drop(gate.enter().expect("a place comes free")))
                })
                .collect();
            for thread in threads {
                thread.join().expect("no panic");
            }
            drop(taken);
            assert_eq!(*gate.taken.lock().unwrap_or_else(PoisonError::into_inner), 0);
        };
        shuttle::check_random(test, 2000);
    }
}
