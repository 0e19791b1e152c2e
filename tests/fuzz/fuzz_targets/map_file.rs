//! A layer's map file: header, checkpoint and log, with checksums that agree more often than not.
#![no_main]

use bedplate_engine::{
    cow::{
        BlockState,
        changes::Changes,
        head::HeadIndex,
        map::{
            checkpoint::{self, HEADER_LEN, Header, LogLen},
            log::{self, LogEnd, Replayed},
        },
    },
    units::{Block, BlockRange, to_usize},
};
use bedplate_fuzz_targets::map::seal;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

/// 16 GiB. The index of a volume of 64 TiB may take 2 GiB, however short the map is that says so; that is its size,
/// and no fault.
const BLOCKS_MAX: u64 = 1 << 22;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if !seed.is_multiple_of(8) {
        seal(&mut data[..size]);
    }
    size
});

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return };
    let Ok(header) = Header::parse(first, bytes.len() as u64) else { return };
    if header.block_count.0 > BLOCKS_MAX {
        return;
    }
    let Some((directory, mut bitmaps)) = rest.split_at_checked(header.directory_len()) else { return };
    let Ok((index, lost)) = checkpoint::decode(&header, directory, &mut bitmaps) else { return };
    let start = to_usize(header.log_offset);
    let bytes = &bytes[start..start + to_usize(header.log_len)];
    let found = log::replay(&header, bytes, &index, lost);
    check(&header, &found);
    if found.damage.is_none() && found.lost.is_empty() {
        checkpoint_says_the_same(&header, &found.end, &index);
        if found.end.torn == 0 && found.end.room() > 0 && header.block_count.0 > 0 {
            next_record_is_read(&header, &found.end, bytes.to_vec());
        }
    }
});

fn check(header: &Header, found: &Replayed) {
    assert!(found.end.used + found.end.torn <= found.end.sectors);
    assert!(found.end.sequence >= header.sequence);
    let mut end = Block(0);
    for range in &found.lost {
        assert!(range.start >= end && !range.is_empty() && range.end().0 <= header.block_count.0);
        end = range.end();
    }
    if let Some((_, at)) = &found.damage {
        assert!(*at < header.log_len);
    }
}

fn checkpoint_says_the_same(header: &Header, end: &LogEnd, index: &HeadIndex) {
    let generation = end.generation + 1;
    let (bytes, written) = checkpoint::encode(header.layer, generation, end.sequence, index, LogLen::Sealed);
    let (first, rest) = bytes.split_first_chunk().expect("a header");
    // One that counted up to its limit is not written again by the engine either: 2^62 commits are not to be had.
    let Ok(again) = Header::parse(first, bytes.len() as u64 + written.log_len) else { return };
    let (directory, mut bitmaps) = rest.split_at(again.directory_len());
    let (read, lost) = checkpoint::decode(&again, directory, &mut bitmaps).expect("what was just written");
    assert!(lost.is_empty());
    let all = BlockRange { start: Block(0), count: header.block_count };
    assert!(read.runs(all).eq(index.runs(all)));
}

/// A record written behind what was read is read with it.
fn next_record_is_read(header: &Header, end: &LogEnd, mut log: Vec<u8>) {
    let mut changes = Changes::default();
    changes.set(BlockRange::new(header.block_count.0 - 1, 1), BlockState::Zero);
    let (record, next) = log::encode(end, &changes);
    log[to_usize(end.offset())..][..record.len()].copy_from_slice(&record);
    let index = HeadIndex::new(header.block_count);
    let found = log::replay(header, &log, &index, Vec::new());
    assert_eq!((found.end, found.damage), (next, None));
    assert_eq!(index.state(Block(header.block_count.0 - 1)), BlockState::Zero);
}
