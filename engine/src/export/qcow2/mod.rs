//! Writing a block device's content as a qcow2 file.
//!
//! Clusters of zeros are left out, the others compressed where that is asked for and makes them smaller. What the file
//! looks like is `layout`'s; how the work is spread over threads is `pieces`'s.

mod compress;
mod layout;

use std::{
    fs::File,
    path::Path,
    sync::{Mutex, PoisonError},
};

use self::{
    compress::Compressor,
    layout::{Layout, Placed},
};
use super::{
    Monitor,
    pieces::{self, Piece},
    put,
};
use crate::{
    device::BlockDevice,
    error::{Error, Result},
    sparse::is_zero,
    units::to_usize,
};

/// How clusters are compressed, each at the level that QEMU uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Zlib,
    Zstd,
}

/// Bytes of a cluster: a power of two from 512 to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// Refuses what is not such a power.
    pub fn new(bytes: u64) -> Result<ClusterSize> {
        if !bytes.is_power_of_two() || !(512..=2 << 20).contains(&bytes) {
            return Err(Error::Invalid(format!(
                "a cluster of {bytes} bytes: it must be a power of two from 512 to 2M"
            )));
        }
        Ok(ClusterSize { bits: bytes.trailing_zeros() })
    }

    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    const fn bits(self) -> u32 {
        self.bits
    }

    const fn as_usize(self) -> usize {
        to_usize(self.bytes())
    }

    /// Entries of an L2 table, which fills a cluster.
    const fn entries(self) -> u64 {
        self.bytes() / 8
    }
}

impl Default for ClusterSize {
    /// 64 KiB, as `qemu-img` has it.
    fn default() -> ClusterSize {
        ClusterSize { bits: 16 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub cluster: ClusterSize,
    pub compression: Option<Compression>,
}

/// Write `device`, which does not change meanwhile, to the empty `file`; `path` is its name for errors. Not synced.
pub(super) fn write(
    device: &dyn BlockDevice,
    file: &File,
    path: &Path,
    options: Options,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    let layout = Layout::new(options.cluster, device.geometry().size.0, options.compression)?;
    let writer = Writer { file, path, options, layout: Mutex::new(layout) };
    pieces::for_each_piece(device, &writer, monitor)?;
    let layout = writer.layout.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut placed = Vec::new();
    let header = layout.finish(&mut placed);
    placed.iter().chain([&header]).try_for_each(|placed| put(file, path, placed.at, &placed.bytes))
}

struct Writer<'a> {
    file: &'a File,
    path: &'a Path,
    options: Options,
    layout: Mutex<Layout>,
}

/// What a thread knows of its piece.
struct Worker {
    compressor: Option<Compressor>,
    clusters: Vec<Stored>,
    /// The compressed clusters one after another.
    packed: Vec<u8>,
    places: Places,
}

/// What becomes of a cluster.
#[derive(Clone, Copy, Debug)]
enum Stored {
    Zero,
    Plain,
    Packed { len: usize },
}

#[derive(Default)]
struct Places {
    tables: Vec<Placed>,
    plain: Vec<Run>,
    packed: Vec<Run>,
}

/// A run of a buffer and where it goes in the file.
struct Run {
    from: usize,
    to: usize,
    at: u64,
}

impl pieces::Format for Writer<'_> {
    type Worker = Worker;

    fn worker(&self) -> Result<Worker> {
        let cluster = self.options.cluster.as_usize();
        let compressor = self.options.compression.map(|compression| Compressor::new(compression, cluster));
        let compressor = compressor.transpose().map_err(|e| Error::io("compress for", self.path, e))?;
        Ok(Worker { compressor, clusters: Vec::new(), packed: Vec::new(), places: Places::default() })
    }

    fn unit(&self) -> u64 {
        self.options.cluster.bytes()
    }

    fn prepare(&self, worker: &mut Worker, piece: &Piece) {
        worker.clusters.clear();
        worker.packed.clear();
        for bytes in piece.bytes.chunks(self.options.cluster.as_usize()) {
            let stored = if is_zero(bytes) {
                Stored::Zero
            } else if let Some(small) = worker.compressor.as_mut().and_then(|c| c.compress(bytes)) {
                worker.packed.extend_from_slice(small);
                Stored::Packed { len: small.len() }
            } else {
                Stored::Plain
            };
            worker.clusters.push(stored);
        }
    }

    fn place(&self, worker: &mut Worker, piece: &Piece) {
        let mut layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let cluster = self.options.cluster.as_usize();
        let mut places = Places::default();
        let mut packed = 0;
        for (n, stored) in worker.clusters.iter().enumerate() {
            let from = n * cluster;
            let guest = piece.range.start.0 + from as u64;
            match *stored {
                Stored::Zero => {}
                Stored::Plain => {
                    let at = layout.place(guest, &mut places.tables);
                    append(&mut places.plain, Run { from, to: from + cluster, at });
                }
                Stored::Packed { len } => {
                    let at = layout.place_compressed(guest, len as u64, &mut places.tables);
                    append(&mut places.packed, Run { from: packed, to: packed + len, at });
                    packed += len;
                }
            }
        }
        worker.places = places;
    }

    fn write(&self, worker: &mut Worker, piece: &Piece) -> Result<()> {
        let put = |at, bytes: Option<&[u8]>| put(self.file, self.path, at, bytes.unwrap_or_default());
        let places = &worker.places;
        places.tables.iter().try_for_each(|table| put(table.at, Some(&table.bytes)))?;
        places.plain.iter().try_for_each(|run| put(run.at, piece.bytes.get(run.from..run.to)))?;
        places.packed.iter().try_for_each(|run| put(run.at, worker.packed.get(run.from..run.to)))
    }
}

/// Add a run, to the last one where it continues that both in the buffer and in the file.
fn append(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.to == run.from && last.at + (last.to - last.from) as u64 == run.at => {
            last.to = run.to
        }
        _ => runs.push(run),
    }
}
