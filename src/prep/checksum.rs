//! Checksums: what a user expects, what the bytes give, and the state in between.
//!
//! SHA-512 of the file is always computed; SHA-256 beside it only when that is what the user gave. The state in the
//! middle of a file can be kept ([`Midstate`]), so that a resumed arrival hashes nothing twice. Its encoding is that of
//! the `sha2` crate, which is stable within 0.11; one that does not decode is no error, the prefix is then read again.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{
    Digest, Sha256, Sha512,
    digest::common::hazmat::{SerializableState, SerializedState},
};

use super::failure::{Failure, Result};

/// Zeros to hash for holes.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// The checksum that was asked for, in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    Sha512(String),
    Sha256(String),
}

impl Expected {
    /// 128 hexadecimal digits, `sha512:` and those, or `sha256:` and 64. The error says what is wrong.
    pub fn parse(text: &str) -> std::result::Result<Expected, String> {
        let text = text.trim().to_ascii_lowercase();
        let (kind, digits) = text.split_once(':').unwrap_or(("", &text));
        if let Some(odd) = digits.chars().find(|c| !c.is_ascii_hexdigit()) {
            return Err(format!("checksum: {odd:?} is not a hexadecimal digit"));
        }
        match (kind, digits.len()) {
            ("" | "sha512", 128) => Ok(Expected::Sha512(digits.to_owned())),
            ("sha256", 64) => Ok(Expected::Sha256(digits.to_owned())),
            ("", 64) => Err("checksum: 64 digits look like SHA-256; write sha256:HEX to say so".to_owned()),
            ("" | "sha512", len) => {
                Err(format!("checksum: SHA-512 has 128 hexadecimal digits, this has {len}"))
            }
            ("sha256", len) => Err(format!("checksum: SHA-256 has 64 hexadecimal digits, this has {len}")),
            (kind, _) => Err(format!("checksum: {kind:?} is not known; sha512 and sha256 are")),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expected::Sha512(digits) => write!(f, "sha512:{digits}"),
            Expected::Sha256(digits) => write!(f, "sha256:{digits}"),
        }
    }
}

/// Hashes a contiguous prefix.
#[derive(Clone, Debug)]
pub struct Hasher {
    sha512: Sha512,
    sha256: Option<Sha256>,
}

/// A [`Hasher`] in the middle of a file, as it is kept on disk: hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Midstate {
    sha512: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// What a whole file gave, in lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sums {
    pub sha512: String,
    pub sha256: Option<String>,
}

impl Hasher {
    pub fn new(expected: Option<&Expected>) -> Hasher {
        Hasher { sha512: Sha512::new(), sha256: wants_sha256(expected).then(Sha256::new) }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.sha512.update(bytes);
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(bytes);
        }
    }

    pub fn zeros(&mut self, mut len: u64) {
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            let zeros = usize::try_from(part).ok().and_then(|part| ZEROS.get(..part)).unwrap_or(&ZEROS);
            self.update(zeros);
            len -= part;
        }
    }

    pub fn midstate(&self) -> Midstate {
        Midstate {
            sha512: hex(&self.sha512.serialize()),
            sha256: self.sha256.as_ref().map(|sha256| hex(&sha256.serialize())),
        }
    }

    /// `None` when the state is not one of this version of `sha2`, or lacks a sum that is needed.
    pub fn resume(midstate: &Midstate, expected: Option<&Expected>) -> Option<Hasher> {
        let sha256 = match (wants_sha256(expected), &midstate.sha256) {
            (true, Some(digits)) => Some(restore::<Sha256>(digits)?),
            (true, None) => return None,
            (false, _) => None,
        };
        Some(Hasher { sha512: restore::<Sha512>(&midstate.sha512)?, sha256 })
    }

    pub fn finish(self) -> Sums {
        Sums {
            sha512: hex(&self.sha512.finalize()),
            sha256: self.sha256.map(|sha256| hex(&sha256.finalize())),
        }
    }
}

impl Sums {
    /// Refuse bytes that are not the expected ones.
    pub fn check(&self, expected: Option<&Expected>) -> Result<()> {
        let (wanted, actual) = match expected {
            None => return Ok(()),
            Some(Expected::Sha512(wanted)) => (wanted, &self.sha512),
            // A hasher that was made for this expectation has the sum; one that was not must not pass.
            Some(Expected::Sha256(wanted)) => (wanted, self.sha256.as_ref().unwrap_or(&self.sha512)),
        };
        if wanted == actual {
            return Ok(());
        }
        Err(Failure::Checksum { expected: wanted.clone(), actual: actual.clone() })
    }
}

fn wants_sha256(expected: Option<&Expected>) -> bool {
    matches!(expected, Some(Expected::Sha256(_)))
}

fn restore<H: SerializableState>(digits: &str) -> Option<H> {
    let bytes = unhex(digits)?;
    let state = SerializedState::<H>::try_from(bytes.as_slice()).ok()?;
    H::deserialize(&state).ok()
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).collect()
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_read_in_both_kinds_and_a_bare_sha256_is_explained() {
        let long = "AB".repeat(64);
        assert_eq!(Expected::parse(&long).unwrap(), Expected::Sha512(long.to_lowercase()));
        assert_eq!(
            Expected::parse(&format!("sha512:{long}")).unwrap().to_string(),
            format!("sha512:{long}").to_lowercase()
        );
        assert!(matches!(Expected::parse(&format!("SHA256:{}", "0".repeat(64))), Ok(Expected::Sha256(_))));
        assert!(Expected::parse(&"0".repeat(64)).unwrap_err().contains("sha256:"));
        for bad in ["", "sha512:", "md5:00", &"g".repeat(128), &"0".repeat(127)] {
            assert!(Expected::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_hash_goes_on_from_its_midstate_at_any_byte() {
        let expected = Expected::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
        let bytes: Vec<u8> = (0..1000_u32).flat_map(u32::to_le_bytes).collect();
        let mut whole = Hasher::new(Some(&expected));
        whole.update(&bytes);
        let whole = whole.finish();
        for cut in [0, 1, 63, 64, 127, 128, 129, 3999] {
            let mut first = Hasher::new(Some(&expected));
            first.update(&bytes[..cut]);
            let json = serde_json::to_string(&first.midstate()).unwrap();
            let mut second = Hasher::resume(&serde_json::from_str(&json).unwrap(), Some(&expected)).unwrap();
            second.update(&bytes[cut..]);
            assert_eq!(second.finish(), whole, "{cut}");
        }
    }

    #[test]
    fn a_midstate_that_does_not_decode_is_refused() {
        let good = Hasher::new(None).midstate();
        for sha512 in ["", "zz", "00", &good.sha512[2..], &"f".repeat(good.sha512.len())] {
            let bad = Midstate { sha512: sha512.to_owned(), sha256: None };
            assert!(Hasher::resume(&bad, None).is_none(), "{sha512:?}");
        }
        let wants = Expected::Sha256("0".repeat(64));
        assert!(Hasher::resume(&good, Some(&wants)).is_none(), "the kept state lacks SHA-256");
    }

    #[test]
    fn zeros_hash_like_zero_bytes() {
        let mut holes = Hasher::new(None);
        holes.zeros(200_001);
        let mut bytes = Hasher::new(None);
        bytes.update(&vec![0; 200_001]);
        assert_eq!(holes.finish(), bytes.finish());
    }
}
