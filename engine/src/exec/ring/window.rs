//! Memory that somebody else lends for the time of a request.
//!
//! Owns [`Window`], which a front end lends, and [`Lent`], the same once its owner has promised what reading into it
//! needs. All that touches such memory is here.

use std::{
    io::IoSliceMut,
    os::fd::{BorrowedFd, RawFd},
    ptr::NonNull,
};

use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::exec::asynchronous::Cache;

/// Memory of a front end that a request reads into or writes from.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub start: NonNull<u8>,
    pub len: usize,
}

/// Memory whose owner keeps it valid, initialised and untouched until the request, or action, that it was lent for has
/// ended. It is never used after that, and no two of them that are written to overlap.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent(Window);

#[expect(unsafe_code, reason = "it is a reference in all but its lifetime")]
// SAFETY: like `&mut [u8]`: whoever has it is the only one that uses these bytes.
unsafe impl Send for Lent {}

impl Window {
    /// # Safety
    ///
    /// The caller promises what [`Lent`] says.
    #[expect(unsafe_code, reason = "the promise about the memory is the caller's")]
    pub(super) unsafe fn lend(self) -> Lent {
        Lent(self)
    }
}

impl Lent {
    /// # Safety
    ///
    /// The caller promises what [`Lent`] says.
    #[expect(unsafe_code, reason = "the promise about the memory is the caller's")]
    pub(super) unsafe fn of(bytes: &mut [u8]) -> Lent {
        Lent(Window { start: NonNull::from(&mut *bytes).cast(), len: bytes.len() })
    }

    /// For bytes that are only read.
    ///
    /// # Safety
    ///
    /// The caller promises what [`Lent`] says, and calls nothing that writes.
    #[expect(unsafe_code, reason = "the promise about the memory is the caller's")]
    pub(super) unsafe fn of_source(bytes: &[u8]) -> Lent {
        Lent(Window { start: NonNull::from(bytes).cast(), len: bytes.len() })
    }

    pub(super) fn len(self) -> usize {
        self.0.len
    }

    pub(super) fn pointer(self) -> *mut u8 {
        self.0.start.as_ptr()
    }

    pub(super) fn is_aligned(self, align: usize) -> bool {
        self.pointer().align_offset(align) == 0
    }

    /// `len` bytes from `at`, which lie within it.
    pub(super) fn part(self, at: usize, len: usize) -> Lent {
        assert!(at <= self.0.len && len <= self.0.len - at, "{at}+{len} of {}", self.0.len);
        #[expect(unsafe_code, reason = "a part of lent memory")]
        // SAFETY: within the same memory, as just checked.
        let start = unsafe { self.0.start.add(at) };
        Lent(Window { start, len })
    }

    /// What follows the first `at` bytes.
    pub(super) fn rest(self, at: usize) -> Lent {
        self.part(at, self.0.len - at)
    }

    pub(super) fn bytes<'a>(self) -> &'a [u8] {
        #[expect(unsafe_code, reason = "lent memory has no lifetime of its own")]
        // SAFETY: valid and unchanged while it is lent; callers keep the slice no longer.
        unsafe {
            std::slice::from_raw_parts(self.pointer(), self.0.len)
        }
    }

    pub(super) fn bytes_mut<'a>(self) -> &'a mut [u8] {
        #[expect(unsafe_code, reason = "lent memory has no lifetime of its own")]
        // SAFETY: valid and nobody else's while it is lent; callers keep the slice no longer.
        unsafe {
            std::slice::from_raw_parts_mut(self.pointer(), self.0.len)
        }
    }

    /// Fill as much of it as is in memory of this open file, and say how much.
    pub(super) fn fill_from_memory(self, fd: RawFd, cache: Cache, offset: u64) -> usize {
        let flags = match cache {
            Cache::Buffered => ReadWriteFlags::NOWAIT,
            Cache::Memory => ReadWriteFlags::empty(),
            Cache::Direct { .. } => return 0,
        };
        #[expect(unsafe_code, reason = "the descriptor is held by a pin, not by this type")]
        // SAFETY: a request's pin or device keeps the file open while its pieces are looked for.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        loop {
            match preadv2(file, &mut [IoSliceMut::new(self.bytes_mut())], offset, flags) {
                Ok(count) => return count,
                Err(Errno::INTR) => {}
                // Not cached, not possible for this file, or an error that whoever reads it next will tell.
                Err(_) => return 0,
            }
        }
    }
}
