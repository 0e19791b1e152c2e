//! Getting the bytes of a range: each part from where the device says it is, all of them at once.
//!
//! What is in the page cache is copied at once; what is not, and what is read past the cache, goes onto the ring; the
//! rest is left to threads.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use super::{
    Worker,
    flight::{ReadWork, TaskKind},
    window::Lent,
};
use crate::{
    cow::plan::Place,
    device::{BlockDevice, check_length},
    exec::asynchronous::{Cache, Located, Pin},
    units::{ByteOffset, ByteRange},
};

/// Parts of one read that fly at a time; what follows them is read by one thread.
const PARTS_MAX: usize = 64;
/// Bytes of one request that the worker copies, or fills with zeros, itself: whoever asks for more waits for a thread, and
/// nobody else for that.
pub(super) const COPIED_MAX: usize = 1 << 20;

impl Worker {
    pub(super) fn begin_read(&mut self, device: Arc<dyn BlockDevice>, offset: u64, into: Lent, token: u32) {
        let range = ByteRange::new(offset, into.len() as u64);
        if let Err(error) = check_length(range.len.0) {
            return self.end(device, token, Err(error));
        }
        let kind = TaskKind::Read { device: device.clone(), pin: Pin::DEVICE, range, token };
        let task = self.new_task(kind);
        let mut gathering = Gathering::new(self, task, range.start, into, None);
        let located = match device.asynchronous() {
            Some(device) => device.locate(range, &mut |part, located| gathering.found(part, located)),
            None => Ok(Pin::DEVICE),
        };
        gathering.end();
        let result = match located {
            Ok(found) => {
                if let Some(TaskKind::Read { pin, .. }) = self.tasks.get_mut(task).map(|task| &mut task.kind)
                {
                    *pin = found;
                }
                Ok(())
            }
            Err(error) => Err(error),
        };
        drop(device);
        self.part_ended(task, result);
    }
}

/// A run of a file that may go on.
#[derive(Clone, Copy)]
struct Run {
    range: ByteRange,
    fd: RawFd,
    cache: Cache,
    offset: u64,
}

/// Takes the parts of a read, and starts what they need.
pub(super) struct Gathering<'a> {
    worker: &'a mut Worker,
    task: u32,
    /// Where `into` begins.
    start: ByteOffset,
    into: Lent,
    place: Option<Place>,
    run: Option<Run>,
    waits: Option<ByteRange>,
    parts: usize,
    copied: usize,
}

impl<'a> Gathering<'a> {
    /// For a read of `task` whose bytes from `start` on go to `into`; of an action, all from `place`.
    pub fn new(
        worker: &'a mut Worker,
        task: u32,
        start: ByteOffset,
        into: Lent,
        place: Option<Place>,
    ) -> Gathering<'a> {
        Gathering { worker, task, start, into, place, run: None, waits: None, parts: 0, copied: 0 }
    }

    pub fn found(&mut self, range: ByteRange, located: Located<'_>) {
        if self.parts >= PARTS_MAX {
            return self.wait_for(range);
        }
        match located {
            Located::File { file, offset } => {
                let (fd, cache) = (file.fd.as_raw_fd(), file.cache);
                if let Some(run) = &mut self.run
                    && run.fd == fd
                    && run.range.end() == range.start
                    && run.offset + run.range.len.0 == offset
                {
                    run.range.len.0 += range.len.0;
                    return;
                }
                self.end_run();
                self.run = Some(Run { range, fd, cache, offset });
            }
            Located::Zeros | Located::Bytes(_) if !self.may_copy(range) => self.wait_for(range),
            Located::Zeros => self.lent(range).bytes_mut().fill(0),
            Located::Bytes(bytes) => self.lent(range).bytes_mut().copy_from_slice(bytes),
            Located::Waits => self.wait_for(range),
        }
    }

    pub fn end(mut self) {
        self.end_run();
        self.end_wait();
    }

    fn lent(&self, range: ByteRange) -> Lent {
        self.into.part(range.start.since(self.start).as_usize(), range.len.as_usize())
    }

    /// Whether the worker has the time to copy these bytes itself.
    fn may_copy(&mut self, range: ByteRange) -> bool {
        self.copied += range.len.as_usize();
        self.copied <= COPIED_MAX
    }

    fn end_run(&mut self) {
        let Some(Run { range, fd, cache, offset }) = self.run.take() else { return };
        let direct = matches!(cache, Cache::Direct { .. });
        if !direct && !self.may_copy(range) {
            return self.wait_for(range);
        }
        let into = self.lent(range);
        let done = into.fill_from_memory(fd, cache, offset);
        if done == into.len() {
            return;
        }
        self.parts += 1;
        let left = ByteRange::new(range.start.0 + done as u64, range.len.0 - done as u64);
        let (offset, place, into) = (offset + done as u64, self.place, into.rest(done));
        let work = ReadWork { fd, cache, offset, range: left, place, into, bounce: None };
        self.worker.fly_read(self.task, work);
    }

    fn wait_for(&mut self, range: ByteRange) {
        match &mut self.waits {
            Some(waits) if waits.end() == range.start => waits.len.0 += range.len.0,
            Some(_) | None => {
                self.end_wait();
                self.waits = Some(range);
            }
        }
    }

    fn end_wait(&mut self) {
        if let Some(range) = self.waits.take() {
            self.parts += 1;
            let into = self.lent(range);
            self.worker.read_by_thread(self.task, range, self.place, into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            setting::{disk, worker},
            worker::Lease,
        },
        *,
    };
    use crate::{device::Durability, units::ByteLen, volume::life::Origin};

    #[test]
    fn what_lies_in_a_file_system_in_memory_is_copied_by_the_worker_and_nothing_of_it_flies() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("every Linux has one");
        let disk = disk(dir.path());
        disk.create_volume("v", Origin::Empty, Some(ByteLen(65536))).expect("created");
        let volume = disk.volume("v").expect("there");
        let (mut worker, written, mut read) = (worker(), vec![7; 4096], vec![0; 5000]);
        #[expect(unsafe_code, reason = "the buffers are lent to the worker")]
        // SAFETY: they outlive it, and are looked at when it is through with them.
        let (data, into) = unsafe { (Lent::of_source(&written), Lent::of(&mut read)) };
        // Neither the first block nor the last is whole.
        worker.start_leased(
            volume.clone(),
            Lease::Write { offset: 1000, data, durability: Durability::Volatile },
            1,
        );
        worker.settle_without_ring(1);
        worker.start_leased(volume, Lease::Read { offset: 500, into }, 2);
        worker.settle_without_ring(2);
        drop(worker);
        assert!(read[..500].iter().chain(&read[4596..]).all(|byte| *byte == 0));
        assert_eq!(read[500..4596], written);
    }
}
