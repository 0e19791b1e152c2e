//! Whether what has arrived can be served, and how large the device over it is.
//!
//! All tables of a qcow2 file are read once, one L2 table after another: damage that a guest would meet later is found
//! now. A snapshot that the file does not have is no fault of the file: what has arrived is kept for another try, and
//! whoever mistyped it is told which there are.

use std::{fs::File, path::Path};

use bedplate_engine::{
    error::Error as Storage,
    image::{
        BaseImage, Format,
        device::sectors,
        qcow2::{Qcow2Image, Qcow2Layer, View},
    },
    units::{ByteLen, ByteRange},
};

use crate::prep::{
    arrival::Arrived,
    failure::{Failure, Result},
    stop::Stop,
};

/// Snapshots that a message names.
const SNAPSHOTS_NAMED_MAX: usize = 16;
/// Characters of a name that a message shows.
const NAME_SHOWN_MAX: usize = 64;

/// The size of the device over what has arrived, which errors call `path`; refuses what could not be served.
pub(super) fn served_size(arrived: &Arrived, view: &View, path: &Path, stop: &Stop) -> Result<u64> {
    let len = match (arrived.format, view) {
        (Format::Raw, View::Active) => ByteLen(arrived.size_bytes),
        (Format::Raw, View::Snapshot(name)) => {
            return Err(Failure::Source(format!(
                "internal snapshot {name:?}: only qcow2 files have them, and this is a raw one"
            )));
        }
        (Format::Qcow2, view) => {
            let Some(file) = arrived.file.system() else {
                return Err(Failure::Unsupported("a qcow2 file of a simulated machine".to_owned()));
            };
            let image = open(file, path, view)?;
            check_tables(image.layer(), || stop.check())?;
            image.len()
        }
    };
    match sectors(len) {
        ByteLen(0) => Err(Failure::Unsupported("the image is empty (its virtual size is 0)".to_owned())),
        ByteLen(size) => Ok(size),
    }
}

fn open(file: &File, path: &Path, view: &View) -> Result<Qcow2Image> {
    let again = || file.try_clone().map_err(|e| Storage::io("open", path, e));
    match Qcow2Image::open(again()?, path, view) {
        Err(missing @ Storage::NotFound { .. }) => {
            let layer = Qcow2Layer::open(again()?, path, &View::Active)?;
            Err(Failure::Source(format!("{missing}; {}", snapshots_of(&layer)?)))
        }
        opened => Ok(opened?),
    }
}

/// Check every entry of every table; `go_on` is asked before each table.
fn check_tables(layer: &Qcow2Layer, mut go_on: impl FnMut() -> Result<()>) -> Result<()> {
    let (size, span) = (layer.size().0, layer.header().geometry.l2_span());
    let mut at = 0;
    while at < size {
        go_on()?;
        let len = span.min(size - at);
        layer.verify_range(ByteRange::new(at, len))?;
        at += len;
    }
    Ok(())
}

/// Which internal snapshots there are, for people.
fn snapshots_of(layer: &Qcow2Layer) -> Result<String> {
    let snapshots = layer.snapshots()?;
    let shown = |text: &str| match text.char_indices().nth(NAME_SHOWN_MAX) {
        Some((end, _)) => format!("{:?}...", text.get(..end).unwrap_or(text)),
        None => format!("{text:?}"),
    };
    let named: Vec<String> = snapshots
        .iter()
        .take(SNAPSHOTS_NAMED_MAX)
        .map(|snapshot| format!("{} (id {})", shown(&snapshot.name), shown(&snapshot.id)))
        .collect();
    let more = snapshots.len() - named.len();
    Ok(match (named.as_slice(), more) {
        ([], _) => "the file has none".to_owned(),
        (named, 0) => format!("there are {}", named.join(", ")),
        (named, more) => format!("there are {} and {more} more", named.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, time::Duration};

    use super::*;
    use crate::directory::HeldFile;

    const CLUSTER: u64 = 512;
    /// What one table of 512 bytes maps.
    const SPAN: u64 = 64 * CLUSTER;

    /// A file of the smallest clusters: an L1 table whose entries point at as many empty tables, in holes.
    fn small_clusters(tables: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        let (counts_table, counts, l1) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER);
        let mut header = b"QFI\xfb".to_vec();
        header.extend(2_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(9_u32.to_be_bytes());
        header.extend((tables * SPAN).to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend(u32::try_from(tables).unwrap().to_be_bytes());
        header.extend(l1.to_be_bytes());
        header.extend(counts_table.to_be_bytes());
        header.extend(1_u32.to_be_bytes());
        header.extend([0; 12]);
        file.write_all_at(&header, 0).unwrap();
        file.write_all_at(&counts.to_be_bytes(), counts_table).unwrap();
        let first = l1 + (tables * 8).next_multiple_of(CLUSTER);
        for table in 0..tables {
            let entry = (first + table * CLUSTER) | 1 << 63;
            file.write_all_at(&entry.to_be_bytes(), l1 + table * 8).unwrap();
        }
        file.set_len(first + tables * CLUSTER).unwrap();
        file
    }

    #[test]
    fn whether_to_go_on_is_asked_before_each_table_however_small_the_clusters_are() {
        let image = open(&small_clusters(100), Path::new("x"), &View::Active).unwrap();
        let mut asked = 0;
        check_tables(image.layer(), || {
            asked += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(asked, 100);
        let mut left = 7;
        let ended = check_tables(image.layer(), || {
            left -= 1;
            if left == 0 { Err(Failure::Cancelled) } else { Ok(()) }
        });
        assert!(matches!(ended, Err(Failure::Cancelled)));
    }

    #[test]
    fn a_job_that_was_told_to_end_checks_no_table() {
        let file = small_clusters(2);
        let size_bytes = file.metadata().unwrap().len();
        let sums = crate::prep::checksum::Hasher::new(None).finish();
        let file = HeldFile::new(file, "x".into());
        let arrived = Arrived { file, size_bytes, sums, format: Format::Qcow2 };
        let stop = Stop::after(Duration::from_secs(60));
        let size = served_size(&arrived, &View::Active, Path::new("x"), &stop).unwrap();
        assert_eq!(size, 2 * SPAN);
        stop.cancel();
        let ended = served_size(&arrived, &View::Active, Path::new("x"), &stop);
        assert!(matches!(ended, Err(Failure::Cancelled)));
    }
}
