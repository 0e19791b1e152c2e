//! What is kept of an unfinished arrival: `partial.json` beside `partial.data`.
//!
//! Owns the record of how much of the file is known to be durable, with what it takes to go on from there: the
//! validator of the source, the total, and the hash's midstate. It never claims more than a successful sync covered;
//! bytes of `partial.data` past its position are not trusted. A record that cannot be read is no error: the arrival
//! starts again.

use bedplate_engine::error::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    checksum::{Midstate, hex},
    source::Validator,
};
use crate::directory::Directory;

/// The version that this program reads and writes; another one makes the arrival start again.
const PARTIAL_FORMAT_VERSION: u32 = 1;

/// The names of the two files.
#[derive(Clone, Copy, Debug)]
pub struct PartialNames {
    pub data: &'static str,
    pub record: &'static str,
}

/// Whether what is kept may be used as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The arrival goes on that it is of.
    #[default]
    NotNeeded,
    /// Somebody asked for the image anew: the source may serve other bytes by now, and has to show that it does not.
    Needed,
}

impl Proof {
    fn is_not_needed(&self) -> bool {
        *self == Proof::NotNeeded
    }
}

/// So much is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Bytes `[0, position)` of the file are on the medium.
    pub position: u64,
    /// The length of the whole, where the source has said it.
    pub total: Option<u64>,
    /// Everything has arrived.
    pub complete: bool,
    pub validator: Validator,
    #[serde(default, skip_serializing_if = "Proof::is_not_needed")]
    pub proof: Proof,
    /// The hash of those bytes so far.
    pub midstate: Midstate,
}

/// The bytes of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartialFile {
    format_version: u32,
    kept: Kept,
    /// SHA-256 of `kept` in compact JSON. A damaged midstate would otherwise become a wrong sum that is believed.
    check: String,
}

impl Kept {
    /// What is kept in this directory, if it can be trusted.
    pub fn load(dir: &Directory, names: PartialNames) -> Option<Kept> {
        let json = match dir.read_small(names.record) {
            Ok(json) => json,
            Err(error) => {
                if !error.is_not_found() {
                    tracing::warn!(%error, "what was kept of an arrival is not readable; it starts again");
                }
                return None;
            }
        };
        let kept = Kept::parse(&json);
        if kept.is_none() {
            tracing::warn!(directory = %dir.path().display(), "what was kept of an arrival is damaged; it starts again");
        }
        kept
    }

    /// What the bytes of a record say, if they can be trusted.
    pub fn parse(json: &[u8]) -> Option<Kept> {
        let file: PartialFile = serde_json::from_slice(json).ok()?;
        let sound = file.format_version == PARTIAL_FORMAT_VERSION
            && file.check == file.kept.check()
            && file.kept.total.is_none_or(|total| file.kept.position <= total);
        sound.then_some(file.kept)
    }

    /// Record it; durable on return.
    pub fn store(&self, dir: &Directory, names: PartialNames) -> Result<()> {
        dir.replace(names.record, &self.to_json())
    }

    /// Have the next arrival use what is kept only if its source proves that it still serves the same; durable on
    /// return. Without a strong validator it cannot, so that then nothing is kept.
    pub fn demand_proof(dir: &Directory, names: PartialNames) -> Result<()> {
        match Kept::load(dir, names) {
            Some(kept) if kept.validator != Validator::None => {
                Kept { proof: Proof::Needed, ..kept }.store(dir, names)
            }
            Some(_) | None => Kept::forget(dir, names),
        }
    }

    /// Forget what was kept; durable on return.
    pub fn forget(dir: &Directory, names: PartialNames) -> Result<()> {
        dir.remove_file(names.record)?;
        dir.sync()
    }

    /// The bytes of its record.
    pub fn to_json(&self) -> Vec<u8> {
        let file =
            PartialFile { format_version: PARTIAL_FORMAT_VERSION, kept: self.clone(), check: self.check() };
        serde_json::to_vec_pretty(&file)
            .expect("strings, numbers and options of them always have a JSON form")
    }

    fn check(&self) -> String {
        let json =
            serde_json::to_vec(self).expect("strings, numbers and options of them always have a JSON form");
        hex(&Sha256::digest(&json))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prep::checksum::Hasher;

    #[test]
    fn version_1_is_read_as_it_always_was() {
        let state = "00".repeat(209);
        let kept = format!(
            r#"{{"position":4096,"total":null,"complete":false,"validator":{{"file":{{"device":1,"inode":2,"size_bytes":3,"mtime_ns":4}}}},"midstate":{{"sha512":"{state}"}}}}"#
        );
        let check = hex(&Sha256::digest(kept.as_bytes()));
        let golden = format!(r#"{{"format_version":1,"kept":{kept},"check":"{check}"}}"#);
        let read = Kept::parse(golden.as_bytes()).unwrap();
        assert_eq!((read.position, read.total, read.complete), (4096, None, false));
        assert_eq!(read.proof, Proof::NotNeeded);
        assert!(matches!(
            read.validator,
            Validator::File { device: 1, inode: 2, size_bytes: 3, mtime_ns: 4 }
        ));
        assert!(Kept::parse(golden.replace("on\":1", "on\":2").as_bytes()).is_none());
    }

    #[test]
    fn no_damaged_byte_of_a_kept_record_is_believed() {
        let kept = Kept {
            position: 4096,
            total: Some(8192),
            complete: false,
            validator: Validator::Etag("\"abc\"".to_owned()),
            proof: Proof::Needed,
            midstate: Hasher::new(None).midstate(),
        };
        let json = kept.to_json();
        assert_eq!(Kept::parse(&json).as_ref(), Some(&kept));
        for at in 0..json.len() {
            let mut bad = json.clone();
            bad[at] ^= 1;
            assert!(Kept::parse(&bad).is_none_or(|read| read == kept), "byte {at}");
        }
    }
}
