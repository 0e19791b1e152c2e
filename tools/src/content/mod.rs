//! What is in a disk: its partition table, the file systems in it, and whether firmware would start it.
//!
//! Owns [`look`] and [`Window`], the checked way to bytes of a device. What is read was written by a guest, so every
//! offset is held against the device, every count has a limit with a name, and what does not add up is damage that is
//! said, not an error.

mod gpt;
mod mbr;
mod superblock;

use bedplate_engine::{
    device::BlockDevice,
    error::Result,
    units::{ByteRange, to_usize},
};
use serde::Serialize;

pub use self::superblock::FileSystem;
use crate::print;

/// Most bytes that are asked for at once.
const READ_LEN_MAX: u64 = 2 << 20;

/// What a disk holds.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Content {
    /// "gpt" or "mbr".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition_table: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition_table_uuid: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub partitions: Vec<Partition>,
    /// One that covers the disk without a partition table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_system: Option<FileSystem>,
    /// Why firmware would start it; empty where nothing looks so.
    pub bootable: Vec<&'static str>,
    /// What does not add up in the partition table.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub table_damage: Vec<String>,
}

/// One entry of a partition table.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Partition {
    /// As the kernel counts it.
    pub number: u32,
    pub start: u64,
    pub length: u64,
    /// GUID, or two hexadecimal digits.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub type_name: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Marked for a BIOS to start.
    pub active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_system: Option<FileSystem>,
}

/// What a partition table says.
#[derive(Debug, Default)]
struct Table {
    uuid: Option<String>,
    partitions: Vec<Partition>,
    damage: Vec<String>,
}

/// A part of a device.
#[derive(Clone, Copy)]
pub struct Window<'a> {
    device: &'a dyn BlockDevice,
    range: ByteRange,
}

impl<'a> Window<'a> {
    pub fn whole(device: &'a dyn BlockDevice) -> Window<'a> {
        Window { device, range: ByteRange::new(0, device.geometry().size.0) }
    }

    /// The part at `start`, as far as this one goes.
    fn part(self, start: u64, len: u64) -> Option<Window<'a>> {
        let whole = ByteRange::new(0, self.range.len.0);
        let end = start.checked_add(len)?;
        let part = ByteRange::new(start, end - start).intersect(whole)?;
        let range = ByteRange::new(self.range.start.0 + part.start.0, part.len.0);
        Some(Window { device: self.device, range })
    }

    pub fn len(self) -> u64 {
        self.range.len.0
    }

    /// The `len` bytes at `at`; none where they do not lie within.
    pub fn read(self, at: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len());
        if !fits || len > READ_LEN_MAX {
            return Ok(None);
        }
        let mut bytes = vec![0; to_usize(len)];
        self.device.read_at(&mut bytes, self.range.start.0 + at)?;
        Ok(Some(bytes))
    }
}

/// Look at a disk.
pub fn look(device: &dyn BlockDevice) -> Result<Content> {
    let disk = Window::whole(device);
    let file_system = superblock::probe(disk)?;
    let has_boot_code = mbr::has_boot_code(disk)?;
    let mut content = Content::default();
    if let Some(table) = gpt::read(disk)? {
        content.take("gpt", table);
        if content.partitions.iter().any(|partition| partition.kind == gpt::EFI_SYSTEM) {
            content.bootable.push("UEFI: an EFI system partition");
        }
        let has_bios_boot = content.partitions.iter().any(|partition| partition.kind == gpt::BIOS_BOOT);
        if has_boot_code && has_bios_boot {
            content.bootable.push("BIOS: boot code and a BIOS boot partition");
        }
    } else if let Some(table) = mbr::read(disk, file_system.is_some())? {
        content.take("mbr", table);
        if content.partitions.iter().any(|partition| partition.kind == mbr::EFI_SYSTEM) {
            content.bootable.push("UEFI: an EFI system partition");
        }
    }
    let is_active = content.partitions.iter().any(|partition| partition.active);
    if has_boot_code && is_active {
        content.bootable.push("BIOS: boot code and an active partition");
    }
    if superblock::has_el_torito(disk)? {
        content.bootable.push("CD: an El Torito boot record");
    }
    for partition in &mut content.partitions {
        if let Some(window) = disk.part(partition.start, partition.length) {
            partition.file_system = superblock::probe(window)?;
        }
    }
    content.file_system = file_system;
    Ok(content)
}

impl Content {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.partition_table.is_none() && self.file_system.is_none() && self.bootable.is_empty()
    }

    fn take(&mut self, name: &'static str, table: Table) {
        self.partition_table = Some(name);
        self.partition_table_uuid = table.uuid;
        self.partitions = table.partitions;
        self.table_damage = table.damage;
    }

    /// For people.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = Vec::new();
        if let Some(table) = self.partition_table {
            let uuid =
                self.partition_table_uuid.as_deref().map_or_else(String::new, |uuid| format!(" {uuid}"));
            rows.push(("partition table".to_owned(), format!("{table}{uuid}")));
        }
        if let Some(file_system) = &self.file_system {
            rows.push(("file system".to_owned(), file_system.to_string()));
        }
        let boot =
            if self.bootable.is_empty() { "nothing looks so".to_owned() } else { self.bootable.join("; ") };
        rows.push(("bootable".to_owned(), boot));
        rows
    }

    /// For people.
    pub fn table(&self) -> Option<String> {
        let rows = self.partitions.iter().map(|partition| {
            [
                partition.number.to_string(),
                format!("{:#x}", partition.start),
                crate::size::show(partition.length),
                partition.type_name.map_or_else(|| partition.kind.clone(), str::to_owned),
                partition.name.clone().unwrap_or_default(),
                partition.file_system.as_ref().map_or_else(String::new, ToString::to_string),
            ]
        });
        let table = print::listing(["NUMBER", "START", "SIZE", "TYPE", "NAME", "CONTENT"], rows);
        (!self.partitions.is_empty()).then_some(table)
    }
}

/// Say where partitions reach past the disk or into one another. Containers of partitions are not among them.
fn judge(partitions: &[Partition], disk_len: u64, damage: &mut Vec<String>) {
    let mut sorted: Vec<&Partition> =
        partitions.iter().filter(|partition| !mbr::is_extended(partition)).collect();
    sorted.sort_by_key(|partition| partition.start);
    for partition in &sorted {
        if partition.start.saturating_add(partition.length) > disk_len {
            damage.push(format!("partition {} reaches past the end of the disk", partition.number));
        }
    }
    for pair in sorted.windows(2) {
        if let [before, after] = pair
            && before.start.saturating_add(before.length) > after.start
        {
            damage.push(format!("partitions {} and {} overlap", before.number, after.number));
        }
    }
}

/// The little-endian number of two bytes at `at`.
fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

/// The little-endian number of four bytes at `at`.
fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// The little-endian number of eight bytes at `at`.
fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use bedplate_engine::{
        device::{Access, Complete, Extent, ExtentKind, Geometry, Request},
        units::ByteLen,
    };

    use super::*;

    struct Bytes(Vec<u8>);

    impl BlockDevice for Bytes {
        fn geometry(&self) -> Geometry {
            Geometry { size: ByteLen(self.0.len() as u64), access: Access::ReadOnly }
        }

        fn submit(&self, _request: Request, _complete: Complete) {
            unreachable!("only read_at is used");
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
            Ok(())
        }

        fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
            Ok(vec![Extent { range, kind: ExtentKind::Data }])
        }
    }

    /// An extended boot record whose next one is at this sector of the extended partition.
    fn boot_record(bytes: &mut [u8], kind: u8, start: u32, len: u32, next: u32) {
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (at, kind, start) in [(446, kind, start), (462, 5, next)] {
            bytes[at + 4] = kind;
            bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
            bytes[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
        }
    }

    #[test]
    fn a_chain_of_logical_partitions_that_comes_back_ends() {
        let mut disk = vec![0; 512 * 64];
        boot_record(&mut disk, 0x83, 1, 4, 8);
        boot_record(&mut disk[8 * 512..], 0x83, 1, 4, 10);
        boot_record(&mut disk[18 * 512..], 0x83, 1, 4, 0);
        disk[462 + 12] = 60;
        let content = look(&Bytes(disk)).unwrap();
        assert!(content.table_damage.iter().any(|what| what.contains("comes back")), "{content:?}");
        assert_eq!(content.partitions.len(), 4);
    }

    #[test]
    fn a_record_past_the_disk_or_its_partition_is_damage() {
        for next in [u32::MAX, 62, 30] {
            let mut disk = vec![0; 512 * 64];
            boot_record(&mut disk, 0x83, 1, 4, 8);
            boot_record(&mut disk[8 * 512..], 0x83, 1, 4, next);
            assert!(!look(&Bytes(disk)).unwrap().table_damage.is_empty(), "{next}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let magics: [(usize, &[u8]); 12] = [
            (512, b"EFI PART"),
            (4096, b"EFI PART"),
            (510, &[0x55, 0xaa]),
            (1080, &[0x53, 0xef]),
            (0, b"XFSB"),
            (65600, b"_BHRfS_M"),
            (4086, b"SWAPSPACE2"),
            (512, b"LABELONE"),
            (0, b"LUKS\xba\xbe\0\x02"),
            (32768, b"\x01CD001"),
            (0, b"hsqs"),
            (82, b"FAT32   "),
        ];
        for len in [0, 1, 511, 512, 1024, 4096, 70_000] {
            for _ in 0..200 {
                let mut disk: Vec<u8> = (0..len).map(|_| random().to_le_bytes()[0]).collect();
                for (at, magic) in magics {
                    if random() % 3 == 0 && at + magic.len() <= len {
                        disk[at..at + magic.len()].copy_from_slice(magic);
                    }
                }
                look(&Bytes(disk)).unwrap();
            }
        }
    }
}
