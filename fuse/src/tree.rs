//! Names and inode numbers: which node of the mount a number means, and what `stat` says of it.
//!
//! Owns the numbers. A file's number is a hash of its kind and uuid, so it is the same after every lookup and in every
//! mount; a number that another file has already is passed over for the next one. Within a mount a number is never
//! given to a second file: the table remembers files that are gone. Only when it is full ([`INODES_MAX`]) are gone files
//! forgotten; should a number then come back by a collision of 64 bits, its generation differs, and the kernel fails
//! what still holds the old one. Not here: which names exist; that is the [`Namespace`](crate::Namespace)'s.

use std::{
    collections::{HashMap, HashSet},
    sync::{PoisonError, RwLock},
    time::SystemTime,
};

use bedplate_engine::device::Access;
use fuser::{FileAttr, FileType, Generation, INodeNo};

use crate::{
    namespace::{FileEntry, FileId, Kind},
    options::MountOptions,
};

/// Most files that have a number at once, deleted ones included.
pub(crate) const INODES_MAX: usize = 1 << 16;

/// What I/O in whole blocks of costs least; `st_blksize` and `f_bsize`.
pub(crate) const IO_SIZE: u32 = 4096;

/// The unit of `st_blocks`, which POSIX leaves open and Linux does not.
const STAT_BLOCK: u64 = 512;

/// Numbers up to this one are the directories'.
const RESERVED_MAX: u64 = 15;

/// What a number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Root,
    Directory(Kind),
    File(FileId),
}

/// The table has no room; [`Tree::forget_except`] makes some.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// The numbers of one mount.
#[derive(Debug, Default)]
pub(crate) struct Tree(RwLock<Numbers>);

#[derive(Debug, Default)]
struct Numbers {
    by_file: HashMap<FileId, u64>,
    by_number: HashMap<u64, FileId>,
}

impl Tree {
    /// What `ino` means, if this mount ever said so.
    pub(crate) fn node(&self, ino: INodeNo) -> Option<Node> {
        if ino == INodeNo::ROOT {
            return Some(Node::Root);
        }
        if let Some(kind) = Kind::ALL.into_iter().find(|kind| directory_ino(*kind) == ino) {
            return Some(Node::Directory(kind));
        }
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_number.get(&ino.0).copied().map(Node::File)
    }

    /// The number that `file` has, if it was ever asked for.
    pub(crate) fn known(&self, file: FileId) -> Option<INodeNo> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_file.get(&file).copied().map(INodeNo)
    }

    /// The number of `file`, given to it now if it has none.
    pub(crate) fn number(&self, file: FileId) -> Result<INodeNo, Full> {
        self.number_from(file, hash(file))
    }

    /// Forget every file that is not in `living`.
    pub(crate) fn forget_except(&self, living: &HashSet<FileId>) {
        let mut numbers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        numbers.by_file.retain(|file, _| living.contains(file));
        numbers.by_number.retain(|_, file| living.contains(file));
    }

    fn number_from(&self, file: FileId, first: u64) -> Result<INodeNo, Full> {
        if let Some(ino) = self.known(file) {
            return Ok(ino);
        }
        let mut numbers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = numbers.by_file.get(&file) {
            return Ok(INodeNo(*number));
        }
        if numbers.by_file.len() >= INODES_MAX {
            return Err(Full);
        }
        // Ends: the table has fewer entries than there are numbers.
        let mut number = first;
        while number <= RESERVED_MAX || numbers.by_number.contains_key(&number) {
            number = number.wrapping_add(1);
        }
        numbers.by_file.insert(file, number);
        numbers.by_number.insert(number, file);
        Ok(INodeNo(number))
    }
}

/// The number of one of the two directories.
pub(crate) const fn directory_ino(kind: Kind) -> INodeNo {
    match kind {
        Kind::Image => INodeNo(2),
        Kind::Volume => INodeNo(3),
    }
}

/// Tells two files apart that were given the same number at different times.
pub(crate) fn generation(file: FileId) -> Generation {
    Generation(file.uuid.as_u64_pair().1)
}

/// What `stat` says of a directory.
pub(crate) fn directory_attr(node: Kind, owner: Owner, at: SystemTime) -> FileAttr {
    attr(directory_ino(node), FileType::Directory, 0o555, owner, at)
}

/// What `stat` says of the mount's root.
pub(crate) fn root_attr(owner: Owner, at: SystemTime) -> FileAttr {
    FileAttr { nlink: 4, ..attr(INodeNo::ROOT, FileType::Directory, 0o555, owner, at) }
}

/// What `stat` says of a file.
pub(crate) fn file_attr(ino: INodeNo, entry: &FileEntry, options: &MountOptions, owner: Owner) -> FileAttr {
    let mode = match (entry.id.kind, entry.access) {
        (Kind::Image, _) => options.image_mode.read_only(),
        (Kind::Volume, Access::ReadOnly) => options.volume_mode.read_only(),
        (Kind::Volume, Access::ReadWrite) => options.volume_mode,
    };
    FileAttr {
        size: entry.size,
        blocks: entry.allocated_bytes.div_ceil(STAT_BLOCK),
        nlink: 1,
        ..attr(ino, FileType::RegularFile, mode.bits(), owner, entry.modified)
    }
}

/// Whose the files are: the user that mounted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

fn attr(ino: INodeNo, kind: FileType, perm: u16, owner: Owner, at: SystemTime) -> FileAttr {
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: at,
        mtime: at,
        ctime: at,
        crtime: at,
        kind,
        perm,
        nlink: 2,
        uid: owner.uid,
        gid: owner.gid,
        rdev: 0,
        blksize: IO_SIZE,
        flags: 0,
    }
}

/// FNV-1a (Fowler, Noll, Vo) with 64 bits: the same in every build, which `std`'s hasher does not promise.
fn hash(file: FileId) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let kind = match file.kind {
        Kind::Image => b'i',
        Kind::Volume => b'v',
    };
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
    file.uuid.as_bytes().iter().fold(step(OFFSET, &kind), step)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_file_keeps_its_number_in_every_mount() {
        let file = FileId::volume(Uuid::from_u128(7));
        let (here, there) = (Tree::default(), Tree::default());
        assert_eq!(here.number(file), here.number(file));
        assert_eq!(here.number(file), there.number(file));
        assert_eq!(here.node(here.number(file).unwrap()), Some(Node::File(file)));
    }

    #[test]
    fn an_image_and_a_volume_with_one_uuid_have_two_numbers() {
        let tree = Tree::default();
        let uuid = Uuid::from_u128(7);
        assert_ne!(tree.number(FileId::image(uuid)), tree.number(FileId::volume(uuid)));
    }

    #[test]
    fn a_collision_is_passed_over_and_remembered() {
        let tree = Tree::default();
        let (a, b) = (FileId::volume(Uuid::from_u128(1)), FileId::volume(Uuid::from_u128(2)));
        let first = tree.number_from(a, 100).unwrap();
        let second = tree.number_from(b, 100).unwrap();
        assert_eq!((first, second), (INodeNo(100), INodeNo(101)));
        assert_eq!(tree.node(second), Some(Node::File(b)));
        assert_eq!(tree.number_from(b, 100), Ok(second));
    }

    #[test]
    fn a_hash_that_hits_a_directory_or_wraps_ends_above_the_reserved_numbers() {
        let tree = Tree::default();
        for (uuid, first) in [(1, 0), (2, 3), (3, u64::MAX), (4, u64::MAX)] {
            let ino = tree.number_from(FileId::volume(Uuid::from_u128(uuid)), first).unwrap();
            assert!(ino.0 > RESERVED_MAX);
        }
    }

    #[test]
    fn a_full_table_makes_room_by_forgetting_only_what_is_gone() {
        let tree = Tree::default();
        let file = |n: usize| FileId::volume(Uuid::from_u128(n as u128));
        for n in 0..INODES_MAX {
            tree.number(file(n)).unwrap();
        }
        let extra = file(INODES_MAX);
        assert_eq!(tree.number(extra), Err(Full));
        let kept = tree.number(file(5)).unwrap();
        tree.forget_except(&HashSet::from([file(5)]));
        assert!(tree.number(extra).is_ok());
        assert_eq!(tree.known(file(5)), Some(kept));
        assert_eq!(tree.known(file(6)), None);
    }
}
