//! Headers made by hand, field by field.

#![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

use super::*;
use crate::error::Corruption;

const FILE_LEN: u64 = 10 << 16;

/// A header as writers of version 3 make it: 64 KiB clusters, 1 GiB, L1 table in the fourth cluster.
fn area() -> Vec<u8> {
    let mut area = vec![0; 65536];
    area[..4].copy_from_slice(MAGIC);
    for (at, value) in [(4, 3), (20, 16), (36, 2), (56, 1), (96, 4), (100, 112_u32)] {
        set32(&mut area, at, value);
    }
    for (at, value) in [(24, 1_u64 << 30), (40, 3 << 16), (48, 1 << 16)] {
        set64(&mut area, at, value);
    }
    area
}

fn set32(area: &mut [u8], at: usize, value: u32) {
    area[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn set64(area: &mut [u8], at: usize, value: u64) {
    area[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn extension(area: &mut [u8], at: usize, kind: u32, data: &[u8]) -> usize {
    set32(area, at, kind);
    set32(area, at + 4, u32::try_from(data.len()).unwrap());
    area[at + 8..at + 8 + data.len()].copy_from_slice(data);
    at + 8 + data.len().next_multiple_of(8)
}

fn verify(area: &[u8]) -> Result<Header> {
    UnverifiedHeader::parse(area)?.verify(FILE_LEN)
}

fn refused_field(area: &[u8]) -> (&'static str, u64) {
    let (mut what, at) = match verify(area) {
        Err(Fault::Corrupt { what, at }) => (what, at.0),
        other => panic!("{other:?}"),
    };
    loop {
        match what {
            Corruption::Field { field, .. } => return (field, at),
            Corruption::Lost { what: inner, .. } => what = *inner,
            other => panic!("{other:?}"),
        }
    }
}

fn unsupported(area: &[u8]) -> String {
    match verify(area) {
        Err(Fault::Unsupported(what)) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sound_header_gives_its_fields() {
    let header = verify(&area()).unwrap();
    assert_eq!((header.version, header.size, header.refcount_bits()), (Version::V3, ByteLen(1 << 30), 16));
    assert_eq!(header.l1, L1Ref { offset: ByteOffset(3 << 16), entries: 2 });
    assert_eq!(header.geometry.l2_span(), 512 << 20);
    assert_eq!((header.compression, header.backing, header.data_file), (Compression::Zlib, None, None));
}

#[test]
fn a_field_that_cannot_be_is_named_with_its_place() {
    for (at, value, field) in [
        (20, 8, "cluster_bits"),
        (20, 22, "cluster_bits"),
        (20, u32::MAX, "cluster_bits"),
        (36, 1, "l1_size"),
        (36, u32::MAX, "l1_size"),
        (56, 0, "refcount_table_clusters"),
        (56, u32::MAX, "refcount_table_clusters"),
        (96, 7, "refcount_order"),
        (100, 96, "header_length"),
        (100, 108, "header_length"),
        (100, 65544, "header_length"),
    ] {
        let mut area = area();
        set32(&mut area, at, value);
        assert_eq!(refused_field(&area), (field, at as u64), "{value}");
    }
    for (at, value, field) in [
        (40, 0, "l1_table_offset"),
        (40, (3 << 16) + 512, "l1_table_offset"),
        (40, u64::MAX << 16, "l1_table_offset"),
        (48, 0, "refcount_table_offset"),
        (48, 100, "refcount_table_offset"),
        (48, FILE_LEN, "refcount_table_offset"),
        (8, 65537, "backing_file_offset"),
    ] {
        let mut area = area();
        set64(&mut area, at, value);
        assert_eq!(refused_field(&area), (field, at as u64), "{value}");
    }
}

#[test]
fn what_is_not_read_here_is_named() {
    for (at, value, named) in [
        (4, 1, "version 1"),
        (4, u32::MAX, "version 4294967295"),
        (32, 1, "AES"),
        (32, 2, "LUKS"),
        (32, 9, "crypt_method 9"),
    ] {
        let mut area = area();
        set32(&mut area, at, value);
        assert!(unsupported(&area).contains(named), "{named}");
    }
    let mut area = area();
    set64(&mut area, 72, 1 << 40);
    assert_eq!(unsupported(&area), "incompatible feature bit 40");
    let mut name = vec![0, 40];
    name.extend(b"time travel");
    name.resize(FEATURE_NAME_LEN, 0);
    extension(&mut area, 112, EXTENSION_FEATURE_NAMES, &name);
    assert!(unsupported(&area).contains("time travel"));
    set64(&mut area, 24, VOLUME_SIZE_MAX + 1);
    set64(&mut area, 72, 0);
    set32(&mut area, 36, 4 << 20);
    assert!(unsupported(&area).contains("virtual size"));
}

#[test]
fn compression_and_its_feature_bit_go_together() {
    for (bits, kind, expected) in [
        (0, 0, Some(Compression::Zlib)),
        (8, 1, Some(Compression::Zstd)),
        (8, 0, None),
        (0, 1, None),
        (8, 2, None),
    ] {
        let mut area = area();
        set64(&mut area, 72, bits);
        area[104] = kind;
        assert_eq!(verify(&area).ok().map(|header| header.compression), expected, "{bits} {kind}");
    }
}

#[test]
fn extensions_are_found_and_must_lie_before_the_backing_files_name() {
    let mut area = area();
    let at = extension(&mut area, 112, 0x1234_5678, b"unknown ones are passed over");
    let at = extension(&mut area, at, EXTENSION_BACKING_FORMAT, b"raw");
    let mut bitmaps = vec![0; 24];
    set32(&mut bitmaps, 0, 3);
    let end = extension(&mut area, at, EXTENSION_BITMAPS, &bitmaps);
    set64(&mut area, 8, 1024);
    set32(&mut area, 16, 8);
    area[1024..1032].copy_from_slice(b"base.img");
    let header = verify(&area).unwrap();
    let backing = Backing { name: b"base.img".to_vec(), format: Some("raw".into()) };
    assert_eq!(header.backing, Some(backing));
    assert!(matches!(header.bitmaps, Some(BitmapsRef { count: 3, state: BitmapsState::Stale, .. })));
    set64(&mut area, 8, end as u64 - 8);
    assert_eq!(refused_field(&area).0, "length of a header extension");
}

#[test]
fn a_header_that_is_cut_anywhere_is_refused() {
    let area = area();
    for len in 0..105 {
        assert!(verify(&area[..len]).is_err(), "{len} bytes");
    }
}
