//! What commands print: JSON as it came, or tables for people.
//!
//! Owns the look of tables and the writing to stdout, where a reader that goes away is not an error of ours. JSON is
//! the contract's own types, so it is as stable as they are; tables may change at any time.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use jiff::Timestamp;
use serde::Serialize;

use super::{exit::Failure, size};

/// Characters of a remark at the end of a line; `get` has all of it.
const REMARK_LEN_MAX: usize = 60;

/// What `-o` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Table,
    /// Exact and stable
    Json,
}

/// The flag of every command that prints a listing or an object.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct OutputArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

impl OutputArgs {
    /// Print `value`: as JSON, or as the text that `people` makes of it.
    pub fn print<T: Serialize + ?Sized>(
        self,
        value: &T,
        people: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        match self.output {
            Output::Table => print(&people(value)),
            Output::Json => {
                let text = serde_json::to_string_pretty(value)
                    .map_err(|error| Failure::Io { what: "print".to_owned(), source: error.into() })?;
                print(&text)
            }
        }
    }
}

/// Write text and a line's end to stdout.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|source| Failure::Io { what: "write the output".to_owned(), source })
}

/// A listing: a head and one line for each object. There may be ten thousand of them, for which a table that could wrap
/// and style its cells takes longer than everything else.
pub fn listing<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let end = text.len();
        for (width, cell) in widths.iter().zip(row) {
            // A cell is one line, whatever a message has in it.
            text.extend(cell.chars().map(|c| if c.is_control() { ' ' } else { c }));
            text.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.truncate(end + text[end..].trim_end().len());
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text
}

/// One object: a line for each of its properties.
pub fn properties(rows: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| [name.to_owned(), value]));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2)).set_cell_alignment(CellAlignment::Left);
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A size for people, `-` when it is not known.
pub fn bytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(none, size::show)
}

/// A size for people and the exact one.
pub fn exact_bytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(none, |bytes| format!("{} ({bytes} bytes)", size::show(bytes)))
}

/// A moment, to the second.
pub fn time(at: Option<Timestamp>) -> String {
    at.and_then(|at| at.round(jiff::Unit::Second).ok()).map_or_else(none, |at| at.to_string())
}

/// A text, `-` when there is none.
pub fn text(text: Option<impl ToString>) -> String {
    text.map_or_else(none, |text| text.to_string())
}

/// A text cut to what a line of a listing has room for.
pub fn shortened(text: &str) -> String {
    match text.char_indices().nth(REMARK_LEN_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or(text)),
        None => text.to_owned(),
    }
}

/// A state as it is written in JSON.
pub fn word(state: impl Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(_) | Err(_) => none(),
    }
}

fn none() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_has_aligned_columns_and_no_trailing_blanks() {
        let rows = [["a".to_owned(), bytes(Some(10 << 30))], ["longer".to_owned(), bytes(None)]];
        assert_eq!(listing(["NAME", "SIZE"], rows), "NAME    SIZE\na       10.00 GiB\nlonger  -");
    }

    #[test]
    fn states_are_printed_as_in_json() {
        assert_eq!(word(crate::api::types::ImageState::InProgress), "in_progress");
    }
}
