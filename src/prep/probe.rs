//! What the first bytes of an arrival say that it is.
//!
//! Told once, at import, and then written in the record: a raw image whose guest writes another format's header later
//! stays raw. What this version cannot serve is refused here by name, before it has been fetched; taken as raw it would
//! give its guest a disk full of compressed bytes.

use std::path::Path;

use bedplate_engine::image::{
    Format,
    qcow2::{Qcow2Image, UnverifiedHeader},
};

use super::failure::{Failure, Result};

/// Tell from the first bytes: as many as there are, or a mebibyte. `name` is what errors call the file, `len` its
/// length where that is known.
pub fn probe(first: &[u8], name: &str, len: Option<u64>) -> Result<Format> {
    let refused = |what: &str| Err(Failure::Unsupported(what.to_owned()));
    match first {
        [b'Q', b'F', b'I', 0xfb, ..] => {
            check_header(first, name, len)?;
            Ok(Format::Qcow2)
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
        _ => Ok(Format::Raw),
    }
}

/// Refuse what a header says that cannot be served.
fn check_header(first: &[u8], name: &str, len: Option<u64>) -> Result<()> {
    let area = UnverifiedHeader::area_len(first);
    let Some(area) = first.get(..usize::try_from(area).unwrap_or(usize::MAX)) else {
        // Not all of it is here. What is wrong with it is found when the file is.
        return Ok(());
    };
    let header = UnverifiedHeader::parse(area).and_then(|header| header.verify(len.unwrap_or(u64::MAX)));
    let path = Path::new(name);
    let header = header.map_err(|fault| fault.of(path))?;
    Ok(Qcow2Image::check_self_contained(&header, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for (first, name) in [
            (&b"\xfd7zXZ\0\0\x04"[..], "xz"),
            (b"\x28\xb5\x2f\xfd\0\0\0\0", "zstd"),
            (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
            (b"KDMV\x01\0\0\0", "vmdk"),
        ] {
            let error = probe(first, "x", None).unwrap_err();
            assert!(matches!(&error, Failure::Unsupported(text) if text.contains(name)), "{error}");
        }
        for raw in [&b""[..], b"QFI", b"\0\0\0\0\0\0\0\0", b"\xeb\x63\x90\x10\x8e\xd0\xbc\0"] {
            assert_eq!(probe(raw, "x", None).unwrap(), Format::Raw);
        }
    }
}
