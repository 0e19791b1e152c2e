//! What is inspected, as one read-only device: layers over layers, whatever their formats.
//!
//! Owns [`Layer`], the boundary between formats and everything that compares, converts, maps or draws, and [`Stack`],
//! layers with the newest on top. A stack answers where bytes are ([`Run`]) before it reads any, so that a map and a
//! read never disagree. Damage and files that may not be opened are answers of the map; reading them is an error.

use std::{fs::File, ops::ControlFlow, path::Path};

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Reply, Request},
    error::{Error, Result},
    image::qcow2::{Place, Segment},
    units::{ByteLen, ByteRange, to_usize},
};

/// Extents of one answer.
const EXTENTS_MAX: usize = 1024;
/// Runs that are looked at for one answer of extents.
const RUNS_LOOKED_AT_MAX: usize = 1 << 16;

/// Layers of one stack: as many as Longhorn allows, and the image below them.
pub const LAYERS_MAX: usize = 256;

/// One file of a stack. [`Place::Backing`] means that the layer below has the bytes.
pub trait Layer: Send + Sync {
    /// What people call it.
    fn name(&self) -> &str;

    /// Past this the layer, and what lies below it, reads zeros.
    fn size(&self) -> u64;

    /// The segments of `range`, within the size, in order and without gaps, until `found` breaks.
    fn each(&self, range: ByteRange, found: &mut dyn FnMut(Segment) -> ControlFlow<()>) -> Result<()>;

    /// The same for reading: holes that are zeros may be called data, where telling costs more than reading.
    fn each_to_read(
        &self,
        range: ByteRange,
        found: &mut dyn FnMut(Segment) -> ControlFlow<()>,
    ) -> Result<()> {
        self.each(range, found)
    }

    /// Fill `buffer`, which is as long as the segment, which is no [`Place::Backing`].
    fn read(&self, segment: Segment, buffer: &mut [u8]) -> Result<()>;

    /// Why `range`, which is [`Place::Damaged`], cannot be read.
    fn explain(&self, range: ByteRange) -> Error;

    /// The files that its bytes come from, and those that say where the bytes are.
    fn files(&self) -> Vec<(&File, &Path)>;
}

/// What is below the lowest layer.
#[derive(Clone, Debug)]
pub enum Floor {
    Zeros,
    /// A file that was not opened; reading it answers this.
    Unopened {
        name: String,
        refusal: Error,
    },
}

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In the layer's file, from this offset on.
    Data {
        offset: u64,
    },
    Zero {
        offset: Option<u64>,
    },
    Compressed,
    /// No layer says anything of it: zeros.
    Absent,
    /// In a file that was not opened.
    Unopened,
    Damaged,
}

/// A run of one kind in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub range: ByteRange,
    /// Index of the layer, from the top; of an unopened file, one more than that of the lowest.
    pub depth: usize,
    pub kind: Kind,
}

impl Run {
    /// Take `next` in, if it goes on where this one ends.
    fn absorb(&mut self, next: Run) -> bool {
        let goes_on = |a: u64, b: u64| a.checked_add(self.range.len.0) == Some(b);
        let joined = self.depth == next.depth
            && match (self.kind, next.kind) {
                (Kind::Data { offset: a }, Kind::Data { offset: b })
                | (Kind::Zero { offset: Some(a) }, Kind::Zero { offset: Some(b) }) => goes_on(a, b),
                (a, b) => a == b && !matches!(a, Kind::Damaged),
            };
        if joined {
            self.range.len.0 += next.range.len.0;
        }
        joined
    }
}

/// Layers, top first; at least one.
pub struct Stack {
    layers: Vec<Box<dyn Layer>>,
    floor: Floor,
    size: u64,
    notes: Vec<String>,
}

/// What a walk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Map,
    Read,
}

/// What is called with each run and the segment of its layer.
type Found<'a> = dyn FnMut(Run, Segment) -> Result<ControlFlow<()>> + 'a;

impl Stack {
    /// `size` is what the whole reads as.
    pub fn new(layers: Vec<Box<dyn Layer>>, floor: Floor, size: u64) -> Stack {
        Stack { layers, floor, size, notes: Vec::new() }
    }

    /// With what its reader should know: what was not as it should be, and what was done about it.
    #[must_use]
    pub fn with_notes(self, notes: Vec<String>) -> Stack {
        Stack { notes, ..self }
    }

    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// The names of the layers, top first, and that of the file that was not opened.
    pub fn names(&self) -> Vec<&str> {
        let unopened = match &self.floor {
            Floor::Zeros => None,
            Floor::Unopened { name, .. } => Some(name.as_str()),
        };
        self.layers.iter().map(|layer| layer.name()).chain(unopened).collect()
    }

    /// Every file that takes part, as it is held open: those of the top layer first.
    pub fn files(&self) -> Vec<(&File, &Path)> {
        self.layers.iter().flat_map(|layer| layer.files()).collect()
    }

    /// Call `found` for each run of `range` in order, until it breaks. Neighbours that go on are one run.
    pub fn each(&self, range: ByteRange, mut found: impl FnMut(Run) -> ControlFlow<()>) -> Result<()> {
        let range = ByteRange::within(range.start.0, range.len.0, ByteLen(self.size))?;
        let mut pending: Option<Run> = None;
        let flow = self.walk(Purpose::Map, 0, range, &mut |run, _| {
            if pending.as_mut().is_some_and(|last| last.absorb(run)) {
                return Ok(ControlFlow::Continue(()));
            }
            Ok(pending.replace(run).map_or(ControlFlow::Continue(()), &mut found))
        })?;
        if let (Some(last), ControlFlow::Continue(())) = (pending, flow) {
            let _ = found(last);
        }
        Ok(())
    }

    /// Why a damaged or unopened run cannot be read.
    pub fn explain(&self, run: Run) -> Error {
        match (self.layers.get(run.depth), &self.floor) {
            (Some(layer), _) => layer.explain(run.range),
            (None, Floor::Unopened { refusal, .. }) => refusal.clone(),
            (None, Floor::Zeros) => Error::Invalid(format!("there is no layer {}", run.depth)),
        }
    }

    /// The runs of `range` as the layer at `depth` has them. The number of layers bounds how deep this calls itself.
    fn walk(
        &self,
        purpose: Purpose,
        depth: usize,
        range: ByteRange,
        found: &mut Found<'_>,
    ) -> Result<ControlFlow<()>> {
        let Some(layer) = self.layers.get(depth) else {
            let (depth, kind) = match self.floor {
                Floor::Zeros => (depth.saturating_sub(1), Kind::Absent),
                Floor::Unopened { .. } => (depth, Kind::Unopened),
            };
            return found(Run { range, depth, kind }, Segment { range, place: Place::Backing });
        };
        let mut flow = Ok(ControlFlow::Continue(()));
        if let Some(inside) = range.intersect(ByteRange::new(0, layer.size())) {
            let mut segment_found = |segment: Segment| {
                flow = match kind(segment.place) {
                    Some(kind) => found(Run { range: segment.range, depth, kind }, segment),
                    None => self.walk(purpose, depth + 1, segment.range, found),
                };
                match flow {
                    Ok(ControlFlow::Continue(())) => ControlFlow::Continue(()),
                    Ok(ControlFlow::Break(())) | Err(_) => ControlFlow::Break(()),
                }
            };
            match purpose {
                Purpose::Map => layer.each(inside, &mut segment_found)?,
                Purpose::Read => layer.each_to_read(inside, &mut segment_found)?,
            }
        }
        let past = range.start.0.max(layer.size());
        match flow {
            Ok(ControlFlow::Continue(())) if past < range.end().0 => {
                let range = ByteRange::new(past, range.end().0 - past);
                let run = Run { range, depth: depth.saturating_sub(1), kind: Kind::Absent };
                found(run, Segment { range, place: Place::Backing })
            }
            flow => flow,
        }
    }

    fn read_run(&self, run: Run, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        match (run.kind, self.layers.get(run.depth)) {
            (Kind::Absent | Kind::Zero { .. }, _) => {
                buffer.fill(0);
                Ok(())
            }
            (Kind::Data { .. } | Kind::Compressed, Some(layer)) => layer.read(segment, buffer),
            (Kind::Damaged | Kind::Unopened | Kind::Data { .. } | Kind::Compressed, _) => {
                Err(self.explain(run))
            }
        }
    }
}

/// What a layer's answer means to the stack; none where the layer below is to be asked.
fn kind(place: Place) -> Option<Kind> {
    match place {
        Place::Data { host } => Some(Kind::Data { offset: host.0 }),
        Place::Zero { host } => Some(Kind::Zero { offset: host.map(|host| host.0) }),
        Place::Compressed { .. } => Some(Kind::Compressed),
        Place::Damaged => Some(Kind::Damaged),
        Place::Backing => None,
    }
}

impl BlockDevice for Stack {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.size), access: Access::ReadOnly }
    }

    fn submit(&self, request: Request, complete: Complete) {
        let refused = || Err(Error::ReadOnly { what: "what is inspected".to_owned() });
        let reply = match request {
            Request::Read { offset, mut buffer } => {
                let result = self.read_at(&mut buffer, offset);
                Reply { result, buffer }
            }
            Request::Write { data, .. } => Reply { result: refused(), buffer: data },
            Request::Zero { .. } | Request::Discard { .. } => Reply { result: refused(), buffer: Vec::new() },
            Request::Flush => Reply { result: Ok(()), buffer: Vec::new() },
        };
        complete(reply);
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::within(offset, buffer.len() as u64, ByteLen(self.size))?;
        let mut rest = buffer;
        let mut read = |run: Run, segment| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(to_usize(run.range.len.0));
            rest = after;
            self.read_run(run, segment, part).map(ControlFlow::Continue)
        };
        self.walk(Purpose::Read, 0, range, &mut read).map(drop)
    }

    /// Damaged ranges count as data, so that whoever wants them reads them and is told.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut looked_at = 0;
        self.each(range, |run| {
            let kind = match run.kind {
                Kind::Data { .. } | Kind::Compressed | Kind::Damaged | Kind::Unopened => ExtentKind::Data,
                Kind::Zero { .. } | Kind::Absent => ExtentKind::Zero,
            };
            looked_at += 1;
            let full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.len.0 += run.range.len.0,
                Some(_) | None if full => return ControlFlow::Break(()),
                Some(_) | None => extents.push(Extent { range: run.range, kind }),
            }
            if looked_at < RUNS_LOOKED_AT_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(extents)
    }
}
