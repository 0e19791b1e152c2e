//! From compressed bytes to a cluster.
//!
//! Owns [`decode`]. Input is what the table entry spans, which may go on past the compressed data; output is exactly
//! one cluster, more or less is an error, and nothing is allocated for what the data claims. zlib goes through
//! libdeflate, which wants input and output whole, as they are here; zstd through the library's one-shot decoder, which
//! unlike its stream needs no window. Both keep their state per thread.

use std::cell::RefCell;

use libdeflater::{DecompressionError, Decompressor};
use zstd::zstd_safe::{DCtx, find_frame_compressed_size, get_error_name};

use super::header::Compression;
use crate::error::DecodeProblem;

/// Bytes of compressed data that a thread keeps room for between two clusters.
const INPUT_KEPT_MAX: usize = 256 << 10;

/// Why there is no cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecoded {
    /// The bytes are to blame.
    Corrupt(DecodeProblem),
    /// They are not: there is no memory for the decoder's state.
    NoMemory,
}

impl From<DecodeProblem> for Undecoded {
    fn from(problem: DecodeProblem) -> Undecoded {
        Undecoded::Corrupt(problem)
    }
}

/// Decode `input` into `output`, which is as long as a cluster.
pub fn decode(compression: Compression, input: &[u8], output: &mut [u8]) -> Result<(), Undecoded> {
    match compression {
        Compression::Zlib => Ok(inflate(input, output)?),
        Compression::Zstd => unzstd(input, output),
    }
}

/// Run `work` with `len` bytes of this thread's room for compressed data, whose content is arbitrary. Not to be nested.
pub fn with_input<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local! {
        static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    INPUT.with_borrow_mut(|input| {
        if input.len() < len {
            input.resize(len, 0);
        }
        let result = work(input.get_mut(..len).unwrap_or_default());
        if input.len() > INPUT_KEPT_MAX {
            input.truncate(INPUT_KEPT_MAX);
            input.shrink_to_fit();
        }
        result
    })
}

fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), DecodeProblem> {
    thread_local! {
        static INFLATE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
    }
    let len = INFLATE.with_borrow_mut(|state| state.deflate_decompress(input, output));
    match len {
        Ok(len) if len == output.len() => Ok(()),
        Ok(_) => Err(DecodeProblem::Short),
        Err(DecompressionError::InsufficientSpace) => Err(DecodeProblem::Long),
        Err(DecompressionError::BadData) => Err(DecodeProblem::Garbage),
    }
}

/// A cluster is one frame or several.
fn unzstd(input: &[u8], output: &mut [u8]) -> Result<(), Undecoded> {
    thread_local! {
        static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|state| {
        if state.is_none() {
            *state = DCtx::try_create();
        }
        let state = state.as_mut().ok_or(Undecoded::NoMemory)?;
        let mut input = input;
        let mut filled = 0;
        while let Some(rest) = output.get_mut(filled..)
            && !rest.is_empty()
        {
            if input.is_empty() {
                return Err(DecodeProblem::Short.into());
            }
            let len = find_frame_compressed_size(input).map_err(|_| DecodeProblem::Garbage)?;
            let frame = input.get(..len).filter(|frame| !frame.is_empty()).ok_or(DecodeProblem::Garbage)?;
            filled += state.decompress(rest, frame).map_err(|code| refusal(get_error_name(code)))?;
            input = input.get(len..).unwrap_or_default();
        }
        Ok(())
    })
}

/// What an error of the zstd library means, by the only name that it gives it.
fn refusal(name: &str) -> Undecoded {
    match name {
        "Destination buffer is too small" => Undecoded::Corrupt(DecodeProblem::Long),
        "Allocation error : not enough memory" => Undecoded::NoMemory,
        _ => Undecoded::Corrupt(DecodeProblem::Garbage),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "tests know their bytes")]

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut state = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let mut out = vec![0; state.deflate_compress_bound(bytes.len())];
        let len = state.deflate_compress(bytes, &mut out).unwrap();
        out.truncate(len);
        out
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(bytes, 1).unwrap()
    }

    fn cluster() -> Vec<u8> {
        (0..65536_u32).map(|n| u8::try_from(n / 7 % 251).unwrap()).collect()
    }

    type Encode = fn(&[u8]) -> Vec<u8>;
    const BOTH: [(Compression, Encode); 2] = [(Compression::Zlib, deflated), (Compression::Zstd, zstd)];

    #[test]
    fn a_cluster_decodes_also_with_foreign_bytes_behind_it() {
        for (compression, encode) in BOTH {
            let mut input = encode(&cluster());
            let mut output = vec![0xaa; 65536];
            assert_eq!(decode(compression, &input, &mut output), Ok(()));
            assert_eq!(output, cluster());
            input.extend([0x5a; 700]);
            output.fill(0);
            assert_eq!(decode(compression, &input, &mut output), Ok(()));
            assert_eq!(output, cluster());
        }
    }

    #[test]
    fn too_little_too_much_and_garbage_are_told_apart() {
        for (compression, encode) in BOTH {
            let mut output = vec![0; 65536];
            let short = encode(&cluster()[..65000]);
            assert_eq!(decode(compression, &short, &mut output), Err(DecodeProblem::Short.into()));
            let mut long = cluster();
            long.push(1);
            assert_eq!(decode(compression, &encode(&long), &mut output), Err(DecodeProblem::Long.into()));
            assert_eq!(decode(compression, &[0xff; 512], &mut output), Err(DecodeProblem::Garbage.into()));
            let whole = encode(&cluster());
            assert!(decode(compression, &whole[..whole.len() / 2], &mut output).is_err());
            assert!(decode(compression, &[], &mut output).is_err());
        }
    }

    #[test]
    fn a_lack_of_memory_is_not_blamed_on_the_bytes() {
        // ZSTD_error_memory_allocation, as the library returns it.
        let code = 0_usize.wrapping_sub(64);
        assert_eq!(refusal(get_error_name(code)), Undecoded::NoMemory);
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let whole = cluster();
        let mut input = zstd(&whole[..1000]);
        input.extend(zstd(&whole[1000..]));
        let mut output = vec![0; 65536];
        assert_eq!(decode(Compression::Zstd, &input, &mut output), Ok(()));
        assert_eq!(output, whole);
    }

    #[test]
    fn a_frame_that_claims_a_huge_window_costs_nothing() {
        // A frame header with a window of 2 GiB and one raw block of four bytes.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x21, 0x00, 0x00, 1, 2, 3, 4];
        let mut output = vec![0; 512];
        assert!(decode(Compression::Zstd, &frame, &mut output).is_err());
    }
}
