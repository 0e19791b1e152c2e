//! One buffer per serving thread, which requests' bytes pass through.
//!
//! Owns its alignment ([`BUFFER_ALIGN`], so that a device may use it for direct I/O as it is) and its bound
//! ([`REQUEST_BYTES_MAX`]). It is allocated when a thread first needs it and kept: nothing is allocated or cleared per
//! request. A read is made into it and answered from it. A write is copied into it, because the transport receives its
//! bytes 80 into a page, where no direct I/O takes them: this is the one copy that would have to be made further down.

use std::cell::RefCell;

use bedplate_engine::units::{BLOCK_SIZE, to_usize};

/// Longest read or write that the kernel is told to send.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// What direct I/O needs on every medium in use; a page.
pub(crate) const BUFFER_ALIGN: usize = 4096;

/// Room for the longest request, wherever in a page it begins.
pub(crate) const BUFFER_LEN: usize = (1 << 20) + BUFFER_ALIGN;
const _: () = assert!(BUFFER_LEN as u64 == REQUEST_BYTES_MAX as u64 + BUFFER_ALIGN as u64);

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Run `work` with this thread's buffer: [`BUFFER_LEN`] bytes, aligned, holding whatever the last request left.
/// `work` serves one request and does not come back here.
pub(crate) fn with_buffer<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.is_empty() {
            *buffer = vec![0; BUFFER_LEN + BUFFER_ALIGN];
        }
        let start = buffer.as_ptr().align_offset(BUFFER_ALIGN);
        work(&mut buffer[start..start + BUFFER_LEN])
    })
}

/// Run `work` with a copy of `data` in this thread's buffer that lies in its pages as it will lie in the file's blocks,
/// so that each whole block of it is aligned. `None` if it is longer than a request.
pub(crate) fn with_aligned<R>(data: &[u8], offset: u64, work: impl FnOnce(&[u8]) -> R) -> Option<R> {
    let start = to_usize(offset % BLOCK_SIZE);
    with_buffer(|buffer| {
        let copy = buffer.get_mut(start..start + data.len())?;
        copy.copy_from_slice(data);
        Some(work(copy))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_aligned_and_the_same_at_every_request() {
        let first = with_buffer(|buffer| (buffer.as_ptr().addr(), buffer.len()));
        let second = with_buffer(|buffer| (buffer.as_ptr().addr(), buffer.len()));
        assert_eq!(first.0 % BUFFER_ALIGN, 0);
        assert_eq!(first.1, BUFFER_LEN);
        assert_eq!(first, second);
    }

    #[test]
    fn a_write_lies_in_the_buffer_as_in_its_blocks() {
        let data = [7; 6000];
        let place = with_aligned(&data, 3 * 4096 + 100, |copy| (copy.as_ptr().addr() % 4096, copy == data));
        assert_eq!(place, Some((100, true)));
        let longest = vec![1; 1 << 20];
        assert_eq!(with_aligned(&longest, 4095, <[u8]>::len), Some(1 << 20));
        assert_eq!(with_aligned(&[1; BUFFER_LEN], 1, <[u8]>::len), None);
    }
}
