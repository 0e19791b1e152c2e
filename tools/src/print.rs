//! What inspections print: JSON, or text for people.
//!
//! Owns the look of tables, the escaping of strings that come from images, and the writing to stdout. JSON keys are
//! those of `qemu-img --output=json` where the notion is the same.

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::{
    failure::{Failure, Result},
    size,
};

/// What `-o` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Table,
    /// With qemu-img's keys where it has them
    Json,
}

/// What `-o` takes where there is something to draw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PageOutput {
    /// For people
    #[default]
    Table,
    /// With qemu-img's keys where it has them
    Json,
    /// One page with what the file is and a picture of its data
    Html,
}

/// Write `value` as JSON, or as the text that `people` makes of it.
pub fn report<T: Serialize + ?Sized>(
    output: Output,
    value: &T,
    people: impl FnOnce(&T) -> String,
) -> Result<()> {
    match output {
        Output::Table => line(&people(value)),
        Output::Json => {
            let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Output(e.into()))?;
            line(&text)
        }
    }
}

/// Write text and a line's end to stdout.
pub fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Failure::Output)
}

/// A string from outside as it may go to a terminal: nothing in it moves the cursor or turns the text around.
pub fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_unicode());
        }
    }
    shown
}

/// Whether a character only stands for itself: no control character, no mark of direction, no invisible one.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A listing: a head and one line for each object.
pub fn listing<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    table.add_rows(rows.into_iter().map(|row| row.map(|cell| shown(&cell))));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    trimmed(&table)
}

/// One object: a line for each of its properties.
pub fn properties(rows: impl IntoIterator<Item = (String, String)>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| [name, shown(&value)]));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2)).set_cell_alignment(CellAlignment::Left);
    }
    trimmed(&table)
}

fn trimmed(table: &Table) -> String {
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A size for people and the exact one.
pub fn exact(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", size::show(bytes))
}

/// What the reader of a stack should know, on stderr, where it is in nobody's way.
pub fn notes(notes: &[String]) {
    for note in notes {
        eprintln!("note: {}", shown(note));
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A bar on stderr that is only there on a terminal.
pub fn progress(what: &'static str, bytes: u64) -> indicatif::ProgressBar {
    let style =
        indicatif::ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = indicatif::ProgressBar::new(bytes).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_an_image_moves_the_cursor() {
        assert_eq!(shown("a\x1b[2Jb\n\u{9b}\u{202e}ä"), "a\\u{1b}[2Jb\\u{a}\\u{9b}\\u{202e}ä");
    }
}
