//! Writing a file sparsely: blocks of zeros become holes.
//!
//! What has not been written yet must be a hole (whoever writes has cut the file there), so that leaving zeros out is
//! all it takes. Decisions are made on 4 KiB blocks of the *file*, whatever pieces the bytes came in, so that the same
//! content always takes the same space.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Write `bytes` at `offset`, leaving out every block, or part of one at either end, that is all zeros.
pub fn write_sparse(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    for_each_run(bytes, offset, |data, at| file.write_all_at(data, at))
}

/// Give `write` each run of neighbouring blocks with data, and where in the file it goes; the rest is left out.
pub fn for_each_run<E>(
    bytes: &[u8],
    offset: u64,
    write: impl FnMut(&[u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    // To the next block boundary of the file.
    let to_boundary = usize::try_from(BLOCK_SIZE - offset % BLOCK_SIZE).unwrap_or(BLOCK_BYTES) % BLOCK_BYTES;
    let (head, rest) = bytes.split_at(to_boundary.min(bytes.len()));
    let mut run = Run { write, bytes, offset, start: 0, end: 0 };
    if !head.is_empty() {
        run.block(head)?;
    }
    for block in rest.chunks(BLOCK_BYTES) {
        run.block(block)?;
    }
    run.flush()
}

/// Neighbouring blocks with data, written at once: `bytes[start..end]`.
struct Run<'a, W> {
    write: W,
    bytes: &'a [u8],
    offset: u64,
    start: usize,
    end: usize,
}

impl<W, E> Run<'_, W>
where
    W: FnMut(&[u8], u64) -> Result<(), E>,
{
    /// The next block of the bytes.
    fn block(&mut self, block: &[u8]) -> Result<(), E> {
        let next = self.end + block.len();
        if is_zero(block) {
            self.flush()?;
            self.start = next;
        }
        self.end = next;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), E> {
        if let Some(data) = self.bytes.get(self.start..self.end).filter(|data| !data.is_empty()) {
            (self.write)(data, self.offset + self.start as u64)?;
        }
        self.start = self.end;
        Ok(())
    }
}

/// Whether all bytes are zero, in strides that the compiler turns into vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (strides, rest) = bytes.as_chunks::<128>();
    strides.iter().all(|stride| stride.iter().fold(0, |all, b| all | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// The content and the allocated 512-byte sectors of a file that got `content` in pieces of `piece` bytes.
    fn written(content: &[u8], piece: usize) -> (Vec<u8>, u64) {
        let file = tempfile::tempfile().unwrap();
        let mut offset = 0;
        for part in content.chunks(piece) {
            write_sparse(&file, part, offset).unwrap();
            offset += part.len() as u64;
        }
        file.set_len(offset).unwrap();
        let mut back = vec![1; content.len()];
        file.read_exact_at(&mut back, 0).unwrap();
        file.sync_all().unwrap();
        (back, file.metadata().unwrap().blocks())
    }

    #[test]
    fn the_content_and_the_space_do_not_depend_on_the_pieces() {
        let mut content = vec![0; 40 * 4096 + 100];
        for at in [5 * 4096 + 1, 6 * 4096, 20 * 4096 + 4095, 40 * 4096 + 99] {
            content[at] = 7;
        }
        for piece in [1000, 4096, 5000, 8192, 100_000, content.len()] {
            let (back, sectors) = written(&content, piece);
            assert!(back == content, "{piece}");
            assert_eq!(sectors, 4 * 8, "{piece}");
        }
    }

    #[test]
    fn zero_is_told_at_every_length() {
        for len in [0, 1, 127, 128, 129, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes));
                bytes[at] = 0;
            }
        }
    }
}
