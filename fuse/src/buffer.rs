//! One buffer per serving thread, which reads are made into and answered from.
//!
//! Owns its alignment ([`BUFFER_ALIGN`], so that a device may read into it with direct I/O) and its bound
//! ([`REQUEST_BYTES_MAX`]). It is allocated at a thread's first read and kept: nothing is allocated, cleared or copied
//! per request. Writes need none: their bytes stay where the transport received them, 80 bytes into its own buffer, so
//! a device that wants aligned memory makes its one copy itself.

use std::cell::RefCell;

/// Longest read or write that the kernel is told to send.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// What direct I/O needs on every medium in use.
const BUFFER_ALIGN: usize = 4096;

const BUFFER_LEN: usize = 1 << 20;
const _: () = assert!(BUFFER_LEN as u64 == REQUEST_BYTES_MAX as u64, "a buffer holds the longest request");

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
}
