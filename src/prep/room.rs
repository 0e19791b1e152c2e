//! Room on a disk: what an arrival leaves free for everything else that is on it.
//!
//! Volumes grow on the same disk as images arrive, and a full disk fails their writes. So an arrival is refused, or ends,
//! before the free space falls below a reserve ([`Reserve`]), whoever fills the disk. Checked before the first
//! byte for what the source says that it needs, and before every write for what nobody could know.

use std::{fmt, str::FromStr};

use bedplate_engine::units::ByteLen;
use bedplate_inspect::size;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::failure::{Failure, Result};
use crate::directory::{Directory, Space};

/// The reserve is at least this ...
const RESERVE_MIN: ByteLen = ByteLen(1 << 30);
/// ... or the size of the file system divided by this, if that is more ...
const RESERVE_DIVISOR: u64 = 50;
/// ... but never more than its size divided by this, or small disks could hold nothing.
const RESERVE_DIVISOR_MIN: u64 = 4;
/// What records and the file system's own tables may take beside the bytes of an arrival.
const OVERHEAD: ByteLen = ByteLen(4 << 20);

/// Free bytes that arrivals leave on a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reserve {
    /// 1 GiB or 2 % of its size, whichever is more, but at most a quarter.
    #[default]
    OfSize,
    /// That much.
    Fixed(ByteLen),
}

impl Reserve {
    /// On a file system of this size.
    pub fn bytes(self, size_bytes: u64) -> u64 {
        match self {
            Reserve::OfSize => {
                RESERVE_MIN.0.max(size_bytes / RESERVE_DIVISOR).min(size_bytes / RESERVE_DIVISOR_MIN)
            }
            Reserve::Fixed(len) => len.0,
        }
    }

    /// Refuse an arrival that needs this much more than it has.
    pub fn check_fits(self, dir: &Directory, needed_bytes: u64) -> Result<()> {
        self.check(dir, needed_bytes.saturating_add(OVERHEAD.0))
    }

    /// Refuse to write on a disk whose reserve is touched.
    pub fn check_kept(self, dir: &Directory) -> Result<()> {
        self.check(dir, 0)
    }

    fn check(self, dir: &Directory, needed_bytes: u64) -> Result<()> {
        let Space { free_bytes, size_bytes } = dir.space()?;
        let reserve_bytes = self.bytes(size_bytes);
        if needed_bytes.saturating_add(reserve_bytes) <= free_bytes {
            return Ok(());
        }
        Err(Failure::NoSpace { path: dir.path().to_owned(), needed_bytes, reserve_bytes, free_bytes })
    }
}

impl FromStr for Reserve {
    type Err = String;

    /// `auto`, or a size such as 512M.
    fn from_str(text: &str) -> std::result::Result<Reserve, String> {
        match text {
            "auto" => Ok(Reserve::OfSize),
            _ => size::parse_bytes(text).map(|bytes| Reserve::Fixed(ByteLen(bytes))),
        }
    }
}

impl fmt::Display for Reserve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reserve::OfSize => f.write_str("auto"),
            Reserve::Fixed(len) => write!(f, "{}", len.0),
        }
    }
}

impl<'de> Deserialize<'de> for Reserve {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Reserve, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Reserve {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_a_gib_or_two_percent_but_at_most_a_quarter() {
        const GIB: u64 = 1 << 30;
        for (size, reserve) in [
            (0, 0),
            (GIB, GIB / 4),
            (4 * GIB, GIB),
            (50 * GIB, GIB),
            (1000 * GIB, 20 * GIB),
            (u64::MAX, u64::MAX / 50),
        ] {
            assert_eq!(Reserve::OfSize.bytes(size), reserve, "{size}");
            assert_eq!(Reserve::Fixed(ByteLen(7)).bytes(size), 7);
        }
    }
}
