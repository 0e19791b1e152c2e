//! A worker with a front end of its own: what is read, who waits for whom, and how it ends.

use std::{
    path::Path,
    process::Command,
    ptr::NonNull,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bedplate_engine::{
    device::{BlockDevice, Durability, Extent, ExtentKind, Reply, Request},
    error::{Error, Result},
    exec::{
        buffer::AlignedBuffer,
        pool::Pool,
        ring::{FrontEnd, IN_FLIGHT_OF_DEVICE_MAX, Job, Window, Worker},
    },
    image::{BaseImage, BaseSource},
    units::{ByteLen, ByteRange, to_usize},
    volume::{
        disk::{Disk, Held},
        life::Origin,
        record::ImageRef,
    },
};

use crate::util::{Fixture, Rng, assert_same, content, served};

/// Requests in flight.
const DEPTH: u32 = 32;
/// Bytes that one of them has for itself: neither begin nor end of it is a block's.
const PART: u64 = 70_001;
const SIZE: u64 = (DEPTH as u64 * PART).next_multiple_of(512);

fn worker() -> Worker {
    Worker::new(Arc::new(Pool::start("waiter", 2, || {}).expect("threads"))).expect("a ring")
}

/// Start a request whose memory outlives it.
fn start(worker: &mut Worker, device: &Arc<dyn BlockDevice>, job: Job, token: u32) {
    #[expect(unsafe_code, reason = "tests lend buffers that they keep")]
    // SAFETY: the callers keep the windows' buffers until their requests have ended, and use one at a time.
    unsafe {
        worker.start(device, job, token)
    };
}

fn window(buffer: &mut [u8]) -> Window {
    Window { start: NonNull::from(&mut *buffer).cast(), len: buffer.len() }
}

/// What one slot of the closed loop is doing.
enum Doing {
    Nothing,
    /// And then compares.
    Read {
        at: u64,
    },
    Change,
}

struct Slot {
    start: u64,
    model: Vec<u8>,
    buffer: Vec<u8>,
    doing: Doing,
}

/// A closed loop: each slot changes and reads its own part of the device, and knows what is in it.
struct Clients {
    device: Arc<dyn BlockDevice>,
    rng: Rng,
    slots: Vec<Slot>,
    left: u32,
    running: u32,
}

impl Clients {
    fn new(device: Arc<dyn BlockDevice>, seed: u64, requests: u32) -> Clients {
        let bytes = content(&*device);
        let slots = (0..u64::from(DEPTH))
            .map(|n| {
                let start = n * PART;
                let model = bytes[to_usize(start)..to_usize(start + PART)].to_vec();
                Slot { start, model, buffer: Vec::new(), doing: Doing::Nothing }
            })
            .collect();
        Clients { device, rng: Rng(seed), slots, left: requests, running: 0 }
    }

    fn run(mut self, worker: &mut Worker) {
        for token in 0..DEPTH {
            self.next(worker, token);
        }
        worker.run(&mut self).expect("the ring works");
        assert_eq!((self.left, self.running), (0, 0));
    }

    fn next(&mut self, worker: &mut Worker, token: u32) {
        if self.left == 0 {
            if self.running == 0 {
                worker.handle().stop();
            }
            return;
        }
        self.left -= 1;
        self.running += 1;
        let Clients { rng, slots, device, .. } = self;
        let slot = &mut slots[token as usize];
        let long = if rng.below(8) == 0 { PART } else { 9000 };
        let len = 1 + rng.below(long);
        let at = rng.below(PART - len + 1);
        let (offset, inside) = (slot.start + at, to_usize(at)..to_usize(at + len));
        let durability = if rng.below(16) == 0 { Durability::Fua } else { Durability::Volatile };
        let job = match rng.below(20) {
            0..9 => {
                slot.buffer = vec![0xaa; to_usize(len)];
                slot.doing = Doing::Read { at };
                Job::Read { offset, window: window(&mut slot.buffer) }
            }
            9..16 => {
                slot.buffer = rng.bytes(to_usize(len));
                slot.model[inside].copy_from_slice(&slot.buffer);
                slot.doing = Doing::Change;
                Job::Write { offset, window: window(&mut slot.buffer), durability }
            }
            16..19 => {
                slot.model[inside].fill(0);
                slot.doing = Doing::Change;
                Job::Zero { range: ByteRange::new(offset, len), durability }
            }
            _ => {
                slot.doing = Doing::Change;
                Job::Flush
            }
        };
        start(worker, device, job, token);
    }
}

impl FrontEnd for Clients {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>) {
        result.expect("nothing fails here");
        self.running -= 1;
        let slot = &mut self.slots[token as usize];
        if let Doing::Read { at } = std::mem::replace(&mut slot.doing, Doing::Nothing) {
            let expected = &slot.model[to_usize(at)..to_usize(at) + slot.buffer.len()];
            assert_same(&slot.buffer, expected, &format!("byte {} of the device", slot.start + at));
        }
        self.next(worker, token);
    }

    fn woken(&mut self, _worker: &mut Worker) {}
}

/// Snapshots and merges, until told to stop.
fn disturb(disk: &Disk, stop: &AtomicBool) -> u32 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let name = format!("s{rounds}");
        disk.create_snapshot("v", &name).expect("taken");
        if rounds >= 2 {
            disk.delete_snapshot("v", &format!("s{}", rounds - 2)).expect("deleted");
        }
        disk.reclaim(|| !stop.load(Ordering::Relaxed)).expect("merged");
        rounds += 1;
    }
    rounds
}

fn qcow2_of(raw: &Path, options: &[&str]) -> std::path::PathBuf {
    let path = raw.with_extension("qcow2");
    let made = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args(options)
        .args([raw, &path])
        .status();
    assert!(made.expect("qemu-img runs").success());
    path
}

fn clients_read_what_they_wrote(fixture: &Fixture, image: ImageRef) {
    for seed in [1, 2] {
        let disk = fixture.disk();
        disk.create_volume("v", Origin::Image(image.clone()), None).expect("created");
        let device: Arc<dyn BlockDevice> = disk.volume("v").expect("there");
        let stop = AtomicBool::new(false);
        let rounds = std::thread::scope(|scope| {
            let disturbing = scope.spawn(|| disturb(&disk, &stop));
            // Every exit of this thread ends the other.
            struct Stop<'a>(&'a AtomicBool);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let stopping = Stop(&stop);
            Clients::new(device.clone(), seed, 6000).run(&mut worker());
            drop(stopping);
            disturbing.join().expect("no panic")
        });
        println!("seed {seed}: {rounds} rounds of life");
        let before = content(&*device);
        device.flush().expect("flushed");
        drop((device, disk));
        let disk = fixture.disk();
        assert_same(&content(&served(&disk, "v")), &before, "after reopening");
        disk.delete_volume("v").expect("deleted");
    }
}

#[test]
fn clients_at_depth_32_read_what_they_wrote_over_a_raw_image_while_snapshots_come_and_go() {
    let fixture = Fixture::new();
    let image = fixture.image(&Rng(7).bytes(to_usize(SIZE)));
    clients_read_what_they_wrote(&fixture, image);
}

#[test]
fn clients_at_depth_32_read_what_they_wrote_over_compressed_and_plain_qcow2_images() {
    for options in [&["-c", "-o", "cluster_size=64k"][..], &["-o", "cluster_size=4k"]] {
        let fixture = Fixture::new();
        let raw = fixture.path().join("raw");
        // Halves that can and that cannot be compressed.
        let mut bytes = Rng(7).bytes(to_usize(SIZE));
        bytes[to_usize(SIZE / 3)..to_usize(SIZE / 2)].fill(5);
        std::fs::write(&raw, bytes).expect("written");
        let image = fixture.image_in(uuid::Uuid::new_v4(), qcow2_of(&raw, options));
        clients_read_what_they_wrote(&fixture, image);
    }
}

/// Counts ends by token.
#[derive(Default)]
struct Ends {
    order: Vec<u32>,
    errors: Vec<Error>,
    expected: usize,
}

impl FrontEnd for Ends {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>) {
        self.order.push(token);
        self.errors.extend(result.err());
        if self.order.len() == self.expected {
            worker.handle().stop();
        }
    }

    fn woken(&mut self, _worker: &mut Worker) {}
}

#[test]
fn one_request_of_a_volume_does_not_wait_for_the_thousand_of_another() {
    const MANY: u32 = 1000;
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let image = fixture.image(&Rng(3).bytes(1 << 20));
    let volumes = ["busy", "other"].map(|name| -> Arc<dyn BlockDevice> {
        disk.create_volume(name, Origin::Image(image.clone()), None).expect("created");
        disk.volume(name).expect("there")
    });
    let mut buffers = vec![vec![0; 4096]; MANY as usize + 1];
    let mut worker = worker();
    for (token, buffer) in (0..).zip(&mut buffers) {
        let device = &volumes[usize::from(token == MANY)];
        let offset = u64::from(token % 256) * 4096;
        start(&mut worker, device, Job::Read { offset, window: window(buffer) }, token);
    }
    let mut ends = Ends { expected: MANY as usize + 1, ..Ends::default() };
    worker.run(&mut ends).expect("the ring works");
    assert!(ends.errors.is_empty(), "{:?}", ends.errors);
    let before = ends.order.iter().position(|token| *token == MANY).expect("it has ended");
    // Those that were under way already, and one turn of the other.
    assert!(before <= IN_FLIGHT_OF_DEVICE_MAX + 1, "{before} ended before it");
}

/// Requests of every kind on a volume, with their buffers.
fn start_many(worker: &mut Worker, device: &Arc<dyn BlockDevice>, buffers: &mut [Vec<u8>]) {
    for (token, buffer) in (0..).zip(buffers) {
        let offset = u64::from(token) * 5000;
        let job = match token % 4 {
            0 => Job::Read { offset, window: window(buffer) },
            1 => Job::Write { offset, window: window(buffer), durability: Durability::Fua },
            2 => Job::Zero { range: ByteRange::new(offset, 5000), durability: Durability::Volatile },
            _ => Job::Flush,
        };
        start(worker, device, job, token);
    }
}

#[test]
fn a_worker_that_is_stopped_ends_what_was_started_and_one_that_is_dropped_waits_for_it() {
    let fixture = Fixture::new();
    let image = fixture.image(&Rng(3).bytes(4 << 20));
    for told in [true, false] {
        let disk = fixture.disk();
        let name = format!("v{told}");
        disk.create_volume(&name, Origin::Image(image.clone()), None).expect("created");
        let device: Arc<dyn BlockDevice> = disk.volume(&name).expect("there");
        let mut buffers = vec![vec![9; 5000]; 300];
        let mut worker = worker();
        start_many(&mut worker, &device, &mut buffers);
        if told {
            worker.handle().stop();
            let mut ends = Ends::default();
            worker.run(&mut ends).expect("the ring works");
            assert_eq!((ends.order.len(), ends.errors.len()), (300, 0));
        }
        drop(worker);
        drop((device, disk));
        // The fixture panics if something still holds the disk.
        assert_eq!(fixture.disk().volumes().len(), if told { 1 } else { 2 });
    }
}

#[test]
fn a_wake_from_another_thread_comes_to_a_worker_that_sleeps() {
    struct Woken(u32);
    impl FrontEnd for Woken {
        fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}
        fn request_ended(&mut self, _worker: &mut Worker, _token: u32, _result: Result<()>) {}
        fn woken(&mut self, worker: &mut Worker) {
            self.0 += 1;
            if self.0 == 3 {
                worker.handle().stop();
            }
        }
    }
    let mut worker = worker();
    let handle = worker.handle().clone();
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    let waking = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !seen.load(Ordering::Relaxed) && Instant::now() < deadline {
            handle.wake();
            std::thread::yield_now();
        }
    });
    let mut woken = Woken(0);
    worker.run(&mut woken).expect("the ring works");
    done.store(true, Ordering::Relaxed);
    waking.join().expect("no panic");
    assert!(woken.0 >= 3);
}

#[test]
fn a_submitter_with_too_many_under_way_waits_and_every_request_is_answered_once() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let image = fixture.image(&Rng(3).bytes(4 << 20));
    disk.create_volume("v", Origin::Image(image), None).expect("created");
    let volume = disk.volume("v").expect("there");
    let (tell, told) = mpsc::channel();
    for n in 0..2000u64 {
        let tell = tell.clone();
        let request = match n % 3 {
            0 => Request::Read { offset: n * 2000, buffer: vec![0; 2000] },
            1 => Request::Write { offset: n * 2000, data: vec![1; 2000], durability: Durability::Volatile },
            _ => Request::Discard { range: ByteRange::new(n * 2000, 2000) },
        };
        volume.submit(request, Box::new(move |reply| drop(tell.send(reply.result))));
    }
    drop(tell);
    let results: Vec<Result<()>> = told.iter().collect();
    assert_eq!(results.len(), 2000);
    assert!(results.iter().all(Result::is_ok));
}

#[test]
fn threads_that_call_and_wait_find_what_they_wrote_through_the_workers() {
    const THREADS: u64 = 8;
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let image = fixture.image(&Rng(3).bytes(to_usize(THREADS * PART)));
    disk.create_volume("v", Origin::Image(image), None).expect("created");
    let volume = disk.volume("v").expect("there");
    std::thread::scope(|scope| {
        for n in 0..THREADS {
            let volume = &volume;
            scope.spawn(move || {
                let mut rng = Rng(n);
                let mut model = vec![0; to_usize(PART)];
                volume.read_at(&mut model, n * PART).expect("read");
                for _ in 0..200 {
                    let len = 1 + rng.below(20_000);
                    let at = rng.below(PART - len);
                    let inside = to_usize(at)..to_usize(at + len);
                    match rng.below(3) {
                        0 => {
                            let data = rng.bytes(to_usize(len));
                            model[inside].copy_from_slice(&data);
                            volume.write_at(&data, n * PART + at, Durability::Volatile).expect("written");
                        }
                        1 => {
                            model[inside].fill(0);
                            let range = ByteRange::new(n * PART + at, len);
                            volume.zero(range, Durability::Fua).expect("zeroed");
                        }
                        _ => {
                            let mut found = vec![0xaa; to_usize(len)];
                            volume.read_at(&mut found, n * PART + at).expect("read");
                            assert_same(&found, &model[inside], &format!("thread {n} at {at}"));
                        }
                    }
                }
            });
        }
    });
    let end = volume.geometry().size.0;
    let past = volume.write_at(&[1; 2], end - 1, Durability::Volatile);
    assert!(matches!(past, Err(Error::OutOfRange { .. })), "{past:?}");
    assert!(matches!(volume.read_at(&mut [1; 2], end - 1), Err(Error::OutOfRange { .. })));
}

/// Reads the same places again and again, and looks at the memory that takes once the worker has its tables.
struct Measured {
    device: Arc<dyn BlockDevice>,
    buffers: Vec<AlignedBuffer>,
    ended: u64,
    before: Option<i64>,
    peak: i64,
}

impl Measured {
    const WARM: u64 = 1000;
    const ALL: u64 = 5000;

    fn next(&mut self, worker: &mut Worker, token: u32) {
        let offset = (self.ended * 7 + u64::from(token)) % 200 * 4096;
        let job = Job::Read { offset, window: window(&mut self.buffers[token as usize]) };
        start(worker, &self.device, job, token);
    }
}

impl FrontEnd for Measured {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>) {
        result.expect("nothing fails here");
        self.ended += 1;
        match (self.ended, self.before) {
            (Measured::WARM, _) => self.before = Some(crate::memory::begin()),
            (Measured::ALL, Some(before)) => {
                self.peak = crate::memory::peak_since(before);
                worker.handle().stop();
            }
            _ => {}
        }
        if self.ended < Measured::ALL {
            self.next(worker, token);
        }
    }

    fn woken(&mut self, _worker: &mut Worker) {}
}

#[test]
fn reads_of_head_image_and_zeros_allocate_nothing_once_the_worker_has_its_tables() {
    let fixture = Fixture::new();
    let disk = fixture.disk();
    let image = fixture.image(&Rng(3).bytes(1 << 20));
    disk.create_volume("v", Origin::Image(image), None).expect("created");
    let device: Arc<dyn BlockDevice> = disk.volume("v").expect("there");
    for block in 0..50 {
        device.write_at(&[7; 4096], block * 16384, Durability::Volatile).expect("written");
        device.zero(ByteRange::new(block * 16384 + 8192, 4096), Durability::Volatile).expect("zeroed");
    }
    let buffers = (0..16).map(|_| AlignedBuffer::new(4096)).collect();
    let mut measured = Measured { device, buffers, ended: 0, before: None, peak: -1 };
    let mut worker = worker();
    for token in 0..16 {
        measured.next(&mut worker, token);
    }
    worker.run(&mut measured).expect("the ring works");
    assert_eq!((measured.ended >= Measured::ALL, measured.peak), (true, 0));
}

/// An image of zeros that is read once it may be.
#[derive(Debug)]
struct Gated(Mutex<mpsc::Receiver<()>>);

impl BaseImage for Gated {
    fn len(&self) -> ByteLen {
        ByteLen(1 << 20)
    }

    fn read_at(&self, buffer: &mut [u8], _offset: u64) -> Result<()> {
        self.0.lock().expect("no panic").recv().expect("the gate opens");
        buffer.fill(0);
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }
}

/// The only image there is.
struct Only(Arc<Gated>);

impl BaseSource for Only {
    fn open_base(&self, _image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        Ok(self.0.clone())
    }
}

#[test]
fn a_volume_whose_image_does_not_answer_keeps_no_request_of_another_waiting() {
    const MANY: u32 = 300;
    let (open, gate) = mpsc::channel();
    let stuck = tempfile::tempdir().expect("a temporary directory");
    let stuck = Held::take(stuck.path()).expect("the disk can be had");
    let stuck = stuck.serve(Arc::new(Only(Arc::new(Gated(Mutex::new(gate)))))).expect("the disk opens");
    let fixture = Fixture::new();
    let image = fixture.image(&Rng(3).bytes(1 << 20));
    let volumes = [&stuck, &fixture.disk()].map(|disk| -> Arc<dyn BlockDevice> {
        disk.create_volume("v", Origin::Image(image.clone()), None).expect("created");
        disk.volume("v").expect("there")
    });
    let mut buffers = vec![vec![0; 4096]; MANY as usize + 1];
    let mut worker = worker();
    for (token, buffer) in (0..).zip(&mut buffers) {
        let device = &volumes[usize::from(token == MANY)];
        start(&mut worker, device, Job::Read { offset: 0, window: window(buffer) }, token);
    }
    /// Tells when the last one started ends, and stops after all.
    struct Front {
        ends: Ends,
        tell: mpsc::Sender<()>,
    }
    impl FrontEnd for Front {
        fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}
        fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>) {
            if token == MANY {
                self.tell.send(()).expect("somebody waits");
            }
            self.ends.request_ended(worker, token, result);
        }
        fn woken(&mut self, _worker: &mut Worker) {}
    }
    let (tell, told) = mpsc::channel();
    let ends = Ends { expected: MANY as usize + 1, ..Ends::default() };
    let mut front = Front { ends, tell };
    let in_time = std::thread::scope(|scope| {
        let opening = scope.spawn(move || {
            let in_time = told.recv_timeout(Duration::from_secs(30)).is_ok();
            (0..MANY).for_each(|_| open.send(()).expect("somebody reads"));
            in_time
        });
        worker.run(&mut front).expect("the ring works");
        opening.join().expect("no panic")
    });
    assert!(in_time && front.ends.errors.is_empty(), "{:?}", front.ends.errors);
}

#[test]
fn a_worker_is_closed_also_while_an_image_does_not_answer() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (open, gate) = mpsc::channel::<()>();
    let disk = Held::take(dir.path()).expect("the disk can be had");
    let disk = disk.serve(Arc::new(Only(Arc::new(Gated(Mutex::new(gate)))))).expect("the disk opens");
    let image = ImageRef { name: "base".into(), uuid: uuid::Uuid::new_v4(), sha512: String::new() };
    disk.create_volume("v", Origin::Image(image), None).expect("created");
    let device: Arc<dyn BlockDevice> = disk.volume("v").expect("there");
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        // Whoever reads into it may do so at any time from now on.
        let buffer = Vec::leak(vec![0; 4096]);
        let mut worker = worker();
        start(&mut worker, &device, Job::Read { offset: 0, window: window(buffer) }, 0);
        drop(worker);
        tell.send(()).expect("somebody waits");
    });
    told.recv_timeout(Duration::from_secs(60)).expect("closed");
    drop(open);
}

#[test]
fn a_disk_that_only_a_request_holds_is_let_go_when_that_has_ended() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (open, gate) = mpsc::channel();
    let bases = Arc::new(Only(Arc::new(Gated(Mutex::new(gate)))));
    let held = Held::take(dir.path()).expect("the disk can be had").executor(crate::EXECUTOR);
    let disk = held.serve(bases).expect("the disk opens");
    drop(held);
    let image = ImageRef { name: "base".into(), uuid: uuid::Uuid::new_v4(), sha512: String::new() };
    disk.create_volume("v", Origin::Image(image), None).expect("created");
    let volume = disk.volume("v").expect("there");
    let (tell, told) = mpsc::channel();
    let answer = move |reply: Reply| drop(tell.send(reply.result));
    volume.submit(Request::Read { offset: 0, buffer: vec![1; 4096] }, Box::new(answer));
    drop((volume, disk));
    open.send(()).expect("somebody waits");
    told.recv_timeout(Duration::from_secs(30)).expect("answered").expect("read");
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = Held::take(dir.path()) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::yield_now();
    }
}
