//! What a block device looks like as a file: the rules of reading, writing, `fallocate`, `truncate` and `lseek`.
//!
//! Owns every decision that depends on the size or on the access of the device; plain functions over
//! [`BlockDevice`], which know neither the mount nor the kernel's requests. The rules: the size is fixed. A read past
//! the end is short, a write past it is short or "no space", as on a disk. Truncation to nothing and to the own size
//! changes nothing, so that `dd` and a shell's `>` work; any other size is refused.
//! Not here: durability is the device's (invariant 1); this file only asks for it.

use bedplate_engine::{
    device::{Access, BlockDevice, Durability, ExtentKind, REQUEST_LEN_MAX},
    units::{ByteRange, to_usize},
};
use fuser::Errno;
use nix::{fcntl::FallocateFlags, libc};

use crate::errno::Fault;

/// The first window in which `lseek` looks for a change between data and hole; each further one is twice as long,
/// up to [`SEEK_WINDOW_MAX`], so that a fragmented file is not listed whole for one answer.
const SEEK_WINDOW_MIN: u64 = 1 << 20;
const SEEK_WINDOW_MAX: u64 = 1 << 30;

/// What `fallocate` is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocation {
    /// Reserve space. A volume is sparse by nature and reserves nothing: within the size this is a promise that costs
    /// nothing, as on a thin disk.
    Reserve,
    /// Give the range back; the part past the end is none of ours.
    Punch,
    /// Make the range read as zeros.
    Zero(PastEnd),
}

/// What becomes of the part of a range that lies past the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PastEnd {
    /// The caller said that the size is to stay (`FALLOC_FL_KEEP_SIZE`): it is left out.
    Ignored,
    /// The file would have to grow: no space.
    Refused,
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    Data,
    Hole,
}

impl Allocation {
    /// Decode the mode bits; `None` for what a disk does not do (collapse, insert, unshare).
    pub(crate) fn decode(mode: i32) -> Option<Allocation> {
        const KEEP: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(KEEP);
        const ZERO: FallocateFlags = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: FallocateFlags = ZERO.union(KEEP);
        match FallocateFlags::from_bits(mode)? {
            flags if flags.is_empty() || flags == KEEP => Some(Allocation::Reserve),
            PUNCH => Some(Allocation::Punch),
            ZERO => Some(Allocation::Zero(PastEnd::Refused)),
            ZERO_KEEP => Some(Allocation::Zero(PastEnd::Ignored)),
            _ => None,
        }
    }
}

impl Seek {
    /// Decode `whence`; the kernel answers every other one itself.
    pub(crate) fn decode(whence: i32) -> Option<Seek> {
        match whence {
            libc::SEEK_DATA => Some(Seek::Data),
            libc::SEEK_HOLE => Some(Seek::Hole),
            _ => None,
        }
    }
}

/// Whether a write with these open flags is to be on disk before it is answered. There is no other sign of it: no
/// FSYNC follows, and the kernel adds the bit for `RWF_DSYNC`. O_SYNC contains O_DSYNC.
pub(crate) fn durability(open_flags: i32) -> Durability {
    if open_flags & libc::O_DSYNC == 0 { Durability::Volatile } else { Durability::Fua }
}

/// How many of `len` bytes from `offset` a read gets, into a buffer with `room`: fewer at the end, none past it.
pub(crate) fn readable(device: &dyn BlockDevice, offset: u64, len: u32, room: usize) -> Result<usize, Fault> {
    let left = device.geometry().size.0.saturating_sub(offset);
    let len = to_usize(u64::from(len).min(left));
    // Never a short read instead: the client would take it for the end.
    if len > room { Err(Fault::Refused(Errno::EINVAL)) } else { Ok(len) }
}

/// Fill the start of `buffer` with as many of `len` bytes from `offset` as there are.
pub(crate) fn read<'b>(
    device: &dyn BlockDevice,
    buffer: &'b mut [u8],
    offset: u64,
    len: u32,
) -> Result<&'b [u8], Fault> {
    let len = readable(device, offset, len, buffer.len())?;
    let buffer = &mut buffer[..len];
    if len > 0 {
        device.read_at(buffer, offset)?;
    }
    Ok(buffer)
}

/// How many of `len` bytes at `offset` are written: those within the size. None at all is "no space", unless nothing was
/// to be written.
pub(crate) fn writable_len(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<usize, Fault> {
    let size = writable(device)?;
    match (len, to_usize(size.saturating_sub(offset))) {
        (0, _) => Ok(0),
        (_, 0) => Err(Fault::Refused(Errno::ENOSPC)),
        (len, left) => Ok(len.min(left)),
    }
}

/// Write what lies within the size, and say how much that was.
pub(crate) fn write(
    device: &dyn BlockDevice,
    data: &[u8],
    offset: u64,
    durability: Durability,
) -> Result<usize, Fault> {
    let len = writable_len(device, offset, data.len())?;
    if len > 0 {
        device.write_at(&data[..len], offset, durability)?;
    }
    Ok(len)
}

/// Carry out a `fallocate`. A range is longer than a request may be, so it goes down in pieces; a durable one is
/// flushed once, at the end.
pub(crate) fn allocate(
    device: &dyn BlockDevice,
    what: Allocation,
    offset: u64,
    len: u64,
    durability: Durability,
) -> Result<(), Fault> {
    let size = writable(device)?;
    let end = offset.checked_add(len).ok_or(Fault::Refused(Errno::EFBIG))?;
    let past_end = match what {
        Allocation::Reserve | Allocation::Zero(PastEnd::Refused) => PastEnd::Refused,
        Allocation::Punch | Allocation::Zero(PastEnd::Ignored) => PastEnd::Ignored,
    };
    if end > size && past_end == PastEnd::Refused {
        return Err(Fault::Refused(Errno::ENOSPC));
    }
    let end = end.min(size);
    match what {
        Allocation::Reserve => return Ok(()),
        Allocation::Punch => pieces(offset, end).try_for_each(|range| device.discard(range))?,
        Allocation::Zero(_) => {
            pieces(offset, end).try_for_each(|range| device.zero(range, Durability::Volatile))?;
        }
    }
    match durability {
        Durability::Volatile => Ok(()),
        Durability::Fua => Ok(device.flush()?),
    }
}

/// Whether a file of `size` bytes may be "truncated" to `new_size`.
pub(crate) fn truncate(size: u64, new_size: u64) -> Result<(), Fault> {
    if new_size == 0 || new_size == size { Ok(()) } else { Err(Fault::Refused(Errno::EINVAL)) }
}

/// The first offset from `offset` on with data, or with a hole; the end of the file counts as a hole.
pub(crate) fn seek(device: &dyn BlockDevice, what: Seek, offset: u64) -> Result<u64, Fault> {
    let size = device.geometry().size.0;
    if offset >= size {
        return Err(Fault::Refused(Errno::ENXIO));
    }
    let wanted = match what {
        Seek::Data => ExtentKind::Data,
        Seek::Hole => ExtentKind::Zero,
    };
    let mut at = offset;
    let mut window = SEEK_WINDOW_MIN;
    while at < size {
        let extents = device.extents(ByteRange::new(at, window.min(size - at)))?;
        if let Some(found) = extents.iter().find(|extent| extent.kind == wanted) {
            return Ok(found.range.start.0.max(at));
        }
        match extents.last() {
            Some(last) if last.range.end().0 > at => at = last.range.end().0,
            // A device that does not move on would keep this thread forever.
            _ => return Err(Fault::Refused(Errno::EIO)),
        }
        window = (window * 2).min(SEEK_WINDOW_MAX);
    }
    match what {
        Seek::Data => Err(Fault::Refused(Errno::ENXIO)),
        Seek::Hole => Ok(size),
    }
}

/// The size of a device that takes changes; EROFS for one that does not.
fn writable(device: &dyn BlockDevice) -> Result<u64, Fault> {
    let geometry = device.geometry();
    match geometry.access {
        Access::ReadWrite => Ok(geometry.size.0),
        Access::ReadOnly => Err(Fault::Refused(Errno::EROFS)),
    }
}

/// `[start, end)` in ranges of at most [`REQUEST_LEN_MAX`], cut at its multiples so that no cut splits a block.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let cut = (at / REQUEST_LEN_MAX + 1) * REQUEST_LEN_MAX;
        let range = ByteRange::new(at, cut.min(end) - at);
        at += range.len.0;
        Some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_range_once_and_are_cut_at_request_boundaries() {
        let (start, end) = (5000, 3 * REQUEST_LEN_MAX + 1);
        let ranges: Vec<ByteRange> = pieces(start, end).collect();
        assert_eq!(ranges.first().map(|range| range.start.0), Some(start));
        assert_eq!(ranges.last().map(|range| range.end().0), Some(end));
        assert!(ranges.iter().all(|range| range.len.0 <= REQUEST_LEN_MAX && !range.is_empty()));
        for pair in ranges.windows(2) {
            assert_eq!(pair[0].end(), pair[1].start);
            assert_eq!(pair[1].start.0 % REQUEST_LEN_MAX, 0);
        }
        assert_eq!(pieces(7, 7).count(), 0);
    }

    #[test]
    fn only_the_modes_that_a_disk_has_are_decoded() {
        assert_eq!(Allocation::decode(0), Some(Allocation::Reserve));
        assert_eq!(Allocation::decode(libc::FALLOC_FL_KEEP_SIZE), Some(Allocation::Reserve));
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(Allocation::decode(punch), Some(Allocation::Punch));
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        assert_eq!(Allocation::decode(zero), Some(Allocation::Zero(PastEnd::Refused)));
        let zero_keep = zero | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(Allocation::decode(zero_keep), Some(Allocation::Zero(PastEnd::Ignored)));
        assert_eq!(Allocation::decode(libc::FALLOC_FL_COLLAPSE_RANGE), None);
        assert_eq!(Allocation::decode(1 << 20), None);
    }

    #[test]
    fn both_sync_flags_ask_for_durability_and_no_other_flag_does() {
        assert_eq!(durability(libc::O_RDWR | libc::O_DSYNC), Durability::Fua);
        assert_eq!(durability(libc::O_RDWR | libc::O_SYNC), Durability::Fua);
        assert_eq!(durability(libc::O_RDWR | libc::O_DIRECT), Durability::Volatile);
    }

    #[test]
    fn truncation_keeps_the_size_or_is_refused() {
        assert!(truncate(4096, 0).is_ok());
        assert!(truncate(4096, 4096).is_ok());
        assert!(matches!(truncate(4096, 4095), Err(Fault::Refused(Errno::EINVAL))));
        assert!(matches!(truncate(4096, 8192), Err(Fault::Refused(Errno::EINVAL))));
    }
}
