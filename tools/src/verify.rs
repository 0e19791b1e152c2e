//! `inspect verify`: whether a file has the checksum that it should have.
//!
//! Owns the checksum's notation and the one pass over the file. The bytes of the file are what counts, whatever its
//! format, so that `sha512sum FILE` agrees. Exit code 5 on a mismatch.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use bedplate_engine::error::Error;
use clap::Args;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use sha2::{Digest, Sha256, Sha512};

use crate::{
    failure::Result,
    layer::open_file,
    print::{self, Output},
};

/// Bytes that are hashed at once.
const PIECE_LEN: usize = 1 << 20;

const EXAMPLES: &str = "Examples:
  bedplate inspect verify disk.qcow2 --checksum sha512:0f1e...
  bedplate inspect verify disk.raw --checksum sha256:9a8b...

Exit code 5 says that the checksum does not agree.";

/// Check a file against a checksum, in one pass
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Any file or block device; its bytes as they are
    file: PathBuf,
    /// What it should be: the hexadecimal digits of a SHA-512 or SHA-256, after `sha512:` or `sha256:` if you like
    #[arg(long, value_name = "HEX")]
    checksum: Checksum,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
}

/// A checksum that somebody wrote down.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Checksum {
    algorithm: Algorithm,
    /// Lower case.
    hex: String,
}

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Checksum, String> {
        let (named, hex) = match text.split_once(':') {
            Some(("sha512", hex)) => (Some(Algorithm::Sha512), hex),
            Some(("sha256", hex)) => (Some(Algorithm::Sha256), hex),
            Some((other, _)) => return Err(format!("{other:?} is neither sha512 nor sha256")),
            None => (None, text),
        };
        let of_length = match hex.len() {
            128 => Some(Algorithm::Sha512),
            64 => Some(Algorithm::Sha256),
            _ => None,
        };
        match of_length {
            Some(algorithm)
                if hex.bytes().all(|byte| byte.is_ascii_hexdigit())
                    && named.is_none_or(|named| named == algorithm) =>
            {
                Ok(Checksum { algorithm, hex: hex.to_ascii_lowercase() })
            }
            Some(_) | None => {
                Err("write the 128 hexadecimal digits of a SHA-512 or the 64 of a SHA-256".to_owned())
            }
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    filename: String,
    algorithm: &'static str,
    matches: bool,
    expected: String,
    found: String,
}

pub fn run(args: &VerifyArgs) -> Result<u8> {
    let (algorithm, found) = match args.checksum.algorithm {
        Algorithm::Sha512 => ("sha512", digest::<Sha512>(&args.file)?),
        Algorithm::Sha256 => ("sha256", digest::<Sha256>(&args.file)?),
    };
    let report = Report {
        filename: args.file.display().to_string(),
        algorithm,
        matches: found == args.checksum.hex,
        expected: args.checksum.hex.clone(),
        found,
    };
    print::report(args.output, &report, |report| {
        let Report { filename, algorithm, expected, found, .. } = report;
        let filename = print::shown(filename);
        if report.matches {
            format!("{filename}: {algorithm} agrees")
        } else {
            format!("{filename}: {algorithm} does not agree\nexpected {expected}\nfound    {found}")
        }
    })?;
    Ok(if report.matches { 0 } else { 5 })
}

/// The digest of a file's bytes, in lower-case hexadecimal.
pub fn digest<D: Digest>(path: &Path) -> Result<String, Error> {
    let mut file = open_file(path)?;
    // Advice: whether the kernel takes it changes nothing but the speed.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
    let len = file.metadata().map_or(0, |meta| meta.len());
    let bar = print::progress("hashing", len);
    let mut hash = D::new();
    let mut buffer = vec![0; PIECE_LEN];
    loop {
        let count = read(&mut file, &mut buffer).map_err(|e| Error::io("read", path, e))?;
        if count == 0 {
            break;
        }
        hash.update(buffer.get(..count).unwrap_or_default());
        bar.inc(count as u64);
    }
    bar.finish_and_clear();
    Ok(print::hex(&hash.finalize()))
}

fn read(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_algorithm_is_told_by_its_name_or_its_length() {
        let (long, short) = ("A0".repeat(64), "b1".repeat(32));
        assert_eq!(long.parse(), Ok(Checksum { algorithm: Algorithm::Sha512, hex: "a0".repeat(64) }));
        assert_eq!(
            format!("sha256:{short}").parse(),
            Ok(Checksum { algorithm: Algorithm::Sha256, hex: short.clone() })
        );
        for text in ["", "zz", &format!("sha512:{short}"), &format!("md5:{short}"), &"g".repeat(64)] {
            assert!(text.parse::<Checksum>().is_err(), "{text}");
        }
    }
}
