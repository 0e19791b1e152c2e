//! `-o html`: what a file is and where its data lies, as one page that needs nothing else.
//!
//! Owns the page. No script, no link, no font from elsewhere; every string from a file is escaped. The picture is an
//! inline SVG with a title for each cell.

use std::fmt::Write;

use bedplate_engine::units::ByteRange;

use crate::{
    failure::Result,
    info::Info,
    map::{self, word},
    page::{escaped, escaped_lines, head},
    picture::{COLUMNS, Look, Picture},
    size,
    stack::{Run, Stack},
};

/// Runs that a page lists; it says how many more there are.
pub const ROWS_MAX: usize = 2000;
/// Side of a cell.
const CELL: usize = 12;

/// What the map's part of a page shows.
pub struct Mapped<'a> {
    stack: &'a Stack,
    picture: Picture,
    /// The first [`ROWS_MAX`].
    runs: Vec<Run>,
    count: usize,
    is_damaged: bool,
}

impl<'a> Mapped<'a> {
    pub fn of(stack: &'a Stack, range: ByteRange) -> Result<Mapped<'a>> {
        let (mut picture, mut runs, mut count) = (Picture::new(range), Vec::new(), 0);
        let is_damaged = map::each(stack, range, |run| {
            picture.add(run);
            count += 1;
            if runs.len() < ROWS_MAX {
                runs.push(run);
            }
            Ok(())
        })?;
        Ok(Mapped { stack, picture, runs, count, is_damaged })
    }

    pub fn is_damaged(&self) -> bool {
        self.is_damaged
    }
}

/// The whole page.
pub fn page(title: &str, infos: &[Info], mapped: Option<&Mapped<'_>>) -> String {
    let mut page = head(title, "");
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
        picture(&mut page, &mapped.picture);
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

fn picture(page: &mut String, picture: &Picture) {
    let (width, height) = (COLUMNS * CELL, picture.cells.len().div_ceil(COLUMNS) * CELL);
    let _ =
        write!(page, "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"map of the data\">");
    let mut at = picture.start;
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
    for run in &mapped.runs {
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
    let more = mapped.count - mapped.runs.len();
    if more > 0 {
        let _ = writeln!(page, "<p>and {more} more: see `-o json`</p>");
    }
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
