//! A map file that decays: every byte flipped, every length cut, every subset of a torn tail.
//!
//! Damage is *refused or the same content*: decoding fails, or every block that is not called lost is what it was.

use bedplate_engine::{
    cow::{
        BlockState, LEAF_BLOCKS,
        changes::Changes,
        frozen::{FrozenIndex, Slot, Value},
        head::HeadIndex,
        map::{
            MAP_LOG_MAX,
            checkpoint::{self, LogLen},
            log::{self, ENTRIES_PER_SECTOR, LOG_SECTOR_LEN, LogEnd, Replayed},
        },
    },
    error::Corruption,
    exec::simulated::Seed,
    units::{Block, BlockCount, BlockRange},
};
use uuid::Uuid;

use crate::disk::decode_map;

const BLOCKS: u64 = LEAF_BLOCKS * 4 + 1000;
const LOG_LEN: u64 = 4096;

/// A map file with what it says.
struct Map {
    bytes: Vec<u8>,
    index: HeadIndex,
    end: LogEnd,
    log_at: usize,
}

impl Map {
    /// A checkpoint with leaves of every kind and an empty log.
    fn new() -> Map {
        let index = HeadIndex::new(BlockCount(BLOCKS));
        let set = |start, count, state| index.set(BlockRange::new(start, count), state);
        set(10, 3, BlockState::Data);
        set(12, 5, BlockState::Zero);
        set(LEAF_BLOCKS, LEAF_BLOCKS, BlockState::Data);
        set(2 * LEAF_BLOCKS, LEAF_BLOCKS, BlockState::Zero);
        set(2 * LEAF_BLOCKS + 7, 1, BlockState::Data);
        set(BLOCKS - 9, 9, BlockState::Data);
        let log_len = LogLen::Live { least: LOG_LEN };
        let (bytes, header) = checkpoint::encode(Uuid::from_u128(9), 3, 40, &index, log_len);
        let log_at = bytes.len();
        let mut map = Map { bytes, index, end: LogEnd::start(&header), log_at };
        map.bytes.resize(log_at + usize::try_from(header.log_len).expect("small"), 0);
        map
    }

    /// Append the record of a commit.
    fn commit(&mut self, runs: &[(u64, u64, BlockState)]) {
        let mut changes = Changes::default();
        for (start, count, state) in runs {
            let run = BlockRange::new(*start, *count);
            changes.set(run, *state);
            self.index.set(run, *state);
        }
        let (record, end) = log::encode(&self.end, &changes);
        let at = self.log_at + usize::try_from(self.end.offset()).expect("small");
        self.bytes[at..at + record.len()].copy_from_slice(&record);
        self.end = end;
    }

    /// Runs of single blocks, enough for `sectors` sectors.
    fn scattered(first: u64, sectors: u64) -> Vec<(u64, u64, BlockState)> {
        let state = |n| if n % 3 == 0 { BlockState::Zero } else { BlockState::Data };
        (0..sectors * 39 - 20).map(|n| (first + n * 2, 1, state(n))).collect()
    }

    /// A map whose log has records of one and of several sectors.
    fn with_records() -> Map {
        let mut map = Map::new();
        map.commit(&[(10, 2, BlockState::Zero), (500, 8, BlockState::Data)]);
        map.commit(&Map::scattered(1000, 3));
        map.commit(&[(502, 2, BlockState::Zero), (LEAF_BLOCKS + 5, 9, BlockState::Zero)]);
        map.commit(&[(3 * LEAF_BLOCKS - 4, 40, BlockState::Data)]);
        map
    }
}

/// What a damaged map says must be what the whole one says, or lost.
fn check(expected: &HeadIndex, found: Result<(HeadIndex, Replayed), Corruption>, what: &str) -> Verdict {
    let Ok((index, replayed)) = found else { return Verdict::Refused };
    let mut at = 0;
    while at < BLOCKS {
        let rest = BlockRange::new(at, BLOCKS - at);
        let ((found, count), (right, other)) = (index.run_at(rest), expected.run_at(rest));
        let run = BlockRange::new(at, count.0.min(other.0));
        if found != right {
            // Every block of the run has to be lost.
            let mut at = run.start.0;
            while at < run.end().0 {
                let lost = replayed.lost.iter().find(|range| range.contains(Block(at)));
                let Some(lost) = lost else {
                    panic!("{what}: block {at} is {found:?} instead of {right:?} and not lost");
                };
                at = lost.end().0;
            }
        }
        at = run.end().0;
    }
    if replayed.lost.is_empty() && replayed.damage.is_none() { Verdict::Same } else { Verdict::Lost }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    Lost,
    Same,
}

fn decode(bytes: &[u8]) -> Result<(HeadIndex, Replayed), Corruption> {
    decode_map(bytes).map(|(_, index, replayed)| (index, replayed))
}

#[test]
fn a_whole_map_says_what_it_was_told() {
    let map = Map::with_records();
    assert_eq!(check(&map.index, decode(&map.bytes), "whole"), Verdict::Same);
}

#[test]
fn a_flipped_byte_anywhere_is_refused_or_lost_or_changes_nothing() {
    let map = Map::with_records();
    let mut verdicts = [0; 3];
    for at in 0..map.bytes.len() {
        for pattern in [0x01, 0x80, 0xff, map.bytes[at]] {
            if pattern == 0 {
                continue;
            }
            let mut bytes = map.bytes.clone();
            bytes[at] ^= pattern;
            match check(&map.index, decode(&bytes), &format!("byte {at} with {pattern:#x}")) {
                Verdict::Refused => verdicts[0] += 1,
                Verdict::Lost => verdicts[1] += 1,
                Verdict::Same => verdicts[2] += 1,
            }
        }
    }
    println!("{} refused, {} lost, {} the same", verdicts[0], verdicts[1], verdicts[2]);
    assert!(verdicts.iter().all(|count| *count > 0));
}

#[test]
fn two_damaged_sectors_of_the_log_are_never_taken_for_a_torn_tail() {
    let map = Map::with_records();
    let used = usize::try_from(map.end.used).expect("small");
    for first in 0..used {
        for second in first..used {
            let mut bytes = map.bytes.clone();
            for sector in [first, second] {
                bytes[map.log_at + sector * LOG_SECTOR_LEN + 100] ^= 0x55;
            }
            let verdict = check(&map.index, decode(&bytes), &format!("sectors {first} and {second}"));
            // The same sector twice is whole again.
            assert_eq!(verdict, if first == second { Verdict::Same } else { Verdict::Lost });
        }
    }
}

/// A map with the longest log there is, full of records of as many single blocks as a sector takes. Blocks between them
/// are in no record.
fn with_the_longest_log() -> Map {
    let records = MAP_LOG_MAX / LOG_SECTOR_LEN as u64;
    let blocks = records * ENTRIES_PER_SECTOR as u64 * 2;
    let index = HeadIndex::new(BlockCount(blocks));
    let log_len = LogLen::Live { least: MAP_LOG_MAX };
    let (bytes, header) = checkpoint::encode(Uuid::from_u128(9), 3, 40, &index, log_len);
    let log_at = bytes.len();
    let mut map = Map { bytes, index, end: LogEnd::start(&header), log_at };
    map.bytes.resize(log_at + usize::try_from(header.log_len).expect("small"), 0);
    for record in 0..records {
        // Far apart, so that what is lost falls to pieces all over the volume.
        let runs = (0..ENTRIES_PER_SECTOR as u64).map(|n| ((n * records + record) * 2, 1, BlockState::Data));
        map.commit(&runs.collect::<Vec<_>>());
    }
    assert_eq!(map.end.room(), 0);
    map
}

#[test]
fn the_longest_log_damaged_at_its_start_opens_with_every_later_record_and_ends() {
    let mut map = with_the_longest_log();
    map.bytes[map.log_at + 100] ^= 1;
    let (index, replayed) = decode(&map.bytes).expect("the header is whole");
    assert!(replayed.damage.is_some());
    // All but the first record's blocks are known, and nothing in between is.
    let known = map.end.used * ENTRIES_PER_SECTOR as u64 - ENTRIES_PER_SECTOR as u64;
    let lost: u64 = replayed.lost.iter().map(|range| range.count.0).sum();
    assert_eq!(lost, index.block_count().0 - known);
    assert!(replayed.lost.is_sorted_by(|a, b| a.end() < b.start));
    let frozen = FrozenIndex::empty().overlaid(&index, Slot(0), &replayed.lost);
    assert_eq!(frozen.value(Block(0)), Value::Lost(Slot(0)), "of the damaged record");
    assert_eq!(frozen.value(Block(2)), Value::Data(Slot(0)), "of the second record");
    assert_eq!(frozen.value(Block(3)), Value::Lost(Slot(0)), "of no record");
}

#[test]
fn the_longest_log_in_which_every_other_record_is_damaged_opens_and_ends() {
    let mut map = with_the_longest_log();
    for sector in (0..usize::try_from(map.end.used).expect("small")).step_by(2) {
        map.bytes[map.log_at + sector * LOG_SECTOR_LEN + 100] ^= 1;
    }
    let (index, replayed) = decode(&map.bytes).expect("the header is whole");
    // Only the last record has nothing damaged behind it.
    let lost: u64 = replayed.lost.iter().map(|range| range.count.0).sum();
    assert_eq!(lost, index.block_count().0 - ENTRIES_PER_SECTOR as u64);
    let frozen = FrozenIndex::empty().overlaid(&index, Slot(0), &replayed.lost);
    let last = Block((map.end.used - 1) * 2);
    assert_eq!(frozen.value(last), Value::Data(Slot(0)));
    assert_eq!(frozen.value(Block(2)), Value::Lost(Slot(0)));
}

#[test]
fn a_map_cut_at_any_length_is_refused() {
    let map = Map::with_records();
    for len in 0..map.bytes.len() {
        let verdict = check(&map.index, decode(&map.bytes[..len]), &format!("{len} bytes"));
        assert_eq!(verdict, Verdict::Refused, "{len} bytes");
    }
}

#[test]
fn a_torn_last_record_is_dropped_whole_and_everything_before_it_is_kept() {
    for sectors in 1..=5 {
        let mut map = Map::with_records();
        let before = decode(&map.bytes).expect("whole").0;
        let start = map.log_at + usize::try_from(map.end.offset()).expect("small");
        map.commit(&Map::scattered(5000, sectors));
        let count = usize::try_from(sectors).expect("small");
        for kept in 0..1u32 << count {
            let mut bytes = map.bytes.clone();
            for sector in (0..count).filter(|sector| kept >> sector & 1 == 0) {
                let at = start + sector * LOG_SECTOR_LEN;
                bytes[at..at + LOG_SECTOR_LEN].fill(0);
            }
            let whole = kept == (1 << count) - 1;
            let expected = if whole { &map.index } else { &before };
            let what = format!("{sectors} sectors, kept {kept:#b}");
            assert_eq!(check(expected, decode(&bytes), &what), Verdict::Same, "{what}");
        }
    }
}

#[test]
fn what_a_torn_record_left_behind_does_not_disturb_the_records_that_follow() {
    for kept in 0..8u32 {
        let mut map = Map::with_records();
        let end = map.end;
        let index = decode(&map.bytes).expect("whole").0;
        let start = map.log_at + usize::try_from(end.offset()).expect("small");
        map.commit(&Map::scattered(5000, 3));
        for sector in (0..3).filter(|sector| kept >> sector & 1 == 0) {
            let at = start + sector * LOG_SECTOR_LEN;
            map.bytes[at..at + LOG_SECTOR_LEN].fill(0);
        }
        if kept != 7 {
            (map.end, map.index) = (end, index);
        }
        for n in 0..4 {
            map.commit(&[(7000 + n, 1, BlockState::Data)]);
            let what = format!("kept {kept:#b}, {n} records later");
            assert_eq!(check(&map.index, decode(&map.bytes), &what), Verdict::Same, "{what}");
        }
    }
}

#[test]
fn a_torn_record_never_goes_on_in_what_another_torn_one_left() {
    for sectors in 2..=4 {
        let mut map = Map::with_records();
        let before = decode(&map.bytes).expect("whole").0;
        let end = map.end;
        let start = map.log_at + usize::try_from(end.offset()).expect("small");
        // Of the first record everything but its first sector is there, of the second only the first.
        map.commit(&Map::scattered(5000, sectors));
        map.end = end;
        let rest = map.bytes[start + LOG_SECTOR_LEN..].to_vec();
        map.commit(&Map::scattered(9000, sectors));
        map.bytes[start + LOG_SECTOR_LEN..].copy_from_slice(&rest);
        let what = format!("{sectors} sectors");
        assert_eq!(check(&before, decode(&map.bytes), &what), Verdict::Same, "{what}");
    }
}

/// Append a record of `sectors` sectors of which only those in the mask `kept` reached the medium. Whether all did.
fn commit_torn(map: &mut Map, first: u64, sectors: u64, kept: u32) -> bool {
    let (end, index) = (map.end, decode(&map.bytes).expect("whole").0);
    let start = map.log_at + usize::try_from(end.offset()).expect("small");
    let before = map.bytes.clone();
    map.commit(&Map::scattered(first, sectors));
    let count = usize::try_from(sectors).expect("small");
    for sector in (0..count).filter(|sector| kept >> sector & 1 == 0) {
        let at = start + sector * LOG_SECTOR_LEN;
        map.bytes[at..at + LOG_SECTOR_LEN].copy_from_slice(&before[at..at + LOG_SECTOR_LEN]);
    }
    let whole = kept == (1 << count) - 1;
    if !whole {
        (map.end, map.index) = (end, index);
    }
    whole
}

#[test]
fn a_tail_that_stays_after_an_opening_is_never_taken_for_a_record_whatever_is_appended_and_torn_after_it() {
    let mut histories = 0;
    // Two openings that each leave what a torn record left, then whole records over it, then one more torn one.
    for (stale, other) in [(4u64, 1u64), (4, 3), (3, 4)] {
        for (kept, other_kept) in
            (0..(1u32 << stale) - 1).flat_map(|a| (0..(1u32 << other) - 1).map(move |b| (a, b)))
        {
            for whole in [&[][..], &[1], &[2], &[1, 1], &[3, 1]] {
                for (last, last_kept) in
                    [1u64, 2, 3].into_iter().flat_map(|n| (0..1u32 << n).map(move |k| (n, k)))
                {
                    let mut map = Map::new();
                    map.commit(&[(500, 8, BlockState::Data)]);
                    commit_torn(&mut map, 1000, stale, kept);
                    commit_torn(&mut map, 3000, other, other_kept);
                    for (n, sectors) in whole.iter().zip(0u64..) {
                        assert!(commit_torn(&mut map, 5000 + sectors * 1000, *n, (1 << n) - 1));
                    }
                    commit_torn(&mut map, 9000, last, last_kept);
                    let what = format!(
                        "{stale} {kept:#b}, {other} {other_kept:#b}, {whole:?}, {last} {last_kept:#b}"
                    );
                    assert_eq!(check(&map.index, decode(&map.bytes), &what), Verdict::Same, "{what}");
                    histories += 1;
                }
            }
        }
    }
    println!("{histories} histories");
}

#[test]
fn records_of_an_older_generation_never_replay() {
    let mut old = Map::with_records();
    let (bytes, header) = checkpoint::encode(
        Uuid::from_u128(9),
        4,
        old.end.sequence,
        &old.index,
        LogLen::Live { least: LOG_LEN },
    );
    let log_at = bytes.len();
    let mut new = bytes;
    new.resize(log_at + usize::try_from(header.log_len).expect("small"), 0);
    // Sectors of the old file under the new one, as after a write that never reached the medium.
    let used = usize::try_from(old.end.offset()).expect("small");
    new[log_at..log_at + used].copy_from_slice(&old.bytes[old.log_at..old.log_at + used]);
    assert_eq!(check(&old.index, decode(&new), "old sectors"), Verdict::Same);
    old.bytes = new;
    old.log_at = log_at;
    old.end = LogEnd::start(&header);
    old.commit(&[(77, 1, BlockState::Zero)]);
    assert_eq!(check(&old.index, decode(&old.bytes), "a record before old sectors"), Verdict::Same);
}

#[test]
fn any_index_and_any_commits_come_back_from_a_map() {
    let mut seed = Seed(5);
    for round in 0..300 {
        let blocks = 1 + seed.below(LEAF_BLOCKS * 3);
        let index = HeadIndex::new(BlockCount(blocks));
        let change = |seed: &mut Seed, index: &HeadIndex| {
            let start = seed.below(blocks);
            let long = [8, 5000, blocks][seed.index(3)];
            let run = BlockRange::new(start, 1 + seed.below(long.min(blocks - start)));
            let state = if seed.one_in(2) { BlockState::Data } else { BlockState::Zero };
            index.set(run, state);
            (run, state)
        };
        for _ in 0..seed.below(30) {
            change(&mut seed, &index);
        }
        let log_len = LogLen::Live { least: 64 << 10 };
        let (mut bytes, header) = checkpoint::encode(Uuid::from_u128(1), 1, 0, &index, log_len);
        let log_at = bytes.len();
        bytes.resize(log_at + usize::try_from(header.log_len).expect("small"), 0);
        let mut end = LogEnd::start(&header);
        for _ in 0..seed.below(12) {
            let mut changes = Changes::default();
            for _ in 0..1 + seed.below(100) {
                let (run, state) = change(&mut seed, &index);
                changes.set(run, state);
            }
            let at = log_at + usize::try_from(end.offset()).expect("small");
            let (record, next) = log::encode(&end, &changes);
            bytes[at..at + record.len()].copy_from_slice(&record);
            end = next;
        }
        let (found, read, replayed) = decode_map(&bytes).expect("what was encoded decodes");
        assert_eq!((&found, replayed.end, replayed.damage), (&header, end, None), "round {round}");
        let all = BlockRange::new(0, blocks);
        assert!(read.runs(all).eq(index.runs(all)), "round {round}");
    }
}
