//! `inspect check`: whether a file's metadata is consistent.
//!
//! Owns the command, its report with `qemu-img check`'s keys, and its exit codes: 0 clean, 1 could not run, 2
//! corruption, 3 leaks only, 63 a format that has nothing to check. What is found in qcow2 files is `refcheck.rs`'s.

use std::{ops::ControlFlow, path::PathBuf};

use bedplate_engine::{
    device::BlockDevice,
    error::Error,
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
    refcheck::{self, Counts, FINDINGS_MAX},
    source::{self, Chain, FormatName, OpenArgs},
    stack::{Kind, Stack},
    tables::QcowFile,
    volume_report,
};

/// What `qemu-img` answers for formats without checks.
const UNCHECKABLE: u8 = 63;
/// Bytes that are read at once for `--data`.
const DATA_PIECE_LEN: u64 = 2 << 20;
/// Runs that are held at once for `--data`.
const RUNS_AT_ONCE: usize = 1 << 16;

const EXAMPLES: &str = "Examples:
  bedplate inspect check disk.qcow2
  bedplate inspect check disk.qcow2 --data -o json

Exit codes, as of qemu-img check: 0 clean, 1 the check could not run, 2 corruption, 3 leaks only (space is wasted, no \
data is wrong), 63 a format that has nothing to check.";

/// Check the metadata: refcounts, leaks, overlaps
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CheckArgs {
    /// A qcow2 file, or a directory of layers
    file: PathBuf,
    /// Also read every byte, which decodes every compressed cluster and verifies the checksums that Longhorn left
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
    #[serde(skip_serializing_if = "is_none")]
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
                let file = open_file(&args.file)?;
                let chain = Chain::open(file, &args.file, Format::Qcow2, &View::Active, None)?;
                for text in read_all(&chain.into_stack())? {
                    counts.corruption(|| text);
                }
            }
            finish(args, counts)
        }
    }
}

/// Directories have no clusters; their leaks are leftovers that belong to nothing.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DirectoryReport {
    filename: String,
    format: &'static str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_none")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_none")]
    leaks: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    findings: Vec<String>,
}

fn check_directory(args: &CheckArgs) -> Result<u8> {
    let (format, mut corruptions, leftovers) = match directory::open(&args.file) {
        Ok(Directory::Replica(replica)) => {
            let mut found = longhorn::check(&replica);
            if args.data {
                let verified = longhorn::verify_checksums(&replica);
                found.corruptions.extend(verified.corruptions);
                found.leftovers.extend(verified.leftovers);
            }
            ("longhorn-replica", found.corruptions, found.leftovers)
        }
        Ok(Directory::Volume(volume)) => ("bedplate-volume", volume_report::check(&volume), Vec::new()),
        Err(error @ Error::Corrupt { .. }) => ("unknown", vec![error.to_string()], Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if args.data && corruptions.is_empty() {
        corruptions.extend(read_all(&source::open(&args.file, &OpenArgs::default())?)?);
    }
    let code = exit_code(corruptions.len(), leftovers.len());
    let report = DirectoryReport {
        filename: args.file.display().to_string(),
        format,
        check_errors: 0,
        corruptions: corruptions.len() as u64,
        leaks: leftovers.len() as u64,
        findings: corruptions
            .into_iter()
            .map(|text| format!("ERROR {text}"))
            .chain(leftovers.into_iter().map(|text| format!("Leftover: {text}")))
            .collect(),
    };
    print::report(args.output, &report, |report| {
        if report.findings.is_empty() {
            return "No errors were found in the directory.".to_owned();
        }
        report.findings.iter().map(|text| print::shown(text)).collect::<Vec<_>>().join("\n")
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

/// Read every byte that the files at hand have; what cannot be read. What is below them and not opened is not theirs.
fn read_all(stack: &Stack) -> Result<Vec<String>> {
    let bar = print::progress("reading", stack.size());
    let mut buffer = vec![0; to_usize(DATA_PIECE_LEN)];
    let mut failed = Vec::new();
    let mut next = 0;
    while next < stack.size() {
        // A part of the map at a time, however many runs it has.
        let mut runs = Vec::new();
        stack.each(ByteRange::new(next, stack.size() - next), |run| {
            next = run.range.end().0;
            match run.kind {
                Kind::Data { .. } | Kind::Compressed | Kind::Damaged => runs.push(run),
                Kind::Zero { .. } | Kind::Absent | Kind::Unopened => {}
            }
            if runs.len() < RUNS_AT_ONCE { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        for run in runs {
            // However long it is: one entry of a table may be damaged for many TiB.
            if run.kind == Kind::Damaged {
                note(&mut failed, || stack.explain(run));
                continue;
            }
            let mut start = run.range.start.0;
            while start < run.range.end().0 {
                let len = (run.range.end().0 - start).min(DATA_PIECE_LEN);
                if let Some(part) = buffer.get_mut(..to_usize(len))
                    && let Err(error) = stack.read_at(part, start)
                {
                    note(&mut failed, || error);
                }
                start += len;
                bar.set_position(start);
            }
        }
    }
    bar.finish_and_clear();
    Ok(failed)
}

fn note(failed: &mut Vec<String>, error: impl FnOnce() -> Error) {
    if failed.len() < FINDINGS_MAX {
        failed.push(error().to_string());
    }
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
