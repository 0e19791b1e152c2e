//! Exports of images and volumes: the flags that both have, and where the bytes go.
//!
//! A file is written by the node, which knows the holes; stdout is fed from a stream, where holes are zeros.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};

use super::{
    VolumeAt,
    exit::Failure,
    output, size,
    wait::{self, TimeoutArgs},
};
use crate::api::{
    client::Client,
    types::{Compression, Existing, Export, Format},
};

/// The flags.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The file to write, `-` for stdout
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Format of the file
    #[arg(long, value_enum, default_value_t)]
    format: ExportFormat,
    /// Compress the clusters of a qcow2 file
    #[arg(long, value_enum)]
    compress: Option<Compress>,
    /// Bytes of a cluster of a qcow2 file: a power of two from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_bytes)]
    cluster_size: Option<u64>,
    /// Print the SHA-512 of the file, of what a guest reads from it, or of both
    #[arg(long, value_enum, value_name = "OF")]
    digest: Option<DigestOf>,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ExportFormat {
    /// The bytes as they are; holes stay holes
    #[default]
    Raw,
    /// Clusters of zeros take no space; see --compress
    Qcow2,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compress {
    /// Readable by every QEMU
    Zlib,
    /// Faster and smaller; QEMU 5.1 and later
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DigestOf {
    File,
    Guest,
    Both,
}

/// What is exported.
pub enum Origin {
    Image(String),
    Volume(VolumeAt),
}

pub async fn run(origin: Origin, args: ExportArgs, client: &Client) -> Result<(), Failure> {
    let format = match args.format {
        ExportFormat::Raw => Format::Raw,
        ExportFormat::Qcow2 => Format::Qcow2,
    };
    if args.out == Path::new("-") {
        if args.compress.is_some() || args.cluster_size.is_some() || args.digest.is_some() {
            let message = "--compress, --cluster-size and --digest are for files; stdout gets the raw bytes";
            return Err(Failure::Usage(message.to_owned()));
        }
        return to_stdout(origin, format, client).await;
    }
    let path = std::path::absolute(&args.out)
        .map_err(|source| Failure::Io { what: args.out.display().to_string(), source })?;
    let path = path.into_os_string().into_string().map_err(|path| {
        Failure::Usage(format!("{} is not UTF-8; export under another name", Path::new(&path).display()))
    })?;
    let mut request = Export {
        path,
        snapshot: None,
        format,
        compress: args.compress.map(|compress| match compress {
            Compress::Zlib => Compression::Zlib,
            Compress::Zstd => Compression::Zstd,
        }),
        cluster_size_bytes: args.cluster_size,
        digest_file: matches!(args.digest, Some(DigestOf::File | DigestOf::Both)),
        digest_guest: matches!(args.digest, Some(DigestOf::Guest | DigestOf::Both)),
        existing: if args.force { Existing::Replace } else { Existing::Refuse },
    };
    let job = match origin {
        Origin::Image(name) => client.export_image(&name, &request).await?,
        Origin::Volume(at) => {
            request.snapshot = at.snapshot;
            client.export_volume(&at.name, &request).await?
        }
    };
    let job = wait::job(client, job, args.timeout.timeout).await?;
    let digests = job.digests.unwrap_or_default();
    let of = [("file", digests.file_sha512), ("guest", digests.guest_sha512)];
    let lines: Vec<_> =
        of.into_iter().filter_map(|(of, hex)| Some(format!("{of} sha512:{}", hex?))).collect();
    if !lines.is_empty() {
        output::print(&lines.join("\n"))?;
    }
    Ok(())
}

async fn to_stdout(origin: Origin, format: Format, client: &Client) -> Result<(), Failure> {
    match format {
        Format::Raw => {}
        Format::Qcow2 => {
            return Err(Failure::Usage("qcow2 cannot be written to stdout; use --format raw".to_owned()));
        }
    }
    if io::stdout().is_terminal() {
        return Err(Failure::Usage("a terminal is no place for a disk's bytes; redirect stdout".to_owned()));
    }
    let mut out = io::stdout().lock();
    match origin {
        Origin::Image(name) => client.image_content(&name, &mut out).await?,
        Origin::Volume(at) => client.volume_content(&at.name, at.snapshot.as_deref(), &mut out).await?,
    };
    Ok(())
}
