//! How many workers, entries and bytes: arithmetic over the machine's processors.
//!
//! Owns the limits ([`FUSE_PAYLOAD_MAX`], [`WORKERS_MAX`]) and the shares that follow. The kernel puts a request into the
//! queue of the processor that asks and waits until every *possible* processor's queue has an entry; so a processor that
//! is not online gets one, and those that are online share the memory. Workers are as many as there are processors that
//! we may run on, times [`RINGS_PER_QUEUE`]; they are not bound to processors.

use std::{fs, io, path::Path};

use nix::{sched::sched_getaffinity, unistd::Pid};

use super::entry::HEADER_BYTES;

/// Most memory that the payloads of one mount take.
pub(crate) const FUSE_PAYLOAD_MAX: usize = 256 << 20;
/// Most workers of one mount.
const WORKERS_MAX: usize = 128;
/// Rings, each with a thread, that serve one queue. With two the disk does not stand idle while one answers a burst; a
/// cached base alone would be a tenth faster with one.
const RINGS_PER_QUEUE: usize = 2;
/// Requests of one processor in work at once, if the memory allows it.
const DEPTH: usize = 32;
/// Below this, requests are made shorter instead.
const DEPTH_MIN: usize = 8;
/// Longest read or write, if the memory allows it; and the shortest limit that is set, the kernel's own default.
const REQUEST_BYTES: usize = 256 << 10;
const REQUEST_BYTES_MIN: usize = 128 << 10;

const PROCESSORS: &str = "/sys/devices/system/cpu";

/// The machine's processors, by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Processors {
    /// One past the highest that there can ever be.
    possible: u16,
    online: Vec<u16>,
    /// Those that this process may run on.
    allowed: Vec<u16>,
}

/// What each worker has, and how long a request may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) request_bytes: usize,
    /// For each worker the queue of each of its entries.
    pub(super) workers: Vec<Vec<u16>>,
}

impl Processors {
    pub(super) fn read() -> io::Result<Processors> {
        let list = |name: &str| {
            let text = fs::read_to_string(Path::new(PROCESSORS).join(name))?;
            parse(&text).ok_or_else(|| io::Error::other(format!("{PROCESSORS}/{name} is {text:?}")))
        };
        let possible = list("possible")?.last().map_or(1, |last| last + 1);
        let online = list("online")?;
        let allowed = sched_getaffinity(Pid::this())?;
        let allowed =
            online.iter().copied().filter(|n| allowed.is_set(usize::from(*n)).unwrap_or(false)).collect();
        Ok(Processors { possible, online, allowed })
    }
}

impl Sizes {
    pub(super) fn of(processors: &Processors) -> Sizes {
        let Processors { possible, online, allowed } = processors;
        let homes = allowed.len().clamp(1, WORKERS_MAX / RINGS_PER_QUEUE);
        let mut workers = vec![Vec::new(); homes * RINGS_PER_QUEUE];
        let idle = usize::from(*possible).saturating_sub(online.len());
        let (depth, request_bytes) = fit(online.len().max(1), idle);
        for queue in 0..*possible {
            // A processor's own worker where it may have one.
            let home = allowed.iter().position(|n| *n == queue).unwrap_or(queue.into()) % homes;
            let depth = if online.contains(&queue) { depth } else { 1 };
            for ring in 0..RINGS_PER_QUEUE {
                let share = (depth + RINGS_PER_QUEUE - 1 - ring) / RINGS_PER_QUEUE;
                workers[ring * homes + home].extend(std::iter::repeat_n(queue, share));
            }
        }
        workers.retain(|entries| !entries.is_empty());
        Sizes { request_bytes, workers }
    }

    /// Entries of all workers.
    pub(super) fn entry_count(&self) -> usize {
        self.workers.iter().map(Vec::len).sum()
    }
}

/// Entries for each busy queue and bytes for each entry, so that with one entry for each idle queue they stay within
/// [`FUSE_PAYLOAD_MAX`] as far as one entry for each queue does.
fn fit(busy: usize, idle: usize) -> (usize, usize) {
    let depth = |bytes: usize| {
        let entries = FUSE_PAYLOAD_MAX / (bytes + HEADER_BYTES);
        entries.saturating_sub(idle) / busy
    };
    let bytes = if depth(REQUEST_BYTES) >= DEPTH_MIN { REQUEST_BYTES } else { REQUEST_BYTES_MIN };
    (depth(bytes).clamp(1, DEPTH), bytes)
}

/// A list of numbers and ranges, as the kernel writes it: `0-3,8`. `None` if it is not one.
fn parse(text: &str) -> Option<Vec<u16>> {
    let mut numbers = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors(possible: u16, online: u16, allowed: &[u16]) -> Processors {
        Processors { possible, online: (0..online).collect(), allowed: allowed.to_vec() }
    }

    #[test]
    fn the_kernels_lists_are_read_and_nonsense_is_not() {
        assert_eq!(parse("0-1\n"), Some(vec![0, 1]));
        assert_eq!(parse("0,2-4,9"), Some(vec![0, 2, 3, 4, 9]));
        for text in ["", "a", "1-", "-2", "70000"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert!(!Processors::read().unwrap().allowed.is_empty());
    }

    #[test]
    fn every_possible_processor_has_an_entry_and_an_online_one_its_depth() {
        for (possible, online, allowed) in
            [(1, 1, vec![0]), (2, 2, vec![0, 1]), (8, 2, vec![1]), (128, 16, vec![3, 5, 7]), (4, 4, vec![])]
        {
            let sizes = Sizes::of(&processors(possible, online, &allowed));
            for queue in 0..possible {
                let count = sizes.workers.iter().flatten().filter(|entry| **entry == queue).count();
                assert_eq!(count, if queue < online { DEPTH } else { 1 }, "{queue} of {possible}");
            }
            assert!(sizes.workers.len() <= allowed.len().max(1) * RINGS_PER_QUEUE);
        }
    }

    #[test]
    fn a_processor_that_we_may_run_on_has_its_own_workers() {
        let sizes = Sizes::of(&processors(4, 4, &[0, 1, 2, 3]));
        assert_eq!(sizes.workers.len(), 4 * RINGS_PER_QUEUE);
        for (worker, entries) in sizes.workers.iter().enumerate() {
            assert!(entries.iter().all(|queue| usize::from(*queue) == worker % 4));
        }
    }

    #[test]
    fn memory_is_bounded_whatever_the_machine() {
        for (possible, online) in [(1, 1), (2, 2), (64, 64), (256, 64), (512, 512), (1024, 8)] {
            let allowed: Vec<u16> = (0..online).collect();
            let sizes = Sizes::of(&processors(possible, online, &allowed));
            let bytes = sizes.entry_count() * (sizes.request_bytes + HEADER_BYTES);
            assert!(bytes <= FUSE_PAYLOAD_MAX, "{possible} {online}: {bytes}");
            assert!(sizes.workers.len() <= WORKERS_MAX);
            assert!(sizes.request_bytes >= REQUEST_BYTES_MIN);
        }
    }
}
