//! Damage at random and damage by design: what a file may say, and what it may cost to find that out.

use std::time::{Duration, Instant};

use bedplate_engine::{
    device::ExtentKind,
    error::{Corruption, Error},
    image::{
        BaseImage,
        qcow2::{Qcow2Layer, View},
    },
    units::{ByteLen, ByteOffset, ByteRange, to_usize},
};

use super::{images, memory::peak_of};

/// For any file of up to 2 MiB.
const ALLOCATED_MAX: i64 = 64 << 20;
/// Long beyond what any one file takes, on a machine that is busy: a hang ends here.
const HANG: Duration = Duration::from_secs(20);
/// Mutants of each image.
const MUTANTS: u64 = 150;
/// Bytes that are read of an image, however large it says it is.
const READ_MAX: u64 = 4 << 20;

/// A small generator with a seed that tests can print.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        to_usize(self.next() % end.max(1) as u64)
    }
}

/// Change a few places of `bytes`: bits, whole fields, the length. Places that say something are met more often.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let telling: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    for _ in 0..=random.below(4) {
        let at = match random.below(4) {
            0 => random.below(bytes.len()),
            1 => random.below(112.min(bytes.len())),
            _ => telling[random.below(telling.len())],
        };
        let Some(place) = bytes.get_mut(at..) else { continue };
        match random.below(6) {
            0 => place[0] ^= 1 << random.below(8),
            1 => place[0] = 0xff,
            2 => place[0] = 0,
            3 => place.iter_mut().take(8).for_each(|byte| *byte = 0xff),
            4 => {
                let target = (random.next() % (1 << 18)) & !511;
                place.iter_mut().zip(target.to_be_bytes()).for_each(|(byte, new)| *byte = new);
            }
            _ => {
                let len = random.below(bytes.len()).max(72);
                bytes.truncate(len);
            }
        }
    }
}

/// Everything that can be asked of a file.
fn exercise(bytes: &[u8]) {
    for view in [View::Active, View::Snapshot("1".into()), View::Snapshot("s3".into())] {
        if let Ok(layer) = images::open_layer(bytes, &view) {
            exercise_layer(&layer);
        }
        let Ok(image) = images::open(bytes, &view) else { continue };
        let whole = ByteRange { start: ByteOffset(0), len: image.len() };
        let verified = image.verify_tables();
        let mut at = 0;
        let mut buffer = vec![0; 65536];
        while at < whole.len.0.min(READ_MAX) {
            let len = (whole.len.0 - at).min(65536);
            let part = &mut buffer[..to_usize(len)];
            match (image.read_at(part, at), &verified) {
                (Err(Error::Corrupt { .. }), _) | (Ok(()), _) => {}
                (Err(other), _) => panic!("reading {len} bytes at {at}: {other}"),
            }
            at += len;
        }
        if let Ok(extents) = image.extents(whole) {
            assert!(whole.is_empty() || !extents.is_empty());
            let mut end = 0;
            for extent in extents {
                assert_eq!(extent.range.start.0, end);
                end = extent.range.end().0;
            }
            assert!(end <= whole.len.0);
        }
    }
}

fn exercise_layer(layer: &Qcow2Layer) {
    let whole = ByteRange { start: ByteOffset(0), len: layer.size() };
    for segment in layer.map(whole, 2000).unwrap() {
        let len = segment.range.len.0.min(4096);
        let _ = layer.read_segment(
            bedplate_engine::image::qcow2::Segment {
                range: ByteRange::new(segment.range.start.0, len),
                place: segment.place,
            },
            &mut vec![0; to_usize(len)],
        );
    }
    let _ = layer.snapshots();
    let _ = layer.bitmaps();
    if let Ok(refcounts) = layer.refcounts() {
        for index in 0..refcounts.block_count().min(64) {
            let _ = refcounts.read_block(index);
        }
    }
}

#[test]
fn no_damaged_file_costs_a_panic_a_hang_or_much_memory() {
    for (number, image) in images::all().iter().enumerate() {
        for mutant in 0..MUTANTS {
            let seed = (number as u64) << 32 | mutant;
            let mut bytes = image.bytes.clone();
            if mutant > 0 {
                mutate(&mut bytes, &mut Random(seed));
            }
            let start = Instant::now();
            let ((), allocated) = peak_of(|| exercise(&bytes));
            assert!(allocated <= ALLOCATED_MAX, "{} with seed {seed}: {allocated} bytes", image.name);
            assert!(start.elapsed() < HANG, "{} with seed {seed}: {:?}", image.name, start.elapsed());
        }
    }
}

/// A file of 2 MiB and 512-byte clusters, with a header that says this; the rest is zeros.
fn crafted(size: u64, l1_entries: u32, l1_offset: u64, cluster_bits: u32) -> Vec<u8> {
    let mut bytes = vec![0; 2 << 20];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    for (at, value) in [(4, 3), (20, cluster_bits), (36, l1_entries), (56, 1), (96, 4), (100, 104)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
    }
    for (at, value) in [(24, size), (40, l1_offset), (48, 1 << cluster_bits)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
    }
    bytes
}

#[test]
fn an_l1_table_whose_entries_all_name_one_table_is_refused_and_cheap() {
    let entries = 255 * 1024_u32;
    let mut bytes = crafted(u64::from(entries) * 32768, entries, 4096, 9);
    for entry in bytes[4096..].chunks_exact_mut(8).take(to_usize(entries.into())) {
        entry.copy_from_slice(&(1024_u64 | 1 << 63).to_be_bytes());
    }
    let (opened, allocated) = peak_of(|| images::open(&bytes, &View::Active));
    assert!(matches!(opened, Err(Error::Corrupt { what: Corruption::Lost { .. }, .. })), "{opened:?}");
    assert!(allocated <= ALLOCATED_MAX, "{allocated}");
    let layer = images::open_layer(&bytes, &View::Active).unwrap();
    assert!(matches!(layer.verify_tables(), Err(Error::Corrupt { .. })));
}

#[test]
fn an_image_without_bytes_needs_no_table() {
    let bytes = crafted(0, 0, u64::MAX, 9);
    let image = images::open(&bytes, &View::Active).unwrap();
    image.verify_tables().unwrap();
    image.read_at(&mut [], 0).unwrap();
    assert!(image.extents(ByteRange::new(0, 0)).unwrap().is_empty());
}

#[test]
fn a_huge_size_is_refused_and_a_large_sparse_one_is_answered_at_once() {
    for size in [u64::MAX, 1 << 63, (64 << 40) + 1] {
        let bytes = crafted(size, 1 << 18, 4096, 21);
        assert!(images::open(&bytes, &View::Active).is_err());
    }
    let mut bytes = crafted(64 << 40, 128, 2 << 20, 21);
    bytes.resize(5 << 20, 0);
    let image = images::open(&bytes, &View::Active).unwrap();
    let whole = ByteRange { start: ByteOffset(0), len: image.len() };
    image.verify_tables().unwrap();
    let extents = image.extents(whole).unwrap();
    assert_eq!((extents.len(), extents[0].kind, extents[0].range), (1, ExtentKind::Zero, whole));
}

#[test]
fn a_cluster_that_claims_to_become_more_than_it_may_costs_one_cluster() {
    // 2 MiB clusters of which every one is compressed and decodes to more than itself.
    let mut bytes = crafted(1 << 30, 1, 2 << 20, 21);
    bytes.resize(12 << 20, 0);
    bytes[2 << 20..][..8].copy_from_slice(&(6_u64 << 20 | 1 << 63).to_be_bytes());
    let bomb = deflate_of_zeros(8 << 20);
    bytes[8 << 20..][..bomb.len()].copy_from_slice(&bomb);
    // Sectors are counted from bit 49 on.
    let entry = 1_u64 << 62 | 31 << 49 | 8 << 20;
    for word in bytes[6 << 20..][..512 * 8].chunks_exact_mut(8) {
        word.copy_from_slice(&entry.to_be_bytes());
    }
    let image = images::open(&bytes, &View::Active).unwrap();
    image.verify_tables().unwrap();
    let ((), allocated) = peak_of(|| {
        for cluster in 0..512 {
            let read = image.read_at(&mut [0; 512], cluster << 21);
            assert!(matches!(read, Err(Error::Corrupt { .. })), "{read:?}");
        }
    });
    assert!(allocated <= 16 << 20, "{allocated}");
}

/// A deflate stream of `len` zeros, a multiple of 258: a stored-free block of one literal and long matches.
fn deflate_of_zeros(len: usize) -> Vec<u8> {
    let mut state = libdeflater::Compressor::new(libdeflater::CompressionLvl::best());
    let mut out = vec![0; state.deflate_compress_bound(len)];
    let end = state.deflate_compress(&vec![0; len], &mut out).unwrap();
    out.truncate(end);
    out
}

#[test]
fn a_file_that_shrinks_while_it_is_read_gives_errors_and_never_zeros() {
    let image = images::all().into_iter().find(|image| image.name == "v2").unwrap();
    let file = images::file_of(&image.bytes);
    let handle = file.try_clone().unwrap();
    let opened =
        bedplate_engine::image::qcow2::Qcow2Image::open(file, "test.qcow2".as_ref(), &View::Active).unwrap();
    let mut buffer = [0; 4096];
    opened.read_at(&mut buffer, 0).unwrap();
    assert_eq!(buffer, [1; 4096]);
    handle.set_len(512).unwrap();
    let read = opened.read_at(&mut buffer, 0);
    assert!(matches!(read, Err(Error::Corrupt { what: Corruption::Truncated("data"), .. })), "{read:?}");
    assert_eq!(opened.len(), ByteLen(3 << 20));
}
