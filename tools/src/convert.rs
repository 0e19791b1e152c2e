//! `inspect convert`: the content of anything, as a raw or qcow2 file.
//!
//! Owns the command and its digests; the files are written by the engine's export, which lets a file appear only when
//! it is whole. `-` is stdout, which gets the raw bytes in order.

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use bedplate_engine::{
    device::{BlockDevice, ExtentKind, for_each_extent},
    error::{Error, Result as EngineResult},
    export::{
        Content, Existing, Format, Monitor,
        qcow2::{ClusterSize, Compression, Options},
        to_file,
    },
    units::{ByteRange, to_usize},
};
use clap::Args;
use indicatif::ProgressBar;
use sha2::{Digest, Sha512};

use crate::{
    failure::{Failure, Result},
    print,
    source::{self, FormatName, OpenArgs},
    stack::{Kind, Stack},
    verify::digest,
    written::{Compress, WrittenArgs},
};

/// Bytes that are written to stdout, or hashed of zeros, at once.
const PIECE_LEN: u64 = 1 << 20;

const EXAMPLES: &str = "Examples:
  bedplate inspect convert disk.qcow2 disk.raw
  bedplate inspect convert disk.raw disk.qcow2 --format qcow2 --compress zstd --digest both
  bedplate inspect convert volume-1234/ --backing /srv/backing --snapshot before-upgrade out.raw
  bedplate inspect convert overlay.qcow2 --allow-references /srv/images - | dd of=/dev/sdx bs=1M";

/// Write the content of a file, chain or directory of layers as one raw or qcow2 file
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct ConvertArgs {
    /// A raw or qcow2 file, a block device, or a directory of layers
    input: PathBuf,
    /// The file to write, `-` for stdout
    out: PathBuf,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    written: WrittenArgs,
}

pub fn run(args: &ConvertArgs) -> Result<u8> {
    let stack = source::open(&args.input, &args.open)?;
    print::notes(stack.notes());
    if args.out == Path::new("-") {
        to_stdout(&stack, args)?;
        return Ok(0);
    }
    let written = &args.written;
    let format = match written.format {
        FormatName::Raw if written.compress.is_some() || written.cluster_size.is_some() => {
            let text = "--compress and --cluster-size are for --format qcow2";
            return Err(Failure::Usage(text.to_owned()));
        }
        FormatName::Raw => Format::Raw,
        FormatName::Qcow2 => Format::Qcow2(Options {
            cluster: written.cluster_size.map(ClusterSize::new).transpose()?.unwrap_or_default(),
            compression: written.compress.map(|compress| match compress {
                Compress::Zlib => Compression::Zlib,
                Compress::Zstd => Compression::Zstd,
            }),
        }),
    };
    refuse_damage(&stack)?;
    let existing = if written.force { Existing::Replace } else { Existing::Refuse };
    let hash = written.wants_digest_of_guest().then(Sha512::new);
    let mut watch = Watch { bar: print::progress("converting", stack.size()), hash };
    to_file(&stack, &args.out, existing, format, &mut watch)?;
    watch.bar.finish_and_clear();
    if written.wants_digest_of_file() {
        print::line(&format!("file sha512:{}", digest::<Sha512>(&args.out)?))?;
    }
    if let Some(hash) = watch.hash {
        print::line(&format!("guest sha512:{}", print::hex(&hash.finalize())))?;
    }
    Ok(0)
}

/// What cannot be read is refused before anything is written.
fn refuse_damage(stack: &Stack) -> Result<()> {
    let mut damaged = None;
    stack.each(ByteRange::new(0, stack.size()), |run| match run.kind {
        Kind::Damaged | Kind::Unopened => {
            damaged = Some(run);
            ControlFlow::Break(())
        }
        Kind::Data { .. } | Kind::Zero { .. } | Kind::Compressed | Kind::Absent => ControlFlow::Continue(()),
    })?;
    damaged.map_or(Ok(()), |run| Err(stack.explain(run).into()))
}

/// Watches an export.
struct Watch {
    bar: ProgressBar,
    hash: Option<Sha512>,
}

impl Monitor for Watch {
    fn reached(&mut self, at: u64) -> EngineResult<()> {
        self.bar.set_position(at);
        Ok(())
    }

    fn content(&mut self, part: Content<'_>) -> EngineResult<()> {
        let Some(hash) = &mut self.hash else { return Ok(()) };
        match part {
            Content::Data(bytes) => hash.update(bytes),
            Content::Zeros(len) => zeros(len, |zeros| {
                hash.update(zeros);
                Ok::<(), Error>(())
            })?,
        }
        Ok(())
    }
}

/// Hand over `len` zeros, piece by piece.
fn zeros<E>(len: u64, mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut left = len;
    while left > 0 {
        let count = left.min(ZEROS.len() as u64);
        take(ZEROS.get(..to_usize(count)).unwrap_or_default())?;
        left -= count;
    }
    Ok(())
}

fn to_stdout(stack: &Stack, args: &ConvertArgs) -> Result<()> {
    if let Some(text) = args.written.unfit_for_stdout() {
        return Err(Failure::Usage(text.to_owned()));
    }
    if io::stdout().is_terminal() {
        return Err(Failure::Usage("a terminal is no place for a disk's bytes; redirect stdout".to_owned()));
    }
    refuse_damage(stack)?;
    let mut out = io::stdout().lock();
    each_piece(stack, |bytes| out.write_all(bytes).map_err(Failure::Output))?;
    out.flush().map_err(Failure::Output)
}

/// Hand over the whole content, in order.
pub fn each_piece(stack: &Stack, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; to_usize(PIECE_LEN)];
    for_each_extent::<Failure>(stack, |range, kind| match kind {
        ExtentKind::Zero => zeros(range.len.0, &mut take),
        ExtentKind::Data => {
            let mut at = range.start.0;
            while at < range.end().0 {
                let len = (range.end().0 - at).min(PIECE_LEN);
                let part = buffer.get_mut(..to_usize(len)).unwrap_or_default();
                stack.read_at(part, at)?;
                take(part)?;
                at += len;
            }
            Ok(())
        }
    })
}
