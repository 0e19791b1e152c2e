//! A device for tests: bytes in memory, whose runs come one at a time and cut short, as a device may.

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Reply, Request},
    error::{Error, Result},
    units::{ByteLen, ByteRange, to_usize},
};

use bedplate_engine::sparse::is_zero;

/// The longest run that it gives.
const RUN_LEN_MAX: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// Zero blocks are zero runs.
pub struct MemoryDevice(pub Vec<u8>);

impl MemoryDevice {
    fn kind(&self, block: u64) -> ExtentKind {
        let start = to_usize(block * BLOCK);
        let end = to_usize((block + 1) * BLOCK).min(self.0.len());
        if is_zero(&self.0[start..end]) { ExtentKind::Zero } else { ExtentKind::Data }
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.0.len() as u64), access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let reply = match request {
            Request::Read { offset, mut buffer } => {
                let at = to_usize(offset);
                let end = at + buffer.len();
                buffer.copy_from_slice(&self.0[at..end]);
                Reply { result: Ok(()), buffer }
            }
            _ => Reply { result: Err(Error::ReadOnly { what: "memory".to_owned() }), buffer: Vec::new() },
        };
        complete(reply);
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let start = range.start.0;
        let last = range.end().0.min(start + RUN_LEN_MAX);
        let kind = self.kind(start / BLOCK);
        let mut end = start;
        while end < last && self.kind(end / BLOCK) == kind {
            end = ((end / BLOCK + 1) * BLOCK).min(last);
        }
        Ok(vec![Extent { range: ByteRange::new(start, end - start), kind }])
    }
}
