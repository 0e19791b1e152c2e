//! `-o html`: what a file is and where its data lies, as one page that needs nothing else.
//!
//! Owns the page. No script, no link, no font from elsewhere; every string from a file is escaped. The picture is an
//! inline SVG with a title for each cell.

use std::fmt::Write;

use crate::{
    info::Info,
    map::word,
    picture::{COLUMNS, Look, Picture},
    print::shown,
    size,
    stack::{Run, Stack},
};

/// Runs that a page lists; it says how many more there are.
pub const ROWS_MAX: usize = 2000;
/// Side of a cell.
const CELL: usize = 12;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#1c2430;background:#fff}h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}\
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.15rem .9rem .15rem 0;text-align:left;\
vertical-align:top;overflow-wrap:anywhere}td.n{font-family:ui-monospace,monospace}tr.bad{color:#b00020}\
pre{font-size:.85rem;overflow-x:auto}svg{width:100%;height:auto}.key span{margin-right:1.2rem}\
@media(prefers-color-scheme:dark){body{color:#dde3ea;background:#14181d}tr.bad{color:#ff7a8a}}";

/// What the map's part of a page shows.
pub struct Mapped<'a> {
    pub stack: &'a Stack,
    pub runs: &'a [Run],
    pub start: u64,
    pub len: u64,
}

/// The whole page.
pub fn page(title: &str, infos: &[Info], mapped: Option<&Mapped<'_>>) -> String {
    let title = escaped(title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    for info in infos {
        page.push_str("<table>");
        for (name, value) in info.rows() {
            let class = if name == "DAMAGE" { " class=\"bad\"" } else { "" };
            // Writing to a string does not fail.
            let _ = write!(page, "<tr{class}><th>{}</th><td>{}</td></tr>", escaped(&name), escaped(&value));
        }
        page.push_str("</table>\n");
        for (title, table) in info.tables() {
            let _ = write!(page, "<h2>{title}</h2>\n<pre>{}</pre>\n", escaped_lines(&table));
        }
    }
    if let Some(mapped) = mapped {
        page.push_str("<h2>Where data lies</h2>\n");
        picture(&mut page, mapped);
        listing(&mut page, mapped);
    }
    page.push_str("</body></html>");
    page
}

fn colour(look: Look) -> (&'static str, u64) {
    match look {
        Look::Damaged => ("#d3202f", 8),
        Look::Unopened => ("#b58900", 8),
        Look::Data { eighths, is_compressed: false } => ("#1f6feb", eighths),
        Look::Data { eighths, is_compressed: true } => ("#8250df", eighths),
        Look::Zero => ("#8b949e", 3),
        Look::Absent => ("#8b949e", 1),
    }
}

fn picture(page: &mut String, mapped: &Mapped<'_>) {
    let picture = Picture::new(mapped.runs, mapped.start, mapped.len);
    let (width, height) = (COLUMNS * CELL, picture.cells.len().div_ceil(COLUMNS) * CELL);
    let _ =
        write!(page, "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"map of the data\">");
    let mut at = mapped.start;
    for (index, cell) in picture.cells.iter().enumerate() {
        let (x, y) = (index % COLUMNS * CELL, index / COLUMNS * CELL);
        let (fill, eighths) = colour(cell.look());
        let side = CELL - 1;
        // An eighth is an eighth of opacity, on top of what can still be seen.
        let opacity = 100 * eighths / 8;
        let _ = write!(
            page,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\" fill-opacity=\"{opacity}%\">\
             <title>{at:#x}: {} data, {} compressed, {} zeros</title></rect>",
            size::show(cell.data),
            size::show(cell.compressed),
            size::show(cell.zero)
        );
        at += cell.len;
    }
    page.push_str("</svg>\n<p class=\"key\">");
    let key = [
        (Look::Data { eighths: 8, is_compressed: false }, "data"),
        (Look::Data { eighths: 8, is_compressed: true }, "compressed"),
        (Look::Zero, "zeros or nothing"),
        (Look::Unopened, "not opened"),
        (Look::Damaged, "damaged"),
    ];
    for (look, name) in key {
        let _ = write!(page, "<span><b style=\"color:{}\">&#9632;</b> {name}</span>", colour(look).0);
    }
    let _ = writeln!(page, "one cell is {}</p>", size::show(picture.cell_len));
}

fn listing(page: &mut String, mapped: &Mapped<'_>) {
    let names = mapped.stack.names();
    page.push_str("<table><tr><th>offset</th><th>length</th><th>kind</th><th>file</th></tr>");
    for run in mapped.runs.iter().take(ROWS_MAX) {
        let name = names.get(run.depth).map_or("-", |name| name);
        let class = if word(run.kind) == "damaged" { " class=\"bad\"" } else { "" };
        let _ = write!(
            page,
            "<tr{class}><td class=\"n\">{:#x}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            run.range.start.0,
            size::show(run.range.len.0),
            word(run.kind),
            escaped(name)
        );
    }
    page.push_str("</table>\n");
    let more = mapped.runs.len().saturating_sub(ROWS_MAX);
    if more > 0 {
        let _ = writeln!(page, "<p>and {more} more: see `-o json`</p>");
    }
}

/// Text that stays text wherever it is put.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in shown(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The same for a table, whose lines are its own.
fn escaped_lines(text: &str) -> String {
    text.lines().map(escaped).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_images_stay_text() {
        let evil = "<script>alert('&\"')</script>\u{202e}";
        let info =
            Info { filename: evil.to_owned(), backing_filename: Some(evil.to_owned()), ..Info::default() };
        let page = page(evil, &[info], None);
        assert!(!page.contains("<script") && !page.contains('\u{202e}'), "{page}");
        assert!(page.contains("&lt;script&gt;alert(&#39;&amp;&quot;&#39;)"));
    }
}
