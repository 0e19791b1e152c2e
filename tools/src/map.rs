//! `inspect map`: where the bytes are.
//!
//! Owns the listing of runs, with `qemu-img map`'s keys, and the table for people. What is damaged or may not be
//! opened is listed like everything else, with the reason.

use std::{ops::ControlFlow, path::PathBuf};

use bedplate_engine::{error::Error, units::ByteRange};
use clap::Args;
use serde::Serialize;

use crate::{
    failure::Result,
    html::{self, Mapped},
    info::{self, Info},
    picture::{By, Picture},
    print::{self, Output, PageOutput},
    size,
    source::{self, OpenArgs},
    stack::{Kind, Run, Stack},
};

/// Runs of one listing; beyond it ask for a part with `--start-offset` and `--max-length`.
pub const RUNS_MAX: usize = 4 << 20;

const EXAMPLES: &str = "Examples:
  bedplate inspect map disk.qcow2
  bedplate inspect map overlay.qcow2 --allow-references . --layers
  bedplate inspect map disk.qcow2 --chart
  bedplate inspect map disk.qcow2 -o html > disk.html
  bedplate inspect map disk.qcow2 -o json --start-offset 1G --max-length 64M

The keys of `-o json` are those of `qemu-img map --output=json`. Ranges that are damaged have the key `damage`, and the
exit code is 5; ranges of a file that may not be opened are neither zero nor data.";

/// Show where data lies
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct MapArgs {
    /// A raw or qcow2 file, a block device, or a directory of layers
    file: PathBuf,
    #[command(flatten)]
    open: OpenArgs,
    /// Begin at this offset
    #[arg(long, value_name = "OFFSET", value_parser = size::parse_bytes, default_value = "0")]
    start_offset: u64,
    /// Show only so many bytes
    #[arg(long, value_name = "LENGTH", value_parser = size::parse_bytes)]
    max_length: Option<u64>,
    /// Show whose bytes they are: every range, with the file that has it
    #[arg(long)]
    layers: bool,
    /// Draw a picture; with --layers, of which layer has what
    #[arg(long)]
    chart: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: PageOutput,
}

/// One run.
#[derive(Debug, Serialize)]
pub struct Entry {
    pub start: u64,
    pub length: u64,
    pub depth: usize,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

pub fn run(args: &MapArgs) -> Result<u8> {
    let stack = source::open(&args.file, &args.open)?;
    print::notes(stack.notes());
    let start = args.start_offset.min(stack.size());
    let len = (stack.size() - start).min(args.max_length.unwrap_or(u64::MAX));
    let runs = runs(&stack, ByteRange::new(start, len))?;
    let is_damaged = runs.iter().any(|run| matches!(run.kind, Kind::Damaged));
    let output = match args.output {
        PageOutput::Html => {
            let infos: Vec<Info> = vec![info::of_path(&args.file, args.open.format)?];
            let mapped = Mapped { stack: &stack, runs: &runs, start, len };
            print::line(&html::page(&args.file.display().to_string(), &infos, Some(&mapped)))?;
            return Ok(if is_damaged { 5 } else { 0 });
        }
        PageOutput::Table if args.chart => {
            let by = if args.layers { By::Layer } else { By::Fullness };
            print::line(&Picture::new(&runs, start, len).chart(start, by))?;
            return Ok(if is_damaged { 5 } else { 0 });
        }
        PageOutput::Table => Output::Table,
        PageOutput::Json => Output::Json,
    };
    let names = stack.names();
    let entries: Vec<_> = runs.iter().map(|run| entry(&stack, *run, args.layers.then_some(&names))).collect();
    let kinds = runs.iter().map(|run| run.kind);
    print::report(output, &entries, |entries| table(entries, kinds, &names, args.layers))?;
    Ok(if is_damaged { 5 } else { 0 })
}

/// All runs of a range.
pub fn runs(stack: &Stack, range: ByteRange) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    stack.each(range, |run| {
        runs.push(run);
        if runs.len() <= RUNS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if runs.len() > RUNS_MAX {
        let what = format!("the map has more than {RUNS_MAX} ranges; ask for a part with --max-length");
        return Err(Error::Invalid(what).into());
    }
    Ok(runs)
}

/// A run with `qemu-img`'s keys.
pub fn entry(stack: &Stack, run: Run, names: Option<&Vec<&str>>) -> Entry {
    let (present, zero, data, compressed, offset) = match run.kind {
        Kind::Data { offset } => (true, false, true, false, Some(offset)),
        Kind::Zero { offset } => (true, true, false, false, offset),
        Kind::Compressed => (true, false, true, true, None),
        Kind::Absent => (false, true, false, false, None),
        Kind::Unopened => (false, false, false, false, None),
        Kind::Damaged => (true, false, false, false, None),
    };
    let damage = matches!(run.kind, Kind::Damaged).then(|| stack.explain(run).to_string());
    let filename = names.and_then(|names| names.get(run.depth)).map(|name| (*name).to_owned());
    Entry {
        start: run.range.start.0,
        length: run.range.len.0,
        depth: run.depth,
        present,
        zero,
        data,
        compressed,
        offset,
        filename,
        damage,
    }
}

/// What a run is, in a word.
pub fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Data { .. } => "data",
        Kind::Zero { .. } => "zero",
        Kind::Compressed => "compressed",
        Kind::Absent => "absent",
        Kind::Unopened => "not opened",
        Kind::Damaged => "damaged",
    }
}

/// For people: what holds data, or everything with its layer.
fn table(entries: &[Entry], kinds: impl Iterator<Item = Kind>, names: &[&str], all: bool) -> String {
    let hex = |n: u64| format!("{n:#x}");
    let file = |entry: &Entry| names.get(entry.depth).map_or("-", |name| name).to_owned();
    let place = |kind: Kind, entry: &Entry| match entry.offset {
        Some(offset) => hex(offset),
        None => word(kind).to_owned(),
    };
    let with_kinds = entries.iter().zip(kinds);
    let mut text = if all {
        let rows = with_kinds.map(|(entry, kind)| {
            let place = place(kind, entry);
            [
                hex(entry.start),
                hex(entry.length),
                word(kind).to_owned(),
                place,
                entry.depth.to_string(),
                file(entry),
            ]
        });
        print::listing(["OFFSET", "LENGTH", "KIND", "MAPPED TO", "DEPTH", "FILE"], rows)
    } else {
        let rows = with_kinds.filter(|(_, kind)| !matches!(kind, Kind::Zero { .. } | Kind::Absent));
        let rows =
            rows.map(|(entry, kind)| [hex(entry.start), hex(entry.length), place(kind, entry), file(entry)]);
        print::listing(["OFFSET", "LENGTH", "MAPPED TO", "FILE"], rows)
    };
    for damage in entries.iter().filter_map(|entry| entry.damage.as_deref()) {
        text.push('\n');
        text.push_str(&print::shown(damage));
    }
    text
}
