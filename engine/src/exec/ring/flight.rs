//! What is under way: flights, each one entry of the ring or one job of a thread, and the tasks that they belong to.
//!
//! Owns [`Flight`] and [`Task`]. A task is a client's read or one action of a change; it has ended when all its flights
//! have. What the ring cannot do, or does not do well, is left to a thread that may wait, which then says what is wrong:
//! so an error reads the same whoever met it. Only a write that failed is not tried again. Syncs are a commit's, which
//! is a thread's.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use nix::errno::Errno;

use super::{
    Worker,
    read::COPIED_MAX,
    service::begin_serving,
    wake::{Letter, Post},
    window::Lent,
    worker::Lease,
};
use crate::{
    cow::plan::{Place, Segment},
    device::BlockDevice,
    error::{Error, Result},
    exec::{
        asynchronous::{Cache, Pin},
        buffer::AlignedBuffer,
        carrier::{ChangeId, Planned},
        executor::Live,
        fair::{Key, key_of},
        storage::StorageFile,
    },
    units::{ByteLen, ByteRange, to_usize},
};

/// Bytes of a buffer for a part that does not lie as direct I/O wants it; longer ones are left to threads.
const BOUNCE_LEN: usize = 128 << 10;
/// Such buffers in use at a time.
const BOUNCES_MAX: usize = 64;

/// Buffers for what is not aligned, used again.
#[derive(Debug, Default)]
pub(super) struct Bounces {
    free: Vec<AlignedBuffer>,
    used: usize,
}

impl Bounces {
    pub fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        if len > BOUNCE_LEN || self.used >= BOUNCES_MAX {
            return None;
        }
        self.used += 1;
        Some(self.free.pop().unwrap_or_else(|| AlignedBuffer::new(BOUNCE_LEN)))
    }

    fn put(&mut self, buffer: Option<AlignedBuffer>) {
        if let Some(buffer) = buffer {
            self.used -= 1;
            self.free.push(buffer);
        }
    }
}

/// How a flight has landed.
#[derive(Debug)]
pub(super) enum Landing {
    /// The ring's result: not negative, or an error number negated.
    Ring(i32),
    Thread(Result<()>),
}

#[derive(Debug)]
pub(super) struct Flight {
    pub task: u32,
    pub work: Work,
}

#[derive(Debug)]
pub(super) enum Work {
    Read(ReadWork),
    Write(WriteWork),
    Punch(Arc<dyn StorageFile>, ByteRange),
    /// Whatever a thread does.
    Thread,
}

/// A part of a read.
#[derive(Debug)]
pub(super) struct ReadWork {
    /// Open as long as the task is there.
    pub fd: RawFd,
    pub cache: Cache,
    /// Of the file.
    pub offset: u64,
    /// Of the device.
    pub range: ByteRange,
    /// Of an action's read: whose bytes they are.
    pub place: Option<Place>,
    /// As long as `range`.
    pub into: Lent,
    /// What the kernel fills instead; the part begins so many bytes into it.
    pub bounce: Option<(AlignedBuffer, usize)>,
}

#[derive(Debug)]
pub(super) struct WriteWork {
    pub file: Arc<dyn StorageFile>,
    pub offset: u64,
    /// What is not written yet.
    pub bytes: Lent,
    pub bounce: Option<AlignedBuffer>,
}

#[derive(Debug)]
pub(super) struct Task {
    pub kind: TaskKind,
    /// Flights that have not landed, and one while more may start.
    pub outstanding: usize,
    pub result: Result<()>,
}

#[derive(Debug)]
pub(super) enum TaskKind {
    Read {
        device: Arc<dyn BlockDevice>,
        pin: Pin,
        range: ByteRange,
        token: u32,
    },
    Action {
        change: ChangeId,
        planned: Planned,
    },
    /// A commit, which a thread carries out and tells the core of.
    Commit {
        change: ChangeId,
    },
    /// A request of a device that only waits.
    Whole {
        device: Arc<dyn BlockDevice>,
        token: u32,
    },
    /// A write that waits for the disk's reserve.
    Admission {
        device: Arc<dyn BlockDevice>,
        lease: Lease,
        token: u32,
    },
}

/// Sends a thread's answer, also when its job panics.
struct Answer {
    post: Arc<Post>,
    flight: u32,
    result: Option<Result<()>>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        let panicked = || Err(Error::io("carry out", "a request", io::Error::other("it panicked")));
        let result = self.result.take().unwrap_or_else(panicked);
        self.post.send(Letter::Landed { flight: self.flight, result });
    }
}

impl Worker {
    pub(super) fn new_task(&mut self, kind: TaskKind) -> u32 {
        self.tasks.insert(Task { kind, outstanding: 1, result: Ok(()) })
    }

    pub(super) fn new_flight(&mut self, task: u32, work: Work) -> u32 {
        if let Some(task) = self.tasks.get_mut(task) {
            task.outstanding += 1;
        }
        self.flights.insert(Flight { task, work })
    }

    /// Let a thread that may wait do a part of a task. What hangs with jobs of one key leaves threads for other keys.
    pub(super) fn by_thread(
        &mut self,
        task: u32,
        key: Key,
        job: impl FnOnce() -> Result<()> + Send + 'static,
    ) {
        let flight = self.new_flight(task, Work::Thread);
        let answer = Answer { post: self.post().clone(), flight, result: None };
        self.pool.run(key, move || {
            // What it calls must not come back to a worker.
            begin_serving();
            let mut answer = answer;
            // What the job holds is let go before anybody hears of its end.
            answer.result = Some(job());
        });
    }

    /// All of a request, for a device that only waits.
    pub(super) fn leave_to_thread(&mut self, device: Arc<dyn BlockDevice>, lease: Lease, token: u32) {
        let task = self.new_task(TaskKind::Whole { device: device.clone(), token });
        self.by_thread(task, key_of(&device), move || lease.carry_out(&*device));
        self.part_ended(task, Ok(()));
    }

    pub(super) fn land(&mut self, number: u32, landing: Landing) {
        let Some(Flight { task, work }) = self.flights.remove(number) else {
            debug_assert!(false, "flight {number} landed twice");
            return;
        };
        match (work, landing) {
            (Work::Read(work), Landing::Ring(result)) => self.read_landed(task, work, result),
            (Work::Write(work), Landing::Ring(result)) => self.write_landed(task, work, result),
            (Work::Punch(file, range), Landing::Ring(result)) => match check("punch", &*file, result) {
                Checked::Done(_) => self.part_ended(task, Ok(())),
                Checked::Failed(error) => self.part_ended(task, Err(error)),
                Checked::Interrupted => {
                    self.by_thread(task, key_of(&file), move || file.punch(range));
                    self.part_ended(task, Ok(()));
                }
            },
            (_, Landing::Thread(result)) => self.part_ended(task, result),
            (Work::Thread, Landing::Ring(_)) => debug_assert!(false, "a thread's flight is not on the ring"),
        }
    }

    fn read_landed(&mut self, task: u32, mut work: ReadWork, result: i32) {
        let len = work.into.len();
        let got = usize::try_from(result).unwrap_or(0);
        if let Some((buffer, skip)) = work.bounce.take() {
            let whole = got >= skip + len;
            if whole && let Some(bytes) = buffer.get(skip..skip + len) {
                work.into.bytes_mut().copy_from_slice(bytes);
            }
            self.bounces.put(Some(buffer));
            if !whole {
                self.read_by_thread(task, work.range, work.place, work.into);
            }
            return self.part_ended(task, Ok(()));
        }
        if got < len {
            let rest = ByteRange {
                start: work.range.start.plus(ByteLen(got as u64)),
                len: ByteLen((len - got) as u64),
            };
            let offset = work.offset + got as u64;
            work = ReadWork { offset, range: rest, into: work.into.rest(got), ..work };
            if got > 0 {
                self.fly_read(task, work);
            } else {
                self.read_by_thread(task, work.range, work.place, work.into);
            }
        }
        self.part_ended(task, Ok(()));
    }

    fn write_landed(&mut self, task: u32, mut work: WriteWork, result: i32) {
        match check("write", &*work.file, result) {
            Checked::Done(0) => {
                let error = io::Error::from(io::ErrorKind::WriteZero);
                let error = Error::io("write", work.file.path(), error);
                self.bounces.put(work.bounce.take());
                return self.part_ended(task, Err(error));
            }
            Checked::Done(count) if count < work.bytes.len() => {
                self.bounces.put(work.bounce.take());
                let (offset, bytes) = (work.offset + count as u64, work.bytes.rest(count));
                self.fly_write(task, work.file, offset, bytes);
            }
            Checked::Done(_) => self.bounces.put(work.bounce.take()),
            Checked::Failed(error) => {
                self.bounces.put(work.bounce.take());
                return self.part_ended(task, Err(error));
            }
            Checked::Interrupted => {
                self.bounces.put(work.bounce.take());
                let WriteWork { file, offset, bytes, .. } = work;
                self.by_thread(task, key_of(&file), move || file.write_at(bytes.bytes(), offset));
            }
        }
        self.part_ended(task, Ok(()));
    }

    /// Put a part of a read onto the ring.
    pub(super) fn fly_read(&mut self, task: u32, mut work: ReadWork) {
        let (fd, mut offset, mut into) = (work.fd, work.offset, work.into);
        if let Cache::Direct { align } = work.cache {
            let len = into.len() as u64;
            let direct =
                offset.is_multiple_of(align) && len.is_multiple_of(align) && into.is_aligned(to_usize(align));
            if !direct {
                let start = offset / align * align;
                let skip = to_usize(offset - start);
                let whole = to_usize((offset + len - start).next_multiple_of(align));
                let Some(mut buffer) = self.bounces.take(whole) else {
                    return self.read_by_thread(task, work.range, work.place, work.into);
                };
                #[expect(unsafe_code, reason = "the kernel fills a buffer of the flight")]
                // SAFETY: the flight owns the buffer until it has landed, and its bytes do not move with it.
                let lent = unsafe { Lent::of(&mut buffer) };
                (offset, into) = (start, lent.part(0, whole));
                work.bounce = Some((buffer, skip));
            }
        }
        let flight = self.new_flight(task, Work::Read(work));
        self.ring.read(fd, offset, into, flight);
    }

    /// Put a write onto the ring.
    pub(super) fn fly_write(&mut self, task: u32, file: Arc<dyn StorageFile>, offset: u64, bytes: Lent) {
        let Some((fd, cache)) = file.descriptor().map(|file| (file.fd.as_raw_fd(), file.cache)) else {
            return self.by_thread(task, key_of(&file), move || file.write_at(bytes.bytes(), offset));
        };
        if cache == Cache::Memory && bytes.len() <= COPIED_MAX {
            if let Some(task) = self.tasks.get_mut(task) {
                task.outstanding += 1;
            }
            return self.part_ended(task, file.write_at(bytes.bytes(), offset));
        }
        let (mut source, mut bounce) = (bytes, None);
        if let Cache::Direct { align } = cache
            && !bytes.is_aligned(to_usize(align))
        {
            let Some(mut buffer) = self.bounces.take(bytes.len()) else {
                return self.by_thread(task, key_of(&file), move || file.write_at(bytes.bytes(), offset));
            };
            buffer[..bytes.len()].copy_from_slice(bytes.bytes());
            #[expect(unsafe_code, reason = "the kernel reads a buffer of the flight")]
            // SAFETY: the flight owns the buffer until it has landed, and its bytes do not move with it.
            let lent = unsafe { Lent::of(&mut buffer) };
            (source, bounce) = (lent.part(0, bytes.len()), Some(buffer));
        }
        let flight = self.new_flight(task, Work::Write(WriteWork { file, offset, bytes, bounce }));
        self.ring.write(fd, offset, source, flight);
    }

    pub(super) fn fly_punch(&mut self, task: u32, file: Arc<dyn StorageFile>, range: ByteRange) {
        let Some(fd) = file.descriptor().map(|file| file.fd.as_raw_fd()) else {
            return self.by_thread(task, key_of(&file), move || file.punch(range));
        };
        let flight = self.new_flight(task, Work::Punch(file, range));
        self.ring.punch(fd, range, flight);
    }

    /// Have a thread read a part of a task's read.
    pub(super) fn read_by_thread(&mut self, task: u32, range: ByteRange, place: Option<Place>, into: Lent) {
        enum Reader {
            Device(Arc<dyn BlockDevice>),
            Layer(Arc<Live>, Place),
        }
        let reader = match (self.tasks.get_mut(task).map(|task| &task.kind), place) {
            (Some(TaskKind::Read { device, .. }), _) => Reader::Device(device.clone()),
            (Some(TaskKind::Action { planned, .. }), Some(place)) => {
                Reader::Layer(planned.live.clone(), place)
            }
            _ => return debug_assert!(false, "only reads and actions have bytes to read"),
        };
        let key = match &reader {
            Reader::Device(device) => {
                device.asynchronous().map_or(key_of(device), |device| device.waits_for())
            }
            Reader::Layer(live, _) => live.view.waits_for(),
        };
        self.by_thread(task, key, move || match reader {
            Reader::Device(device) => device.read_at(into.bytes_mut(), range.start.0),
            Reader::Layer(live, place) => live.view.read_segment(Segment { range, place }, into.bytes_mut()),
        });
    }

    /// One part of a task is through; with the last one, the task is.
    pub(super) fn part_ended(&mut self, number: u32, result: Result<()>) {
        let Some(task) = self.tasks.get_mut(number) else { return };
        if task.result.is_ok() {
            task.result = result;
        }
        task.outstanding -= 1;
        if task.outstanding > 0 {
            return;
        }
        let Some(Task { kind, result, .. }) = self.tasks.remove(number) else { return };
        match kind {
            TaskKind::Read { device, pin, range, token } => {
                let confirm = |()| device.asynchronous().map_or(Ok(()), |device| device.confirm(range));
                let result = result.and_then(confirm);
                self.unpin(pin);
                self.end(device, token, result);
            }
            TaskKind::Action { change, planned } => self.action_ended(change, planned, result),
            TaskKind::Commit { change } => self.commit_ended(change),
            TaskKind::Whole { device, token } => self.end(device, token, result),
            TaskKind::Admission { device, lease, token } => match result {
                Ok(()) => self.submit_change(device, lease, token),
                Err(error) => self.end(device, token, Err(error)),
            },
        }
    }

    /// Whoever is the last to hold a volume waits for its housekeeping and closes its files.
    pub(super) fn let_go(&mut self, device: Arc<dyn BlockDevice>) {
        if Arc::strong_count(&device) == 1 {
            self.pool.run(key_of(&device), move || drop(device));
        }
    }

    /// Whoever is the last to follow a view closes its files, and so gives the space of those that were removed back.
    pub(super) fn unpin(&mut self, pin: Pin) {
        if pin.is_last() {
            self.pool.run(0, move || drop(pin));
        }
    }
}

enum Checked {
    Done(usize),
    Failed(Error),
    /// Nothing has happened, and nothing is wrong with the file.
    Interrupted,
}

fn check(op: &'static str, file: &dyn StorageFile, result: i32) -> Checked {
    match usize::try_from(result) {
        Ok(count) => Checked::Done(count),
        Err(_) => match Errno::from_raw(-result) {
            // The kernel cancels what it has no thread for.
            Errno::EINTR | Errno::EAGAIN | Errno::ECANCELED => Checked::Interrupted,
            errno => Checked::Failed(Error::io(op, file.path(), io::Error::from(errno))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::setting::{Nobody, worker},
        *,
    };
    use crate::{
        exec::storage::{Open, Storage, file::FileStorage},
        image::{device::ImageDevice, raw::RawImage},
    };

    /// A device that nobody asks anything.
    fn nothing() -> Arc<dyn BlockDevice> {
        let file = tempfile::tempfile().expect("a file");
        let image = RawImage::new(file, "nothing".into(), ByteLen(0)).expect("an empty image");
        Arc::new(ImageDevice::new(Arc::new(image)))
    }

    #[test]
    fn a_worker_whose_medium_never_answers_is_given_up_when_it_is_stopped() {
        let (silent, _open) = nix::unistd::pipe().expect("a pipe");
        let mut worker = worker();
        worker.stopping.patience = std::time::Duration::from_millis(20);
        #[expect(unsafe_code, reason = "the kernel would fill a vector of the test")]
        // SAFETY: it is never freed.
        let into = unsafe { Lent::of(vec![0; 512].leak()) };
        let task = worker.new_task(TaskKind::Whole { device: nothing(), token: 0 });
        let work = ReadWork {
            fd: silent.as_raw_fd(),
            cache: Cache::Buffered,
            offset: 0,
            range: ByteRange::new(0, 512),
            place: None,
            into,
            bounce: None,
        };
        worker.fly_read(task, work);
        worker.handle().stop();
        let ended = worker.run(&mut Nobody);
        assert!(matches!(ended, Err(Error::Busy { limit: "CLOSE_WAIT_MAX" })), "{ended:?}");
        drop(worker);
    }

    #[test]
    fn what_a_short_write_left_is_written_and_a_write_of_nothing_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = FileStorage::open(dir.path()).expect("opens");
        let file = storage.open("file", Open::Create).expect("created");
        let mut worker = worker();
        let data = vec![7; 3000];
        for (token, (written, expected)) in (0..).zip([(1000, true), (0, false)]) {
            #[expect(unsafe_code, reason = "the kernel reads from a vector of the test")]
            // SAFETY: it lives until the worker is quiet.
            let bytes = unsafe { Lent::of_source(&data) };
            let task = worker.new_task(TaskKind::Whole { device: nothing(), token });
            let work = Work::Write(WriteWork { file: file.clone(), offset: 0, bytes, bounce: None });
            let flight = worker.new_flight(task, work);
            worker.part_ended(task, Ok(()));
            worker.land(flight, Landing::Ring(written));
            let result = worker.wait_for_end(token);
            assert_eq!(result.is_ok(), expected, "{result:?}");
        }
        let mut found = vec![1; 3000];
        file.read_at(&mut found, 0).expect("all is there");
        assert!(found[..1000].iter().all(|byte| *byte == 0), "nobody has written these");
        assert!(found[1000..].iter().all(|byte| *byte == 7));
    }
}
