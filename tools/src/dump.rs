//! `inspect dump`: a qcow2 file's structures, decoded beside their bytes.
//!
//! Owns the command and the rows: where something is in the file, its bytes, what it is called and what it says. Every
//! entry is shown as it stands, with what is wrong with it; runs of empty entries are one row.

use std::path::PathBuf;

use bedplate_engine::image::qcow2::{Refcounts, Source};
use clap::Args;
use serde::Serialize;

use crate::{
    failure::{Failure, Result},
    header_dump,
    layer::open_file,
    print::{self, Output},
    size,
    tables::{COPIED, Decoded, L1_RESERVED, L2Entry, OFFSET, QcowFile},
};

/// Rows of one dump.
pub const ROWS_MAX: usize = 4 << 20;
/// Bytes of data that `--at` shows.
const SAMPLE_LEN: u64 = 64;

const EXAMPLES: &str = "Examples:
  bedplate inspect dump disk.qcow2 --header
  bedplate inspect dump disk.qcow2 --l1
  bedplate inspect dump disk.qcow2 --l2 0
  bedplate inspect dump disk.qcow2 --refcounts -o json
  bedplate inspect dump disk.qcow2 --at 1G

--at takes an offset as the guest sees it, and shows every entry on the way to its bytes.";

/// Show the header, tables or refcounts of a qcow2 file, decoded beside their bytes
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct DumpArgs {
    /// A qcow2 file
    file: PathBuf,
    #[command(flatten)]
    what: What,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct What {
    /// The header and its extensions
    #[arg(long)]
    header: bool,
    /// The L1 table
    #[arg(long)]
    l1: bool,
    /// The L2 table that this L1 entry points at
    #[arg(long, value_name = "INDEX")]
    l2: Option<u64>,
    /// The refcount table and all refcounts
    #[arg(long)]
    refcounts: bool,
    /// The way to this offset of the guest, and the bytes there
    #[arg(long, value_name = "OFFSET", value_parser = size::parse_bytes)]
    at: Option<u64>,
}

/// One thing in the file.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Of the file.
    pub offset: u64,
    /// In hexadecimal.
    pub bytes: String,
    pub field: String,
    pub value: String,
}

pub fn run(args: &DumpArgs) -> Result<u8> {
    let file = open_file(&args.file)?;
    let what = &args.what;
    let mut rows = Vec::new();
    if what.header {
        rows = header_dump::rows(&Source::new(file, &args.file)?)?;
    } else {
        let dump = Dump { file: QcowFile::open(file, &args.file)?, rows: &mut rows };
        match (what.l2, what.at) {
            (Some(index), _) => dump.l2(index)?,
            (None, Some(at)) => dump.at(at)?,
            (None, None) if what.l1 => dump.l1()?,
            (None, None) => dump.refcounts()?,
        }
    }
    print::report(args.output, &rows, |rows| {
        let rows = rows.iter().map(|row| {
            [format!("{:#x}", row.offset), row.bytes.clone(), row.field.clone(), row.value.clone()]
        });
        print::listing(["OFFSET", "BYTES", "FIELD", "VALUE"], rows)
    })?;
    Ok(0)
}

struct Dump<'a> {
    file: QcowFile,
    rows: &'a mut Vec<Row>,
}

impl Dump<'_> {
    fn row(&mut self, offset: u64, bytes: &[u8], field: String, value: String) -> Result<()> {
        if self.rows.len() == ROWS_MAX {
            return Err(Failure::Usage(format!("there are more than {ROWS_MAX} rows to show")));
        }
        self.rows.push(Row { offset, bytes: print::hex(bytes), field, value });
        Ok(())
    }

    /// `count` empty entries from `first` on, at `offset`.
    fn empty(&mut self, offset: u64, table: &str, first: u64, count: u64) -> Result<()> {
        match count {
            0 => Ok(()),
            1 => self.row(offset, &[], format!("{table}[{first}]"), "empty".to_owned()),
            _ => {
                let last = first + count - 1;
                self.row(offset, &[], format!("{table}[{first}..={last}]"), "empty".to_owned())
            }
        }
    }

    fn l1(mut self) -> Result<()> {
        let table = self.file.header().l1;
        let mut empty = 0;
        let words = self.file.l1(table)?;
        let count = words.len() as u64;
        for (index, word) in (0..).zip(words) {
            if word == 0 {
                empty += 1;
                continue;
            }
            let offset = table.offset.0 + index * 8;
            self.empty(offset - empty * 8, "l1", index - empty, empty)?;
            empty = 0;
            let value = self.l1_value(word);
            self.row(offset, &word.to_be_bytes(), format!("l1[{index}]"), value)?;
        }
        self.empty(table.offset.0 + (count - empty) * 8, "l1", count - empty, empty)
    }

    fn l1_value(&self, word: u64) -> String {
        let at = word & OFFSET;
        let mut value = format!("L2 table at {at:#x}");
        self.remark(&mut value, word & COPIED != 0, at, word & L1_RESERVED);
        value
    }

    /// What is to be said of an entry that points at a cluster.
    fn remark(&self, value: &mut String, is_copied: bool, at: u64, reserved: u64) {
        let unaligned = self.file.geometry().in_cluster(at) != 0;
        let past_end = at >= self.file.source.len();
        for (is_so, text) in [
            (is_copied, ", copied"),
            (unaligned, ", NOT ALIGNED"),
            (past_end, ", PAST THE END"),
            (reserved != 0, ", RESERVED BITS SET"),
        ] {
            if is_so {
                value.push_str(text);
            }
        }
    }

    fn l2(mut self, l1_index: u64) -> Result<()> {
        let table = self.file.header().l1;
        if l1_index >= table.entries.into() {
            return Err(Failure::Usage(format!(
                "the L1 table has {} entries, counted from 0",
                table.entries
            )));
        }
        let words = self.file.words(table.offset.0 + l1_index * 8, 1, "L1 table")?;
        let at = words.first().copied().unwrap_or(0) & OFFSET;
        if at == 0 {
            return Err(Failure::Usage(format!("L1 entry {l1_index} points at no L2 table")));
        }
        let len = self.file.geometry().l2_entry_len();
        let entries = self.file.l2(at)?;
        let count = entries.len() as u64;
        let mut empty = 0;
        for (index, entry) in (0..).zip(entries) {
            if entry.word == 0 && entry.bitmap.unwrap_or(0) == 0 {
                empty += 1;
                continue;
            }
            let offset = at + index * len;
            self.empty(offset - empty * len, "l2", index - empty, empty)?;
            empty = 0;
            self.l2_row(offset, index, entry)?;
        }
        self.empty(at + (count - empty) * len, "l2", count - empty, empty)
    }

    fn l2_row(&mut self, offset: u64, index: u64, entry: L2Entry) -> Result<()> {
        let mut bytes = entry.word.to_be_bytes().to_vec();
        bytes.extend(entry.bitmap.into_iter().flat_map(u64::to_be_bytes));
        let (mut value, host) = match self.file.decode(entry) {
            Decoded::Unallocated => ("unallocated".to_owned(), None),
            Decoded::Zero { host: None } => ("zero".to_owned(), None),
            Decoded::Zero { host: Some(host) } => (format!("zero, kept at {:#x}", host.0), Some(host)),
            Decoded::Data { host } => (format!("data at {:#x}", host.0), Some(host)),
            Decoded::Compressed { host, len } => {
                (format!("compressed, up to {len} bytes at {:#x}", host.0), None)
            }
        };
        // Whether a place in another file is there is not known here.
        let at = host.filter(|_| self.file.header().data_file.is_none()).map_or(0, |host| host.0);
        self.remark(&mut value, entry.is_copied(), at, self.file.reserved(entry));
        if let Some(bitmap) = entry.bitmap {
            let (allocated, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
            value.push_str(&format!(", subclusters {allocated:#010x} allocated, {zero:#010x} zero"));
        }
        self.row(offset, &bytes, format!("l2[{index}]"), value)
    }

    fn at(mut self, guest: u64) -> Result<()> {
        let geometry = self.file.geometry();
        let size = self.file.header().size.0;
        if guest >= size {
            return Err(Failure::Usage(format!("the image has {size} bytes")));
        }
        let l1_index = guest / geometry.l2_span();
        let l1_at = self.file.header().l1.offset.0 + l1_index * 8;
        let word = self.file.words(l1_at, 1, "L1 table")?.first().copied().unwrap_or(0);
        let value = if word == 0 { "empty".to_owned() } else { self.l1_value(word) };
        self.row(l1_at, &word.to_be_bytes(), format!("l1[{l1_index}]"), value)?;
        let table = word & OFFSET;
        if table == 0 {
            return Ok(());
        }
        let l2_index = guest % geometry.l2_span() / geometry.cluster_size();
        let entry =
            usize::try_from(l2_index).ok().and_then(|index| self.file.l2(table).ok()?.get(index).copied());
        let Some(entry) = entry else {
            let text = "the end of the file cuts it off".to_owned();
            return self.row(table, &[], format!("l2[{l2_index}]"), text);
        };
        self.l2_row(table + l2_index * geometry.l2_entry_len(), l2_index, entry)?;
        let host = match self.file.decode(entry) {
            Decoded::Data { host } => host.0 + geometry.in_cluster(guest),
            Decoded::Compressed { host, .. } => host.0,
            Decoded::Unallocated | Decoded::Zero { .. } => return Ok(()),
        };
        if self.file.header().data_file.is_some() {
            return Ok(());
        }
        let sample = self.file.source.bytes_up_to(host, SAMPLE_LEN, "data")?;
        for (at, line) in (host..).step_by(16).zip(sample.chunks(16)) {
            let text = line.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' });
            self.row(at, line, "bytes".to_owned(), text.collect())?;
        }
        Ok(())
    }

    fn refcounts(mut self) -> Result<()> {
        let refcounts: Refcounts = self.file.layer.refcounts()?;
        let table = self.file.header().refcounts.range.start.0;
        for index in 0..refcounts.block_count() {
            let offset = table + index * 8;
            let word = self.file.words(offset, 1, "refcount table")?.first().copied().unwrap_or(0);
            if word == 0 {
                continue;
            }
            let (value, counts) = match refcounts.block(index) {
                Ok(at) => (format!("block at {:#x}", at.unwrap_or(0)), refcounts.read_block(index)?),
                Err(fault) => (fault.of(self.file.source.path()).to_string(), Vec::new()),
            };
            self.row(offset, &word.to_be_bytes(), format!("refcount_table[{index}]"), value)?;
            let bits = u64::from(self.file.header().refcount_bits());
            let mut first = index * refcounts.clusters_per_block();
            let start = first;
            for run in counts.chunk_by(|a, b| a == b) {
                let count = run.len() as u64;
                let value = run.first().copied().unwrap_or(0);
                if value != 0 {
                    let at = (word & OFFSET) + (first - start) * bits / 8;
                    let field = match count {
                        1 => format!("refcount[{first}]"),
                        _ => format!("refcount[{first}..={}]", first + count - 1),
                    };
                    self.row(at, &[], field, value.to_string())?;
                }
                first += count;
            }
        }
        Ok(())
    }
}
