//! Exports of images and volumes: the flags that both have, and where the bytes go.
//!
//! A file is written by the node, which knows the holes; stdout is fed from a stream, where holes are zeros.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use bedplate_inspect::{
    source::FormatName,
    written::{Compress, WrittenArgs},
};
use clap::Args;

use super::{
    VolumeAt,
    exit::Failure,
    output,
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
    #[command(flatten)]
    written: WrittenArgs,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

/// What is exported.
pub enum Origin {
    Image(String),
    Volume(VolumeAt),
}

pub async fn run(origin: Origin, args: ExportArgs, client: &Client) -> Result<(), Failure> {
    let written = &args.written;
    if args.out == Path::new("-") {
        return match written.unfit_for_stdout() {
            Some(text) => Err(Failure::Usage(text.to_owned())),
            None => to_stdout(origin, client).await,
        };
    }
    let path = std::path::absolute(&args.out)
        .map_err(|source| Failure::Io { what: args.out.display().to_string(), source })?;
    let path = path.into_os_string().into_string().map_err(|path| {
        Failure::Usage(format!("{} is not UTF-8; export under another name", Path::new(&path).display()))
    })?;
    let mut request = Export {
        path,
        snapshot: None,
        format: match written.format {
            FormatName::Raw => Format::Raw,
            FormatName::Qcow2 => Format::Qcow2,
        },
        compress: written.compress.map(|compress| match compress {
            Compress::Zlib => Compression::Zlib,
            Compress::Zstd => Compression::Zstd,
        }),
        cluster_size_bytes: written.cluster_size,
        digest_file: written.wants_digest_of_file(),
        digest_guest: written.wants_digest_of_guest(),
        existing: if written.force { Existing::Replace } else { Existing::Refuse },
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

async fn to_stdout(origin: Origin, client: &Client) -> Result<(), Failure> {
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
