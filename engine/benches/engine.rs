//! What single steps of the engine cost, without a disk: lookup and plan, a commit, qcow2, checksums.
//!
//! `cargo bench -p bedplate-engine`, or a part of it: `cargo bench -p bedplate-engine -- plan`. Figures of whole nodes
//! and of disks are the bench's (`bench/`); these say where a change of those comes from.

#![allow(clippy::unwrap_used, reason = "a benchmark ends where something is not as it should be")]

use std::{fs::File, hint::black_box, io::Write, path::Path, sync::Arc};

use bedplate_engine::{
    cow::{
        BlockState,
        core::{ActionKind, Core, HeadState, Op, Output, Step, Synced},
        frozen::{FrozenIndex, Slot},
        head::HeadIndex,
        map::{
            checkpoint::{self, LogLen},
            log::LogEnd,
        },
        plan::Index,
    },
    device::Durability,
    export::{
        Existing, Format, Monitor,
        qcow2::{ClusterSize, Compression, Options},
        to_file,
    },
    image::{
        BaseImage,
        device::ImageDevice,
        qcow2::{Qcow2Image, View},
        raw::RawImage,
    },
    units::{Block, BlockCount, BlockRange, ByteLen, ByteRange, to_usize},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sha2::{Digest, Sha512};
use uuid::Uuid;

/// Of the volume that is looked up in: its map does not fit the caches of a core.
const BLOCKS: u64 = (256 << 30) / 4096;
const IMAGE_LEN: usize = 64 << 20;
const CLUSTER: usize = 64 << 10;

/// Numbers below `limit`, the same in every run.
fn random(limit: u64) -> impl FnMut() -> u64 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % limit
    }
}

/// Head, two frozen layers and a base, of which each answers for a part of any range.
fn index() -> Index {
    let layers = [7, 5, 3].map(|step| {
        let head = HeadIndex::new(BlockCount(BLOCKS));
        for block in (0..BLOCKS).step_by(step) {
            head.set(BlockRange::new(block, 1), BlockState::Data);
        }
        head
    });
    let [lower, upper, head] = layers;
    let frozen = FrozenIndex::empty().overlaid(&lower, Slot(0), &[]).overlaid(&upper, Slot(1), &[]);
    Index { size: BlockCount(BLOCKS).len(), head: Arc::new(head), frozen, base_len: BlockCount(BLOCKS).len() }
}

fn lookups(c: &mut Criterion) {
    let index = index();
    let mut block = random(BLOCKS - 16);
    let mut group = c.benchmark_group("map");
    group.bench_function("lookup in the head", |b| b.iter(|| index.head.state(Block(block()))));
    group.bench_function("lookup below it", |b| b.iter(|| index.frozen.value(Block(block()))));
    for (name, blocks) in [("plan of 4 KiB", 1), ("plan of 64 KiB", 16)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut segments = 0;
                index.each(BlockRange::new(block(), blocks).bytes(), |segment| {
                    segments += segment.range.len.0;
                    true
                });
                segments
            });
        });
    }
    group.finish();
}

/// A volume whose files are in memory: actions are carried out at once, and its data is thrown away.
struct Volume {
    core: Core,
    map: Vec<u8>,
}

impl Volume {
    fn new() -> Volume {
        let (blocks, layer) = (BlockCount(BLOCKS), Uuid::from_u128(1));
        let head = HeadIndex::new(blocks);
        let (mut map, header) = checkpoint::encode(layer, 1, 0, &head, LogLen::LIVE);
        map.resize(map.len() + to_usize(header.log_len), 0);
        let index = Index {
            size: blocks.len(),
            head: Arc::new(head),
            frozen: FrozenIndex::empty(),
            base_len: ByteLen(0),
        };
        let state = HeadState {
            index: Arc::new(index),
            layer,
            log: LogEnd::start(&header),
            log_offset: header.log_offset,
            synced: Synced::Yes,
        };
        Volume { core: Core::new(state, 512), map }
    }

    /// Submit an operation and carry out everything that comes of it.
    fn run(&mut self, op: Op) {
        let (_, Step { mut actions, mut finished }) = self.core.submit(op).unwrap();
        while let Some(action) = actions.pop() {
            match action.kind {
                ActionKind::AppendLog { offset, bytes } => {
                    self.map[to_usize(offset)..][..bytes.len()].copy_from_slice(&bytes);
                }
                ActionKind::StageMap { bytes, log_len } => {
                    self.map = bytes;
                    self.map.resize(self.map.len() + to_usize(log_len), 0);
                }
                _ => {}
            }
            let step = self.core.complete(action.id, Ok(Output::Done));
            actions.extend(step.actions);
            finished.extend(step.finished);
        }
        assert!(finished.iter().all(|(_, result)| result.is_ok()) && !finished.is_empty());
    }
}

fn commits(c: &mut Criterion) {
    let mut volume = Volume::new();
    let mut block = random(BLOCKS);
    let mut write =
        move || Op::Write { range: BlockRange::new(block(), 1).bytes(), durability: Durability::Volatile };
    let mut group = c.benchmark_group("commit");
    group.bench_function("write of 4 KiB", |b| b.iter(|| volume.run(write())));
    for (name, writes) in [("write and flush", 1), ("64 writes and flush", 64)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                (0..writes).for_each(|_| volume.run(write()));
                volume.run(Op::Flush);
            });
        });
    }
    group.finish();
}

struct Silent;

impl Monitor for Silent {
    fn reached(&mut self, _: u64) -> bedplate_engine::error::Result<()> {
        Ok(())
    }
}

/// Lines of a log with numbers in them: they compress to a third or so.
fn text(len: usize) -> Vec<u8> {
    let mut number = random(1 << 40);
    let mut text = Vec::with_capacity(len + 100);
    while text.len() < len {
        writeln!(text, "unit {:010} said {:x} and then nothing for a while", number(), number()).unwrap();
    }
    text.truncate(len);
    text
}

fn qcow2(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, text(IMAGE_LEN)).unwrap();
    let len = ByteLen(IMAGE_LEN as u64);
    let image = RawImage::new(File::open(&raw).unwrap(), raw.clone(), len).unwrap();
    let device = ImageDevice::new(Arc::new(image));
    let open = |path: &Path| Qcow2Image::open(File::open(path).unwrap(), path, &View::Active).unwrap();
    let mut group = c.benchmark_group("qcow2");
    for (name, compression) in
        [("plain", None), ("zlib", Some(Compression::Zlib)), ("zstd", Some(Compression::Zstd))]
    {
        let path = dir.path().join(name);
        let options = Options { cluster: ClusterSize::new(CLUSTER as u64).unwrap(), compression };
        to_file(&device, &path, Existing::Refuse, Format::Qcow2(options), &mut Silent).unwrap();
        let image = open(&path);
        let mut buffer = vec![0; CLUSTER];
        let mut cluster = random((IMAGE_LEN / CLUSTER) as u64);
        group.throughput(Throughput::Bytes(4096));
        if compression.is_none() {
            let mut block = random(IMAGE_LEN as u64 / 4096);
            group.bench_function("mapping of 4 KiB", |b| {
                b.iter(|| image.extents(ByteRange::new(block() * 4096, 4096)).unwrap());
            });
        }
        group.throughput(Throughput::Bytes(CLUSTER as u64));
        group.bench_function(format!("cluster, {name}"), |b| {
            b.iter(|| image.read_at(&mut buffer, cluster() * CLUSTER as u64).unwrap());
        });
    }
    group.finish();
}

fn checksums(c: &mut Criterion) {
    let bytes = text(1 << 20);
    let mut group = c.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("SHA-512", |b| b.iter(|| Sha512::digest(black_box(&bytes))));
    group.bench_function("CRC-32C", |b| b.iter(|| crc32c::crc32c(black_box(&bytes))));
    group.finish();
}

criterion_group!(steps, lookups, commits, qcow2, checksums);
criterion_main!(steps);
