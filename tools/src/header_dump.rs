//! The header of a qcow2 file, field by field.
//!
//! Owns the table of fields and the walk over the extensions. Nothing is verified: a header that no reader takes can
//! be looked at here.

use bedplate_engine::{
    error::Result,
    image::qcow2::{Source, UnverifiedHeader, header::PEEK_LEN},
};

use crate::{
    dump::Row,
    print,
    tables::{be32, be64},
};

/// Extensions that are shown.
const EXTENSIONS_MAX: usize = 256;
/// Bytes of an extension that are shown.
const EXTENSION_SHOWN_MAX: usize = 32;

/// Offset and bytes of each field.
const FIELDS: [(usize, usize, &str); 19] = [
    (0, 4, "magic"),
    (4, 4, "version"),
    (8, 8, "backing_file_offset"),
    (16, 4, "backing_file_size"),
    (20, 4, "cluster_bits"),
    (24, 8, "size"),
    (32, 4, "crypt_method"),
    (36, 4, "l1_size"),
    (40, 8, "l1_table_offset"),
    (48, 8, "refcount_table_offset"),
    (56, 4, "refcount_table_clusters"),
    (60, 4, "nb_snapshots"),
    (64, 8, "snapshots_offset"),
    (72, 8, "incompatible_features"),
    (80, 8, "compatible_features"),
    (88, 8, "autoclear_features"),
    (96, 4, "refcount_order"),
    (100, 4, "header_length"),
    (104, 1, "compression_type"),
];
/// Fields that version 2 has.
const V2_FIELDS: usize = 13;
const V2_LEN: usize = 72;

const INCOMPATIBLE: [&str; 5] = ["dirty", "corrupt", "external data file", "compression type", "extended L2"];
const COMPATIBLE: [&str; 1] = ["lazy refcounts"];
const AUTOCLEAR: [&str; 2] = ["bitmaps", "raw external data"];

/// All rows of the header of `file`.
pub fn rows(file: &Source) -> Result<Vec<Row>> {
    let start = file.bytes_up_to(0, PEEK_LEN, "qcow2 header")?;
    let area = file.bytes_up_to(0, UnverifiedHeader::area_len(&start), "qcow2 header")?;
    // Refuses what is not qcow2 at all.
    let header = UnverifiedHeader::parse(&area).map_err(|fault| fault.of(file.path()))?;
    let is_v2 = header.version == 2;
    let header_len = usize::try_from(header.header_len).unwrap_or(usize::MAX);
    let known = if is_v2 { V2_FIELDS } else { FIELDS.len() };
    let mut rows = Vec::new();
    for (at, len, name) in FIELDS.into_iter().take(known) {
        // The last field came later.
        if at >= header_len.max(V2_LEN) {
            break;
        }
        let Some(bytes) = area.get(at..at + len) else { break };
        let value = bytes.iter().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        rows.push(row(at, bytes, name, meaning(name, value)));
    }
    extensions(&area, header_len, &mut rows);
    let name = usize::try_from(header.backing_offset).ok().zip(usize::try_from(header.backing_len).ok());
    if let Some((at, len)) = name.filter(|(at, len)| *at > 0 && *len > 0)
        && let Some(bytes) = area.get(at..).and_then(|rest| rest.get(..len))
    {
        rows.push(row(at, bytes, "backing file", String::from_utf8_lossy(bytes).into_owned()));
    }
    Ok(rows)
}

fn row(at: usize, bytes: &[u8], field: &str, value: String) -> Row {
    let shown = bytes.get(..EXTENSION_SHOWN_MAX);
    let bytes = shown.map_or_else(|| print::hex(bytes), |start| format!("{}...", print::hex(start)));
    Row { offset: at as u64, bytes, field: field.to_owned(), value }
}

fn meaning(name: &str, value: u64) -> String {
    let named = |names: &[&str]| flags(value, names);
    match name {
        "magic" => "QFI\\xfb".to_owned(),
        "backing_file_offset" | "l1_table_offset" | "refcount_table_offset" | "snapshots_offset" => {
            format!("{value:#x}")
        }
        "cluster_bits" if value < 64 => format!("{value} (clusters of {} bytes)", 1_u64 << value),
        "refcount_order" if value < 64 => format!("{value} (refcounts of {} bits)", 1_u64 << value),
        "crypt_method" => match value {
            0 => "0 (none)".to_owned(),
            1 => "1 (AES)".to_owned(),
            2 => "2 (LUKS)".to_owned(),
            other => format!("{other} (UNKNOWN)"),
        },
        "compression_type" => match value {
            0 => "0 (zlib)".to_owned(),
            1 => "1 (zstd)".to_owned(),
            other => format!("{other} (UNKNOWN)"),
        },
        "incompatible_features" => named(&INCOMPATIBLE),
        "compatible_features" => named(&COMPATIBLE),
        "autoclear_features" => named(&AUTOCLEAR),
        _ => value.to_string(),
    }
}

/// The bits that are set, by name.
fn flags(value: u64, names: &[&str]) -> String {
    let set = (0..64_usize).filter(|bit| value >> bit & 1 == 1);
    let set: Vec<_> = set
        .map(|bit| names.get(bit).map_or_else(|| format!("bit {bit}"), |name| (*name).to_owned()))
        .collect();
    if set.is_empty() { "none".to_owned() } else { set.join(", ") }
}

fn extensions(area: &[u8], header_len: usize, rows: &mut Vec<Row>) {
    let mut at = header_len;
    for _ in 0..EXTENSIONS_MAX {
        let Some((kind, len)) = area.get(at..).and_then(|rest| Some((be32(rest, 0)?, be32(rest, 4)?))) else {
            return;
        };
        let name = match kind {
            0 => return,
            0xe279_2aca => "extension: backing format",
            0x6803_f857 => "extension: feature names",
            0x2385_2875 => "extension: bitmaps",
            0x0537_be77 => "extension: encryption header",
            0x4441_5441 => "extension: data file",
            _ => "extension: unknown",
        };
        let data = usize::try_from(len).ok().and_then(|len| area.get(at + 8..)?.get(..len));
        let Some(data) = data else {
            rows.push(row(at, &[], name, format!("{len} bytes, CUT OFF")));
            return;
        };
        let value = match kind {
            0xe279_2aca | 0x4441_5441 => String::from_utf8_lossy(data).into_owned(),
            0x6803_f857 => format!("{} names", data.len() / 48),
            0x2385_2875 => format!(
                "{} bitmaps, directory of {} bytes at {:#x}",
                be32(data, 0).unwrap_or(0),
                be64(data, 8).unwrap_or(0),
                be64(data, 16).unwrap_or(0)
            ),
            _ => format!("type {kind:#010x}, {len} bytes"),
        };
        rows.push(row(at, data, name, value));
        at = at.saturating_add(8).saturating_add(data.len().next_multiple_of(8));
    }
}
