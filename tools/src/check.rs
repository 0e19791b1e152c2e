//! `inspect check`: whether a file's metadata is consistent.
//!
//! Owns the command, its report with `qemu-img check`'s keys, and its exit codes: 0 clean, 1 could not run, 2
//! corruption, 3 leaks only, 63 a format that has nothing to check. What is found in qcow2 files is `refcheck.rs`'s.

use std::{ops::ControlFlow, path::PathBuf};

use bedplate_engine::{
    device::BlockDevice,
    image::{Format, qcow2::View},
    units::{ByteRange, to_usize},
};
use clap::Args;
use serde::Serialize;

use crate::{
    directory::{self, Directory},
    failure::{Failure, Result},
    layer::open_file,
    longhorn,
    print::{self, Output},
    refcheck::{self, Counts},
    source::{self, Chain, FormatName},
    stack::Kind,
    tables::QcowFile,
};

/// What `qemu-img` answers for formats without checks.
const UNCHECKABLE: u8 = 63;
/// Bytes that are read at once for `--data`.
const DATA_PIECE_LEN: u64 = 2 << 20;

const EXAMPLES: &str = "Examples:
  bedplate inspect check disk.qcow2
  bedplate inspect check disk.qcow2 --data -o json

Exit codes, as of qemu-img check: 0 clean, 1 the check could not run, 2 corruption, 3 leaks only (space is wasted, no
data is wrong), 63 a format that has nothing to check.";

/// Check the metadata: refcounts, leaks, overlaps
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CheckArgs {
    /// A qcow2 file, or a directory of layers
    file: PathBuf,
    /// Also read every byte, which decodes every compressed cluster
    #[arg(long)]
    data: bool,
    /// Read the file as this format, whatever it begins with
    #[arg(id = "as", long = "as", value_enum, value_name = "FORMAT")]
    format: Option<FormatName>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    filename: String,
    format: &'static str,
    check_errors: u64,
    image_end_offset: u64,
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_none")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_none")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_none")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_none")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_none")]
    leaks: u64,
    /// What was found, in words; not `qemu-img`'s.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    findings: Vec<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_none(count: &u64) -> bool {
    *count == 0
}

pub fn run(args: &CheckArgs) -> Result<u8> {
    checked(args).map_err(|failure| failure.with_code(1))
}

fn checked(args: &CheckArgs) -> Result<u8> {
    if args.file.is_dir() {
        return check_directory(args);
    }
    let file = open_file(&args.file)?;
    let format = match args.format {
        Some(format) => format.into(),
        None => source::probe(&file, &args.file)?,
    };
    match format {
        Format::Raw => {
            let text = format!("{}: raw files have no metadata that could be checked", args.file.display());
            Err(Failure::Usage(text).with_code(UNCHECKABLE))
        }
        Format::Qcow2 => {
            let qcow = QcowFile::open(file, &args.file)?;
            let mut counts = refcheck::check(&qcow)?;
            if args.data && qcow.header().data_file.is_none() {
                read_all(args, &mut counts)?;
            }
            finish(args, counts)
        }
    }
}

/// Directories have no clusters; corruptions, and leftovers in place of leaks.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DirectoryReport {
    filename: String,
    format: &'static str,
    check_errors: u64,
    corruptions: Vec<String>,
    leftovers: Vec<String>,
}

fn check_directory(args: &CheckArgs) -> Result<u8> {
    let (format, (corruptions, leftovers)) = match directory::open(&args.file)? {
        Directory::Replica(replica) => ("longhorn-replica", longhorn::check(&replica)),
    };
    let code = exit_code(corruptions.len(), leftovers.len());
    let filename = args.file.display().to_string();
    let report = DirectoryReport { filename, format, check_errors: 0, corruptions, leftovers };
    print::report(args.output, &report, |report| {
        let found = |kind: &str, list: &[String]| -> Vec<String> {
            list.iter().map(|text| format!("{kind}{}", print::shown(text))).collect()
        };
        let mut lines = found("ERROR ", &report.corruptions);
        lines.extend(found("Leftover: ", &report.leftovers));
        if lines.is_empty() {
            lines.push("No errors were found in the directory.".to_owned());
        }
        lines.join("\n")
    })?;
    Ok(code)
}

/// `qemu-img check`'s.
fn exit_code(corruptions: usize, leaks: usize) -> u8 {
    match (corruptions, leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        (_, _) => 2,
    }
}

/// Read every byte that the file itself has, and report what cannot be read.
fn read_all(args: &CheckArgs, counts: &mut Counts) -> Result<()> {
    let file = open_file(&args.file)?;
    let stack = Chain::open(file, &args.file, Format::Qcow2, &View::Active, None)?.into_stack();
    let bar = print::progress("reading", stack.size());
    let mut buffer = vec![0; to_usize(DATA_PIECE_LEN)];
    let mut failed = Vec::new();
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < stack.size() {
        let asked = ByteRange::new(at, (stack.size() - at).min(1 << 30));
        stack.each(asked, |run| {
            match run.kind {
                Kind::Data { .. } | Kind::Compressed | Kind::Damaged => ranges.push(run.range),
                Kind::Zero { .. } | Kind::Absent | Kind::Unopened => {}
            }
            ControlFlow::Continue(())
        })?;
        for range in ranges.drain(..) {
            let mut start = range.start.0;
            while start < range.end().0 {
                let len = (range.end().0 - start).min(DATA_PIECE_LEN);
                if let Some(part) = buffer.get_mut(..to_usize(len))
                    && let Err(error) = stack.read_at(part, start)
                {
                    failed.push(error.to_string());
                }
                start += len;
                bar.set_position(start);
            }
        }
        at = asked.end().0;
    }
    bar.finish_and_clear();
    for text in failed {
        counts.corruption(text);
    }
    Ok(())
}

fn finish(args: &CheckArgs, counts: Counts) -> Result<u8> {
    let code = exit_code(to_usize(counts.corruptions), to_usize(counts.leaks));
    let report = Report {
        filename: args.file.display().to_string(),
        format: "qcow2",
        check_errors: 0,
        image_end_offset: counts.end,
        total_clusters: counts.total,
        allocated_clusters: counts.allocated,
        fragmented_clusters: counts.fragmented,
        compressed_clusters: counts.compressed,
        corruptions: counts.corruptions,
        leaks: counts.leaks,
        findings: counts.findings,
    };
    print::report(args.output, &report, table)?;
    Ok(code)
}

fn table(report: &Report) -> String {
    let mut lines: Vec<_> = report.findings.iter().map(|finding| print::shown(finding)).collect();
    if report.corruptions == 0 && report.leaks == 0 {
        lines.push("No errors were found on the image.".to_owned());
    }
    if report.corruptions > 0 {
        lines.push(format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        lines.push(format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
            report.leaks
        ));
    }
    if report.total_clusters > 0 {
        let (allocated, total) = (report.allocated_clusters, report.total_clusters);
        lines.push(format!(
            "{allocated}/{total} = {} allocated, {} fragmented, {} compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    lines.push(format!("Image end offset: {}", report.image_end_offset));
    lines.join("\n")
}

/// With two decimals, rounded, in whole numbers.
fn percent(part: u64, whole: u64) -> String {
    let (part, whole) = (u128::from(part), u128::from(whole));
    let hundredths = if whole == 0 { 0 } else { (part * 20_000 + whole) / (whole * 2) };
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}
