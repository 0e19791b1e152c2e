//! Clusters that were decoded a moment ago.
//!
//! Owns [`DecodedClusters`]: a small cache that all readers of an image share, split into shards by where the
//! compressed data lies. A cluster that several readers want at once is decoded by one of them while the others
//! wait; an error is told to whoever decoded, and the others try for themselves. Reads of whole clusters decode into
//! their own buffer and only look here.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    error::Result,
    units::{ByteLen, ByteOffset},
};

/// Bytes of decoded clusters that one image keeps.
pub const DECODED_BYTES_MAX: u64 = 16 << 20;
/// Decoded clusters that one image keeps.
pub const DECODED_CLUSTERS_MAX: u64 = 1024;
/// How long a reader waits for another's decoding before it decodes for itself.
pub const DECODE_WAIT_MAX: Duration = Duration::from_secs(5);
const SHARDS: u64 = 8;

/// Where the compressed data lies, and how much of it there may be.
type Key = (ByteOffset, ByteLen);

#[derive(Debug)]
pub struct DecodedClusters {
    shards: Box<[Shard]>,
    /// Clusters of one shard.
    shard_max: usize,
}

#[derive(Debug, Default)]
struct Shard {
    state: Mutex<State>,
    /// Somebody is through with decoding, one way or the other.
    through: Condvar,
}

#[derive(Debug, Default)]
struct State {
    clusters: HashMap<Key, Slot>,
    /// Counts uses; the slot with the smallest one is the oldest.
    clock: u64,
}

#[derive(Debug)]
enum Slot {
    /// A reader is at it.
    Decoding,
    Ready {
        bytes: Arc<[u8]>,
        used: u64,
    },
}

/// Gives up the right to decode, whatever happened.
struct Turn<'a> {
    shard: &'a Shard,
    key: Key,
}

impl DecodedClusters {
    pub fn new(cluster_size: u64) -> DecodedClusters {
        // Large clusters get fewer shards, so that each shard holds two and the whole stays within its limit.
        let clusters = (DECODED_BYTES_MAX / cluster_size).clamp(2, DECODED_CLUSTERS_MAX);
        let shards = SHARDS.min(clusters / 2);
        DecodedClusters {
            shards: (0..shards).map(|_| Shard::default()).collect(),
            shard_max: usize::try_from(clusters / shards).unwrap_or(2),
        }
    }

    /// The cluster that is compressed at `key`, if it is there now.
    pub fn peek(&self, key: Key) -> Option<Arc<[u8]>> {
        self.shard(key)?.state.lock().unwrap_or_else(PoisonError::into_inner).ready(key)
    }

    /// The cluster that is compressed at `key`, from `decode` if nobody has it.
    pub fn get(&self, key: Key, decode: impl FnOnce() -> Result<Arc<[u8]>>) -> Result<Arc<[u8]>> {
        let Some(shard) = self.shard(key) else { return decode() };
        let deadline = Instant::now() + DECODE_WAIT_MAX;
        let mut state = shard.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(bytes) = state.ready(key) {
                return Ok(bytes);
            }
            if !state.clusters.contains_key(&key) {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return decode();
            }
            state = shard.through.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.clusters.insert(key, Slot::Decoding);
        drop(state);
        let turn = Turn { shard, key };
        let bytes = decode()?;
        let mut state = shard.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.insert(key, bytes.clone(), self.shard_max);
        drop(state);
        drop(turn);
        Ok(bytes)
    }

    fn shard(&self, key: Key) -> Option<&Shard> {
        // Compressed clusters lie anywhere; a multiplication spreads them.
        let spread = key.0.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.shards.get(usize::try_from(spread).ok()? % self.shards.len().max(1))
    }
}

impl State {
    fn ready(&mut self, key: Key) -> Option<Arc<[u8]>> {
        match self.clusters.get_mut(&key) {
            Some(Slot::Ready { bytes, used }) => {
                self.clock += 1;
                *used = self.clock;
                Some(bytes.clone())
            }
            Some(Slot::Decoding) | None => None,
        }
    }

    fn insert(&mut self, key: Key, bytes: Arc<[u8]>, count_max: usize) {
        self.clock += 1;
        self.clusters.insert(key, Slot::Ready { bytes, used: self.clock });
        let ready = self.clusters.iter().filter_map(|(key, slot)| match slot {
            Slot::Ready { used, .. } => Some((*used, *key)),
            Slot::Decoding => None,
        });
        let (mut count, mut oldest) = (0, None);
        for slot in ready {
            count += 1;
            oldest = oldest.min(Some(slot)).or(Some(slot));
        }
        if count > count_max
            && let Some((_, key)) = oldest
        {
            self.clusters.remove(&key);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.shard.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Slot::Decoding) = state.clusters.get(&self.key) {
            state.clusters.remove(&self.key);
        }
        drop(state);
        self.shard.through.notify_all();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::error::Error;

    fn key(n: u64) -> Key {
        (ByteOffset(n), ByteLen(512))
    }

    #[test]
    fn readers_of_one_cluster_decode_it_once() {
        let clusters = DecodedClusters::new(65536);
        let decoded = AtomicUsize::new(0);
        let start = Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    let bytes = clusters.get(key(7 << 16), || {
                        decoded.fetch_add(1, Ordering::SeqCst);
                        Ok(vec![5; 65536].into())
                    });
                    assert_eq!(bytes.unwrap()[65535], 5);
                });
            }
        });
        assert_eq!(decoded.into_inner(), 1);
    }

    #[test]
    fn an_error_or_a_panic_is_not_kept() {
        let clusters = DecodedClusters::new(512);
        assert!(matches!(clusters.get(key(1), || Err(Error::Closed)), Err(Error::Closed)));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            clusters.get(key(1), || panic!("decoder"))
        }));
        assert!(panicked.is_err());
        assert!(clusters.get(key(1), || Ok(vec![1; 512].into())).is_ok());
        assert!(clusters.peek(key(1)).is_some());
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_the_limit_holds() {
        for cluster_size in [512_u64, 65536, 2 << 20] {
            let clusters = DecodedClusters::new(cluster_size);
            let len = usize::try_from(cluster_size).unwrap();
            let bytes: Arc<[u8]> = vec![0; len].into();
            clusters.get(key(0), || Ok(bytes.clone())).unwrap();
            for n in 1..5000 {
                clusters.get(key(n), || Ok(bytes.clone())).unwrap();
                assert!(clusters.peek(key(0)).is_some(), "a cluster in use was dropped");
            }
            let kept = Arc::strong_count(&bytes) as u64 - 1;
            assert!(kept * cluster_size <= DECODED_BYTES_MAX && kept <= DECODED_CLUSTERS_MAX, "{kept}");
            assert!(kept >= 2);
        }
    }
}
