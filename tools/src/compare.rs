//! `inspect compare`: whether two things hold the same content.
//!
//! Owns the comparison of any two devices: on all cores, up to the first difference, and without reading what both
//! call zeros. Exit codes are `qemu-img compare`'s: 0 the same, 1 different, 2 an error.

use std::{
    num::NonZero,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use bedplate_engine::{
    device::{BlockDevice, Extent, ExtentKind, runs_from},
    error::{Error, Result as EngineResult},
    sparse::is_zero,
    units::to_usize,
};
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    failure::{Failure, Result},
    print::{self, Output},
    source::{self, FileArgs, FormatName, OpenArgs},
};

/// Bytes of one piece.
const PIECE_LEN: u64 = 1 << 20;
/// Threads of one comparison.
const THREADS_MAX: usize = 64;
/// No difference found.
const NONE: u64 = u64::MAX;

const EXAMPLES: &str = "Examples:
  bedplate inspect compare disk.raw disk.qcow2
  bedplate inspect compare disk.raw volume-1234/ --other-backing /srv/base.qcow2 -o json

A longer one is the same if the rest of it is zeros, unless --strict.

Exit codes, as of qemu-img compare: 0 the same content, 1 different, 2 an error.";

/// Compare the content of two files of any format
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CompareArgs {
    /// The one: a raw or qcow2 file, a block device, or a directory of layers
    a: PathBuf,
    /// The other
    b: PathBuf,
    #[command(flatten)]
    open: OpenArgs,
    /// Read the other as this format
    #[arg(long, value_enum, value_name = "FORMAT")]
    other_as: Option<FormatName>,
    /// Read a snapshot of the other
    #[arg(long, value_name = "NAME")]
    other_snapshot: Option<String>,
    /// The backing file of the other, if that is a Longhorn replica or a volume
    #[arg(long, value_name = "FILE")]
    other_backing: Option<PathBuf>,
    /// Different lengths are a difference
    #[arg(short, long)]
    strict: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    identical: bool,
    /// First byte that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    mismatch_offset: Option<u64>,
    sizes: [u64; 2],
}

pub fn run(args: &CompareArgs) -> Result<u8> {
    compared(args).map_err(|failure| failure.with_code(2))
}

fn compared(args: &CompareArgs) -> Result<u8> {
    let other = OpenArgs {
        format: args.other_as,
        snapshot: args.other_snapshot.clone(),
        files: FileArgs {
            allow_references: args.open.files.allow_references.clone(),
            backing: args.other_backing.clone(),
        },
    };
    let a = source::open(&args.a, &args.open)?;
    let b = source::open(&args.b, &other)?;
    for stack in [&a, &b] {
        print::notes(stack.notes());
    }
    let sizes = [a.size(), b.size()];
    let unequal = sizes[0] != sizes[1];
    let mismatch = if args.strict && unequal {
        Some(sizes[0].min(sizes[1]))
    } else {
        let bar = print::progress("comparing", sizes[0].max(sizes[1]));
        let found = first_difference(&a, &b, &bar)?;
        bar.finish_and_clear();
        found
    };
    let report = Report { identical: mismatch.is_none(), mismatch_offset: mismatch, sizes };
    print::report(args.output, &report, |report| {
        let mut lines = Vec::new();
        match report.mismatch_offset {
            Some(_) if args.strict && unequal => lines.push("Strict mode: Image size mismatch!".to_owned()),
            Some(at) => lines.push(format!("Content mismatch at offset {at}!")),
            None => {
                if unequal {
                    lines.push("Warning: Image size mismatch!".to_owned());
                }
                lines.push("Images are identical.".to_owned());
            }
        }
        lines.join("\n")
    })?;
    Ok(u8::from(!report.identical))
}

/// The first byte in which two devices differ; past its end a device reads zeros.
pub fn first_difference(a: &dyn BlockDevice, b: &dyn BlockDevice, bar: &ProgressBar) -> Result<Option<u64>> {
    let sides = [a, b].map(|device| Side { device, size: device.geometry().size.0 });
    let size = sides[0].size.max(sides[1].size);
    let work = Work {
        cursor: Mutex::new(Cursor { at: 0, size, runs: [Vec::new(), Vec::new()] }),
        sides,
        difference: AtomicU64::new(NONE),
        failed: Mutex::new(None),
        bar,
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| work.run());
        }
        work.run();
    });
    let difference = work.difference.into_inner();
    // A difference before the place that cannot be read is the answer all the same.
    match work.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((at, error)) if at < difference => Err(Failure::Engine(error)),
        Some(_) | None => Ok((difference != NONE).then_some(difference)),
    }
}

struct Side<'a> {
    device: &'a dyn BlockDevice,
    size: u64,
}

/// What the threads share.
struct Work<'a> {
    sides: [Side<'a>; 2],
    cursor: Mutex<Cursor>,
    /// The first known; nobody looks past it.
    difference: AtomicU64,
    /// The first failure, and the piece it was in.
    failed: Mutex<Option<(u64, Error)>>,
    bar: &'a ProgressBar,
}

/// Goes over both sides in order.
struct Cursor {
    at: u64,
    size: u64,
    /// Known runs of each side that end after `at`, last first.
    runs: [Vec<Extent>; 2],
}

/// A part that has to be looked at.
struct Piece {
    start: u64,
    len: u64,
    kinds: [ExtentKind; 2],
}

impl Cursor {
    fn next(&mut self, sides: &[Side<'_>; 2]) -> EngineResult<Option<Piece>> {
        while self.at < self.size {
            let mut end = self.size.min(self.at.saturating_add(PIECE_LEN));
            let mut both_zero_to = self.size;
            let mut kinds = [ExtentKind::Zero; 2];
            for ((side, runs), kind) in sides.iter().zip(&mut self.runs).zip(&mut kinds) {
                let (found, to) = run_at(side, runs, self.at)?;
                *kind = found.unwrap_or(ExtentKind::Zero);
                end = end.min(to);
                both_zero_to = both_zero_to.min(to);
            }
            let start = self.at;
            if kinds == [ExtentKind::Zero; 2] {
                self.at = both_zero_to;
                continue;
            }
            self.at = end;
            return Ok(Some(Piece { start, len: end - start, kinds }));
        }
        Ok(None)
    }
}

/// The kind of the run that `at` is in, none past the end, and where the run ends.
fn run_at(side: &Side<'_>, runs: &mut Vec<Extent>, at: u64) -> EngineResult<(Option<ExtentKind>, u64)> {
    if at >= side.size {
        return Ok((None, u64::MAX));
    }
    while runs.last().is_some_and(|run| run.range.end().0 <= at) {
        runs.pop();
    }
    if runs.is_empty() {
        *runs = runs_from(side.device, at)?;
        runs.reverse();
    }
    Ok(runs.last().map_or((None, u64::MAX), |run| (Some(run.kind), run.range.end().0)))
}

impl Work<'_> {
    fn run(&self) {
        let mut buffers = [Vec::new(), Vec::new()];
        loop {
            let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
            let at = cursor.at;
            let next = if at < self.difference.load(Ordering::Relaxed) && !self.has_failed() {
                cursor.next(&self.sides)
            } else {
                Ok(None)
            };
            drop(cursor);
            let start = match next {
                Ok(Some(piece)) => {
                    let looked_at = self.look_at(&piece, &mut buffers);
                    self.bar.set_position(piece.start);
                    match looked_at {
                        Ok(()) => continue,
                        Err(error) => (piece.start, error),
                    }
                }
                Ok(None) => return,
                Err(error) => (at, error),
            };
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            if failed.as_ref().is_none_or(|(first, _)| start.0 < *first) {
                *failed = Some(start);
            }
            return;
        }
    }

    fn has_failed(&self) -> bool {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn look_at(&self, piece: &Piece, buffers: &mut [Vec<u8>; 2]) -> EngineResult<()> {
        let len = to_usize(piece.len);
        for ((buffer, side), kind) in buffers.iter_mut().zip(&self.sides).zip(piece.kinds) {
            if kind == ExtentKind::Data {
                buffer.resize(len, 0);
                side.device.read_at(buffer, piece.start)?;
            }
        }
        let [a, b] = buffers;
        let difference = match piece.kinds {
            [ExtentKind::Data, ExtentKind::Data] if a == b => None,
            [ExtentKind::Data, ExtentKind::Data] => a.iter().zip(b.iter()).position(|(a, b)| a != b),
            [ExtentKind::Data, ExtentKind::Zero] => first_non_zero(a),
            [ExtentKind::Zero, ExtentKind::Data] => first_non_zero(b),
            [ExtentKind::Zero, ExtentKind::Zero] => None,
        };
        if let Some(at) = difference {
            self.difference.fetch_min(piece.start + at as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn first_non_zero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}
