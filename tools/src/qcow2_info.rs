//! What a qcow2 header says, for `info`.
//!
//! Owns the keys below `format-specific` and the list of snapshots. A header that cannot be used is shown field by
//! field as far as it goes, with what is wrong with it.

use std::{ffi::OsStr, fs::File, os::unix::ffi::OsStrExt, path::Path};

use bedplate_engine::{
    error::Result,
    image::qcow2::{
        Bitmap, Qcow2Layer, Snapshot, Source, UnverifiedHeader, View,
        header::{BitmapsState, Compression, DataLayout, Header, L2Format, Version},
    },
};
use serde::Serialize;

use crate::{
    info::{FormatSpecific, Info},
    print, size,
    tables::raw_header,
};

/// The keys below `format-specific`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    compat: &'static str,
    compression_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy_refcounts: Option<bool>,
    refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extended_l2: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
}

#[derive(Debug, Serialize)]
struct BitmapInfo {
    name: String,
    granularity: u64,
    flags: Vec<&'static str>,
}

/// An internal snapshot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    id: String,
    name: String,
    vm_state_size: u64,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    /// Virtual size at that time; not `qemu-img`'s key.
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_size: Option<u64>,
}

/// Fill in what the qcow2 file says.
pub fn add(info: &mut Info, file: File, path: &Path) -> Result<()> {
    let again = file.try_clone();
    let source = Source::new(file, path)?;
    let raw = match raw_header(&source) {
        Ok(raw) => raw,
        Err(error) => {
            info.lacks(&error);
            return Ok(());
        }
    };
    add_fields(info, &raw);
    match raw.verify(source.len()) {
        Ok(header) => add_header(info, &header, path),
        Err(fault) => {
            info.lacks(&fault.of(path));
            return Ok(());
        }
    }
    let opened = again
        .map_err(|e| bedplate_engine::error::Error::io("open", path, e))
        .and_then(|file| Qcow2Layer::open(file, path, &View::Active));
    match opened {
        Ok(layer) => add_tables(info, &layer),
        Err(error) => info.lacks(&error),
    }
    Ok(())
}

/// What can be said of any header.
fn add_fields(info: &mut Info, raw: &UnverifiedHeader) {
    info.virtual_size = Some(raw.size);
    info.cluster_size = 1_u64.checked_shl(raw.cluster_bits);
    info.encrypted = (raw.crypt_method != 0).then_some(true);
}

fn add_header(info: &mut Info, header: &Header, path: &Path) {
    info.dirty_flag = header.is_dirty();
    if let Some(backing) = &header.backing {
        let name = Path::new(OsStr::from_bytes(&backing.name));
        info.backing_filename = Some(name.display().to_string());
        let full = path.parent().unwrap_or(Path::new("")).join(name);
        info.full_backing_filename = Some(full.display().to_string());
        info.backing_filename_format.clone_from(&backing.format);
    }
    let is_v3 = header.version == Version::V3;
    let data_file = header.data_file.as_ref();
    let qcow2 = Qcow2Info {
        compat: if is_v3 { "1.1" } else { "0.10" },
        compression_type: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        lazy_refcounts: is_v3.then(|| header.has_lazy_refcounts()),
        refcount_bits: header.refcount_bits(),
        corrupt: is_v3.then(|| header.is_marked_corrupt()),
        extended_l2: is_v3.then(|| header.geometry.l2_format() == L2Format::Extended),
        bitmaps: Vec::new(),
        data_file: data_file
            .and_then(|file| file.name.as_deref())
            .map(|name| String::from_utf8_lossy(name).into_owned()),
        data_file_raw: data_file.map(|file| file.layout == DataLayout::Raw),
    };
    info.format_specific = Some(FormatSpecific::Qcow2(qcow2));
}

/// What the tables besides the header say; each that is damaged is named.
fn add_tables(info: &mut Info, layer: &Qcow2Layer) {
    match layer.snapshots() {
        Ok(snapshots) => info.snapshots = snapshots.iter().map(snapshot).collect(),
        Err(error) => info.lacks(&error),
    }
    if layer.header().bitmaps.is_none_or(|bitmaps| bitmaps.state == BitmapsState::Stale) {
        return;
    }
    match (layer.bitmaps(), &mut info.format_specific) {
        (Ok(bitmaps), Some(FormatSpecific::Qcow2(qcow2))) => {
            qcow2.bitmaps = bitmaps.iter().map(bitmap).collect()
        }
        (Ok(_), Some(FormatSpecific::LonghornReplica(_)) | None) => {}
        (Err(error), _) => info.lacks(&error),
    }
}

fn snapshot(snapshot: &Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
        vm_state_size: snapshot.vm_state_len,
        date_sec: snapshot.date_sec,
        date_nsec: snapshot.date_nsec,
        vm_clock_sec: snapshot.vm_clock_nsec / 1_000_000_000,
        vm_clock_nsec: snapshot.vm_clock_nsec % 1_000_000_000,
        icount: snapshot.icount,
        disk_size: snapshot.disk_size,
    }
}

fn bitmap(bitmap: &Bitmap) -> BitmapInfo {
    let flags = [(bitmap.is_in_use(), "in-use"), (bitmap.is_recording(), "auto")];
    BitmapInfo {
        name: bitmap.name.clone(),
        granularity: bitmap.granularity,
        flags: flags.into_iter().filter_map(|(is_set, name)| is_set.then_some(name)).collect(),
    }
}

impl Qcow2Info {
    /// For people.
    pub fn rows(&self) -> Vec<(String, String)> {
        let yes_no = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
        let mut rows = vec![
            ("compatibility".to_owned(), self.compat.to_owned()),
            ("compression".to_owned(), self.compression_type.to_owned()),
            ("refcount bits".to_owned(), self.refcount_bits.to_string()),
        ];
        let flags = [
            ("lazy refcounts", self.lazy_refcounts),
            ("extended L2", self.extended_l2),
            ("marked corrupt", self.corrupt),
        ];
        rows.extend(flags.into_iter().filter_map(|(name, flag)| Some((name.to_owned(), yes_no(flag?)))));
        if let Some(raw) = self.data_file_raw {
            let name = self.data_file.as_deref().unwrap_or("unnamed");
            rows.push(("data file".to_owned(), format!("{name}{}", if raw { " (raw)" } else { "" })));
        }
        for bitmap in &self.bitmaps {
            let flags = if bitmap.flags.is_empty() { "no flags".to_owned() } else { bitmap.flags.join(", ") };
            let granularity = size::show(bitmap.granularity);
            rows.push(("bitmap".to_owned(), format!("{} (one bit for {granularity}; {flags})", bitmap.name)));
        }
        rows
    }
}

/// For people.
pub fn snapshot_table(snapshots: &[SnapshotInfo]) -> String {
    let rows = snapshots.iter().map(|snapshot| {
        [
            snapshot.id.clone(),
            snapshot.name.clone(),
            size::show(snapshot.vm_state_size),
            format!("{}.{:09}", snapshot.date_sec, snapshot.date_nsec),
            format!("{}.{:03} s", snapshot.vm_clock_sec, snapshot.vm_clock_nsec / 1_000_000),
        ]
    });
    print::listing(["ID", "NAME", "VM STATE", "SECONDS SINCE 1970", "VM CLOCK"], rows)
}
