//! What the engine and the image service know, in the words of the API.
//!
//! Only translation: nothing is decided or looked up here.

use std::path::Path;

use bedplate_engine::volume::{
    device::{VolumeInfo, VolumeState},
    record::SnapshotRecord,
    recover::Recovered,
};
use bedplate_fuse::{IoPath, Transport};

use super::refuse;
use crate::{api::types, images, prep::progress};

pub fn progress(progress: &progress::Progress) -> types::Progress {
    types::Progress {
        phase: match progress.phase {
            progress::Phase::Queued => types::Phase::Queued,
            progress::Phase::Connecting => types::Phase::Connecting,
            progress::Phase::Transferring => types::Phase::Transferring,
            progress::Phase::Hashing => types::Phase::Hashing,
            progress::Phase::Syncing => types::Phase::Syncing,
            progress::Phase::Publishing => types::Phase::Publishing,
            progress::Phase::Verifying => types::Phase::Verifying,
        },
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        rate_bytes_per_s: progress.rate_bytes_per_s,
        eta_s: progress.eta_s,
        attempt: progress.attempt,
        last_error: progress.last_error.clone(),
        next_retry_at: progress.next_retry_at,
    }
}

/// `disk_path` knows the directory of a disk.
pub fn image(
    info: images::ImageInfo,
    io_path: Option<types::IoPath>,
    disk_path: impl Fn(uuid::Uuid) -> String,
) -> types::Image {
    let copies = info.copies.into_iter().map(|copy| {
        let (message, code) = match &copy.state {
            images::ImageState::Failed(failure) => {
                (Some(failure.message.clone()), Some(refuse::failure_code(failure.code)))
            }
            images::ImageState::Unknown(reason) => (Some(reason.clone()), None),
            images::ImageState::Pending | images::ImageState::InProgress | images::ImageState::Ready => {
                (None, None)
            }
        };
        let (state, progress) = (image_state(&copy.state), copy.progress.as_ref().map(progress));
        let verification = copy.verification.as_ref().map(verification);
        types::Copy { disk: disk_path(copy.disk), state, progress, message, code, verification }
    });
    types::Image {
        name: info.name,
        uuid: info.uuid,
        state: image_state(&info.state),
        format: info.format.map(|format| match format {
            images::Format::Raw => types::Format::Raw,
            images::Format::Qcow2 => types::Format::Qcow2,
        }),
        internal_snapshot: info.internal_snapshot,
        size_bytes: info.size_bytes,
        virtual_size_bytes: info.virtual_size_bytes,
        allocated_bytes: info.allocated_bytes,
        sha512: info.sha512,
        source: without_query(info.source),
        sources: info.sources.into_iter().map(source_file).collect(),
        copies: copies.collect(),
        io_path,
        created_at: info.created_at,
    }
}

fn source_file(file: images::SourceFile) -> types::SourceFile {
    types::SourceFile { path: file.path, size_bytes: file.size_bytes, sha512: file.sha512 }
}

fn verification(verification: &images::Verification) -> types::Verification {
    match verification {
        images::Verification::Passed => {
            types::Verification { state: types::VerificationState::Passed, message: None, code: None }
        }
        images::Verification::Failed(failure) => types::Verification {
            state: types::VerificationState::Failed,
            message: Some(failure.message.clone()),
            code: Some(refuse::failure_code(failure.code)),
        },
    }
}

fn image_state(state: &images::ImageState) -> types::ImageState {
    match state {
        images::ImageState::Pending => types::ImageState::Pending,
        images::ImageState::InProgress => types::ImageState::InProgress,
        images::ImageState::Ready => types::ImageState::Ready,
        images::ImageState::Failed(_) => types::ImageState::Failed,
        images::ImageState::Unknown(_) => types::ImageState::Unknown,
    }
}

pub fn transport(transport: Transport) -> types::Transport {
    match transport {
        Transport::Uring => types::Transport::Uring,
        Transport::Classic => types::Transport::Classic,
    }
}

pub fn io_path(path: IoPath, transport: Transport) -> types::IoPath {
    match (path, transport) {
        (IoPath::Passthrough, _) => types::IoPath::Passthrough,
        (IoPath::Cached, _) => types::IoPath::Cached,
        (IoPath::Direct, Transport::Uring) => types::IoPath::Uring,
        (IoPath::Direct, Transport::Classic) => types::IoPath::Classic,
    }
}

/// `name` is the one that it is served under; `path` and `device` where it is now.
pub fn volume(
    name: String,
    info: VolumeInfo,
    disk: &Path,
    path: Option<String>,
    device: Option<String>,
    io_path: Option<types::IoPath>,
) -> types::Volume {
    let (state, message) = match info.state {
        VolumeState::Ready => (types::VolumeState::Ready, None),
        VolumeState::ReadOnly { reason } => (types::VolumeState::Failed, Some(reason)),
        VolumeState::Failed { reason } => (types::VolumeState::Unknown, Some(reason)),
    };
    types::Volume {
        name,
        uuid: info.uuid,
        state,
        size_bytes: info.size.0,
        allocated_bytes: info.allocated.0,
        image: info.image.map(|image| types::ImageRef { name: image.name, uuid: image.uuid }),
        snapshots: info.snapshots.into_iter().map(snapshot).collect(),
        // One that cannot be opened has no file.
        path: path.filter(|_| state != types::VolumeState::Unknown),
        device,
        io_path,
        created_at: Some(info.created_at),
        disk: disk.display().to_string(),
        message,
        holders: info.holders,
    }
}

pub fn snapshot(record: SnapshotRecord) -> types::Snapshot {
    types::Snapshot { name: record.name, size_bytes: record.size_bytes, created_at: Some(record.created_at) }
}

pub fn recovered(recovered: Recovered) -> types::RecoverReport {
    let mut report = types::RecoverReport::default();
    for layer in recovered.layers {
        report.faults.push(layer.reason);
        report.lost.extend(
            layer
                .guessed
                .iter()
                .map(|range| types::Range { start_bytes: range.start.0, len_bytes: range.len.0 }),
        );
    }
    report
}

/// A source as people may see it: signatures are in the queries of URLs. The record keeps it whole, to fetch it again.
fn without_query(source: String) -> String {
    match source.split_once('?') {
        Some((url, _)) if url.starts_with("http://") || url.starts_with("https://") => format!("{url}?..."),
        Some(_) | None => source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_url_is_shown_without_its_signature() {
        assert_eq!(without_query("https://host/a.raw?sig=secret".into()), "https://host/a.raw?...");
        assert_eq!(without_query("/srv/what?.raw".into()), "/srv/what?.raw");
    }
}
