//! One raw image of what several files hold: a qcow2 file and those that it names, or a directory of layers.
//!
//! What the record says of the files must be of the bytes that were joined. So they are opened twice: what the first
//! opening finds (device, inode, size, time of the last write; where these do not tell, also the digest) must be what is
//! found through the descriptors of the second when everything has been read through them. Then nothing changed in
//! between, neither under the headers and maps that the opening read, nor under the bytes, nor under their digests. The
//! bytes themselves arrive as those of any device. What is written through a mapping that was dirty already shows in no
//! time until it is synced: files that are mapped for writing are not for joining.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use bedplate_engine::{error::Error as Storage, image::Format};
use bedplate_inspect::{
    source::{self as inspect, FileArgs, OpenArgs},
    stack::Stack,
};
use jiff::{SignedDuration, Timestamp};

use crate::{
    catalog::{
        record::{ImageRecord, Parts},
        sources::{SourceFile, check_room},
    },
    prep::{
        arrival::{Arrived, Spec, arrive},
        digest::{Part, digest},
        failure::{Failure, Result},
        partial::Kept,
        progress::Meter,
        source::{Validator, device::DeviceSource, file::identity},
        stop::Stop,
    },
};

/// The coarsest steps in which a file system keeps times (FAT: 2 s). Of two writes within one the second leaves no trace.
const TIME_STEP_MAX: SignedDuration = SignedDuration::from_secs(2);

/// What a file was like before it was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Before {
    path: PathBuf,
    stamp: Validator,
    /// Where the stamp would not tell of every write.
    sha512: Option<String>,
}

/// Join the files that `path` leads to. Returns the image, and the files, the top of the chain first.
pub(super) fn join(
    mut spec: Spec,
    path: &Path,
    record: &mut ImageRecord,
) -> Result<(Arrived, Vec<SourceFile>)> {
    let Parts { backing, allow_references } = &record.parts;
    let files = FileArgs {
        allow_references: allow_references.as_ref().map(PathBuf::from),
        backing: backing.as_ref().map(PathBuf::from),
    };
    let args = OpenArgs { format: None, snapshot: record.internal_snapshot.clone(), files };
    let first = inspect::open(path, &args)?;
    let before = look(&first, &spec.meter, &spec.stop)?;
    drop(first);
    let stack = Arc::new(inspect::open(path, &args)?);
    for note in stack.notes() {
        tracing::warn!(image = %record.name, note, "what is joined into an image");
    }
    // What an earlier run joined may have been other bytes of the same files.
    Kept::forget(&spec.dir, spec.names)?;
    spec.format = Some(Format::Raw);
    let arrived = arrive(&spec, &mut DeviceSource::new(stack.clone()))?;
    let sources = sources(path, &stack, &before, &spec.meter, &spec.stop)?;
    // The snapshot has become the content, and the source says which it was.
    if let Some(snapshot) = record.internal_snapshot.take() {
        record.source = format!("{}@{snapshot}", record.source);
    }
    Ok((arrived, sources))
}

/// What the files are like now.
pub(super) fn look(stack: &Stack, meter: &Meter, stop: &Stop) -> Result<Vec<Before>> {
    let files = stack.files();
    let paths: Vec<String> = files.iter().map(|(_, path)| path.display().to_string()).collect();
    check_room(paths.iter().map(String::as_str)).map_err(Failure::Unsupported)?;
    let parts = files.iter().map(|(file, path)| Part::whole(file, path)).collect::<Result<Vec<_>>>()?;
    let settled = Timestamp::now() - TIME_STEP_MAX;
    let mut found = Vec::new();
    for part in &parts {
        let stamp = stamp(part.file, part.path)?;
        found.push(Before { path: part.path.to_owned(), stamp, sha512: None });
    }
    let untold = |before: &Before| !tells(&before.stamp, settled);
    let to_digest: Vec<Part<'_>> =
        parts.iter().zip(&found).filter(|(_, before)| untold(before)).map(|(part, _)| *part).collect();
    let sums = digest(&to_digest, meter, stop)?;
    for (before, sum) in found.iter_mut().filter(|before| untold(before)).zip(sums) {
        before.sha512 = Some(sum);
    }
    Ok(found)
}

fn stamp(file: &File, path: &Path) -> Result<Validator> {
    Ok(identity(&file.metadata().map_err(|e| Storage::io("stat", path, e))?))
}

/// Whether every later write changes this stamp: that of a file, written last at `settled` or before.
fn tells(stamp: &Validator, settled: Timestamp) -> bool {
    match stamp {
        Validator::File { mtime_ns, .. } => i128::from(*mtime_ns) <= settled.as_nanosecond(),
        Validator::None | Validator::Etag(_) | Validator::LastModified(_) => false,
    }
}

/// What the record says of the files that `path` leads to, if they still are what they were.
pub(super) fn sources(
    path: &Path,
    stack: &Stack,
    before: &[Before],
    meter: &Meter,
    stop: &Stop,
) -> Result<Vec<SourceFile>> {
    let files = stack.files();
    if !files.iter().map(|(_, path)| *path).eq(before.iter().map(|before| before.path.as_path())) {
        return Err(Failure::Changed(path.to_owned()));
    }
    let parts = files.iter().map(|(file, path)| Part::whole(file, path)).collect::<Result<Vec<_>>>()?;
    let sums = digest(&parts, meter, stop)?;
    let mut sources = Vec::new();
    for ((Part { file, path, size_bytes }, sha512), then) in parts.into_iter().zip(sums).zip(before) {
        let same =
            then.stamp == stamp(file, path)? && then.sha512.as_ref().is_none_or(|then| *then == sha512);
        if !same {
            return Err(Failure::Changed(path.to_owned()));
        }
        sources.push(SourceFile { path: path.display().to_string(), size_bytes, sha512 });
    }
    Ok(sources)
}
