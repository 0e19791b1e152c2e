//! Buffers that direct I/O takes.
//!
//! Owns [`AlignedBuffer`]: bytes that start at a multiple of [`BUFFER_ALIGN`], by leaving room in front of them, and
//! [`with_scratch`], one such buffer per thread.

use std::cell::RefCell;

use crate::units::BLOCK_BYTES;

/// Every device's memory alignment divides this.
pub const BUFFER_ALIGN: usize = 4096;
/// Bytes of a thread's scratch buffer; longer requests go through it piece by piece.
pub const SCRATCH_LEN: usize = 1 << 20;

/// A zeroed buffer that starts at a multiple of [`BUFFER_ALIGN`].
#[derive(Debug)]
pub struct AlignedBuffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    pub fn new(len: usize) -> AlignedBuffer {
        let storage = vec![0; len + BUFFER_ALIGN];
        let start = storage.as_ptr().align_offset(BUFFER_ALIGN).min(BUFFER_ALIGN);
        AlignedBuffer { storage, start, len }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}

/// Whether direct I/O can use these bytes where they are.
pub fn is_aligned(bytes: &[u8], align: usize) -> bool {
    bytes.as_ptr().align_offset(align) == 0
}

/// Whether a block, or a part of one, holds only zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    bytes.chunks(BLOCK_BYTES).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// Run `work` with this thread's scratch buffer, whose content is arbitrary. Not to be nested.
pub fn with_scratch<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Option<AlignedBuffer>> = const { RefCell::new(None) };
    }
    SCRATCH.with_borrow_mut(|scratch| work(scratch.get_or_insert_with(|| AlignedBuffer::new(SCRATCH_LEN))))
}
