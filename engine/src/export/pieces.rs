//! A device's content, piece by piece, on all cores.
//!
//! The content is cut into pieces, which threads take in order: each reads its piece, prepares it (compresses, say),
//! waits for its turn, places it and writes it. Only the placing is done one after another, so nothing is queued (a
//! thread holds one piece) and what is written does not depend on how threads happened to run. What does the work is a
//! [`Format`].

use std::{
    num::NonZero,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{Content, Monitor};
use crate::{
    device::{BlockDevice, ExtentKind, runs_from},
    error::{Error, Result},
    units::{ByteRange, to_usize},
};

/// Bytes of one piece; a unit of the format where that is larger.
const PIECE_LEN: u64 = 1 << 20;
/// Threads of one export.
const THREADS_MAX: usize = 64;

/// What becomes of pieces.
pub(super) trait Format: Sync {
    /// What a thread has of its own.
    type Worker;

    fn worker(&self) -> Result<Self::Worker>;

    /// Pieces begin at multiples of this many bytes.
    fn unit(&self) -> u64;

    /// Called in any order, on several threads.
    fn prepare(&self, worker: &mut Self::Worker, piece: &Piece);

    /// Called in the order of the content, one after another.
    fn place(&self, worker: &mut Self::Worker, piece: &Piece);

    /// Called in any order, on several threads.
    fn write(&self, worker: &mut Self::Worker, piece: &Piece) -> Result<()>;
}

/// A part of the content that has data in it.
#[derive(Debug)]
pub(super) struct Piece {
    pub range: ByteRange,
    /// The content of the range, and zeros after the device's end up to a whole unit.
    pub bytes: Vec<u8>,
}

/// Hand all pieces of `device`, which does not change meanwhile, to `format`.
pub(super) fn for_each_piece<F: Format>(
    device: &dyn BlockDevice,
    format: &F,
    monitor: &mut dyn Monitor,
) -> Result<()> {
    let size = device.geometry().size.0;
    let walk = Walk { size, unit: format.unit(), given_to: 0, asked_to: 0, runs: Vec::new() };
    let state = State { walk, handed_out: 0, placed: 0, placed_to: 0, failed: None, monitor };
    let order = Order { state: Mutex::new(state), turned: Condvar::new() };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    thread::scope(|scope| {
        for _ in 1..threads {
            // With fewer threads it takes longer, and that is all.
            let spawned = thread::Builder::new().spawn_scoped(scope, || order.run(device, format));
            if spawned.is_err() {
                break;
            }
        }
        order.run(device, format);
    });
    let state = order.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.failed {
        return Err(error);
    }
    if state.placed_to < size {
        state.monitor.content(Content::Zeros(size - state.placed_to))?;
        state.monitor.reached(size)?;
    }
    Ok(())
}

/// What the threads take turns at.
struct Order<'a> {
    state: Mutex<State<'a>>,
    turned: Condvar,
}

struct State<'a> {
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

impl State<'_> {
    /// Show the monitor what comes before the piece, and the piece.
    fn show(&mut self, piece: &Piece) -> Result<()> {
        let range = piece.range;
        if range.start.0 > self.placed_to {
            self.monitor.content(Content::Zeros(range.start.0 - self.placed_to))?;
        }
        let content = piece.bytes.get(..to_usize(range.len.0)).unwrap_or_default();
        self.monitor.content(Content::Data(content))?;
        self.placed_to = range.end().0;
        self.monitor.reached(self.placed_to)
    }
}

impl<'a> Order<'a> {
    /// Take pieces until there are none.
    fn run<F: Format>(&self, device: &dyn BlockDevice, format: &F) {
        let _ends_the_others = Guard(self);
        if let Err(error) = self.pieces(device, format) {
            self.fail(error);
        }
    }

    fn pieces<F: Format>(&self, device: &dyn BlockDevice, format: &F) -> Result<()> {
        let unit = to_usize(format.unit());
        let mut worker = format.worker()?;
        let mut piece = Piece { range: ByteRange::new(0, 0), bytes: Vec::new() };
        while let Some((number, range)) = self.next(device)? {
            piece.range = range;
            let len = to_usize(range.len.0);
            piece.bytes.resize(len.next_multiple_of(unit), 0);
            let (content, past_end) = piece.bytes.split_at_mut(len);
            past_end.fill(0);
            device.read_at(content, range.start.0)?;
            format.prepare(&mut worker, &piece);
            let placed = self.in_turn(number, |state| {
                state.show(&piece)?;
                format.place(&mut worker, &piece);
                Ok(())
            })?;
            if placed.is_none() {
                return Ok(());
            }
            format.write(&mut worker, &piece)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: Error) {
        self.lock().failed.get_or_insert(error);
        self.turned.notify_all();
    }

    /// The next piece and its number, or `None` when all are taken or one has failed.
    fn next(&self, device: &dyn BlockDevice) -> Result<Option<(u64, ByteRange)>> {
        let mut state = self.lock();
        if state.failed.is_some() {
            return Ok(None);
        }
        let Some(piece) = state.walk.next(device)? else { return Ok(None) };
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

/// Goes over a device's data in order, in pieces of whole units.
struct Walk {
    size: u64,
    unit: u64,
    /// Up to here pieces have been given; a multiple of the unit, or the end.
    given_to: u64,
    /// Up to here the device has been asked.
    asked_to: u64,
    /// Data before `asked_to` that has not been given whole, last first.
    runs: Vec<ByteRange>,
}

impl Walk {
    fn next(&mut self, device: &dyn BlockDevice) -> Result<Option<ByteRange>> {
        let piece_len = PIECE_LEN.max(self.unit);
        let mut piece = ByteRange::new(0, 0);
        loop {
            let Some(run) = self.runs.pop() else {
                if !piece.is_empty() || self.asked_to >= self.size {
                    break;
                }
                self.ask(device)?;
                continue;
            };
            // The unit that it begins in may have been given for the run before it.
            let start = (run.start.0 / self.unit * self.unit).max(self.given_to);
            if run.end().0 <= start {
                continue;
            }
            if !piece.is_empty() && (start > piece.end().0 || piece.len.0 >= piece_len) {
                self.runs.push(run);
                break;
            }
            let first = if piece.is_empty() { start } else { piece.start.0 };
            let end = run.end().0.next_multiple_of(self.unit).min(first + piece_len).min(self.size);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Access, Complete, Extent, Geometry, Request},
        units::ByteLen,
    };

    /// Runs of data at any byte, of which the device tells `told` at most at once.
    struct Runs {
        size: u64,
        data: Vec<(u64, u64)>,
        told: usize,
    }

    impl Runs {
        fn random(mut seed: u64) -> Runs {
            let mut random = |below: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 33) % below + 1
            };
            let longest = [700, 70_000, 5 << 20][to_usize(random(3) - 1)];
            let size = (random(60) * longest).next_multiple_of(512);
            let (mut data, mut at) = (Vec::new(), random(longest) - 1);
            while at < size {
                let end = (at + random(longest)).min(size);
                data.push((at, end));
                at = end + random(longest);
            }
            Runs { size, data, told: to_usize(random(5)) }
        }
    }

    impl BlockDevice for Runs {
        fn geometry(&self) -> Geometry {
            Geometry { size: ByteLen(self.size), access: Access::ReadOnly }
        }

        fn submit(&self, _request: Request, _complete: Complete) {
            unreachable!("nothing is read");
        }

        fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
            let mut extents = Vec::new();
            let mut at = range.start.0;
            let mut push = |end: u64, kind| {
                let end = end.min(range.end().0);
                if end > at && extents.len() < self.told {
                    extents.push(Extent { range: ByteRange::new(at, end - at), kind });
                    at = end;
                }
            };
            for (start, end) in &self.data {
                push(*start, ExtentKind::Zero);
                push(*end, ExtentKind::Data);
            }
            push(self.size, ExtentKind::Zero);
            Ok(extents)
        }
    }

    #[test]
    fn pieces_are_whole_units_in_order_and_leave_no_byte_of_data_out() {
        for seed in 0..2000_u64 {
            let unit = 1 << (9 + seed % 13);
            let device = Runs::random(seed);
            let mut walk = Walk { size: device.size, unit, given_to: 0, asked_to: 0, runs: Vec::new() };
            let mut pieces: Vec<ByteRange> = Vec::new();
            while let Some(piece) = walk.next(&device).unwrap() {
                assert!(pieces.last().is_none_or(|last| last.end() <= piece.start), "seed {seed}");
                assert!(piece.start.0.is_multiple_of(unit) && !piece.is_empty(), "seed {seed}");
                assert!(piece.end().0.is_multiple_of(unit) || piece.end().0 == device.size, "seed {seed}");
                assert!(piece.len.0 <= PIECE_LEN.max(unit), "seed {seed}");
                pieces.push(piece);
            }
            let covered = |at: u64, end: u64| -> u64 {
                let run = ByteRange::new(at, end - at);
                pieces.iter().filter_map(|piece| piece.intersect(run)).map(|part| part.len.0).sum()
            };
            for (at, end) in &device.data {
                assert_eq!(covered(*at, *end), end - at, "seed {seed}: {at}-{end}");
            }
            // A unit without data is in no piece.
            let with_data = |at: u64| device.data.iter().any(|(start, end)| *start < at + unit && at < *end);
            for piece in &pieces {
                let mut units = (piece.start.0..piece.end().0).step_by(to_usize(unit));
                assert!(units.all(with_data), "seed {seed}: {piece}");
            }
        }
    }
}
