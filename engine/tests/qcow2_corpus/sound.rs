//! What is asked of a reader about a sound image.
//!
//! Owns what `same` means in the manifest of a corpus, for any [`Subject`]: content, sizes, extents, snapshots, bitmaps
//! and marks.

use std::path::Path;

use bedplate_engine::{
    device::ExtentKind,
    image::{
        BaseImage,
        qcow2::{Qcow2Layer, View},
    },
    units::ByteRange,
};

use super::{
    manifest::{Content, DataExtent, Same},
    subject::{self, Subject},
    verdict::{Verdict, equal, sha512},
};

/// Reads what it should, in every view.
pub fn is_same<I: Subject>(corpus: &Path, file: &Path, same: &Same) -> Verdict {
    let image = I::open_in(corpus, file, &View::Active).map_err(|e| e.to_string())?;
    let layer = image.layer();
    layer.verify_tables().map_err(|e| format!("verifying: {e}"))?;
    equal("size", image.len().0, same.size)?;
    equal("dirty", layer.header().is_dirty(), same.dirty)?;
    equal("marked corrupt", layer.header().is_marked_corrupt(), same.corrupt)?;
    if let Some(expected) = same.data_bytes {
        let extents = subject::extents(&image)?;
        let data = extents.iter().filter(|(_, kind)| *kind == ExtentKind::Data);
        equal("bytes of data extents", data.map(|(range, _)| range.len.0).sum(), expected)?;
    }
    match &same.content {
        Content::Sha512(expected) => {
            let content = subject::content(&image)?;
            equal("content", &sha512(&content), expected)?;
        }
        Content::Extents(expected) => holds_extents(&image, expected)?,
    }
    holds_snapshots::<I>(corpus, file, layer, same)?;
    equal("bitmaps", subject::bitmaps(layer).map_err(|e| e.to_string())?, same.bitmaps.clone())
}

/// A disk too large to read as a whole: zeros but for what is expected.
fn holds_extents(image: &dyn BaseImage, expected: &[DataExtent]) -> Verdict {
    for extent in expected {
        let mut bytes = vec![0xa5; usize::try_from(extent.len).map_err(|e| e.to_string())?];
        image.read_at(&mut bytes, extent.start).map_err(|e| e.to_string())?;
        equal(&format!("content from {} on", extent.start), &sha512(&bytes), &extent.sha512)?;
    }
    for (range, kind) in subject::extents(image)? {
        if kind == ExtentKind::Zero {
            continue;
        }
        let mut uncovered = range.len.0;
        for extent in expected {
            let overlap = ByteRange::new(extent.start, extent.len).intersect(range);
            uncovered -= overlap.map_or(0, |overlap| overlap.len.0);
        }
        equal(&format!("bytes of data in {range} that should be zeros"), uncovered, 0)?;
    }
    Ok(())
}

fn holds_snapshots<I: Subject>(corpus: &Path, file: &Path, active: &Qcow2Layer, same: &Same) -> Verdict {
    let listed = subject::snapshots(active).map_err(|e| format!("listing snapshots: {e}"))?;
    let expected: Vec<_> = same.snapshots.iter().map(|s| (s.id.clone(), s.name.clone())).collect();
    equal("snapshots", listed, expected)?;
    for snapshot in &same.snapshots {
        for wanted in [&snapshot.id, &snapshot.name] {
            let said = |e: &dyn std::fmt::Display| format!("snapshot {wanted:?}: {e}");
            let image = I::open_in(corpus, file, &View::Snapshot(wanted.clone())).map_err(|e| said(&e))?;
            image.layer().verify_tables().map_err(|e| said(&e))?;
            equal(&format!("size of snapshot {wanted:?}"), image.len().0, snapshot.size)?;
            let content = subject::content(&image).map_err(|e| said(&e))?;
            equal(&format!("content of snapshot {wanted:?}"), &sha512(&content), &snapshot.sha512)?;
        }
    }
    Ok(())
}
