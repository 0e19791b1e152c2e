//! Where the bytes of a range are: the one answer that reading, extents, inspection and executors come from.
//!
//! Owns [`Segment`] and [`Place`], and turns entries of the tables into them: neighbours that lie next to one another
//! become one, subclusters are told apart, and what the end of the file cuts off is named. A damaged place is an
//! answer like any other, so that whoever only looks can go on; whoever reads it gets the reason.

use std::ops::ControlFlow;

use super::{
    header::Geometry,
    tables::{Entry, Tables},
};
use crate::{
    error::Result,
    units::{ByteLen, ByteOffset, ByteRange},
};

/// Whose bytes a segment is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The file that holds the clusters, from this offset on; it is long enough.
    Data { host: ByteOffset },
    /// Zeros. Space may be kept for them at `host`.
    Zero { host: Option<ByteOffset> },
    /// One compressed cluster, or a part of it. `len` bytes at `host` hold it, maybe fewer.
    Compressed { host: ByteOffset, len: ByteLen },
    /// The file below has them; without one they are zeros.
    Backing,
    /// Nobody can tell; [`super::Qcow2Layer::explain`] says why.
    Damaged,
}

/// A run of guest bytes in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub range: ByteRange,
    pub place: Place,
}

impl Segment {
    /// Take `next` in, if it goes on where this one ends.
    fn absorb(&mut self, next: Segment) -> bool {
        let len = self.range.len.0;
        let joined = match (self.place, next.place) {
            (Place::Data { host }, Place::Data { host: after }) => host.0.checked_add(len) == Some(after.0),
            (Place::Zero { host: None }, Place::Zero { host: None }) | (Place::Backing, Place::Backing) => {
                true
            }
            (Place::Zero { host: Some(host) }, Place::Zero { host: Some(after) }) => {
                host.0.checked_add(len) == Some(after.0)
            }
            (
                Place::Data { .. }
                | Place::Zero { .. }
                | Place::Backing
                | Place::Compressed { .. }
                | Place::Damaged,
                _,
            ) => false,
        };
        if joined {
            self.range.len.0 += next.range.len.0;
        }
        joined
    }
}

/// Call `found` for each segment of `range` in order, until it breaks. `range` lies within what the tables map.
pub(super) fn each(
    tables: &Tables,
    range: ByteRange,
    mut found: impl FnMut(Segment) -> ControlFlow<()>,
) -> Result<()> {
    let mut pending: Option<Segment> = None;
    let mut stopped = false;
    let mut push = |segment: Segment| {
        if pending.as_mut().is_some_and(|last| last.absorb(segment)) {
            return ControlFlow::Continue(());
        }
        match pending.replace(segment) {
            Some(done) => found(done),
            None => ControlFlow::Continue(()),
        }
    };
    tables.each(range, |range, entry| {
        let flow = split(tables, range, entry, &mut push);
        stopped = flow.is_break();
        flow
    })?;
    if let Some(last) = pending
        && !stopped
    {
        let _ = found(last);
    }
    Ok(())
}

/// The segments of one entry; `range` is a part of its cluster, or of several clusters without a host.
fn split(
    tables: &Tables,
    range: ByteRange,
    entry: Entry,
    push: &mut impl FnMut(Segment) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let geometry = tables.geometry();
    let host_of = |host: ByteOffset| ByteOffset(host.0 + geometry.in_cluster(range.start.0));
    match entry {
        Entry::Unallocated => push(Segment { range, place: Place::Backing }),
        Entry::Damaged => push(Segment { range, place: Place::Damaged }),
        Entry::Zero { host } => push(Segment { range, place: Place::Zero { host: host.map(host_of) } }),
        Entry::Compressed { host, len } => push(Segment { range, place: Place::Compressed { host, len } }),
        Entry::Data { host } => push_data(tables, range, host_of(host), push),
        Entry::Subclusters { host, allocated, zero } => {
            split_subclusters(tables, range, host, Subclusters { allocated, zero }, push)
        }
    }
}

/// Which of a cluster's 32 parts are what.
#[derive(Clone, Copy)]
struct Subclusters {
    allocated: u32,
    zero: u32,
}

fn split_subclusters(
    tables: &Tables,
    range: ByteRange,
    host: Option<ByteOffset>,
    parts: Subclusters,
    push: &mut impl FnMut(Segment) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let geometry: Geometry = tables.geometry();
    let size = geometry.subcluster_size();
    let mut at = range.start.0;
    while at < range.end().0 {
        let in_cluster = geometry.in_cluster(at);
        let part = in_cluster / size;
        let end = (at - in_cluster + (part + 1) * size).min(range.end().0);
        let piece = ByteRange::new(at, end - at);
        let bit = 1_u32 << part;
        let host = host.map(|host| ByteOffset(host.0 + in_cluster));
        match (parts.allocated & bit != 0, parts.zero & bit != 0, host) {
            (true, _, Some(host)) => push_data(tables, piece, host, push)?,
            // The tables let no such entry through.
            (true, _, None) => push(Segment { range: piece, place: Place::Damaged })?,
            (false, true, host) => push(Segment { range: piece, place: Place::Zero { host } })?,
            (false, false, _) => push(Segment { range: piece, place: Place::Backing })?,
        }
        at = end;
    }
    ControlFlow::Continue(())
}

/// Data at `host`, as far as the file goes.
fn push_data(
    tables: &Tables,
    range: ByteRange,
    host: ByteOffset,
    push: &mut impl FnMut(Segment) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let there = tables.data_len().saturating_sub(host.0).min(range.len.0);
    if there > 0 {
        let held = ByteRange { start: range.start, len: ByteLen(there) };
        push(Segment { range: held, place: Place::Data { host } })?;
    }
    if there < range.len.0 {
        let cut = ByteRange::new(range.start.0 + there, range.len.0 - there);
        push(Segment { range: cut, place: Place::Damaged })?;
    }
    ControlFlow::Continue(())
}
