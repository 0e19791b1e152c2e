//! The header of a qcow2 file and its extensions.
//!
//! Owns [`UnverifiedHeader`], the fields as they stand in the file, and [`Header`], the fields as they may be used:
//! every offset and length in a `Header` was held against the file, every feature is one that this reader knows. The
//! tables that it points at are another matter (`tables.rs`, `refcount.rs`, `snapshots.rs`, `bitmaps.rs`): only
//! what every reader needs, the active L1 table and the geometry, is refused here when it is wrong. Layout: the
//! public specification of qcow2, versions 2 and 3.

mod geometry;

pub use self::geometry::{CLUSTER_BITS, Geometry, L2Format};
use super::fault::{Fault, Result, be32, be64};
use crate::units::{ByteLen, ByteOffset, ByteRange, VOLUME_SIZE_MAX};

/// Largest L1 table, as everywhere else that reads the format.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table.
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Longest name of a backing file.
pub const BACKING_NAME_LEN_MAX: u32 = 1023;
/// Smallest cluster that can be divided into 32 subclusters, as a power of two.
const SUBCLUSTERS_BITS_MIN: u32 = 14;

const MAGIC: &[u8; 4] = b"QFI\xfb";
const V2_LEN: u32 = 72;
const V3_LEN_MIN: u32 = 104;
/// Bytes of the header that [`UnverifiedHeader::area_len`] wants to see.
pub const PEEK_LEN: u64 = 24;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;
const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
const AUTOCLEAR_BITMAPS: u64 = 1;
const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAME_LEN: usize = 48;

/// Every field as the file has it; nothing is checked but that it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnverifiedHeader {
    pub version: u32,
    pub backing_offset: u64,
    pub backing_len: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub crypt_method: u32,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub snapshot_count: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub header_len: u32,
    pub compression_type: u8,
    /// The start of the file, as far as the first cluster goes.
    area: Vec<u8>,
}

/// How a cluster is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate; the format's tools say zlib.
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V2,
    V3,
}

/// An L1 table, within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Ref {
    pub offset: ByteOffset,
    pub entries: u32,
}

/// The refcount table; its first byte is within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountRef {
    pub range: ByteRange,
    /// Width of one refcount as a power of two.
    pub order: u32,
}

/// The snapshot table as the header has it: whether that is sound is found out when snapshots are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotsRef {
    pub offset: u64,
    pub count: u32,
}

/// The bitmaps extension as the header has it, not checked either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsRef {
    pub count: u32,
    pub directory: u64,
    pub directory_len: u64,
    pub state: BitmapsState,
}

/// Whether the bitmaps still describe the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapsState {
    Consistent,
    /// Something wrote to the image that does not know bitmaps.
    Stale,
}

/// The file that holds what this one does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it stands in the header: bytes from outside.
    pub name: Vec<u8>,
    /// "raw", "qcow2" and so on, where the header says.
    pub format: Option<String>,
}

/// The file that holds the guest's clusters in place of this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// As it stands in the header: bytes from outside.
    pub name: Option<Vec<u8>>,
    pub layout: DataLayout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataLayout {
    /// Only the tables tell which of its bytes count.
    Mapped,
    /// It is a raw image of its own.
    Raw,
}

/// A header that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: Version,
    pub geometry: Geometry,
    /// Virtual size, at most [`VOLUME_SIZE_MAX`].
    pub size: ByteLen,
    pub l1: L1Ref,
    pub refcounts: RefcountRef,
    pub snapshots: SnapshotsRef,
    pub bitmaps: Option<BitmapsRef>,
    pub compression: Compression,
    pub backing: Option<Backing>,
    pub data_file: Option<DataFile>,
    incompatible: u64,
    compatible: u64,
}

impl UnverifiedHeader {
    /// How many bytes of the file [`UnverifiedHeader::parse`] wants, given its first [`PEEK_LEN`]: its first cluster,
    /// or something small if that has no possible size.
    pub fn area_len(start: &[u8]) -> u64 {
        match be32(start, 20) {
            Some(bits) if CLUSTER_BITS.contains(&bits) => (1 << bits).max(512),
            Some(_) | None => 512,
        }
    }

    /// Take the fields from `area`, the start of the file.
    pub fn parse(area: &[u8]) -> Result<UnverifiedHeader> {
        if !area.starts_with(MAGIC) {
            let what = crate::error::Corruption::Magic("qcow2");
            return Err(Fault::Corrupt { what, at: ByteOffset(0) });
        }
        let cut = || Fault::truncated("qcow2 header", area.len() as u64);
        let u32_at = |at| be32(area, at).ok_or_else(cut);
        let u64_at = |at| be64(area, at).ok_or_else(cut);
        let version = u32_at(4)?;
        if !(2..=3).contains(&version) {
            return Err(Fault::Unsupported(format!("version {version} of the qcow2 format (at byte 4)")));
        }
        let mut header = UnverifiedHeader {
            version,
            backing_offset: u64_at(8)?,
            backing_len: u32_at(16)?,
            cluster_bits: u32_at(20)?,
            size: u64_at(24)?,
            crypt_method: u32_at(32)?,
            l1_entries: u32_at(36)?,
            l1_offset: u64_at(40)?,
            refcount_table_offset: u64_at(48)?,
            refcount_table_clusters: u32_at(56)?,
            snapshot_count: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_len: V2_LEN,
            compression_type: 0,
            area: area.to_vec(),
        };
        if version >= 3 {
            header.incompatible = u64_at(72)?;
            header.compatible = u64_at(80)?;
            header.autoclear = u64_at(88)?;
            header.refcount_order = u32_at(96)?;
            header.header_len = u32_at(100)?;
            if header.header_len > V3_LEN_MIN {
                header.compression_type = area.get(104).copied().ok_or_else(cut)?;
            }
        }
        Ok(header)
    }

    /// The header, if a file of `file_len` bytes can have it and this reader knows all that it asks for.
    pub fn verify(self, file_len: u64) -> Result<Header> {
        self.verify_geometry()?;
        let cluster_size = 1_u64 << self.cluster_bits;
        let extensions = self.extensions(cluster_size)?;
        self.verify_features(&extensions)?;
        if self.size > VOLUME_SIZE_MAX {
            return Err(Fault::Unsupported(format!(
                "a virtual size of {} bytes (at byte 24), more than {VOLUME_SIZE_MAX},",
                self.size
            )));
        }
        let format = if self.incompatible & INCOMPATIBLE_EXTENDED_L2 == 0 {
            L2Format::Standard
        } else {
            L2Format::Extended
        };
        let geometry = Geometry::new(self.cluster_bits, format);
        let l1 = self.verify_l1(geometry, file_len)?;
        let refcounts = self.verify_refcounts(cluster_size, file_len)?;
        let backing = self.backing(cluster_size, extensions.backing_format)?;
        let data_file = self.data_file(extensions.data_file, backing.as_ref())?;
        Ok(Header {
            version: if self.version == 2 { Version::V2 } else { Version::V3 },
            geometry,
            size: ByteLen(self.size),
            l1,
            refcounts,
            snapshots: SnapshotsRef { offset: self.snapshots_offset, count: self.snapshot_count },
            bitmaps: extensions.bitmaps,
            compression: self.compression()?,
            backing,
            data_file,
            incompatible: self.incompatible,
            compatible: self.compatible,
        })
    }

    fn verify_geometry(&self) -> Result<()> {
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return Err(Fault::field("cluster_bits", self.cluster_bits, 20));
        }
        if self.version >= 3
            && (self.header_len < V3_LEN_MIN
                || !self.header_len.is_multiple_of(8)
                || u64::from(self.header_len) > 1 << self.cluster_bits)
        {
            return Err(Fault::field("header_length", self.header_len, 100));
        }
        if self.refcount_order > 6 {
            return Err(Fault::field("refcount_order", self.refcount_order, 96));
        }
        Ok(())
    }

    fn verify_features(&self, extensions: &Extensions) -> Result<()> {
        let unknown = self.incompatible & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let name = extensions.incompatible_name(bit);
            return Err(Fault::Unsupported(match name {
                Some(name) => format!("the incompatible feature {name:?} (bit {bit})"),
                None => format!("incompatible feature bit {bit}"),
            }));
        }
        match self.crypt_method {
            0 => {}
            1 => return Err(Fault::Unsupported("encryption (AES, crypt_method 1)".into())),
            2 => return Err(Fault::Unsupported("encryption (LUKS, crypt_method 2)".into())),
            other => return Err(Fault::Unsupported(format!("encryption (crypt_method {other})"))),
        }
        if self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 && self.cluster_bits < SUBCLUSTERS_BITS_MIN {
            return Err(Fault::field("cluster_bits (with extended L2 entries)", self.cluster_bits, 20));
        }
        Ok(())
    }

    fn compression(&self) -> Result<Compression> {
        let announced = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        match (self.compression_type, announced) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (0, true) | (1, false) => {
                Err(Fault::field("compression_type (against its feature bit)", self.compression_type, 104))
            }
            (other, _) => Err(Fault::Unsupported(format!("compression_type {other}"))),
        }
    }

    fn verify_l1(&self, geometry: Geometry, file_len: u64) -> Result<L1Ref> {
        let bytes = u64::from(self.l1_entries) * 8;
        let needed = self.size.div_ceil(geometry.l2_span());
        if bytes > L1_BYTES_MAX || u64::from(self.l1_entries) < needed {
            return Err(Fault::field("l1_size", self.l1_entries, 36));
        }
        if self.l1_entries > 0 {
            let aligned = self.l1_offset.is_multiple_of(geometry.cluster_size());
            // Cluster 0 is the header's.
            if !aligned || self.l1_offset == 0 {
                return Err(Fault::field("l1_table_offset", self.l1_offset, 40));
            }
            let lost = ByteRange::new(0, self.size);
            if self.l1_offset >= file_len {
                return Err(Fault::field("l1_table_offset", self.l1_offset, 40).losing(lost));
            }
            if bytes > file_len - self.l1_offset {
                return Err(Fault::truncated("L1 table", file_len).losing(lost));
            }
        }
        Ok(L1Ref { offset: ByteOffset(self.l1_offset), entries: self.l1_entries })
    }

    fn verify_refcounts(&self, cluster_size: u64, file_len: u64) -> Result<RefcountRef> {
        let bytes = u64::from(self.refcount_table_clusters) * cluster_size;
        if bytes == 0 || bytes > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Fault::field("refcount_table_clusters", self.refcount_table_clusters, 56));
        }
        let at = self.refcount_table_offset;
        if at == 0 || !at.is_multiple_of(cluster_size) || at >= file_len {
            return Err(Fault::field("refcount_table_offset", at, 48));
        }
        Ok(RefcountRef { range: ByteRange::new(at, bytes), order: self.refcount_order })
    }

    fn backing(&self, cluster_size: u64, format: Option<String>) -> Result<Option<Backing>> {
        if self.backing_offset == 0 || self.backing_len == 0 {
            return Ok(None);
        }
        if self.backing_len > BACKING_NAME_LEN_MAX {
            return Err(Fault::field("backing_file_size", self.backing_len, 16));
        }
        let name = self.backing_offset.checked_add(u64::from(self.backing_len)).and_then(|end| {
            let start = usize::try_from(self.backing_offset).ok()?;
            let end = usize::try_from(end).ok()?;
            self.area.get(start..end)
        });
        match name {
            Some(name)
                if self.backing_offset >= u64::from(self.header_len)
                    && self.backing_offset < cluster_size =>
            {
                Ok(Some(Backing { name: name.to_vec(), format }))
            }
            Some(_) | None => Err(Fault::field("backing_file_offset", self.backing_offset, 8)),
        }
    }

    fn data_file(&self, name: Option<Vec<u8>>, backing: Option<&Backing>) -> Result<Option<DataFile>> {
        let raw = self.autoclear & AUTOCLEAR_RAW_DATA != 0;
        if self.incompatible & INCOMPATIBLE_DATA_FILE == 0 {
            // An autoclear bit that lost what it stands for has no meaning left.
            return Ok(None);
        }
        if raw && backing.is_some() {
            return Err(Fault::field(
                "autoclear_features (a raw data file and a backing file)",
                self.autoclear,
                88,
            ));
        }
        let layout = if raw { DataLayout::Raw } else { DataLayout::Mapped };
        Ok(Some(DataFile { name, layout }))
    }

    fn extensions(&self, cluster_size: u64) -> Result<Extensions> {
        let end = match self.backing_offset {
            0 => cluster_size,
            offset if offset > cluster_size => {
                return Err(Fault::field("backing_file_offset", offset, 8));
            }
            offset => offset,
        };
        let mut extensions = Extensions::default();
        let mut at = u64::from(self.header_len);
        // A file may end within its first cluster: there is nothing behind its end.
        let end = end.min(self.area.len() as u64);
        while end.saturating_sub(at) >= 8 {
            let place = usize::try_from(at).unwrap_or(usize::MAX);
            let (Some(kind), Some(len)) =
                (be32(&self.area, place), be32(&self.area, place.saturating_add(4)))
            else {
                break;
            };
            if kind == EXTENSION_END {
                break;
            }
            let len = u64::from(len);
            if len > end - at - 8 {
                return Err(Fault::field("length of a header extension", len, at + 4));
            }
            let start = place + 8;
            let data = usize::try_from(len).ok().and_then(|len| self.area.get(start..start + len));
            extensions.add(kind, data.unwrap_or_default(), at, self.autoclear)?;
            at += 8 + len.next_multiple_of(8);
        }
        Ok(extensions)
    }
}

/// What the header extensions say, as far as this reader knows them.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<Vec<u8>>,
    bitmaps: Option<BitmapsRef>,
    feature_names: Vec<u8>,
}

impl Extensions {
    fn add(&mut self, kind: u32, data: &[u8], at: u64, autoclear: u64) -> Result<()> {
        match kind {
            EXTENSION_BACKING_FORMAT => {
                self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
            }
            EXTENSION_DATA_FILE => self.data_file = Some(data.to_vec()),
            EXTENSION_FEATURE_NAMES => self.feature_names = data.to_vec(),
            EXTENSION_BITMAPS => {
                let cut = || Fault::field("length of the bitmaps extension", data.len() as u64, at + 4);
                let state = if autoclear & AUTOCLEAR_BITMAPS == 0 {
                    BitmapsState::Stale
                } else {
                    BitmapsState::Consistent
                };
                self.bitmaps = Some(BitmapsRef {
                    count: be32(data, 0).ok_or_else(cut)?,
                    directory_len: be64(data, 8).ok_or_else(cut)?,
                    directory: be64(data, 16).ok_or_else(cut)?,
                    state,
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn incompatible_name(&self, bit: u32) -> Option<String> {
        let entry = self
            .feature_names
            .chunks_exact(FEATURE_NAME_LEN)
            .find(|entry| matches!(entry, [0, named, ..] if u32::from(*named) == bit))?;
        let name = entry.get(2..)?.split(|byte| *byte == 0).next()?;
        (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
    }
}

impl Header {
    /// Whether refcounts may be behind: whoever wrote last did not close the image. They are not needed to read.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether a writer found the image damaged. It may be read, not written.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Width of a refcount in bits.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcounts.order
    }
}

#[cfg(test)]
mod tests;
