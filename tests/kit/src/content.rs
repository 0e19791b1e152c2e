//! Bytes for images and volumes.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let len = usize::try_from(len).unwrap();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64 (Marsaglia).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A raw image of `size` bytes: in every fourth 4 MiB one MiB of data, and holes.
pub fn sparse_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for at in (0..size).step_by(usize::try_from(16 * MIB).unwrap()) {
        let len = MIB.min(size - at);
        file.write_all_at(&pattern(len, at + 1), at).unwrap();
    }
    file.sync_all().unwrap();
}

/// What a file takes on its disk.
pub fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// A part of a file.
pub fn read_at(path: &Path, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}
