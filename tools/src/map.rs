//! `inspect map`: where the bytes are.
//!
//! Owns the listing of runs, with `qemu-img map`'s keys, and the table for people; both are printed as they are found.
//! What is damaged or may not be opened is listed like everything else, with the reason.

use std::{
    io::{self, BufWriter, Write},
    ops::ControlFlow,
    path::PathBuf,
};

use bedplate_engine::units::ByteRange;
use clap::Args;
use serde::Serialize;

use crate::{
    failure::{Failure, Result},
    html::{self, Mapped},
    info,
    picture::{By, Picture},
    print::{self, PageOutput},
    size,
    source::{self, OpenArgs},
    stack::{Kind, Run, Stack},
};

const EXAMPLES: &str = "Examples:
  bedplate inspect map disk.qcow2
  bedplate inspect map overlay.qcow2 --allow-references . --layers
  bedplate inspect map disk.qcow2 --chart
  bedplate inspect map disk.qcow2 -o html > disk.html
  bedplate inspect map disk.qcow2 -o json --start-offset 1G --max-length 64M

The keys of `-o json` are those of `qemu-img map --output=json`. Ranges that are damaged have the key `damage`, and the \
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
    let range = ByteRange::new(start, len);
    let is_damaged = match args.output {
        PageOutput::Html => {
            let info = info::of_path(&args.file, args.open.format)?;
            let mapped = Mapped::of(&stack, range)?;
            print::line(&html::page(&args.file.display().to_string(), &[info], Some(&mapped)))?;
            mapped.is_damaged()
        }
        PageOutput::Table if args.chart => {
            let by = if args.layers { By::Layer } else { By::Fullness };
            let mut picture = Picture::new(range);
            let is_damaged = each(&stack, range, |run| {
                picture.add(run);
                Ok(())
            })?;
            print::line(&picture.chart(by))?;
            is_damaged
        }
        PageOutput::Table => table(&stack, range, args.layers)?,
        PageOutput::Json => json(&stack, range, args.layers)?,
    };
    Ok(if is_damaged { 5 } else { 0 })
}

/// Call `found` for all runs of a range; whether any is damaged. A map may be longer than memory.
pub fn each(stack: &Stack, range: ByteRange, mut found: impl FnMut(Run) -> Result<()>) -> Result<bool> {
    let mut is_damaged = false;
    let mut result = Ok(());
    stack.each(range, |run| {
        is_damaged |= matches!(run.kind, Kind::Damaged);
        result = found(run);
        if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    result.map(|()| is_damaged)
}

/// One run a line, as `qemu-img` prints them.
fn json(stack: &Stack, range: ByteRange, with_names: bool) -> Result<bool> {
    let names = stack.names();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut before = "[";
    let is_damaged = each(stack, range, |run| {
        let entry = entry(stack, run, with_names.then_some(&names));
        let line = serde_json::to_string(&entry).map_err(|e| Failure::Output(e.into()))?;
        write!(out, "{before}{line}").map_err(Failure::Output)?;
        before = ",\n";
        Ok(())
    })?;
    let end = if before == "[" { "[]" } else { "]" };
    writeln!(out, "{end}").and_then(|()| out.flush()).map_err(Failure::Output)?;
    Ok(is_damaged)
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
fn table(stack: &Stack, range: ByteRange, all: bool) -> Result<bool> {
    let names: Vec<String> = stack.names().into_iter().map(print::shown).collect();
    let mut out = BufWriter::new(io::stdout().lock());
    let head = if all {
        format!("{:<18}{:<18}{:<12}{:<18}{:<7}FILE", "OFFSET", "LENGTH", "KIND", "MAPPED TO", "DEPTH")
    } else {
        format!("{:<18}{:<18}{:<18}FILE", "OFFSET", "LENGTH", "MAPPED TO")
    };
    writeln!(out, "{head}").map_err(Failure::Output)?;
    let is_damaged = each(stack, range, |run| {
        let Run { range, depth, kind } = run;
        let (start, len) = (range.start.0, range.len.0);
        let file = names.get(depth).map_or("-", String::as_str);
        let mapped = match kind {
            Kind::Data { offset } | Kind::Zero { offset: Some(offset) } => format!("{offset:#x}"),
            Kind::Damaged => return writeln!(out, "{}", damage_line(stack, run)).map_err(Failure::Output),
            Kind::Zero { offset: None } | Kind::Compressed | Kind::Absent | Kind::Unopened => {
                if all { "-" } else { word(kind) }.to_owned()
            }
        };
        if all {
            let kind = word(kind);
            writeln!(out, "{start:<#18x}{len:<#18x}{kind:<12}{mapped:<18}{depth:<7}{file}")
        } else if matches!(kind, Kind::Zero { .. } | Kind::Absent) {
            Ok(())
        } else {
            writeln!(out, "{start:<#18x}{len:<#18x}{mapped:<18}{file}")
        }
        .map_err(Failure::Output)
    })?;
    out.flush().map_err(Failure::Output)?;
    Ok(is_damaged)
}

fn damage_line(stack: &Stack, run: Run) -> String {
    let (start, len) = (run.range.start.0, run.range.len.0);
    format!("{start:<#18x}{len:<#18x}DAMAGED: {}", print::shown(&stack.explain(run).to_string()))
}
