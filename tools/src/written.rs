//! The flags that say what file is written: those of `inspect convert`, and of a node's exports.

use clap::{Args, ValueEnum};

use crate::{size, source::FormatName};

/// What the file is to be.
#[derive(Args, Clone, Debug)]
pub struct WrittenArgs {
    /// Format of the file: holes of a raw one stay holes, clusters of zeros take no space in a qcow2 one
    #[arg(long, value_enum, default_value = "raw")]
    pub format: FormatName,
    /// Compress the clusters of a qcow2 file
    #[arg(long, value_enum)]
    pub compress: Option<Compress>,
    /// Bytes of a cluster of a qcow2 file: a power of two from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_bytes)]
    pub cluster_size: Option<u64>,
    /// Print the SHA-512 of the file, of what a guest reads from it, or of both
    #[arg(long, value_enum, value_name = "OF")]
    pub digest: Option<DigestOf>,
    /// Replace a file that exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Readable by every QEMU
    Zlib,
    /// Faster and smaller; QEMU 5.1 and later
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DigestOf {
    File,
    Guest,
    Both,
}

impl WrittenArgs {
    /// Why these flags make no sense for stdout, which gets the raw bytes; `None` when they do.
    pub fn unfit_for_stdout(&self) -> Option<&'static str> {
        let is_plain = self.format == FormatName::Raw
            && self.compress.is_none()
            && self.cluster_size.is_none()
            && self.digest.is_none();
        let text = "--format qcow2, --compress, --cluster-size and --digest are for files; stdout gets the raw bytes";
        (!is_plain).then_some(text)
    }

    pub fn wants_digest_of_file(&self) -> bool {
        matches!(self.digest, Some(DigestOf::File | DigestOf::Both))
    }

    pub fn wants_digest_of_guest(&self) -> bool {
        matches!(self.digest, Some(DigestOf::Guest | DigestOf::Both))
    }
}
