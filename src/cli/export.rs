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
    wait::{self, TimeoutArgs},
};
use crate::api::{
    client::Client,
    types::{Existing, Export, Format},
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
    /// Not in this version
    Qcow2,
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
        return to_stdout(origin, format, client).await;
    }
    let path = std::path::absolute(&args.out)
        .map_err(|source| Failure::Io { what: args.out.display().to_string(), source })?;
    let path = path.into_os_string().into_string().map_err(|path| {
        Failure::Usage(format!("{} is not UTF-8; export under another name", Path::new(&path).display()))
    })?;
    let existing = if args.force { Existing::Replace } else { Existing::Refuse };
    let job = match origin {
        Origin::Image(name) => {
            let request = Export { path, snapshot: None, format, existing };
            client.export_image(&name, &request).await?
        }
        Origin::Volume(at) => {
            let request = Export { path, snapshot: at.snapshot, format, existing };
            client.export_volume(&at.name, &request).await?
        }
    };
    wait::job(client, job, args.timeout.timeout).await.map(drop)
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
