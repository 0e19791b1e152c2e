//! Compressing one cluster. One [`Compressor`] per thread; its state is reused from cluster to cluster.

use flate2::{Compress, FlushCompress, Status};

use super::Compression;

/// The window that readers of zlib clusters have: 4 KiB. A compressor with a larger one makes streams that QEMU refuses.
const ZLIB_WINDOW_BITS: u8 = 12;
/// QEMU's own choice, for both: the library's default.
const ZLIB_LEVEL: u32 = 6;

pub struct Compressor {
    method: Method,
    /// With room for a cluster that gets larger: zlib-rs (0.6.8) panics later when it is reset after a stream that it
    /// could not end.
    out: Vec<u8>,
}

enum Method {
    Zlib(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// For clusters of `cluster_len` bytes.
    pub fn new(compression: Compression, cluster_len: usize) -> std::io::Result<Compressor> {
        let method = match compression {
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                Method::Zlib(Compress::new_with_window_bits(level, false, ZLIB_WINDOW_BITS))
            }
            Compression::Zstd => Method::Zstd(zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?),
        };
        Ok(Compressor { method, out: vec![0; cluster_len + cluster_len / 8 + 256] })
    }

    /// The cluster in fewer bytes, or `None` when it does not get smaller.
    pub fn compress(&mut self, cluster: &[u8]) -> Option<&[u8]> {
        let len = match &mut self.method {
            Method::Zlib(zlib) => {
                zlib.reset();
                match zlib.compress(cluster, &mut self.out, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(zlib.total_out()).ok()?,
                    Ok(Status::Ok | Status::BufError) | Err(_) => return None,
                }
            }
            // The only error that there could be is that it does not fit.
            Method::Zstd(zstd) => zstd.compress_to_buffer(cluster, self.out.as_mut_slice()).ok()?,
        };
        self.out.get(..len).filter(|small| small.len() < cluster.len())
    }
}
