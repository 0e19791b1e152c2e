//! Exporting a block device to a file, as a job: progress, an end from outside, digests.
//!
//! The file itself is the engine's ([`bedplate_engine::export`]). The digest of the guest's content is taken as it goes
//! by; that of a qcow2 file needs the file to be read once more, as it is not written in order: before it has its name,
//! so that an export which ends there leaves nothing.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use bedplate_engine::{
    device::BlockDevice,
    error::{Error as Storage, Result as StorageResult},
    export::{Content, Existing, Format, Monitor, to_file},
};

use super::{
    checksum::Hasher,
    failure::Result,
    progress::{Meter, Phase},
    stop::Stop,
};

/// Bytes of one read of a file that is hashed.
const READ_LEN: usize = 1 << 20;
/// Zeros that are hashed between two looks at whether the job is to end: holes may be many times what a disk holds.
const ZEROS_LEN_MAX: u64 = 64 << 20;

/// SHA-512 of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The file that was written.
    pub file: bool,
    /// What a guest reads from it.
    pub guest: bool,
}

/// In lower-case hexadecimal digits, where they were wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    pub file: Option<String>,
    pub guest: Option<String>,
}

/// Export to the file `path`; see [`to_file`].
pub fn export_file(
    device: &dyn BlockDevice,
    path: &Path,
    existing: Existing,
    format: Format,
    wanted: Wanted,
    meter: &Meter,
    stop: &Stop,
) -> Result<Digests> {
    meter.begin(Phase::Transferring, 0, Some(device.geometry().size.0));
    // A raw file is the guest's content.
    let guest = wanted.guest || (wanted.file && format == Format::Raw);
    let file = match format {
        Format::Qcow2(_) if wanted.file => FileSum::Wanted,
        Format::Qcow2(_) | Format::Raw => FileSum::NotWanted,
    };
    let mut watch = Watch { path, meter, stop, guest: guest.then(|| Hasher::new(None)), file };
    if let Err(error) = to_file(device, path, existing, format, &mut watch) {
        // What ended it is the better reason.
        stop.check()?;
        return Err(error.into());
    }
    let guest = watch.guest.map(|hasher| hasher.finish().sha512);
    let file = match watch.file {
        FileSum::Taken(sum) => Some(sum),
        FileSum::Wanted | FileSum::NotWanted => guest.clone().filter(|_| wanted.file),
    };
    Ok(Digests { file, guest: guest.filter(|_| wanted.guest) })
}

struct Watch<'a> {
    /// For messages.
    path: &'a Path,
    meter: &'a Meter,
    stop: &'a Stop,
    guest: Option<Hasher>,
    file: FileSum,
}

/// The sum of a file that is not the guest's content.
enum FileSum {
    NotWanted,
    Wanted,
    Taken(String),
}

impl Watch<'_> {
    fn check(&self) -> StorageResult<()> {
        // The reason is asked for once more when the export has ended.
        self.stop.check().map_err(|_| Storage::Closed)
    }

    fn sum_of(&self, file: &File) -> StorageResult<String> {
        let len = file.metadata().map_err(|e| Storage::io("stat", self.path, e))?.len();
        self.meter.begin(Phase::Hashing, 0, Some(len));
        let (mut hasher, mut buffer, mut at) = (Hasher::new(None), vec![0; READ_LEN], 0);
        loop {
            self.check()?;
            let read = file.read_at(&mut buffer, at).map_err(|e| Storage::io("read", self.path, e))?;
            let bytes = buffer.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(hasher.finish().sha512);
            }
            hasher.update(bytes);
            at += bytes.len() as u64;
            self.meter.advance_to(at);
        }
    }
}

impl Monitor for Watch<'_> {
    fn reached(&mut self, at: u64) -> StorageResult<()> {
        self.meter.advance_to(at);
        self.check()
    }

    fn content(&mut self, part: Content<'_>) -> StorageResult<()> {
        match part {
            Content::Data(bytes) => {
                if let Some(guest) = &mut self.guest {
                    guest.update(bytes);
                }
            }
            Content::Zeros(mut len) => {
                while len > 0 && self.guest.is_some() {
                    self.check()?;
                    let part = len.min(ZEROS_LEN_MAX);
                    if let Some(guest) = &mut self.guest {
                        guest.zeros(part);
                    }
                    len -= part;
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, file: &File) -> StorageResult<()> {
        if matches!(self.file, FileSum::Wanted) {
            self.file = FileSum::Taken(self.sum_of(file)?);
        }
        self.meter.enter(Phase::Syncing);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::prep::{failure::Failure, testing::MemoryDevice};

    #[test]
    fn the_hash_of_a_hole_ends_when_the_job_does() {
        let stop = Stop::after(Duration::from_secs(60));
        stop.cancel();
        let (meter, guest) = (Meter::default(), Some(Hasher::new(None)));
        let path = Path::new("x");
        let mut watch = Watch { path, meter: &meter, stop: &stop, guest, file: FileSum::NotWanted };
        assert!(matches!(watch.content(Content::Zeros(4 * ZEROS_LEN_MAX)), Err(Storage::Closed)));
    }

    #[test]
    fn an_export_that_ends_while_its_file_is_hashed_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (stop, meter) = (Stop::after(Duration::from_secs(60)), Meter::default());
        let wanted = Wanted { file: true, guest: false };
        let qcow2 = Format::Qcow2(bedplate_engine::export::qcow2::Options::default());
        stop.cancel();
        // The monitor is told of nothing but the end: the device is empty.
        let device = MemoryDevice(Vec::new());
        let path = dir.path().join("x");
        let ended = export_file(&device, &path, Existing::Refuse, qcow2, wanted, &meter, &stop);
        assert!(matches!(ended, Err(Failure::Cancelled)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
