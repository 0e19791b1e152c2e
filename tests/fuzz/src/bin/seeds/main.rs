//! The seeds: `seeds DIRECTORY` writes a corpus for each target that is made by what writes the real ones.
//!
//! The seeds of the qcow2 targets are made by `tests/corpus/qcow2`, and are real images.

mod texts;

use std::{env, fs, path::Path};

use bedplate::{
    catalog::{
        name::ImageName,
        record::{FailureCode, FailureRecord, ImageRecord, Parts, Published, RecordState, Stamp},
        sources::SourceFile,
    },
    prep::{
        checksum::{Expected, Hasher},
        partial::{Kept, Proof},
        source::Validator,
    },
};
use bedplate_engine::{
    cow::{
        BlockState, LEAF_BLOCKS,
        changes::Changes,
        head::HeadIndex,
        map::{
            checkpoint::{self, LogLen},
            log::{self, LogEnd},
        },
    },
    image::Format,
    units::{BlockCount, BlockRange},
    volume::record::{DiskRecord, FORMAT_VERSION, ImageRef, LayerRef, SnapshotRecord, VolumeRecord},
};
use bedplate_fuzz_targets::{map, tree};
use jiff::Timestamp;
use uuid::Uuid;

const LAYERS: [Uuid; 2] = [
    Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_0001),
    Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_0002),
];
const BLOCKS: u64 = 2 * LEAF_BLOCKS + 100;

fn main() {
    let root = env::args().nth(1).expect("usage: seeds DIRECTORY");
    for (target, seeds) in [
        ("map_file", maps()),
        ("records", records()),
        ("inspect", directories()),
        ("config", texts::config()),
        ("texts", texts::texts()),
        ("http_answer", texts::answers()),
        ("api_request", texts::requests()),
    ] {
        let dir = Path::new(&root).join(target);
        fs::create_dir_all(&dir).expect("a directory to write to");
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(dir.join(format!("seed-{number:03}")), seed).expect("a directory to write to");
        }
    }
}

/// Maps with every kind of leaf and a log of a few sectors, whole, torn and damaged.
fn maps() -> Vec<Vec<u8>> {
    let empty = HeadIndex::new(BlockCount(BLOCKS));
    let mixed = HeadIndex::new(BlockCount(BLOCKS));
    mixed.set(BlockRange::new(3, 70), BlockState::Data);
    mixed.set(BlockRange::new(40, 500), BlockState::Zero);
    mixed.set(BlockRange::new(LEAF_BLOCKS, LEAF_BLOCKS), BlockState::Zero);
    let full = HeadIndex::new(BlockCount(LEAF_BLOCKS));
    full.set(BlockRange::new(0, LEAF_BLOCKS), BlockState::Data);
    let mut seeds = Vec::new();
    for index in [&empty, &mixed, &full] {
        let whole = map(index, 4);
        let mut torn = whole.clone();
        let last = torn.len() - 3 * 512;
        torn[last..].fill(0);
        let mut damaged = whole.clone();
        let third = damaged.len() - 4 * 512;
        damaged[third + 100] ^= 1;
        seeds.extend([map(index, 0), whole, torn, damaged]);
    }
    seeds
}

/// A map of `index` with so many records in a log of eight sectors.
fn map(index: &HeadIndex, records: u64) -> Vec<u8> {
    let (mut bytes, header) = checkpoint::encode(LAYERS[0], 1, 7, index, LogLen::Sealed);
    let start = bytes.len();
    bytes.resize(start + 8 * 512, 0);
    // The log is longer than the engine makes one that is sealed, and shorter than any other.
    bytes[72..80].copy_from_slice(&(8u64 * 512).to_le_bytes());
    map::seal(&mut bytes);
    let len = bytes.len() as u64;
    let first = bytes.first_chunk().expect("a header");
    let header = checkpoint::Header::parse(first, len).unwrap_or(header);
    let mut end = LogEnd::start(&header);
    for record in 0..records {
        let mut changes = Changes::default();
        changes.set(BlockRange::new(record * 10, 5), BlockState::Data);
        changes.set(BlockRange::new(1000 + record, 1), BlockState::Zero);
        if record == 1 {
            for run in 0..50 {
                changes.set(BlockRange::new(2000 + 2 * run, 1), BlockState::Data);
            }
        }
        let (sectors, next) = log::encode(&end, &changes);
        let at = start + usize::try_from(end.offset()).expect("a short log");
        bytes[at..at + sectors.len()].copy_from_slice(&sectors);
        end = next;
    }
    bytes
}

fn disk() -> DiskRecord {
    DiskRecord { format_version: FORMAT_VERSION, id: LAYERS[0], created_at: Timestamp::UNIX_EPOCH }
}

fn volume(image: Option<ImageRef>) -> VolumeRecord {
    VolumeRecord {
        format_version: FORMAT_VERSION,
        name: "v".to_owned(),
        uuid: Uuid::nil(),
        size_bytes: BLOCKS * 4096,
        image,
        head: LAYERS[0],
        layers: vec![
            LayerRef { uuid: LAYERS[0], parent: Some(LAYERS[1]) },
            LayerRef { uuid: LAYERS[1], parent: None },
        ],
        snapshots: vec![SnapshotRecord {
            name: "monday".to_owned(),
            layer: LAYERS[1],
            size_bytes: BLOCKS * 4096,
            created_at: Timestamp::UNIX_EPOCH,
        }],
        created_at: Timestamp::UNIX_EPOCH,
    }
}

fn image_ref() -> ImageRef {
    ImageRef { name: "i".to_owned(), uuid: Uuid::nil(), sha512: "0a".repeat(64) }
}

fn images() -> Vec<ImageRecord> {
    let published = Published {
        format: Format::Raw,
        virtual_size_bytes: 1024,
        sha512: "0a".repeat(64),
        stamp: Stamp { size_bytes: 1000, mtime_ns: 1, inode: 2 },
        sources: vec![SourceFile { path: "/a".to_owned(), size_bytes: 7, sha512: "0b".repeat(64) }],
    };
    let record = ImageRecord {
        name: ImageName::parse("i").expect("a name"),
        uuid: Uuid::nil(),
        created_at: Timestamp::UNIX_EPOCH,
        source: "/srv/a.qcow2".to_owned(),
        expected: Some(format!("sha512:{}", "0a".repeat(64))),
        deadline_s: Some(60),
        internal_snapshot: None,
        parts: Parts { backing: Some("/b".to_owned()), allow_references: Some("/c".to_owned()) },
        state: RecordState::Ready(published.clone()),
    };
    let failure = FailureRecord { code: FailureCode::Checksum, message: "other bytes".to_owned() };
    let qcow2 = Published {
        format: Format::Qcow2,
        virtual_size_bytes: 1 << 20,
        sources: Vec::new(),
        ..published.clone()
    };
    let states = [
        RecordState::Pending,
        RecordState::InProgress,
        RecordState::Ready(published.clone()),
        RecordState::Ready(qcow2),
        RecordState::Failed { failure: failure.clone(), published: None },
        RecordState::Failed { failure, published: Some(published) },
    ];
    states.map(|state| ImageRecord { state, ..record.clone() }).to_vec()
}

fn records() -> Vec<Vec<u8>> {
    let json = |kind: u8, json: Vec<u8>| [vec![kind], json].concat();
    let mut seeds = vec![json(0, serde_json::to_vec_pretty(&disk()).expect("a record"))];
    for image in [None, Some(image_ref())] {
        seeds.push(json(1, serde_json::to_vec_pretty(&volume(image)).expect("a record")));
    }
    seeds.extend(images().iter().map(|record| json(2, record.to_json())));
    let sha256 = Expected::Sha256("0a".repeat(32));
    let validators = [
        Validator::None,
        Validator::Etag("\"abc\"".to_owned()),
        Validator::LastModified("Sun, 06 Nov 1994 08:49:37 GMT".to_owned()),
        Validator::File { device: 1, inode: 2, size_bytes: 3, mtime_ns: -4 },
    ];
    for (validator, expected) in validators.into_iter().zip([None, Some(&sha256), None, Some(&sha256)]) {
        let mut hasher = Hasher::new(expected);
        hasher.update(&[7; 1000]);
        let (total, complete, proof) = (Some(8192), false, Proof::Needed);
        let kept = Kept { position: 1000, total, complete, validator, proof, midstate: hasher.midstate() };
        seeds.push(json(3, kept.to_json()));
        seeds.push(json(3, serde_json::to_vec(&kept).expect("a record")));
    }
    seeds
}

/// For `inspect`: each begins with the kind of directory.
fn directories() -> Vec<Vec<u8>> {
    let kind = |kind: u8, files: &[(u8, &[u8])]| [vec![kind], tree::input(files)].concat();
    let sector = [7u8; 512];
    let head = br#"{"Name":"volume-head-001.img","Parent":"volume-snap-a.img","Removed":false,"UserCreated":false,"Created":"2026-08-21T02:00:00Z","Labels":null}"#;
    let snapshot = br#"{"Name":"volume-head-000.img","Parent":"volume-snap-b.img","Removed":true,"UserCreated":true,"Created":"2026-08-21T02:00:00Z","Labels":{"a":"b"}}"#;
    let meta = br#"{"Size":8192,"Head":"volume-head-001.img","Dirty":true,"Rebuilding":false,"Error":"","Parent":"volume-snap-a.img","SectorSize":512,"BackingFilePath":"","Encrypted":false}"#;
    let sum = br#"{"method":"crc64","checksum":"b90956c775a41001","change_time":"2026-08-21 10:00:00.12 +0800 CST","silently_corrupted":false}"#;
    let replica = [
        (0, &meta[..]),
        (1, &sector[..]),
        (2, &head[..]),
        (3, &sector[..]),
        (4, &snapshot[..]),
        (5, &sum[..]),
        (6, &sector[..]),
        (7, br#"{"Parent":""}"#),
        (11, b"0000000000000001"),
    ];
    let mixed = HeadIndex::new(BlockCount(BLOCKS));
    mixed.set(BlockRange::new(0, 2), BlockState::Data);
    mixed.set(BlockRange::new(2, 9), BlockState::Zero);
    let maps = LAYERS.map(|layer| {
        let (mut bytes, header) = checkpoint::encode(layer, 1, 0, &mixed, LogLen::Sealed);
        bytes.resize(bytes.len() + usize::try_from(header.log_len).expect("a sector"), 0);
        bytes
    });
    let json = |record: &VolumeRecord| serde_json::to_vec(record).expect("a record");
    let data = [3u8; 8192];
    let disk_record = serde_json::to_vec(&disk()).expect("a record");
    let image_record = images().swap_remove(2).to_json();
    let mut seeds = vec![kind(0, &replica), kind(0, &replica[1..]), kind(0, &replica[..5])];
    for image in [None, Some(image_ref())] {
        let volume = json(&volume(image));
        seeds.push(kind(
            1,
            &[
                (0, &disk_record[..]),
                (1, &volume[..]),
                (2, &maps[0][..]),
                (3, &data[..]),
                (4, &maps[1][..]),
                (5, &data[..]),
                (6, &image_record[..]),
                (7, &sector[..]),
            ],
        ));
    }
    seeds.extend([mbr(), gpt()].map(|disk| kind(2, &[(0, &disk[..])])));
    seeds
}

/// A partition table with a primary partition and a logical one, and the start of an ext4 file system.
fn mbr() -> Vec<u8> {
    let mut disk = vec![0u8; 16 << 10];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (slot, (kind, start, len)) in [(0x83u8, 2u32, 10u32), (0x05, 12, 18)].into_iter().enumerate() {
        let at = 446 + 16 * slot;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
    }
    disk[1024 + 1024 + 56..1024 + 1024 + 58].copy_from_slice(&0xef53u16.to_le_bytes());
    let logical = 12 * 512;
    disk[logical + 510..logical + 512].copy_from_slice(&[0x55, 0xaa]);
    disk[logical + 446 + 4] = 0x83;
    disk[logical + 446 + 8..logical + 446 + 12].copy_from_slice(&1u32.to_le_bytes());
    disk[logical + 446 + 12..logical + 446 + 16].copy_from_slice(&4u32.to_le_bytes());
    disk
}

/// A protective table, and a GPT header of one entry that is not summed.
fn gpt() -> Vec<u8> {
    let mut disk = vec![0u8; 34 * 512];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[446 + 4] = 0xee;
    disk[446 + 8] = 1;
    disk[446 + 12] = 33;
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 8..512 + 12].copy_from_slice(&0x1_0000u32.to_le_bytes());
    disk[512 + 12] = 92;
    disk[512 + 24] = 1;
    disk[512 + 32] = 33;
    disk[512 + 72] = 2;
    disk[512 + 80] = 128;
    disk[512 + 84] = 128;
    disk[1024..1040].fill(0x11);
    disk[1024 + 32] = 20;
    disk[1024 + 40] = 25;
    disk
}
