//! Writing a block device's content as a qcow2 file.
//!
//! The guest range is cut into pieces, which threads take in order: each reads its piece, leaves out clusters of zeros,
//! compresses the others, waits for its turn, places them ([`layout`]) and writes them. Only the placing is done one
//! after another, so reading, compressing and writing use all cores, nothing is queued (a thread holds one piece), and
//! the file does not depend on how threads happened to run. What the file looks like is [`layout`]'s.

mod compress;
mod layout;

use std::{
    fs::File,
    num::NonZero,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use self::{
    compress::Compressor,
    layout::{Layout, Placed},
};
use super::{Content, Monitor};
use crate::{
    device::{BlockDevice, ExtentKind, runs_from},
    error::{Error, Result},
    sparse::is_zero,
    units::{ByteRange, to_usize},
};

/// Bytes of one piece; a cluster where that is larger.
const PIECE_LEN: u64 = 1 << 20;
/// Threads of one export.
const THREADS_MAX: usize = 64;

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
pub fn write(
    device: &dyn BlockDevice,
    file: &File,
    path: &Path,
    options: Options,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    let size = device.geometry().size.0;
    let order = Order {
        state: Mutex::new(State {
            layout: Layout::new(options.cluster, size, options.compression)?,
            walk: Walk { size, given_to: 0, asked_to: 0, runs: Vec::new() },
            handed_out: 0,
            placed: 0,
            placed_to: 0,
            failed: None,
            monitor,
        }),
        turned: Condvar::new(),
    };
    let job = Job { device, file, path, options, order: &order };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| job.run());
        }
        job.run();
    });

    let state = order.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.failed {
        return Err(error);
    }
    if state.placed_to < size {
        state.monitor.content(Content::Zeros(size - state.placed_to))?;
    }
    let mut placed = Vec::new();
    let header = state.layout.finish(&mut placed);
    placed.iter().chain([&header]).try_for_each(|placed| put(file, path, placed.at, &placed.bytes))
}

/// What the threads take turns at.
struct Order<'a> {
    state: Mutex<State<'a>>,
    turned: Condvar,
}

struct State<'a> {
    layout: Layout,
    walk: Walk,
    /// Pieces given to threads.
    handed_out: u64,
    /// Pieces placed, which is the number of the piece whose turn it is.
    placed: u64,
    /// The guest byte after the last piece that was placed.
    placed_to: u64,
    /// The first failure, which ends all threads.
    failed: Option<Error>,
    monitor: &'a mut dyn Monitor,
}

impl<'a> Order<'a> {
    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: Error) {
        self.lock().failed.get_or_insert(error);
        self.turned.notify_all();
    }

    /// The next piece and its number, or `None` when all are taken or one has failed.
    fn next(&self, job: &Job<'_, '_>) -> Result<Option<(u64, ByteRange)>> {
        let mut state = self.lock();
        if state.failed.is_some() {
            return Ok(None);
        }
        let Some(piece) = state.walk.next(job.device, job.options.cluster)? else { return Ok(None) };
        state.handed_out += 1;
        Ok(Some((state.handed_out - 1, piece)))
    }

    /// Run `place` when it is this piece's turn; `None` when another has failed.
    fn in_turn<T>(&self, number: u64, place: impl FnOnce(&mut State<'a>) -> Result<T>) -> Result<Option<T>> {
        let mut state = self.lock();
        while state.placed != number && state.failed.is_none() {
            // Ends: the piece before has a thread, which places it or fails.
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.failed.is_some() {
            return Ok(None);
        }
        let done = place(&mut state)?;
        state.placed += 1;
        drop(state);
        self.turned.notify_all();
        Ok(Some(done))
    }
}

/// Ends the other threads when this one panics: they would wait for its turn for ever.
struct Guard<'a, 'b>(&'a Order<'b>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(Error::Closed);
        }
    }
}

/// One export.
struct Job<'a, 'b> {
    device: &'a dyn BlockDevice,
    file: &'a File,
    path: &'a Path,
    options: Options,
    order: &'a Order<'b>,
}

impl Job<'_, '_> {
    /// Take pieces until there are none.
    fn run(&self) {
        let _ends_the_others = Guard(self.order);
        if let Err(error) = self.pieces() {
            self.order.fail(error);
        }
    }

    fn pieces(&self) -> Result<()> {
        let cluster = self.options.cluster;
        let mut compressor = self
            .options
            .compression
            .map(|compression| Compressor::new(compression, cluster.as_usize()))
            .transpose()
            .map_err(|e| Error::io("compress for", self.path, e))?;
        let mut piece = Piece::default();
        while let Some((number, range)) = self.order.next(self)? {
            piece.read(self.device, range, cluster)?;
            if let Some(compressor) = &mut compressor {
                piece.compress(compressor, cluster);
            }
            let placed = self.order.in_turn(number, |state| {
                let zeros = range.start.0 - state.placed_to;
                if zeros > 0 {
                    state.monitor.content(Content::Zeros(zeros))?;
                }
                state
                    .monitor
                    .content(Content::Data(piece.bytes.get(..to_usize(range.len.0)).unwrap_or_default()))?;
                state.placed_to = range.end().0;
                state.monitor.reached(state.placed_to)?;
                Ok(piece.place(&mut state.layout, range, cluster))
            })?;
            let Some(placed) = placed else { return Ok(()) };
            let put = |at, bytes: Option<&[u8]>| put(self.file, self.path, at, bytes.unwrap_or_default());
            placed.tables.iter().try_for_each(|table| put(table.at, Some(&table.bytes)))?;
            placed.plain.iter().try_for_each(|run| put(run.at, piece.bytes.get(run.from..run.to)))?;
            placed.packed.iter().try_for_each(|run| put(run.at, piece.packed.get(run.from..run.to)))?;
        }
        Ok(())
    }
}

fn put(file: &File, path: &Path, at: u64, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, at).map_err(|e| Error::io("write", path, e))
}

/// Goes over a device's data in order, in pieces of whole clusters.
struct Walk {
    size: u64,
    /// Up to here pieces have been given; a multiple of the cluster's size, or the end.
    given_to: u64,
    /// Up to here the device has been asked.
    asked_to: u64,
    /// Data before `asked_to` that has not been given whole, last first.
    runs: Vec<ByteRange>,
}

impl Walk {
    fn next(&mut self, device: &dyn BlockDevice, cluster: ClusterSize) -> Result<Option<ByteRange>> {
        let piece_len = PIECE_LEN.max(cluster.bytes());
        let mut piece = ByteRange::new(0, 0);
        loop {
            let Some(run) = self.runs.pop() else {
                if !piece.is_empty() || self.asked_to >= self.size {
                    break;
                }
                self.ask(device)?;
                continue;
            };
            // The cluster that it begins in may have been given for the run before it.
            let start = (run.start.0 / cluster.bytes() * cluster.bytes()).max(self.given_to);
            if run.end().0 <= start {
                continue;
            }
            if !piece.is_empty() && (start > piece.end().0 || piece.len.0 >= piece_len) {
                self.runs.push(run);
                break;
            }
            let first = if piece.is_empty() { start } else { piece.start.0 };
            let end = run.end().0.next_multiple_of(cluster.bytes()).min(first + piece_len).min(self.size);
            if end < run.end().0 {
                self.runs.push(run);
            }
            piece = ByteRange::new(first, end - first);
            self.given_to = end;
        }
        Ok((!piece.is_empty()).then_some(piece))
    }

    fn ask(&mut self, device: &dyn BlockDevice) -> Result<()> {
        let extents = runs_from(device, self.asked_to)?;
        self.asked_to = extents.last().map_or(self.size, |last| last.range.end().0);
        let data = extents.into_iter().rev().filter(|extent| extent.kind == ExtentKind::Data);
        self.runs.extend(data.map(|extent| extent.range));
        Ok(())
    }
}

/// A thread's piece of the content.
#[derive(Default)]
struct Piece {
    /// The content, with zeros after the device's end up to a whole cluster.
    bytes: Vec<u8>,
    clusters: Vec<Stored>,
    /// The compressed clusters one after another.
    packed: Vec<u8>,
}

/// What becomes of a cluster.
#[derive(Clone, Copy, Debug)]
enum Stored {
    Zero,
    Plain,
    Packed { len: usize },
}

/// A run of a piece's buffer and where it goes in the file.
struct Run {
    from: usize,
    to: usize,
    at: u64,
}

#[derive(Default)]
struct Places {
    tables: Vec<Placed>,
    plain: Vec<Run>,
    packed: Vec<Run>,
}

impl Piece {
    fn read(&mut self, device: &dyn BlockDevice, range: ByteRange, cluster: ClusterSize) -> Result<()> {
        let len = to_usize(range.len.0);
        self.bytes.resize(len.next_multiple_of(cluster.as_usize()), 0);
        let (content, past_end) = self.bytes.split_at_mut(len);
        past_end.fill(0);
        device.read_at(content, range.start.0)?;
        let stored = |bytes: &[u8]| if is_zero(bytes) { Stored::Zero } else { Stored::Plain };
        self.clusters.clear();
        self.clusters.extend(self.bytes.chunks(cluster.as_usize()).map(stored));
        Ok(())
    }

    fn compress(&mut self, compressor: &mut Compressor, cluster: ClusterSize) {
        self.packed.clear();
        for (bytes, stored) in self.bytes.chunks(cluster.as_usize()).zip(&mut self.clusters) {
            if let Stored::Plain = stored
                && let Some(small) = compressor.compress(bytes)
            {
                self.packed.extend_from_slice(small);
                *stored = Stored::Packed { len: small.len() };
            }
        }
    }

    /// Give every cluster its place, in guest order.
    fn place(&self, layout: &mut Layout, range: ByteRange, cluster: ClusterSize) -> Places {
        let mut places = Places::default();
        let mut packed = 0;
        for (n, stored) in self.clusters.iter().enumerate() {
            let from = n * cluster.as_usize();
            let guest = range.start.0 + from as u64;
            match *stored {
                Stored::Zero => {}
                Stored::Plain => {
                    let at = layout.place(guest, &mut places.tables);
                    append(&mut places.plain, Run { from, to: from + cluster.as_usize(), at });
                }
                Stored::Packed { len } => {
                    let at = layout.place_compressed(guest, len as u64, &mut places.tables);
                    append(&mut places.packed, Run { from: packed, to: packed + len, at });
                    packed += len;
                }
            }
        }
        places
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
