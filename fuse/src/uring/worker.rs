//! What a worker does with each request.
//!
//! Owns [`Requests`], the front end of one worker: the kernel's commands in, reads and writes straight from and into the
//! entries' payloads, everything that may wait to the threads of [`answer`](super::answer), and one answer for each. It
//! leaves when every entry has come back from the kernel for the last time, which the end of the connection leads to.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
};

use bedplate_engine::{
    error::{Error, Result},
    exec::{
        pool::Pool,
        ring::{FrontEnd, Worker},
    },
};
use crossbeam::channel::{Receiver, Sender, bounded};
use fuser::{Errno, FileHandle, OpenFlags};
use nix::errno::Errno as Number;

use super::{
    answer::Answer,
    entry::Entries,
    protocol::{Request, write_out},
};
use crate::{device_file, errno::Fault, handles::Handle, served::Served};

/// The front end of one worker.
pub(super) struct Requests {
    served: Arc<Served>,
    entries: Entries,
    /// What came in each entry.
    under_way: Vec<UnderWay>,
    /// Entries that the kernel may still use.
    living: usize,
    /// Threads for what may wait.
    callers: Arc<Pool>,
    answer: Sender<(usize, Answer)>,
    answers: Receiver<(usize, Answer)>,
    /// Whether the last entry to go went with the connection.
    with_connection: bool,
}

/// A request that is not answered yet.
struct UnderWay {
    unique: u64,
    /// What a device does for it; nothing while a thread has it, or nobody.
    device: Option<OnDevice>,
}

struct OnDevice {
    handle: Arc<Handle>,
    op: &'static str,
    done: Done,
}

/// What the answer to a request says that went well.
#[derive(Clone, Copy)]
enum Done {
    /// The payload's first bytes.
    Read(usize),
    /// That so many bytes were written.
    Written(usize),
    Synced,
}

impl Requests {
    pub(super) fn new(served: Arc<Served>, entries: Entries, callers: Arc<Pool>) -> Requests {
        let (answer, answers) = bounded(entries.len());
        let under_way = (0..entries.len()).map(|_| UnderWay { unique: 0, device: None }).collect();
        let living = entries.len();
        Requests { served, entries, under_way, living, callers, answer, answers, with_connection: false }
    }

    /// Offer every entry to the kernel, then serve until the connection ends.
    pub(super) fn run(&mut self, worker: &mut Worker) -> Result<()> {
        for index in 0..self.entries.len() {
            self.entries.register(worker, index);
        }
        worker.run(self)
    }

    /// Whether it served to the end. If not, there may be requests that nobody answers now.
    pub(super) fn has_ended(&self) -> bool {
        let unused = !self.served.rings.load(Ordering::Relaxed);
        self.living == 0 && (self.with_connection || unused)
    }

    fn arrived(&mut self, worker: &mut Worker, index: usize) {
        let Some((header, request)) = self.entries.arrived(index) else { return };
        self.under_way[index] = UnderWay { unique: header.unique, device: None };
        if !self.served.rings.load(Ordering::Relaxed) {
            self.served.rings.store(true, Ordering::Relaxed);
        }
        // A panic of the node or of a device fails this request, and nothing else.
        let started = catch_unwind(AssertUnwindSafe(|| self.begin(worker, index, request)));
        let started = started.unwrap_or_else(|_| {
            tracing::error!("a request panicked; it is answered with an I/O error");
            self.entries.reclaim(index);
            self.under_way[index].device = None;
            Err(Errno::EIO)
        });
        if let Err(errno) = started {
            self.commit(worker, index, Err(errno));
        }
    }

    /// Start what a request asks for, or answer it at once. An error is its answer.
    fn begin(&mut self, worker: &mut Worker, index: usize, request: Request) -> Result<(), Errno> {
        match request {
            Request::Read { fh, offset, len } => self.read(worker, index, fh, offset, len),
            Request::Write { fh, offset, len, flags } => self.write(worker, index, fh, offset, len, flags),
            Request::Sync { fh } => self.sync(worker, index, fh),
            Request::Call(call) => {
                let (served, answer) = (self.served.clone(), self.answer.clone());
                let worker = worker.handle().clone();
                self.callers.run(0, move || {
                    // Room for each entry's. A worker that is gone needs none.
                    let _ = answer.try_send((index, call.answer(&served)));
                    worker.wake();
                });
                Ok(())
            }
            Request::Refused(errno) => Err(errno),
            Request::Nothing => {
                self.commit(worker, index, Ok(0));
                Ok(())
            }
        }
    }

    fn read(
        &mut self,
        worker: &mut Worker,
        index: usize,
        fh: FileHandle,
        offset: u64,
        len: u32,
    ) -> Result<(), Errno> {
        let handle = self.served.handle(fh)?;
        let device = handle.device.clone();
        let room = self.entries.payload_len();
        let len =
            device_file::readable(&*device, offset, len, room).map_err(|e| handle.report("read", &e))?;
        if len == 0 {
            self.commit(worker, index, Ok(0));
            return Ok(());
        }
        self.on_device(index, handle, "read", Done::Read(len));
        self.entries.start_read(worker, index, &device, offset, len);
        Ok(())
    }

    fn write(
        &mut self,
        worker: &mut Worker,
        index: usize,
        fh: FileHandle,
        offset: u64,
        len: usize,
        flags: OpenFlags,
    ) -> Result<(), Errno> {
        let handle = self.served.handle(fh)?;
        let device = handle.device.clone();
        let len = device_file::writable_len(&*device, offset, len).map_err(|e| handle.report("write", &e))?;
        let durability = device_file::durability(flags.0);
        self.on_device(index, handle, "write", Done::Written(len));
        if len == 0 {
            self.ended(worker, index, Ok(()));
            return Ok(());
        }
        self.entries.start_write(worker, index, &device, offset, len, durability);
        Ok(())
    }

    fn sync(&mut self, worker: &mut Worker, index: usize, fh: FileHandle) -> Result<(), Errno> {
        let handle = self.served.handle(fh)?;
        let device = handle.device.clone();
        self.on_device(index, handle, "flush", Done::Synced);
        self.entries.start_flush(worker, index, &device);
        Ok(())
    }

    fn on_device(&mut self, index: usize, handle: Arc<Handle>, op: &'static str, done: Done) {
        self.under_way[index].device = Some(OnDevice { handle, op, done });
    }

    /// A device has answered.
    fn ended(&mut self, worker: &mut Worker, index: usize, result: Result<()>) {
        let Some(OnDevice { handle, op, done }) = self.under_way[index].device.take() else { return };
        let answer = match (result, done) {
            (Err(error), _) => Err(handle.report(op, &Fault::Device(error))),
            (Ok(()), Done::Read(len)) => Ok(len),
            (Ok(()), Done::Written(len)) => match u32::try_from(len) {
                Ok(len) => self.filled(index, &write_out(len)),
                // A request is never as long as 4 GiB.
                Err(_) => Err(Errno::EIO),
            },
            (Ok(()), Done::Synced) => Ok(0),
        };
        self.commit(worker, index, answer);
    }

    fn filled(&mut self, index: usize, bytes: &[u8]) -> Result<usize, Errno> {
        if self.entries.fill(index, bytes) { Ok(bytes.len()) } else { Err(Errno::EIO) }
    }

    fn commit(&mut self, worker: &mut Worker, index: usize, answer: Result<usize, Errno>) {
        let answer = answer.and_then(|len| u32::try_from(len).map_err(|_| Errno::EIO));
        self.entries.commit(worker, index, self.under_way[index].unique, answer);
    }

    /// The kernel gives an entry back without a request.
    fn gone(&mut self, worker: &mut Worker, index: usize, number: Number) {
        self.entries.gone(index);
        self.living -= 1;
        self.with_connection = matches!(number, Number::ENOTCONN | Number::ECONNABORTED | Number::ECANCELED);
        if !self.with_connection {
            let queue = self.entries.queue(index);
            tracing::warn!(queue, error = %number, "the kernel does not take an entry");
        }
        if self.living == 0 {
            worker.handle().stop();
        }
    }
}

impl FrontEnd for Requests {
    fn command_ended(&mut self, worker: &mut Worker, token: u32, result: i32) {
        let Ok(index) = usize::try_from(token) else { return };
        if self.entries.is_gone(index) {
            return;
        }
        if result < 0 {
            self.gone(worker, index, Number::from_raw(-result))
        } else {
            self.arrived(worker, index)
        }
    }

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<(), Error>) {
        let Ok(index) = usize::try_from(token) else { return };
        self.entries.returned(index);
        self.ended(worker, index, result);
    }

    fn woken(&mut self, worker: &mut Worker) {
        while let Ok((index, answer)) = self.answers.try_recv() {
            let answer = answer.and_then(|bytes| self.filled(index, &bytes));
            self.commit(worker, index, answer);
        }
    }
}
