//! A node's disk as a file system of its own on a loop device: small enough to be filled, with sectors of any size, and
//! one that can go away.

use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::node::Node;

/// What the disk is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    /// The smallest that its tools make, or that a node can do something on.
    pub fn smallest_mib(self) -> u64 {
        match self {
            FileSystem::Ext4 => 64,
            FileSystem::Xfs => 300,
        }
    }
}

/// The file system, mounted as the node's disk until this is dropped.
pub struct LoopDisk {
    dir: PathBuf,
    pub device: String,
    ballast: PathBuf,
}

impl LoopDisk {
    /// In place of the disk of a node that does not run.
    pub fn mount(node: &Node, file_system: FileSystem, mib: u64, sector_size: u64) -> LoopDisk {
        node.sh(&format!("truncate -s {mib}M fs.img"));
        LoopDisk::over(node, &node.scratch("fs.img"), file_system, sector_size)
    }

    /// The same over a file that is there.
    pub fn over(node: &Node, file: &Path, file_system: FileSystem, sector_size: u64) -> LoopDisk {
        let losetup =
            format!("losetup --find --show --sector-size {sector_size} --direct-io=on '{}'", file.display());
        let device = node.sh(&losetup).trim().to_owned();
        let disk = LoopDisk { dir: node.path("disk"), ballast: node.path("disk/ballast"), device };
        // All of it is for the node: no blocks that only root has.
        let make = match file_system {
            FileSystem::Ext4 => "mkfs.ext4 -q -b 4096 -m 0",
            FileSystem::Xfs => "mkfs.xfs -q",
        };
        node.sh(&format!("{make} {}", disk.device));
        disk.mount_again(node);
        node.sh(&format!("chmod 700 {}", disk.dir.display()));
        disk
    }

    pub fn mount_again(&self, node: &Node) {
        node.sh(&format!("mount {} {}", self.device, self.dir.display()));
    }

    /// Take it off the node's directory, also while the node uses it.
    pub fn unmount(&self, node: &Node) {
        node.sh(&format!("umount -l {}", self.dir.display()));
    }

    /// Where on the device the bytes of a file lie, each piece with its offset in the file.
    pub fn places_of(&self, node: &Node, file: &Path) -> Vec<(u64, Range<u64>)> {
        let text = node.sh(&format!("sync '{0}'; filefrag -b1 -v '{0}'", file.display()));
        // One line per piece: its number, and first..last of the file's and of the device's bytes.
        let numbers = |line: &str| -> Option<Vec<u64>> {
            let words = line.split([':', '.', ' ']).filter(|word| !word.is_empty());
            words.take(5).map(|word| word.parse().ok()).collect()
        };
        let pieces: Vec<_> = text.lines().filter_map(numbers).filter(|numbers| numbers.len() == 5).collect();
        assert!(!pieces.is_empty(), "{}: {text}", file.display());
        pieces.into_iter().map(|numbers| (numbers[1], numbers[3]..numbers[4] + 1)).collect()
    }

    /// The same of a part that lies in one piece.
    pub fn place_of(&self, node: &Node, file: &Path, at: u64, len: u64) -> Range<u64> {
        let places = self.places_of(node, file);
        let holds = |(first, place): &(u64, Range<u64>)| {
            (*first <= at && at + len <= first + place.end - place.start).then(|| place.start + at - first)
        };
        let start = places.iter().find_map(holds);
        let start = start.unwrap_or_else(|| panic!("{at}+{len} is not in one piece: {places:?}"));
        start..start + len
    }

    /// What can still be allocated.
    pub fn free_bytes(&self) -> u64 {
        let found = nix::sys::statvfs::statvfs(&self.dir).unwrap();
        found.blocks_available() * found.fragment_size()
    }

    /// Take all but `left` bytes with a file that is not the node's.
    pub fn fill(&self, left: u64) {
        let file = File::options().create(true).append(true).open(&self.ballast).unwrap();
        loop {
            let (free, len) = (self.free_bytes(), file.metadata().unwrap().len());
            let step = free.saturating_sub(left);
            if step < 4096 {
                return;
            }
            let grow = |step: u64| {
                let range = [len, step].map(|n| i64::try_from(n).expect("small"));
                fallocate(&file, FallocateFlags::empty(), range[0], range[1])
            };
            // The file system takes some for its own notes, so that the last step may be too large.
            if (0..12).all(|halves| step >> halves < 4096 || grow(step >> halves).is_err()) {
                return;
            }
        }
    }

    /// Give that back.
    pub fn make_room(&self) {
        // Not there where nothing was taken.
        drop(std::fs::remove_file(&self.ballast));
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // What is not there any more need not go.
        for (program, words) in
            [("umount", ["-l", &self.dir.display().to_string()]), ("losetup", ["-d", &self.device])]
        {
            drop(Command::new(program).args(words).output());
        }
    }
}
