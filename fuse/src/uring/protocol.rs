//! What the kernel writes into an entry, and what it reads from it.
//!
//! Owns the numbers and layouts of include/uapi/linux/fuse.h that `fuser` knows but keeps to itself: requests are decoded
//! to [`Request`] and checked, answers encoded. Byte order and sizes are the machine's own. A request consists of the
//! general header, the operation's own structure (at most 128 bytes) and the payload: names, or the bytes of a write.
//! Here is decided nothing but which operations are refused always, with what number, as `classic.rs` does.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bedplate_engine::units::to_usize;
use fuser::{Errno, FileAttr, FileHandle, FileType, Generation, INodeNo, OpenFlags};
use nix::libc;

use crate::{
    handles::{Listed, Route},
    served::{ATTRIBUTE_TTL, NAME_LEN_MAX, NAME_TTL},
    tree::IO_SIZE,
};

/// Room for the general header of a request and of its answer, and for an operation's structure
/// (`FUSE_URING_IN_OUT_HEADER_SZ`, `FUSE_URING_OP_IN_OUT_SZ`).
pub(super) const HEADER_LEN: usize = 128;
/// `struct fuse_uring_ent_in_out`: flags, commit id, payload size, padding, reserved.
pub(super) const ENTRY_LEN: usize = 32;
/// `struct fuse_uring_req_header`.
pub(super) const REQUEST_HEADER_LEN: usize = 2 * HEADER_LEN + ENTRY_LEN;

/// Commands of the ring (`enum fuse_uring_cmd`).
pub(super) const REGISTER: u32 = 1;
pub(super) const COMMIT_AND_FETCH: u32 = 2;

/// Most bytes of an answer that is not data: a directory's names go into as many answers as they need.
const DIRECTORY_BYTES_MAX: usize = 64 << 10;

mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const FSYNCDIR: u32 = 30;
    pub(super) const CREATE: u32 = 35;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const LSEEK: u32 = 46;
}

/// Bits of `fuse_setattr_in::valid`.
const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;

/// A request, decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        fh: FileHandle,
        offset: u64,
        len: u32,
    },
    /// The payload's first `len` bytes are to be written.
    Write {
        fh: FileHandle,
        offset: u64,
        len: usize,
        flags: OpenFlags,
    },
    Sync {
        fh: FileHandle,
    },
    /// What a thread that may wait answers.
    Call(Call),
    Refused(Errno),
    /// Answered with nothing but that it is done.
    Nothing,
}

/// A request that has no bytes of a file in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    Lookup { parent: INodeNo, name: OsString },
    GetAttr { ino: INodeNo },
    SetAttr { ino: INodeNo, ownership: bool, size: Option<u64> },
    Open { ino: INodeNo, flags: OpenFlags },
    Release { fh: FileHandle },
    Allocate { fh: FileHandle, mode: i32, offset: u64, len: u64 },
    Seek { fh: FileHandle, offset: i64, whence: i32 },
    OpenDirectory { ino: INodeNo },
    ReadDirectory { fh: FileHandle, offset: u64, len: usize },
    ReleaseDirectory { fh: FileHandle },
    StatFs,
}

/// What the general header says, and how an answer names its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    opcode: u32,
    pub(super) unique: u64,
    node: INodeNo,
}

impl Header {
    /// Bytes 4 to 24 of `struct fuse_in_header`; who asks does not matter, the kernel has checked that.
    pub(super) fn decode(header: &[u8; HEADER_LEN]) -> Header {
        let mut fields = Fields(&header[4..]);
        // There are as many: the header's length is its type's.
        let (opcode, unique, node) = (fields.u32(), fields.u64(), fields.u64());
        Header {
            opcode: opcode.unwrap_or_default(),
            unique: unique.unwrap_or_default(),
            node: INodeNo(node.unwrap_or_default()),
        }
    }
}

/// The entry's own part: the number to commit with, and how many bytes of the payload are the request's.
pub(super) fn decode_entry(entry: &[u8; ENTRY_LEN]) -> (u64, usize) {
    let mut fields = Fields(&entry[8..]);
    let commit_id = fields.u64().unwrap_or_default();
    (commit_id, to_usize(fields.u32().unwrap_or_default().into()))
}

impl Request {
    /// `payload` is the part of it that the kernel says belongs to the request. What does not decode is answered EIO,
    /// and what is not known, as an older file system would, ENOSYS.
    pub(super) fn decode(header: Header, operation: &[u8; HEADER_LEN], payload: &[u8]) -> Request {
        Request::try_decode(header, Fields(operation), payload).unwrap_or(Request::Refused(Errno::EIO))
    }

    fn try_decode(header: Header, mut fields: Fields<'_>, payload: &[u8]) -> Option<Request> {
        let ino = header.node;
        Some(match header.opcode {
            opcode::READ => {
                let (fh, offset, len) = (fields.handle()?, fields.u64()?, fields.u32()?);
                Request::Read { fh, offset, len }
            }
            opcode::WRITE => {
                let (fh, offset, len) = (fields.handle()?, fields.u64()?, to_usize(fields.u32()?.into()));
                // write_flags and lock_owner.
                fields.skip(12)?;
                let flags = OpenFlags(fields.i32()?);
                (payload.len() >= len).then_some(Request::Write { fh, offset, len, flags })?
            }
            opcode::FSYNC => Request::Sync { fh: fields.handle()? },
            opcode::LOOKUP => Request::Call(Call::Lookup { parent: ino, name: name(payload)? }),
            opcode::GETATTR => Request::Call(Call::GetAttr { ino }),
            opcode::SETATTR => {
                let valid = fields.u32()?;
                // Padding and the handle.
                fields.skip(12)?;
                let size = fields.u64()?;
                Request::Call(Call::SetAttr {
                    ino,
                    ownership: valid & (FATTR_MODE | FATTR_UID | FATTR_GID) != 0,
                    size: (valid & FATTR_SIZE != 0).then_some(size),
                })
            }
            opcode::OPEN => Request::Call(Call::Open { ino, flags: OpenFlags(fields.i32()?) }),
            opcode::RELEASE => Request::Call(Call::Release { fh: fields.handle()? }),
            opcode::FALLOCATE => {
                let (fh, offset, len) = (fields.handle()?, fields.u64()?, fields.u64()?);
                Request::Call(Call::Allocate { fh, mode: fields.i32()?, offset, len })
            }
            opcode::LSEEK => {
                let (fh, offset) = (fields.handle()?, fields.u64()?.cast_signed());
                Request::Call(Call::Seek { fh, offset, whence: fields.i32()? })
            }
            opcode::OPENDIR => Request::Call(Call::OpenDirectory { ino }),
            opcode::READDIR => {
                let (fh, offset, len) = (fields.handle()?, fields.u64()?, fields.u32()?);
                Request::Call(Call::ReadDirectory { fh, offset, len: to_usize(len.into()) })
            }
            opcode::RELEASEDIR => Request::Call(Call::ReleaseDirectory { fh: fields.handle()? }),
            opcode::STATFS => Request::Call(Call::StatFs),
            opcode::FSYNCDIR => Request::Nothing,
            // Names are the node's to give and to take.
            opcode::CREATE
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::SYMLINK
            | opcode::LINK
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2 => Request::Refused(Errno::EPERM),
            opcode::READLINK => Request::Refused(Errno::EINVAL),
            opcode::IOCTL => Request::Refused(Errno::ENOTTY),
            // Flush at close, extended attributes, locks, poll, bmap, copy_file_range, and what is yet to come.
            _ => Request::Refused(Errno::ENOSYS),
        })
    }
}

/// The first name of a payload, which ends with a zero byte.
fn name(payload: &[u8]) -> Option<OsString> {
    let name = payload.split(|byte| *byte == 0).next().filter(|name| name.len() < payload.len())?;
    Some(OsString::from_vec(name.to_vec()))
}

/// Reads a structure field by field.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const LEN: usize>(&mut self) -> Option<[u8; LEN]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn skip(&mut self, len: usize) -> Option<()> {
        self.0 = self.0.get(len..)?;
        Some(())
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn i32(&mut self) -> Option<i32> {
        self.take().map(i32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    fn handle(&mut self) -> Option<FileHandle> {
        self.u64().map(FileHandle)
    }
}

/// `struct fuse_out_header`, which goes where the request's was. Its length is not looked at; the payload's is.
pub(super) fn out_header(unique: u64, error: Option<Errno>) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&error.map_or(0, |errno| -errno.code()).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// `struct fuse_uring_cmd_req`, which a command carries.
pub(super) fn command(commit_id: u64, queue: u16) -> [u8; 80] {
    let mut command = [0; 80];
    command[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    command[16..18].copy_from_slice(&queue.to_ne_bytes());
    command
}

/// `struct fuse_write_out`.
pub(super) fn write_out(len: u32) -> [u8; 8] {
    let mut out = [0; 8];
    out[..4].copy_from_slice(&len.to_ne_bytes());
    out
}

/// `struct fuse_entry_out`.
pub(super) fn entry_out(attr: &FileAttr, generation: Generation) -> Vec<u8> {
    let times = [NAME_TTL, ATTRIBUTE_TTL];
    let mut out = Bytes::default().u64(attr.ino.0).u64(generation.0);
    out = times.iter().fold(out, |out, ttl| out.u64(ttl.as_secs()));
    times.iter().fold(out, |out, ttl| out.u32(ttl.subsec_nanos())).attr(attr).0
}

/// `struct fuse_attr_out`.
pub(super) fn attr_out(attr: &FileAttr) -> Vec<u8> {
    Bytes::default().u64(ATTRIBUTE_TTL.as_secs()).u32(ATTRIBUTE_TTL.subsec_nanos()).u32(0).attr(attr).0
}

/// `struct fuse_open_out`.
pub(super) fn open_out(number: u64, route: &Route) -> Vec<u8> {
    let backing = match route {
        Route::Passthrough(backing) => backing.id(),
        Route::Direct | Route::Cached => 0,
    };
    Bytes::default().u64(number).u32(route.open_flags().bits()).u32(backing).0
}

/// The same for a directory.
pub(super) fn open_directory_out(number: u64) -> Vec<u8> {
    Bytes::default().u64(number).u64(0).0
}

/// `struct fuse_statfs_out`: no space of its own, as `classic.rs` says.
pub(super) fn statfs_out(file_count: u64) -> Vec<u8> {
    let out = [0, 0, 0, file_count, 0].into_iter().fold(Bytes::default(), Bytes::u64);
    let out = out.u32(IO_SIZE).u32(NAME_LEN_MAX).u32(IO_SIZE).u32(0);
    [0_u64; 3].into_iter().fold(out, Bytes::u64).0
}

/// `struct fuse_lseek_out`.
pub(super) fn lseek_out(offset: i64) -> Vec<u8> {
    offset.to_ne_bytes().to_vec()
}

/// As many entries from the one with number `first` on as fit into `room`: `struct fuse_dirent`, each padded to 8 bytes.
/// Entries count from 1, so that an entry's offset is where the next one is found.
pub(super) fn directory_out(names: &[Listed], first: u64, room: usize) -> Vec<u8> {
    let room = room.min(DIRECTORY_BYTES_MAX);
    let mut out = Bytes::default();
    for (Listed { ino, kind, name }, next) in
        names.iter().zip(1_u64..).skip(usize::try_from(first).unwrap_or(usize::MAX))
    {
        let Ok(name_len) = u32::try_from(name.len()) else { continue };
        if out.0.len() + (24 + name.len()).next_multiple_of(8) > room {
            break;
        }
        out = out.u64(ino.0).u64(next).u32(name_len).u32(file_type(*kind) >> 12);
        out.0.extend_from_slice(OsStr::new(name).as_bytes());
        out.0.resize(out.0.len().next_multiple_of(8), 0);
    }
    out.0
}

/// The bits of `st_mode` that say what a file is. The tree has files and directories only.
fn file_type(kind: FileType) -> u32 {
    if kind == FileType::Directory { libc::S_IFDIR } else { libc::S_IFREG }
}

/// Writes a structure field by field.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u32(mut self, value: u32) -> Bytes {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Bytes {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// `struct fuse_attr`.
    fn attr(self, attr: &FileAttr) -> Bytes {
        let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let times = [attr.atime, attr.mtime, attr.ctime].map(since);
        let mut out = self.u64(attr.ino.0).u64(attr.size).u64(attr.blocks);
        out = times.iter().fold(out, |out, time| out.u64(time.as_secs()));
        out = times.iter().fold(out, |out, time| out.u32(time.subsec_nanos()));
        let mode = file_type(attr.kind) | u32::from(attr.perm);
        out.u32(mode).u32(attr.nlink).u32(attr.uid).u32(attr.gid).u32(attr.rdev).u32(attr.blksize).u32(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(opcode: u32) -> Header {
        Header { opcode, unique: 7, node: INodeNo(9) }
    }

    /// An operation's structure of these numbers.
    fn operation(fields: &[&[u8]]) -> [u8; HEADER_LEN] {
        let mut bytes = fields.concat();
        bytes.resize(HEADER_LEN, 0);
        bytes.try_into().unwrap()
    }

    #[test]
    fn the_general_header_is_read_where_the_kernel_writes_it() {
        let mut bytes = [0xee; HEADER_LEN];
        bytes[..24].copy_from_slice(
            &[&40_u32.to_ne_bytes()[..], &15_u32.to_ne_bytes(), &3_u64.to_ne_bytes(), &5_u64.to_ne_bytes()]
                .concat(),
        );
        assert_eq!(Header::decode(&bytes), Header { opcode: 15, unique: 3, node: INodeNo(5) });
        let mut entry = [0; ENTRY_LEN];
        entry[8..16].copy_from_slice(&77_u64.to_ne_bytes());
        entry[16..20].copy_from_slice(&4096_u32.to_ne_bytes());
        assert_eq!(decode_entry(&entry), (77, 4096));
    }

    #[test]
    fn a_write_is_refused_if_its_bytes_are_not_all_there() {
        let fields: [&[u8]; 6] = [
            &5_u64.to_ne_bytes(),
            &4096_u64.to_ne_bytes(),
            &100_u32.to_ne_bytes(),
            &0_u32.to_ne_bytes(),
            &0_u64.to_ne_bytes(),
            &libc::O_DSYNC.to_ne_bytes(),
        ];
        let operation = operation(&fields);
        let (fh, flags) = (FileHandle(5), OpenFlags(libc::O_DSYNC));
        assert_eq!(
            Request::decode(header(opcode::WRITE), &operation, &[1; 100]),
            Request::Write { fh, offset: 4096, len: 100, flags }
        );
        assert_eq!(
            Request::decode(header(opcode::WRITE), &operation, &[1; 99]),
            Request::Refused(Errno::EIO)
        );
    }

    #[test]
    fn a_name_without_its_end_is_refused() {
        let lookup = |payload: &[u8]| Request::decode(header(opcode::LOOKUP), &operation(&[]), payload);
        let found = Request::Call(Call::Lookup { parent: INodeNo(9), name: "abc".into() });
        assert_eq!(lookup(b"abc\0"), found);
        for odd in [&b"abc"[..], b""] {
            assert_eq!(lookup(odd), Request::Refused(Errno::EIO), "{odd:?}");
        }
    }

    #[test]
    fn every_operation_number_decodes_to_something_whatever_comes_with_it() {
        for opcode in (0..70).chain([4096, u32::MAX]) {
            for (byte, len) in [(0, 0), (0xff, 0), (0xff, 1), (0x7f, 5000)] {
                let request = Request::decode(header(opcode), &[byte; HEADER_LEN], &vec![byte; len]);
                let refused = matches!(request, Request::Refused(_));
                assert!(refused || opcode < 47, "{opcode} {request:?}");
            }
        }
    }

    #[test]
    fn answers_are_as_long_as_the_kernel_expects_them() {
        let attr = crate::tree::root_attr(crate::tree::Owner { uid: 1, gid: 2 }, SystemTime::now());
        // sizeof in include/uapi/linux/fuse.h; another length is EINVAL there.
        assert_eq!(entry_out(&attr, Generation(0)).len(), 128);
        assert_eq!(attr_out(&attr).len(), 104);
        assert_eq!(open_out(1, &Route::Direct).len(), 16);
        assert_eq!(open_directory_out(1).len(), 16);
        assert_eq!(statfs_out(5).len(), 80);
        assert_eq!(lseek_out(5).len(), 8);
        assert_eq!(REQUEST_HEADER_LEN, 288);
    }

    #[test]
    fn a_directory_goes_on_where_the_last_answer_ended() {
        let listed = |name: &str| Listed { ino: INodeNo(20), kind: FileType::RegularFile, name: name.into() };
        let names: Vec<Listed> = (0..100).map(|n| listed(&format!("volume-{n}"))).collect();
        let (mut seen, mut first) = (0, 0);
        loop {
            let bytes = directory_out(&names, first, 500);
            assert!(bytes.len() <= 500);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let mut fields = Fields(rest);
                fields.skip(8).unwrap();
                first = fields.u64().unwrap();
                let len = to_usize(fields.u32().unwrap().into());
                assert_eq!(&rest[24..24 + len], format!("volume-{seen}").as_bytes());
                rest = &rest[(24 + len).next_multiple_of(8)..];
                seen += 1;
            }
            if bytes.is_empty() {
                break;
            }
        }
        assert_eq!(seen, 100);
    }
}
