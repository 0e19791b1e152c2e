//! File systems and other contents, by the structure that each keeps at a fixed place.
//!
//! Owns [`probe`] and what is said of each: name, label, uuid, size. A superblock proves nothing about the rest, and
//! nothing of it is followed. Layouts: the headers of the kernel, of cryptsetup and of LVM, and ECMA-119.

use std::fmt;

use bedplate_engine::error::Result;
use serde::Serialize;

use super::{Window, le16, le32, le64};
use crate::{
    print, size,
    tables::{be16, be32, be64},
};

/// What a superblock says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileSystem {
    #[serde(rename = "type")]
    pub kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Bytes that it says it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)?;
        if let Some(label) = &self.label {
            write!(f, " {label:?}")?;
        }
        if let Some(uuid) = &self.uuid {
            write!(f, " {uuid}")?;
        }
        match self.size {
            Some(size) => write!(f, " ({})", size::show(size)),
            None => Ok(()),
        }
    }
}

/// Reads one kind; none where the bytes are not its.
type Probe = fn(Window<'_>) -> Result<Option<FileSystem>>;

/// In this order: containers first, and FAT, which has hardly a signature, last.
const PROBES: [Probe; 11] = [luks, lvm, xfs, btrfs, ext, swap, squashfs, iso9660, ntfs, exfat, fat];

/// What a disk or partition holds.
pub fn probe(window: Window<'_>) -> Result<Option<FileSystem>> {
    for probe in PROBES {
        if let Some(found) = probe(window)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Whether a CD's second descriptor is one to start from.
pub fn has_el_torito(window: Window<'_>) -> Result<bool> {
    let descriptor = window.read(17 * 2048, 64)?;
    Ok(descriptor.is_some_and(|bytes| bytes.starts_with(b"\0CD001\x01EL TORITO SPECIFICATION")))
}

fn named(kind: &'static str, label: &[u8], uuid: Option<String>, size: Option<u64>) -> FileSystem {
    FileSystem { kind, label: text(label), uuid, size }
}

/// Up to the first NUL, without blanks at the end; none if that is empty.
fn text(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next()?;
    let text = String::from_utf8_lossy(text).trim_end().to_owned();
    (!text.is_empty()).then_some(text)
}

/// 16 bytes in the order in which they are written.
fn uuid(bytes: Option<&[u8]>) -> Option<String> {
    let hex = print::hex(bytes.filter(|bytes| bytes.len() == 16)?);
    let groups: Option<Vec<&str>> =
        [0..8, 8..12, 12..16, 16..20, 20..32].into_iter().map(|group| hex.get(group)).collect();
    let uuid = groups?.join("-");
    uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-')).then_some(uuid)
}

fn ext(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sb) = window.read(1024, 1024)? else { return Ok(None) };
    Ok((|| {
        (le16(&sb, 56)? == 0xef53).then_some(())?;
        let (compatible, incompatible, read_only) = (le32(&sb, 92)?, le32(&sb, 96)?, le32(&sb, 100)?);
        // Extents, 64 bits, flexible groups; huge files, group checksums and what came with them.
        let kind = if incompatible & 0x2c0 != 0 || read_only & 0x478 != 0 {
            "ext4"
        } else if compatible & 0x4 != 0 {
            "ext3"
        } else {
            "ext2"
        };
        let high = if incompatible & 0x80 != 0 { u64::from(le32(&sb, 0x150)?) } else { 0 };
        let blocks = high << 32 | u64::from(le32(&sb, 4)?);
        let block_len = 1024_u64.checked_shl(le32(&sb, 24)?)?;
        Some(named(kind, sb.get(120..136)?, uuid(sb.get(104..120)), blocks.checked_mul(block_len)))
    })())
}

fn xfs(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sb) = window.read(0, 512)?.filter(|sb| sb.starts_with(b"XFSB")) else { return Ok(None) };
    Ok((|| {
        let size = be64(&sb, 8)?.checked_mul(be32(&sb, 4)?.into());
        Some(named("xfs", sb.get(108..120)?, uuid(sb.get(32..48)), size))
    })())
}

fn btrfs(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sb) = window.read(65536, 4096)? else { return Ok(None) };
    Ok((|| {
        (sb.get(64..72)? == b"_BHRfS_M").then_some(())?;
        Some(named("btrfs", sb.get(299..555)?, uuid(sb.get(32..48)), le64(&sb, 112)))
    })())
}

fn swap(window: Window<'_>) -> Result<Option<FileSystem>> {
    for page in [4096, 8192, 16384, 65536] {
        let signature = window.read(page - 10, 10)?;
        if signature.as_deref() != Some(b"SWAPSPACE2") {
            continue;
        }
        let Some(header) = window.read(1024, 64)? else { continue };
        let pages = le32(&header, 4).map(|last| u64::from(last) + 1);
        let size = pages.and_then(|pages| pages.checked_mul(page));
        let label = header.get(28..44).unwrap_or_default();
        return Ok(Some(named("swap", label, uuid(header.get(12..28)), size)));
    }
    Ok(None)
}

fn lvm(window: Window<'_>) -> Result<Option<FileSystem>> {
    for sector in 0..4 {
        let Some(label) = window.read(sector * 512, 512)? else { continue };
        if !label.starts_with(b"LABELONE") || label.get(24..32) != Some(b"LVM2 001") {
            continue;
        }
        let header = le32(&label, 20).and_then(|at| label.get(usize::try_from(at).ok()?..)?.get(..40));
        let uuid = header.and_then(|header| text(header.get(..32)?)).and_then(|text| {
            let groups: Option<Vec<&str>> = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32]
                .into_iter()
                .map(|group| text.get(group))
                .collect();
            Some(groups?.join("-"))
        });
        let size = header.and_then(|header| le64(header, 32));
        return Ok(Some(named("lvm2-pv", &[], uuid, size)));
    }
    Ok(None)
}

fn luks(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(header) = window.read(0, 512)?.filter(|header| header.starts_with(b"LUKS\xba\xbe")) else {
        return Ok(None);
    };
    let uuid = text(header.get(168..208).unwrap_or_default());
    Ok(match be16(&header, 6) {
        Some(1) => Some(named("luks1", &[], uuid, None)),
        Some(2) => Some(named("luks2", header.get(24..72).unwrap_or_default(), uuid, None)),
        Some(_) | None => None,
    })
}

fn iso9660(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(descriptor) = window.read(32768, 2048)? else { return Ok(None) };
    Ok((|| {
        (descriptor.get(..6)? == b"\x01CD001").then_some(())?;
        let size = u64::from(le32(&descriptor, 80)?) * u64::from(le16(&descriptor, 128)?);
        Some(named("iso9660", descriptor.get(40..72)?, None, Some(size)))
    })())
}

fn squashfs(window: Window<'_>) -> Result<Option<FileSystem>> {
    let sb = window.read(0, 96)?.filter(|sb| sb.starts_with(b"hsqs"));
    Ok(sb.map(|sb| named("squashfs", &[], None, le64(&sb, 40))))
}

fn ntfs(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sector) = window.read(0, 512)?.filter(|sector| sector.get(3..11) == Some(b"NTFS    ")) else {
        return Ok(None);
    };
    Ok((|| {
        let size = le64(&sector, 40)?.checked_mul(le16(&sector, 11)?.into());
        Some(named("ntfs", &[], Some(format!("{:016X}", le64(&sector, 72)?)), size))
    })())
}

fn exfat(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sector) = window.read(0, 512)?.filter(|sector| sector.get(3..11) == Some(b"EXFAT   ")) else {
        return Ok(None);
    };
    Ok((|| {
        let size = le64(&sector, 72)?.checked_mul(1_u64.checked_shl((*sector.get(108)?).into())?);
        Some(named("exfat", &[], Some(serial(le32(&sector, 100)?)), size))
    })())
}

fn fat(window: Window<'_>) -> Result<Option<FileSystem>> {
    let Some(sector) = window.read(0, 512)?.filter(|sector| sector.ends_with(&[0x55, 0xaa])) else {
        return Ok(None);
    };
    Ok((|| {
        let (label_at, serial_at) = if sector.get(82..90)? == b"FAT32   " {
            (71, 67)
        } else if sector.get(54..58)? == b"FAT1" {
            (43, 39)
        } else {
            return None;
        };
        let bytes_per_sector = u64::from(le16(&sector, 11)?);
        matches!(bytes_per_sector, 512 | 1024 | 2048 | 4096).then_some(())?;
        let sectors = match le16(&sector, 19)? {
            0 => u64::from(le32(&sector, 32)?),
            small => u64::from(small),
        };
        let label = sector.get(label_at..label_at + 11)?;
        let label = if label == b"NO NAME    " { &[][..] } else { label };
        let serial = serial(le32(&sector, serial_at)?);
        Some(named("vfat", label, Some(serial), Some(sectors * bytes_per_sector)))
    })())
}

/// Volume serial numbers of the FAT family.
fn serial(number: u32) -> String {
    format!("{:04X}-{:04X}", number >> 16, number & 0xffff)
}
