//! One arrival: from a source into a verified, durable file, in a single pass.
//!
//! Owns [`arrive`], which runs the pass, and [`Arrival`], its upper end: a source pushes bytes in, they leave as
//! aligned pieces for the hands in `pipeline`. Upholds, of invariant 5: a file is returned only when every byte is
//! synced, its length is what the source said, and its sum is the expected one. Of invariant 9: what was synced is kept
//! and is where the next run starts; a failed sync throws away everything since the last good one, because a run
//! always starts by cutting the file to what is kept.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bedplate_engine::{
    error::Error as Storage,
    image::Format,
    planted::{self, Bug},
};

use super::{
    checksum::{Expected, Hasher, Sums},
    failure::{Failure, Result},
    partial::{Kept, PartialNames, Proof},
    pipeline::{Done, Hands, Mark, Piece, Pipeline, Target, Work, carry_out},
    probe::probe,
    progress::{Meter, Phase},
    room::Reserve,
    source::{Source, Validator},
    stop::Stop,
};
use crate::directory::{Directory, HeldFile, Open};

/// Bytes of a full piece. With the queues this bounds the memory of a job to about 18 MiB.
pub const PIECE_LEN: u64 = 1 << 20;
/// Bytes that are read at once, and that tell what a file is.
const READ_LEN: u64 = 1 << 20;
/// Zeros that travel as one piece.
const ZEROS_LEN_MAX: u64 = 64 << 20;

/// What is to arrive, and where.
#[derive(Debug)]
pub struct Spec {
    pub dir: Arc<Directory>,
    pub names: PartialNames,
    /// Where it comes from, for messages about its bytes: nothing secret.
    pub source: String,
    /// What it is, where that is known and not told by its bytes.
    pub format: Option<Format>,
    pub expected: Option<Expected>,
    pub size_max: u64,
    /// What must stay free on its disk.
    pub reserve: Reserve,
    /// Who hashes, writes and syncs.
    pub hands: Hands,
    /// [`PIECE_LEN`], unless the whole is small.
    pub piece_len: u64,
    /// A mark is set each time this much has arrived ...
    pub sync_bytes: u64,
    /// ... or this much time has passed.
    pub sync_interval: Duration,
    pub meter: Arc<Meter>,
    pub stop: Arc<Stop>,
}

/// A file with every byte durable and verified, still under its partial name.
#[derive(Debug)]
pub struct Arrived {
    pub file: HeldFile,
    pub size_bytes: u64,
    pub sums: Sums,
    pub format: Format,
}

/// What a source says before its first byte.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Length of the whole.
    pub total: Option<u64>,
    /// Space that the rest takes at most, when the source knows better than that it is all of the rest.
    pub needed_bytes: Option<u64>,
    pub validator: Validator,
}

/// Whether the parts of an arrival are known to belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parts {
    Proven,
    /// A source went on without a validator, trusting that the checksum tells.
    Unproven,
}

/// Everything has been written and hashed.
struct Pass {
    hasher: Hasher,
    size_bytes: u64,
    validator: Validator,
    parts: Parts,
}

/// Run one arrival, going on where an earlier one was kept.
pub fn arrive(spec: &Spec, source: &mut dyn Source) -> Result<Arrived> {
    let file = spec.dir.open_file(spec.names.data, Open::CreateWrite)?;
    let target = Target { file: &file, dir: &spec.dir, names: spec.names, reserve: spec.reserve };
    let unchecked = planted::is(Bug::ResumedUnchecked) && Kept::load(&spec.dir, spec.names).is_some();
    let mut pass = run(spec, source, target)?;
    if pass.parts == Parts::Unproven && pass.hasher.clone().finish().check(spec.expected.as_ref()).is_err() {
        tracing::warn!(path = %file.path().display(), "the parts of an arrival do not fit; it is fetched once more as a whole");
        Kept::forget(&spec.dir, spec.names)?;
        pass = run(spec, source, target)?;
    }
    let Pass { hasher, size_bytes, validator, parts: _ } = pass;
    if size_bytes == 0 {
        return Err(Failure::Unsupported("the image is empty".to_owned()));
    }
    let midstate = hasher.midstate();
    let sums = hasher.finish();
    sums.check(spec.expected.as_ref().filter(|_| !unchecked))?;

    spec.meter.enter(Phase::Syncing);
    spec.stop.check()?;
    file.set_len(size_bytes)?;
    file.sync_all()?;
    let (position, total, complete, proof) = (size_bytes, Some(size_bytes), true, Proof::NotNeeded);
    Kept { position, total, complete, validator, proof, midstate }.store(&spec.dir, spec.names)?;
    let format = match spec.format {
        Some(format) => format,
        None => probe_file(spec, &file, size_bytes)?,
    };
    Ok(Arrived { file, size_bytes, sums, format })
}

/// Cut the file to what is kept, and restore the hash of that.
fn pick_up(spec: &Spec, target: Target<'_>) -> Result<(Option<Kept>, Hasher)> {
    let file = target.file;
    let len = file.len()?;
    let kept = Kept::load(&spec.dir, spec.names).filter(|kept| kept.position <= len);
    let position = kept.as_ref().map_or(0, |kept| kept.position);
    if kept.is_none() {
        // Nothing may vouch for the bytes that will be written now.
        Kept::forget(&spec.dir, spec.names)?;
    }
    file.set_len(position)?;
    let Some(kept) = kept else { return Ok((None, Hasher::new(spec.expected.as_ref()))) };
    let hasher = match Hasher::resume(&kept.midstate, spec.expected.as_ref()) {
        Some(hasher) => hasher,
        None => rehash(spec, file, position)?,
    };
    Ok((Some(kept), hasher))
}

/// Read the kept prefix again, where its midstate is of no use.
fn rehash(spec: &Spec, file: &HeldFile, position: u64) -> Result<Hasher> {
    spec.meter.begin(Phase::Hashing, 0, Some(position));
    let mut hasher = Hasher::new(spec.expected.as_ref());
    let mut buffer = vec![0; usize::try_from(READ_LEN.min(position)).unwrap_or(0)];
    let mut at = 0;
    while at < position {
        spec.stop.check()?;
        let len = usize::try_from((position - at).min(READ_LEN)).unwrap_or(buffer.len());
        let part = buffer.get_mut(..len).unwrap_or_default();
        file.read_exact_at(part, at)?;
        hasher.update(part);
        at += part.len() as u64;
        spec.meter.advance_to(at);
    }
    Ok(hasher)
}

/// The pass itself.
fn run(spec: &Spec, source: &mut dyn Source, target: Target<'_>) -> Result<Pass> {
    let (kept, hasher) = pick_up(spec, target)?;
    let from = kept.as_ref().map_or(0, |kept| kept.position);
    spec.meter.begin(Phase::Connecting, from, kept.as_ref().and_then(|kept| kept.total));
    if let Some(Kept { validator, complete: true, proof: Proof::NotNeeded, .. }) = kept {
        return Ok(Pass { hasher, size_bytes: from, validator, parts: Parts::Proven });
    }
    let work = Work::new(target, from, hasher, spec.expected.as_ref());
    let (Delivered { outcome, size_bytes, total, validator, parts }, done) =
        carry_out(work, &spec.hands, &spec.meter, |pipeline| deliver(spec, source, pipeline, kept))?;
    let Done { hasher, written } = done;
    // A disk that refuses is why the source could not deliver, so its word comes first.
    written.and(outcome).map_err(|failure| match failure {
        Failure::NoSpace { .. } | Failure::Storage(Storage::NoSpace { .. }) if total.is_none() => {
            Failure::NoSpaceForUnknown { path: spec.dir.path().to_owned(), arrived_bytes: size_bytes }
        }
        other => other,
    })?;
    Ok(Pass { hasher: hasher?, size_bytes, validator, parts })
}

/// What a source delivered.
struct Delivered {
    outcome: Result<()>,
    size_bytes: u64,
    total: Option<u64>,
    validator: Validator,
    parts: Parts,
}

/// Have the source deliver everything.
fn deliver(
    spec: &Spec,
    source: &mut dyn Source,
    pipeline: &mut dyn Pipeline,
    kept: Option<Kept>,
) -> Delivered {
    let mut arrival = Arrival::new(spec, pipeline, kept);
    let outcome = source.transfer(&mut arrival).and_then(|()| arrival.finish());
    let size_bytes = arrival.position();
    if outcome.as_ref().err().is_some_and(Failure::keeps_partial) {
        // What came last is worth a sync; if that fails, less is kept and the first reason stays.
        drop(arrival.mark());
    }
    let Arrival { total, validator, parts, .. } = arrival;
    Delivered { outcome, size_bytes, total, validator, parts }
}

fn probe_file(spec: &Spec, file: &HeldFile, size_bytes: u64) -> Result<Format> {
    let mut first = vec![0; usize::try_from(READ_LEN.min(size_bytes)).unwrap_or(0)];
    file.read_exact_at(&mut first, 0)?;
    probe(&first, &spec.source, Some(size_bytes))
}

/// The upper end of an arrival, where a source pushes bytes in.
#[derive(Debug)]
pub struct Arrival<'a> {
    spec: &'a Spec,
    pipeline: &'a mut dyn Pipeline,
    /// Bytes that were handed on.
    sent: u64,
    /// Bytes that wait to become a piece. Pieces end at multiples of [`Spec::piece_len`] of the file.
    buffer: Vec<u8>,
    total: Option<u64>,
    validator: Validator,
    parts: Parts,
    proof: Proof,
    marked: u64,
    marked_at: Instant,
    probed: bool,
}

impl<'a> Arrival<'a> {
    fn new(spec: &'a Spec, pipeline: &'a mut dyn Pipeline, kept: Option<Kept>) -> Self {
        let (sent, total, validator, proof) = match kept {
            Some(kept) => (kept.position, kept.total, kept.validator, kept.proof),
            None => (0, None, Validator::None, Proof::NotNeeded),
        };
        Arrival {
            spec,
            pipeline,
            sent,
            buffer: Vec::new(),
            total,
            validator,
            parts: Parts::Proven,
            proof,
            marked: sent,
            marked_at: Instant::now(),
            probed: sent > 0 || spec.format.is_some(),
        }
    }

    /// Where the next byte goes: everything before has arrived, in this run or an earlier one.
    pub fn position(&self) -> u64 {
        self.sent + self.buffer.len() as u64
    }

    /// The length of the whole, where it is known.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// What the bytes before [`Arrival::position`] were said to belong to.
    pub fn validator(&self) -> &Validator {
        &self.validator
    }

    /// Whether the source must prove that it still serves what was kept, or else [restart](Arrival::restart).
    pub fn proof(&self) -> Proof {
        self.proof
    }

    /// The source serves what [`Arrival::validator`] is of.
    pub fn proven(&mut self) {
        self.proof = Proof::NotNeeded;
    }

    pub fn expected(&self) -> Option<&Expected> {
        self.spec.expected.as_ref()
    }

    pub fn meter(&self) -> &Meter {
        &self.spec.meter
    }

    pub fn stop(&self) -> &Arc<Stop> {
        &self.spec.stop
    }

    /// Bytes are about to come from [`Arrival::position`] on. Refuses what will not fit.
    pub fn begin(&mut self, opening: Opening) -> Result<()> {
        let Opening { total, needed_bytes, validator } = opening;
        if let Some(total) = total {
            if total == 0 {
                return Err(Failure::Unsupported("the image is empty".to_owned()));
            }
            self.check_size(total)?;
        }
        let left = total.map_or(0, |total| total.saturating_sub(self.position()));
        self.total = total;
        self.validator = validator;
        self.spec.reserve.check_fits(&self.spec.dir, needed_bytes.unwrap_or(left))?;
        self.spec.meter.begin(Phase::Transferring, self.position(), total);
        Ok(())
    }

    /// What comes now is joined to what has arrived without proof that both are of one file. Only right when a checksum
    /// is expected; if that does not agree, everything is fetched once more.
    pub fn join_unproven(&mut self) {
        self.parts = Parts::Unproven;
    }

    /// The next bytes.
    pub fn bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.check_room(bytes.len() as u64)?;
        while !bytes.is_empty() {
            let room = self.spec.piece_len - self.position() % self.spec.piece_len;
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(take);
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.position().is_multiple_of(self.spec.piece_len) {
                self.hand_on()?;
            }
        }
        self.mark_when_due()
    }

    /// The next `len` bytes are zeros.
    pub fn zeros(&mut self, mut len: u64) -> Result<()> {
        self.check_room(len)?;
        while len > 0 {
            let part = len.min(ZEROS_LEN_MAX);
            if part < self.spec.piece_len {
                // Short runs stay in line with the pieces.
                let zeros = vec![0; usize::try_from(part).unwrap_or(0)];
                self.bytes(&zeros)?;
            } else {
                self.hand_on()?;
                self.probed = true;
                self.sent += part;
                self.pipeline.hand_on(Piece::Zeros(part))?;
                self.mark_when_due()?;
            }
            len -= part;
        }
        Ok(())
    }

    /// Everything that has arrived belongs to something else: begin at byte 0. On return it takes no space any more.
    pub fn restart(&mut self) -> Result<()> {
        self.buffer.clear();
        (self.sent, self.marked, self.probed) = (0, 0, self.spec.format.is_some());
        (self.total, self.validator, self.parts) = (None, Validator::None, Parts::Proven);
        self.proof = Proof::NotNeeded;
        self.spec.meter.begin(Phase::Connecting, 0, None);
        self.pipeline.restart()
    }

    /// Have everything up to here made durable and kept; does not wait for it.
    pub fn mark(&mut self) -> Result<()> {
        self.hand_on()?;
        self.marked_at = Instant::now();
        if self.sent == self.marked {
            return Ok(());
        }
        self.marked = self.sent;
        let mark = Mark { position: self.sent, total: self.total, validator: self.validator.clone() };
        self.pipeline.hand_on(Piece::Mark(mark))
    }

    /// How long until what has arrived by now should be kept.
    pub fn mark_due_in(&self) -> Duration {
        self.spec.sync_interval.saturating_sub(self.marked_at.elapsed())
    }

    fn mark_when_due(&mut self) -> Result<()> {
        let due = self.position() - self.marked >= self.spec.sync_bytes
            || self.marked_at.elapsed() >= self.spec.sync_interval;
        if due { self.mark() } else { Ok(()) }
    }

    /// The source says that this was all.
    fn finish(&mut self) -> Result<()> {
        self.hand_on()?;
        match self.total {
            Some(total) if total != self.sent => {
                Err(Failure::Source(format!("the source ended after {} of {total} bytes", self.sent)))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn hand_on(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if !self.probed {
            probe(&self.buffer, &self.spec.source, self.total)?;
            self.probed = true;
        }
        let bytes = Arc::new(std::mem::take(&mut self.buffer));
        self.sent += bytes.len() as u64;
        self.pipeline.hand_on(Piece::Data(bytes))?;
        self.spec.meter.advance_to(self.sent);
        self.buffer.reserve_exact(usize::try_from(self.spec.piece_len).unwrap_or(0));
        Ok(())
    }

    fn check_room(&self, len: u64) -> Result<()> {
        self.spec.stop.check()?;
        let end = self.position().saturating_add(len);
        if self.total.is_some_and(|total| end > total) {
            return Err(Failure::Source(format!(
                "the source delivers more than the {} bytes it said",
                end - len
            )));
        }
        self.check_size(end)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if size > self.spec.size_max {
            return Err(Failure::Unsupported(format!("images have at most {} bytes", self.spec.size_max)));
        }
        Ok(())
    }
}
