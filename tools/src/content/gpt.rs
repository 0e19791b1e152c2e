//! GUID partition tables.
//!
//! Owns [`read`]. Both headers and both arrays have checksums, which are compared; the first sound pair is what is
//! shown, and what is wrong with the other is said. Sectors of 512 and 4096 bytes. Layout: the UEFI specification.

use bedplate_engine::error::Result;
use flate2::Crc;

use super::{Partition, Table, Window, judge, le32, le64};

/// Entries of one table.
pub const ENTRIES_MAX: u32 = 4096;

pub const EFI_SYSTEM: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
pub const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";

const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_LEN_MIN: u32 = 92;
const ENTRY_LEN_MIN: u32 = 128;
const ENTRY_LEN_MAX: u32 = 4096;
const NAME_AT: usize = 56;
const NAME_UNITS: usize = 36;
/// Attribute of a partition that a BIOS may start.
const LEGACY_BOOT: u64 = 1 << 2;

struct Header {
    sector: u64,
    alternate: u64,
    uuid: String,
    entries_at: u64,
    entry_count: u32,
    entry_len: u32,
    entries_crc: u32,
}

/// The table, if the disk has one or the rest of one.
pub fn read(disk: Window<'_>) -> Result<Option<Table>> {
    for sector in [512, 4096] {
        let mut damage = Vec::new();
        let primary = whole(disk, sector, sector, "first", &mut damage)?;
        let last = match &primary {
            Some((header, _)) => header.alternate.saturating_mul(sector),
            None => (disk.len() / sector).saturating_sub(1) * sector,
        };
        let backup = whole(disk, last, sector, "second", &mut damage)?;
        let found_one = !damage.is_empty() || primary.is_some() || backup.is_some();
        if !found_one {
            continue;
        }
        if primary.is_none() && damage.is_empty() {
            damage.push("the first header is not there".to_owned());
        }
        if backup.is_none() && damage.is_empty() {
            damage.push("the second header is not there".to_owned());
        }
        let mut table = Table { damage, ..Table::default() };
        if let Some((header, entries)) = primary.or(backup) {
            table.partitions = partitions(&header, &entries);
            table.uuid = Some(header.uuid);
        }
        judge(&table.partitions, disk.len(), &mut table.damage);
        return Ok(Some(table));
    }
    Ok(None)
}

/// A sound header at `at` with its array.
fn whole(
    disk: Window<'_>,
    at: u64,
    sector: u64,
    which: &str,
    damage: &mut Vec<String>,
) -> Result<Option<(Header, Vec<u8>)>> {
    let Some(bytes) = disk.read(at, sector)?.filter(|bytes| bytes.starts_with(SIGNATURE)) else {
        return Ok(None);
    };
    let Some(header) = parse(&bytes, sector) else {
        damage.push(format!("the {which} header does not agree with its checksum"));
        return Ok(None);
    };
    if header.entry_count > ENTRIES_MAX
        || !(ENTRY_LEN_MIN..=ENTRY_LEN_MAX).contains(&header.entry_len)
        || !header.entry_len.is_power_of_two()
    {
        let (count, len) = (header.entry_count, header.entry_len);
        damage.push(format!("the {which} header has {count} entries of {len} bytes"));
        return Ok(None);
    }
    let len = u64::from(header.entry_count) * u64::from(header.entry_len);
    let entries = match header.entries_at.checked_mul(sector) {
        Some(at) => disk.read(at, len)?,
        None => None,
    };
    match entries {
        Some(entries) if crc(&[&entries]) == header.entries_crc => Ok(Some((header, entries))),
        Some(_) | None => {
            damage.push(format!("the {which} array of partitions does not agree with its checksum"));
            Ok(None)
        }
    }
}

/// The fields, if the checksum agrees.
fn parse(bytes: &[u8], sector: u64) -> Option<Header> {
    let header_len = le32(bytes, 12).filter(|len| *len >= HEADER_LEN_MIN && u64::from(*len) <= sector)?;
    let rest = bytes.get(20..usize::try_from(header_len).ok()?)?;
    // The checksum is taken with its own field as zeros.
    (crc(&[bytes.get(..16)?, &[0; 4], rest]) == le32(bytes, 16)?).then_some(())?;
    Some(Header {
        sector,
        alternate: le64(bytes, 32)?,
        uuid: guid(bytes.get(56..72)?),
        entries_at: le64(bytes, 72)?,
        entry_count: le32(bytes, 80)?,
        entry_len: le32(bytes, 84)?,
        entries_crc: le32(bytes, 88)?,
    })
}

fn crc(parts: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

fn partitions(header: &Header, entries: &[u8]) -> Vec<Partition> {
    let len = usize::try_from(header.entry_len).unwrap_or(usize::MAX);
    let entries = (1..).zip(entries.chunks_exact(len));
    entries.filter_map(|(number, entry)| partition(number, entry, header.sector)).collect()
}

fn partition(number: u32, entry: &[u8], sector: u64) -> Option<Partition> {
    let kind = entry.get(..16)?;
    if kind.iter().all(|byte| *byte == 0) {
        return None;
    }
    let (first, last) = (le64(entry, 32)?, le64(entry, 40)?);
    let kind = guid(kind);
    let units = entry.get(NAME_AT..NAME_AT + NAME_UNITS * 2)?.as_chunks::<2>().0;
    let units: Vec<u16> =
        units.iter().map(|unit| u16::from_le_bytes(*unit)).take_while(|unit| *unit != 0).collect();
    let name = String::from_utf16_lossy(&units);
    Some(Partition {
        number,
        start: first.saturating_mul(sector),
        length: last.saturating_add(1).saturating_sub(first).saturating_mul(sector),
        type_name: type_name(&kind),
        kind,
        name: (!name.is_empty()).then_some(name),
        uuid: Some(guid(entry.get(16..32)?)),
        active: le64(entry, 48)? & LEGACY_BOOT != 0,
        file_system: None,
    })
}

/// 16 bytes as they are written: the first three groups are little-endian.
fn guid(bytes: &[u8]) -> String {
    let hex = |places: &[usize]| -> String {
        places.iter().map(|place| format!("{:02x}", bytes.get(*place).copied().unwrap_or(0))).collect()
    };
    [&[3, 2, 1, 0][..], &[5, 4], &[7, 6], &[8, 9], &[10, 11, 12, 13, 14, 15]].map(hex).join("-")
}

fn type_name(kind: &str) -> Option<&'static str> {
    Some(match kind {
        EFI_SYSTEM => "EFI system",
        BIOS_BOOT => "BIOS boot",
        "0fc63daf-8483-4772-8e79-3d69d8477de4" => "Linux",
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => "Linux swap",
        "e6d6d379-f507-44c2-a23c-238f2a3df928" => "Linux LVM",
        "a19d880f-05fc-4d3b-a006-743f0f84911e" => "Linux RAID",
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" => "Linux root (x86-64)",
        "b921b045-1df0-41c3-af44-4c6f280d3fae" => "Linux root (ARM-64)",
        "bc13c2ff-59e6-4262-a352-b275fd6f7172" => "Linux extended boot",
        "933ac7e1-2eb4-4f13-b844-0e14e2aef915" => "Linux home",
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7" => "Microsoft basic data",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae" => "Microsoft reserved",
        "9e1a2d38-c612-4316-aa26-8b49521e5a8b" => "PowerPC PReP boot",
        _ => return None,
    })
}
