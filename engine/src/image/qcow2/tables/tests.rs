//! Tables made by hand, entry by entry.

#![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

use std::{io::Write, path::Path};

use super::{
    entry::{COMPRESSED, COPIED, ZERO},
    *,
};
use crate::units::ByteOffset;

const CLUSTER: u64 = 16384;
const L1_AT: u64 = CLUSTER;
const L2_AT: u64 = 2 * CLUSTER;
const DATA: u64 = 4 * CLUSTER;
/// In clusters: header, L1, two L2 tables, data.
const FILE: u64 = 40;

struct File(Vec<u8>);

impl File {
    fn new() -> File {
        let mut file = File(vec![0; to_usize(FILE * CLUSTER)]);
        file.set(L1_AT, L2_AT | COPIED);
        file.set(L1_AT + 8, (L2_AT + CLUSTER) | COPIED);
        file
    }

    fn set(&mut self, at: u64, word: u64) {
        self.0[to_usize(at)..to_usize(at) + 8].copy_from_slice(&word.to_be_bytes());
    }

    /// `size` in clusters.
    fn open(&self, version: Version, format: L2Format, size: u64, l2_bytes_max: u64) -> Tables {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&self.0).unwrap();
        let file = Arc::new(Source::new(file, Path::new("test.qcow2")).unwrap());
        let geometry = Geometry::new(14, format);
        let opening = Opening {
            geometry,
            version,
            clusters: Clusters::Own,
            l1: L1Ref { offset: ByteOffset(L1_AT), entries: 8 },
            size: ByteLen(size * CLUSTER),
            taken: vec![0..CLUSTER, L1_AT..L1_AT + CLUSTER],
            l2_bytes_max,
        };
        Tables::open(file, opening).unwrap()
    }
}

fn entries(tables: &Tables, range: ByteRange) -> Vec<(ByteRange, Entry)> {
    let mut found = Vec::new();
    tables
        .each(range, |range, entry| {
            found.push((range, entry));
            ControlFlow::Continue(())
        })
        .unwrap();
    found
}

fn only(tables: &Tables, cluster: u64) -> Entry {
    let found = entries(tables, ByteRange::new(cluster * CLUSTER + 5, 7));
    assert_eq!(found.len(), 1);
    found[0].1
}

fn problem(tables: &Tables, cluster: u64) -> EntryProblem {
    assert_eq!(only(tables, cluster), Entry::Damaged);
    match tables.explain(ByteRange::new(cluster * CLUSTER, CLUSTER)) {
        Error::Corrupt { what: crate::error::Corruption::Lost { what, .. }, .. } => match *what {
            crate::error::Corruption::Entry { problem, .. } => problem,
            other => panic!("{other}"),
        },
        other => panic!("{other}"),
    }
}

#[test]
fn every_standard_entry_is_what_the_format_says_or_damaged() {
    let host = DATA;
    let sound = [
        (0, Entry::Unallocated),
        (host | COPIED, Entry::Data { host: ByteOffset(host) }),
        (host, Entry::Data { host: ByteOffset(host) }),
        (ZERO, Entry::Zero { host: None }),
        (host | COPIED | ZERO, Entry::Zero { host: Some(ByteOffset(host)) }),
        // Space for zeros that was never written may lie past the end.
        ((FILE * CLUSTER) | ZERO, Entry::Zero { host: Some(ByteOffset(FILE * CLUSTER)) }),
        (COMPRESSED | (host + 700), Entry::Compressed { host: ByteOffset(host + 700), len: ByteLen(324) }),
        (
            COMPRESSED | (2 << 56) | (host + 700),
            Entry::Compressed { host: ByteOffset(host + 700), len: ByteLen(324 + 1024) },
        ),
        (
            COMPRESSED | (3 << 56) | (FILE * CLUSTER - 100),
            Entry::Compressed { host: ByteOffset(FILE * CLUSTER - 100), len: ByteLen(100) },
        ),
    ];
    let damaged = [
        (host | COPIED | 2, EntryProblem::Reserved),
        (host | COPIED | (1 << 56), EntryProblem::Reserved),
        (host | COPIED | (1 << 61), EntryProblem::Reserved),
        (host + 512, EntryProblem::Unaligned),
        (FILE * CLUSTER, EntryProblem::PastEnd),
        (OFFSET & !(CLUSTER - 1), EntryProblem::PastEnd),
        (COPIED, EntryProblem::Metadata),
        (L1_AT, EntryProblem::Metadata),
        (L2_AT | COPIED, EntryProblem::Metadata),
        (L2_AT + CLUSTER, EntryProblem::Metadata),
        (COMPRESSED, EntryProblem::Metadata),
        (COMPRESSED | (L2_AT + 9), EntryProblem::Metadata),
        (COMPRESSED | (FILE * CLUSTER), EntryProblem::PastEnd),
        (COMPRESSED | COPIED | DATA, EntryProblem::Reserved),
    ];
    let mut file = File::new();
    for (at, (word, _)) in (L2_AT..).step_by(8).zip(sound) {
        file.set(at, word);
    }
    for (at, (word, _)) in (L2_AT + CLUSTER..).step_by(8).zip(damaged) {
        file.set(at, word);
    }
    for l2_bytes_max in [0, L2_BYTES_MAX] {
        let tables = file.open(Version::V3, L2Format::Standard, 4096, l2_bytes_max);
        for (cluster, (word, entry)) in (0..).zip(sound) {
            assert_eq!(only(&tables, cluster), entry, "{word:#x}");
        }
        for (cluster, (word, wrong)) in (2048..).zip(damaged) {
            assert_eq!(problem(&tables, cluster), wrong, "{word:#x}");
        }
    }
    let tables = file.open(Version::V2, L2Format::Standard, 4096, L2_BYTES_MAX);
    assert_eq!(problem(&tables, 3), EntryProblem::Reserved, "version 2 knows no zero clusters");
}

#[test]
fn every_extended_entry_is_what_the_format_says_or_damaged() {
    let host = Some(ByteOffset(DATA));
    let all = u64::from(u32::MAX);
    let sound = [
        (0, 0, Entry::Unallocated),
        (DATA | COPIED, 0, Entry::Unallocated),
        (DATA | COPIED, all, Entry::Data { host: ByteOffset(DATA) }),
        (0, all << 32, Entry::Zero { host: None }),
        (DATA, all << 32, Entry::Zero { host }),
        (DATA, 5 | (2 << 32), Entry::Subclusters { host, allocated: 5, zero: 2 }),
        (0, 2 << 32, Entry::Subclusters { host: None, allocated: 0, zero: 2 }),
        (COMPRESSED | DATA, 0, Entry::Compressed { host: ByteOffset(DATA), len: ByteLen(512) }),
    ];
    let damaged = [
        (DATA, 1 | (1 << 32), EntryProblem::Contradiction),
        (0, 1, EntryProblem::Nowhere),
        (DATA | ZERO, 1, EntryProblem::Reserved),
        (COMPRESSED | DATA, 1, EntryProblem::Reserved),
        (FILE * CLUSTER, 1, EntryProblem::PastEnd),
        (L1_AT, all, EntryProblem::Metadata),
    ];
    let mut file = File::new();
    for (at, (word, bitmap, _)) in (L2_AT..).step_by(16).zip(sound) {
        file.set(at, word);
        file.set(at + 8, bitmap);
    }
    for (at, (word, bitmap, _)) in (L2_AT + CLUSTER..).step_by(16).zip(damaged) {
        file.set(at, word);
        file.set(at + 8, bitmap);
    }
    for l2_bytes_max in [0, L2_BYTES_MAX] {
        let tables = file.open(Version::V3, L2Format::Extended, 2048, l2_bytes_max);
        for (cluster, (word, bitmap, entry)) in (0..).zip(sound) {
            assert_eq!(only(&tables, cluster), entry, "{word:#x} {bitmap:#x}");
        }
        for (cluster, (word, bitmap, wrong)) in (1024..).zip(damaged) {
            assert_eq!(problem(&tables, cluster), wrong, "{word:#x} {bitmap:#x}");
        }
    }
}

#[test]
fn tables_that_are_not_kept_give_the_same_answers() {
    let mut file = File::new();
    for n in 0..2048 {
        file.set(L2_AT + n * 8, [0, ZERO, DATA + n % 36 * CLUSTER, COMPRESSED | DATA][to_usize(n % 4)]);
    }
    let kept = file.open(Version::V3, L2Format::Standard, 4000, L2_BYTES_MAX);
    let not_kept = file.open(Version::V3, L2Format::Standard, 4000, 0);
    for (start, len) in
        [(0, 4000 * CLUSTER), (5, 3), (CLUSTER * 63, CLUSTER * 66), (2047 * CLUSTER + 1, CLUSTER)]
    {
        let range = ByteRange::new(start, len);
        let found = entries(&kept, range);
        assert_eq!(found, entries(&not_kept, range));
        assert_eq!(found.iter().map(|(range, _)| range.len.0).sum::<u64>(), len);
    }
    assert_eq!(not_kept.loaded_bytes.load(Ordering::Relaxed), 0);
    assert_eq!(
        kept.loaded_bytes.load(Ordering::Relaxed),
        (2048 + 1952) * 8,
        "only what maps the image is kept"
    );
}

#[test]
fn a_damaged_entry_of_the_l1_table_is_named_with_what_it_loses() {
    let span = 2048 * CLUSTER;
    for (word, wrong) in [
        (L2_AT | 1, EntryProblem::Reserved),
        (L2_AT | (1 << 60), EntryProblem::Reserved),
        (DATA + 512, EntryProblem::Unaligned),
        (FILE * CLUSTER, EntryProblem::PastEnd),
        (L1_AT, EntryProblem::Metadata),
        (COPIED, EntryProblem::Metadata),
        (L2_AT, EntryProblem::Shared),
    ] {
        let mut file = File::new();
        file.set(L1_AT + 8, word);
        let tables = file.open(Version::V3, L2Format::Standard, 4000, L2_BYTES_MAX);
        assert_eq!(tables.first_damaged_table(), Some(ByteRange::new(span, 4000 * CLUSTER - span)));
        assert_eq!(problem(&tables, 2048), wrong, "{word:#x}");
        assert_eq!(only(&tables, 0), Entry::Unallocated);
    }
}

#[test]
fn a_table_that_the_file_cuts_loses_only_entries_that_map_the_image() {
    let mut file = File::new();
    file.set(L1_AT + 8, ((FILE - 1) * CLUSTER) | COPIED);
    file.0.truncate(to_usize((FILE - 1) * CLUSTER + 800));
    let sound = file.open(Version::V3, L2Format::Standard, 2048 + 100, L2_BYTES_MAX);
    assert_eq!(sound.first_damaged_table(), None);
    let cut = file.open(Version::V3, L2Format::Standard, 2048 + 101, L2_BYTES_MAX);
    assert_eq!(cut.first_damaged_table(), Some(ByteRange::new(2148 * CLUSTER, CLUSTER)));
    assert_eq!(only(&cut, 2147), Entry::Unallocated);
    assert_eq!(problem(&cut, 2148), EntryProblem::CutOff);
}
