//! Exporting a block device to a file, as a job: progress, an end from outside, digests.
//!
//! The file itself is the engine's ([`bedplate_engine::export`]). The digest of the guest's content is taken as it goes
//! by; that of a qcow2 file needs the file to be read once more, as it is not written in order.

use std::{fs::File, io::Read, path::Path};

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
    let mut watch = Watch { meter, stop, guest: guest.then(|| Hasher::new(None)) };
    if let Err(error) = to_file(device, path, existing, format, &mut watch) {
        // What ended it is the better reason.
        stop.check()?;
        return Err(error.into());
    }
    let guest = watch.guest.map(|hasher| hasher.finish().sha512);
    let file = match (wanted.file, format) {
        (false, _) => None,
        (true, Format::Raw) => guest.clone(),
        (true, Format::Qcow2(_)) => Some(hash_file(path, meter, stop)?),
    };
    Ok(Digests { file, guest: guest.filter(|_| wanted.guest) })
}

struct Watch<'a> {
    meter: &'a Meter,
    stop: &'a Stop,
    guest: Option<Hasher>,
}

impl Monitor for Watch<'_> {
    fn reached(&mut self, at: u64) -> StorageResult<()> {
        self.meter.advance_to(at);
        self.stop.check().map_err(|_| Storage::Closed)
    }

    fn content(&mut self, part: Content<'_>) -> StorageResult<()> {
        match (&mut self.guest, part) {
            (None, _) => {}
            (Some(hasher), Content::Data(bytes)) => hasher.update(bytes),
            (Some(hasher), Content::Zeros(len)) => hasher.zeros(len),
        }
        Ok(())
    }

    fn syncing(&mut self) {
        self.meter.enter(Phase::Syncing);
    }
}

fn hash_file(path: &Path, meter: &Meter, stop: &Stop) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Storage::io("open", path, e))?;
    let len = file.metadata().map_err(|e| Storage::io("stat", path, e))?.len();
    meter.begin(Phase::Hashing, 0, Some(len));
    let (mut hasher, mut buffer, mut done) = (Hasher::new(None), vec![0; READ_LEN], 0);
    loop {
        stop.check()?;
        let read = file.read(&mut buffer).map_err(|e| Storage::io("read", path, e))?;
        let bytes = buffer.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(hasher.finish().sha512);
        }
        hasher.update(bytes);
        done += bytes.len() as u64;
        meter.advance_to(done);
    }
}
