//! Partition tables in the first sector, with the chain of logical partitions.
//!
//! Owns [`read`]. A chain of extended boot records must stay within its partition and never come back; it is followed
//! for [`LOGICAL_MAX`] entries.

use std::collections::HashSet;

use bedplate_engine::error::Result;

use super::{Partition, Table, Window, judge, le32};

/// Logical partitions of one disk.
pub const LOGICAL_MAX: u32 = 256;

/// What the type of an EFI system partition is called.
pub const EFI_SYSTEM: &str = "ef";

const SECTOR: u64 = 512;
const BOOT_CODE_LEN: usize = 440;
const SERIAL_AT: usize = 440;
const ENTRIES_AT: usize = 446;
const ENTRY_LEN: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// First number of a logical partition.
const LOGICAL_FIRST: u32 = 5;

#[derive(Clone, Copy, Debug)]
struct Entry {
    status: u8,
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn is_used(self) -> bool {
        self.kind != 0 && self.len > 0
    }

    fn partition(self, number: u32, start: u64) -> Partition {
        Partition {
            number,
            start,
            length: self.len,
            kind: format!("{:02x}", self.kind),
            type_name: type_name(self.kind),
            name: None,
            uuid: None,
            active: self.status == 0x80,
            file_system: None,
        }
    }
}

/// Whether a partition holds others.
pub fn is_extended(partition: &Partition) -> bool {
    matches!(partition.kind.as_str(), "05" | "0f" | "85")
}

/// Whether the first sector begins with something that a BIOS could run.
pub fn has_boot_code(disk: Window<'_>) -> Result<bool> {
    let Some(sector) = boot_sector(disk, 0)? else { return Ok(false) };
    Ok(sector.get(..BOOT_CODE_LEN).is_some_and(|code| code.iter().any(|byte| *byte != 0)))
}

/// The table, if the first sector has one. The boot sector of a file system has the same signature, so where
/// `is_file_system`, only entries that make sense count.
pub fn read(disk: Window<'_>, is_file_system: bool) -> Result<Option<Table>> {
    let Some(sector) = boot_sector(disk, 0)? else { return Ok(None) };
    let entries = entries(&sector);
    let makes_sense = entries.iter().all(|entry| matches!(entry.status, 0 | 0x80));
    let within = entries.iter().filter(|entry| entry.is_used()).all(|entry| entry.start < disk.len());
    let is_used = entries.iter().any(|entry| entry.is_used());
    if !makes_sense || (is_file_system && !(within && is_used)) {
        return Ok(None);
    }
    let serial = le32(&sector, SERIAL_AT).unwrap_or(0);
    if !is_used && serial == 0 {
        return Ok(None);
    }
    let mut table = Table { uuid: Some(format!("{serial:08x}")), ..Table::default() };
    for (number, entry) in (1..).zip(&entries) {
        if entry.is_used() {
            table.partitions.push(entry.partition(number, entry.start));
        }
    }
    if let Some(extended) = entries.iter().find(|entry| entry.is_extended() && entry.is_used()) {
        logical(disk, *extended, &mut table)?;
    }
    for partition in &mut table.partitions {
        partition.uuid = Some(format!("{serial:08x}-{:02x}", partition.number));
    }
    judge(&table.partitions, disk.len(), &mut table.damage);
    Ok(Some(table))
}

/// Follow the chain of logical partitions.
fn logical(disk: Window<'_>, extended: Entry, table: &mut Table) -> Result<()> {
    let end = extended.start.saturating_add(extended.len);
    let mut seen = HashSet::new();
    let mut at = extended.start;
    let mut number = LOGICAL_FIRST;
    loop {
        if !seen.insert(at) {
            table.damage.push("the chain of logical partitions comes back to itself".to_owned());
            return Ok(());
        }
        if number == LOGICAL_FIRST + LOGICAL_MAX {
            table.damage.push(format!("there are more than {LOGICAL_MAX} logical partitions"));
            return Ok(());
        }
        let Some(sector) = boot_sector(disk, at)? else {
            table.damage.push(format!("there is no boot record of logical partitions at byte {at}"));
            return Ok(());
        };
        let [here, next, ..] = entries(&sector);
        if here.is_used() && !here.is_extended() {
            table.partitions.push(here.partition(number, at.saturating_add(here.start)));
            number += 1;
        }
        if !next.is_used() || !next.is_extended() {
            return Ok(());
        }
        at = extended.start.saturating_add(next.start);
        if at >= end {
            table.damage.push("the chain of logical partitions leaves its partition".to_owned());
            return Ok(());
        }
    }
}

/// The sector at `at`, if it has the signature.
fn boot_sector(disk: Window<'_>, at: u64) -> Result<Option<Vec<u8>>> {
    let sector = disk.read(at, SECTOR)?;
    Ok(sector.filter(|sector| sector.ends_with(&SIGNATURE)))
}

fn entries(sector: &[u8]) -> [Entry; 4] {
    [0, 1, 2, 3].map(|index| {
        let at = ENTRIES_AT + index * ENTRY_LEN;
        let byte = |place: usize| sector.get(at + place).copied().unwrap_or(0);
        let sectors = |place: usize| u64::from(le32(sector, at + place).unwrap_or(0)) * SECTOR;
        Entry { status: byte(0), kind: byte(4), start: sectors(8), len: sectors(12) }
    })
}

fn type_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        0x01 | 0x04 | 0x06 | 0x0e => "FAT",
        0x05 | 0x0f | 0x85 => "extended",
        0x07 => "NTFS or exFAT",
        0x0b | 0x0c => "FAT32",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xa5 => "FreeBSD",
        0xee => "GPT protective",
        0xef => "EFI system",
        0xfd => "Linux RAID",
        _ => return None,
    })
}
