//! What the first bytes of an arrival say that it is.
//!
//! Told once, at import, and then written in the record: a raw image whose guest writes another format's header later
//! stays raw. What this version cannot serve is refused here by name, before it has been fetched; taken as raw it would
//! give its guest a disk full of compressed bytes.

use super::failure::{Failure, Result};

/// So many first bytes decide.
pub const PROBE_LEN: usize = 8;

/// What an arrival is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Raw,
}

/// Tell from the first [`PROBE_LEN`] bytes (fewer where the file is shorter).
pub fn probe(first: &[u8]) -> Result<Content> {
    let refused = |what: &str| Err(Failure::Unsupported(what.to_owned()));
    match first {
        [b'Q', b'F', b'I', 0xfb, ..] => {
            refused("qcow2 images arrive with the next version; convert it to raw for now")
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => refused("this is an xz file; decompress it first"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => refused("this is a zstd file; decompress it first"),
        [0x1f, 0x8b, 0x08, ..] => refused("this is a gzip file; decompress it first"),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, ..] => {
            refused("this is a bzip2 file; decompress it first")
        }
        [b'K', b'D', b'M', b'V', ..] => refused("vmdk images are not supported; convert it to raw"),
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => {
            refused("vhdx images are not supported; convert it to raw")
        }
        _ => Ok(Content::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for (first, name) in [
            (&b"QFI\xfb\0\0\0\x03"[..], "qcow2"),
            (b"\xfd7zXZ\0\0\x04", "xz"),
            (b"\x28\xb5\x2f\xfd\0\0\0\0", "zstd"),
            (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
            (b"KDMV\x01\0\0\0", "vmdk"),
        ] {
            let error = probe(first).unwrap_err();
            assert!(matches!(&error, Failure::Unsupported(text) if text.contains(name)), "{error}");
        }
        for raw in [&b""[..], b"QFI", b"\0\0\0\0\0\0\0\0", b"\xeb\x63\x90\x10\x8e\xd0\xbc\0"] {
            assert_eq!(probe(raw).unwrap(), Content::Raw);
        }
    }
}
