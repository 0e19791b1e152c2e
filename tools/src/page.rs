//! Pages that need nothing else: no script, no link, no font from elsewhere.
//!
//! Owns how they begin and look, in light and dark and printed, and the escaping of what comes from files and users.

use crate::print::shown;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#1c2430;background:#fff}h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}\
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.15rem .9rem .15rem 0;text-align:left;\
vertical-align:top;overflow-wrap:anywhere}td.n{font-family:ui-monospace,monospace}tr.bad{color:#b00020}\
pre{font-size:.85rem;overflow-x:auto}svg{width:100%;height:auto}.key span{margin-right:1.2rem}\
@media screen and (prefers-color-scheme:dark){body{color:#dde3ea;background:#14181d}tr.bad{color:#ff7a8a}}";

/// The page up to its title as a heading; `style` is added to its own.
pub fn head(title: &str, style: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}{style}</style></head><body>\n\
         <h1>{title}</h1>\n"
    )
}

/// Text that stays text wherever it is put.
pub fn escaped(text: &str) -> String {
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
pub fn escaped_lines(text: &str) -> String {
    text.lines().map(escaped).collect::<Vec<_>>().join("\n")
}
