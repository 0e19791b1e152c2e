//! `NAME.img.checksum`: what Longhorn once found the bytes of a snapshot's file to be.
//!
//! Owns its record, and holding the file against it. The sum is a CRC-64 (ISO 3309, as Go's `hash/crc64` has it) of the
//! whole file, holes as zeros. Longhorn believes it as long as the file's status has not changed since (its ctime): then
//! other bytes are corruption. Of a copy, or of a file that a purge has changed, nobody can tell that.

use std::{fs::File, os::unix::fs::MetadataExt, path::Path};

use bedplate_engine::{
    error::{Error, Result as EngineResult},
    units::VOLUME_SIZE_MAX,
};
use crc::{CRC_64_GO_ISO, Crc, Table};
use jiff::{Timestamp, fmt::strtime};
use serde::Deserialize;

use super::{Replica, SNAPSHOT_PREFIX, record};
use crate::{
    convert::each_piece,
    failure::Result,
    layer::FileLayer,
    print,
    stack::{Floor, Layer, Stack},
};

const CHECKSUM_SUFFIX: &str = ".checksum";
/// The only method that there is.
const METHOD: &str = "crc64";
/// Characters of a record's text that a finding shows.
const TEXT_SHOWN_MAX: usize = 32;

static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_GO_ISO);

/// `NAME.img.checksum`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ChecksumRecord {
    method: String,
    /// In hexadecimal digits; empty where there is none yet.
    checksum: String,
    /// The file's ctime when it was summed, as Go writes a time.
    change_time: String,
    /// Longhorn summed it again, and found other bytes under the same ctime.
    silently_corrupted: bool,
}

/// What was found: corruptions, and records that say nothing (any more).
#[derive(Debug, Default)]
pub struct Findings {
    pub corruptions: Vec<String>,
    pub leftovers: Vec<String>,
}

impl ChecksumRecord {
    /// The sum; none where there is none yet. The error says why it tells nothing.
    fn sum(&self) -> Result<Option<u64>, String> {
        let start = |text: &str| text.chars().take(TEXT_SHOWN_MAX).collect::<String>();
        if self.method != METHOD {
            return Err(format!("the method {:?} is not known", start(&self.method)));
        }
        if self.checksum.is_empty() {
            return Ok(None);
        }
        let sum = u64::from_str_radix(&self.checksum, 16);
        sum.map(Some).map_err(|_| format!("{:?} is no CRC-64", start(&self.checksum)))
    }
}

/// What the records say by themselves.
pub fn check(replica: &Replica) -> Findings {
    let mut findings = Findings::default();
    for name in summed(replica) {
        match read(replica, name) {
            Ok(None) => {}
            Ok(Some(record)) if record.silently_corrupted => {
                findings
                    .corruptions
                    .push(format!("{name}: Longhorn itself found that its bytes had changed"));
            }
            Ok(Some(record)) => {
                if let Err(what) = record.sum() {
                    findings.leftovers.push(format!("{name}{CHECKSUM_SUFFIX}: {what}"));
                }
            }
            Err(error) => findings.leftovers.push(format!("a checksum that says nothing: {error}")),
        }
    }
    findings
}

/// Hold every file that has a sum against it, which reads all of it. One that cannot be read does not hide the others.
pub fn verify(replica: &Replica) -> Findings {
    let mut findings = Findings::default();
    for name in summed(replica) {
        let Ok(Some(record)) = read(replica, name) else { continue };
        let Ok(Some(wanted)) = record.sum() else { continue };
        match look(replica, name) {
            Ok((found, _)) if found == wanted => {}
            Ok((found, changed_at)) => {
                let differ =
                    format!("{name} has the CRC-64 {found:016x}, where Longhorn found {wanted:016x}");
                if moment(&record.change_time).is_some_and(|then| then.as_nanosecond() == changed_at) {
                    findings.corruptions.push(format!("{differ} and the file has not been written to since"));
                } else {
                    let text = format!("{differ}: it was written to since, or is no true copy");
                    findings.leftovers.push(text);
                }
            }
            Err(failure) => findings.corruptions.push(format!("{name} does not give its bytes: {failure}")),
        }
    }
    findings
}

/// The sum of a file's bytes, and when its status had changed last, after they had been read.
fn look(replica: &Replica, name: &str) -> Result<(u64, i128)> {
    let (file, path) = replica.open_name(name)?;
    let again = file.try_clone().map_err(|e| Error::io("open", &path, e))?;
    Ok((sum(again, &path)?, changed_at(&file, &path)?))
}

/// The snapshots' files: no others have sums.
fn summed(replica: &Replica) -> impl Iterator<Item = &str> {
    replica.entries.keys().map(String::as_str).filter(|name| name.starts_with(SNAPSHOT_PREFIX))
}

fn read(replica: &Replica, name: &str) -> EngineResult<Option<ChecksumRecord>> {
    match replica.open_name(&format!("{name}{CHECKSUM_SUFFIX}")) {
        Ok((file, path)) => record::read(file, &path).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// When the file's status last changed, in nanoseconds since the epoch.
fn changed_at(file: &File, path: &Path) -> EngineResult<i128> {
    let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
    Ok(i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()))
}

fn sum(file: File, path: &Path) -> Result<u64> {
    let layer = FileLayer::raw(file, path)?;
    let size = layer.size();
    if size > VOLUME_SIZE_MAX {
        let what = format!("a layer of {size} bytes");
        return Err(Error::Unsupported { path: path.to_owned(), what }.into());
    }
    let stack = Stack::new(vec![Box::new(layer)], Floor::Zeros, size);
    let bar = print::progress("summing", size);
    let mut digest = CRC.digest();
    each_piece(&stack, |bytes| {
        digest.update(bytes);
        bar.inc(bytes.len() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(digest.finalize())
}

/// A time as Go writes it: `2026-08-21 10:00:00.123456789 +0800 CST`. The name of the zone adds nothing to its offset.
fn moment(text: &str) -> Option<Timestamp> {
    let words: Vec<&str> = text.split_whitespace().take(3).collect();
    strtime::parse("%Y-%m-%d %H:%M:%S%.f %z", words.join(" ")).ok()?.to_timestamp().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_the_catalogue_of_crcs() {
        assert_eq!(CRC.checksum(b"123456789"), 0xb909_56c7_75a4_1001);
    }

    #[test]
    fn a_layer_longer_than_any_volume_is_not_read_to_its_end() {
        let file = File::from(rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(VOLUME_SIZE_MAX + 1).unwrap();
        assert!(sum(file, Path::new("x")).is_err_and(|failure| failure.to_string().contains("a layer of")));
    }

    #[test]
    fn times_are_read_as_go_writes_them() {
        let wanted: Timestamp = "2026-08-21T02:00:00.12Z".parse().unwrap();
        for text in ["2026-08-21 10:00:00.12 +0800 CST", "2026-08-21 02:00:00.12 +0000 UTC"] {
            assert_eq!(moment(text), Some(wanted), "{text}");
        }
        let whole = moment("1970-01-01 00:00:01 +0000 UTC");
        assert_eq!(whole.map(Timestamp::as_nanosecond), Some(1_000_000_000));
        for text in ["", "yesterday", "2026-08-21", "2026-08-21 10:00:00.12"] {
            assert_eq!(moment(text), None, "{text}");
        }
    }
}
