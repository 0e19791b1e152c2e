//! Read-ahead over an image, for one reader of it.
//!
//! Owns [`Followed`]: the image as one volume reads it, which watches for runs. The kernel's own read-ahead is off for
//! images (`docs/decisions/0009`): it goes by what the device says, which may be 8 MiB behind every short run, and many
//! volumes that read one file look to it like one reader who jumps. Here nothing is read that was not asked for before
//! [`RUN_MIN`] bytes were read in order, and never more than an eighth of the run so far. Whether the bytes are in
//! memory already, the file is asked (`file.rs`).

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use super::BaseImage;
use crate::{
    device::Extent,
    error::Result,
    exec::{asynchronous::Located, pool::Pool},
    units::{ByteLen, ByteRange},
};

/// Bytes in order after which read-ahead begins.
pub const RUN_MIN: u64 = 2 << 20;
/// Bytes ahead of the reader.
pub const AHEAD_MAX: u64 = 4 << 20;
/// How far requests of one run may overtake one another: a front end splits what is long, and many threads serve it.
const SLACK: u64 = 1 << 20;

/// An image as one reader sees it.
#[derive(Debug)]
pub struct Followed {
    image: Arc<dyn BaseImage>,
    run: Mutex<Run>,
    /// Asks for what is read ahead where whoever reads must not wait, and asking may.
    askers: Option<Arc<Pool>>,
    /// Whether one is at it. What would be asked for meanwhile is not: it is a hint.
    asking: Arc<AtomicBool>,
}

impl Followed {
    pub fn new(image: Arc<dyn BaseImage>, askers: Option<Arc<Pool>>) -> Followed {
        Followed { image, run: Mutex::default(), askers, asking: Arc::default() }
    }

    /// These bytes are being read: what is to be read ahead.
    fn follow(&self, range: ByteRange) -> Option<ByteRange> {
        // Whoever would have to wait for that is one of many in a run, and another sees to it.
        let ahead = self.run.try_lock().ok().and_then(|mut run| run.ahead(range))?;
        ahead.intersect(ByteRange::new(0, self.image.len().0))
    }

    /// Have another thread ask for these bytes.
    fn ask(&self, ahead: ByteRange) {
        if let Some(askers) = &self.askers
            && !self.asking.swap(true, Ordering::AcqRel)
        {
            let (image, asking) = (self.image.clone(), self.asking.clone());
            askers.run(self.image.identity(), move || {
                image.read_ahead(ahead);
                asking.store(false, Ordering::Release);
            });
        }
    }
}

impl BaseImage for Followed {
    fn len(&self) -> ByteLen {
        self.image.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if let Some(ahead) = self.follow(ByteRange::new(offset, buffer.len() as u64)) {
            self.image.read_ahead(ahead);
        }
        self.image.read_at(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.image.extents(range)
    }

    fn read_ahead(&self, range: ByteRange) {
        self.image.read_ahead(range);
    }

    fn identity(&self) -> usize {
        self.image.identity()
    }

    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        self.image.locate(range, &mut |part, located| {
            // What waits comes by `read_at`.
            if matches!(located, Located::File { .. })
                && let Some(ahead) = self.follow(part)
            {
                self.ask(ahead);
            }
            found(part, located);
        });
    }
}

/// What was read last.
#[derive(Debug, Default)]
struct Run {
    start: u64,
    /// Behind the last byte.
    end: u64,
    /// Bytes that were read of it.
    bytes: u64,
    /// Everything before this is read or on its way.
    asked: u64,
}

impl Run {
    /// What is to be read ahead, after `range` was asked for.
    fn ahead(&mut self, range: ByteRange) -> Option<ByteRange> {
        let (start, end, len) = (range.start.0, range.end().0, range.len.0);
        if start > self.end + SLACK || start + SLACK < self.end || start < self.start {
            *self = Run { start, end, bytes: len, asked: end };
            return None;
        }
        self.bytes += len;
        self.end = self.end.max(end);
        // One who leaves more than a quarter out, or comes back all the time, does not read in order.
        let span = self.end - self.start;
        if self.bytes < RUN_MIN || self.bytes < span / 4 * 3 || self.bytes > span / 4 * 5 {
            return None;
        }
        let ahead = (self.bytes / 8).min(AHEAD_MAX);
        let from = self.asked.max(self.end);
        // In large pieces, and while half of the last is still to be read.
        if from >= self.end + ahead / 2 {
            return None;
        }
        self.asked = self.end + ahead;
        Some(ByteRange::new(from, self.asked - from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    /// Bytes that are read ahead of these reads, and how far the last of them reaches.
    fn ahead_of(reads: impl IntoIterator<Item = (u64, u64)>) -> (u64, u64) {
        let mut run = Run::default();
        let asked = reads.into_iter().filter_map(|(at, len)| run.ahead(ByteRange::new(at, len)));
        asked.fold((0, 0), |(sum, _), range| (sum + range.len.0, range.end().0))
    }

    #[test]
    fn nothing_is_read_ahead_of_scattered_reads_and_short_runs() {
        let scattered = (0..10_000u64).map(|n| (n * 7919 % 10_007 * 64 * KIB, 64 * KIB));
        assert_eq!(ahead_of(scattered).0, 0);
        let strided = (0..10_000u64).map(|n| (n * 256 * KIB, 64 * KIB));
        assert_eq!(ahead_of(strided).0, 0);
        let short = (0..1000u64).flat_map(|n| (0..16).map(move |m| (n * (8 << 20) + m * 64 * KIB, 64 * KIB)));
        assert_eq!(ahead_of(short).0, 0);
        // The same place again and again.
        assert_eq!(ahead_of((0..10_000).map(|_| (0, 64 * KIB))).0, 0);
    }

    #[test]
    fn of_a_long_run_each_byte_is_asked_for_once_and_at_most_an_eighth_too_many() {
        for len in [4 * KIB, 64 * KIB, 1024 * KIB] {
            for total in [3u64 << 20, 16 << 20, 1 << 30] {
                let (sum, end) = ahead_of((0..total / len).map(|n| (n * len, len)));
                assert!(end > total && end - total <= (total / 8).min(AHEAD_MAX), "{len} of {total}: {end}");
                assert!(sum <= end - RUN_MIN, "{len} of {total}: {sum} were asked for");
            }
        }
    }

    #[test]
    fn requests_that_overtake_one_another_are_one_run() {
        let swapped = (0..400u64).flat_map(|n| [2 * n + 1, 2 * n]).map(|n| (n * 256 * KIB, 256 * KIB));
        let (sum, end) = ahead_of(swapped);
        assert!(sum > 190 << 20 && end > 200 << 20, "{sum} {end}");
    }
}
