//! The buffers of one operation while it is carried out, and what each action does with them.
//!
//! Owns [`Buffers`]: the client's bytes, the two edge blocks and the copy buffer. Every executor carries data actions
//! out through it, so the way bytes are put together is the same under test and in use.

use std::borrow::Cow;

use super::{
    buffer::{AlignedBuffer, is_zero},
    head::HeadFiles,
    view::View,
};
use crate::{
    cow::{
        core::{ActionKind, Edge, Output, Payload},
        plan::Segment,
    },
    error::Result,
    units::{BLOCK_BYTES, BLOCK_SIZE, Block, BlockRange, ByteOffset, ByteRange, to_usize},
};

/// What one operation reads and writes.
#[derive(Debug, Default)]
pub struct Buffers<'a> {
    /// Where in the volume `data` goes.
    start: u64,
    /// The client's bytes; none for an operation that writes zeros.
    data: Option<Cow<'a, [u8]>>,
    edges: [Option<AlignedBuffer>; 2],
    copy: Option<(u64, AlignedBuffer)>,
}

impl<'a> Buffers<'a> {
    /// For a write of `data` at `start`.
    pub fn of_write(start: u64, data: impl Into<Cow<'a, [u8]>>) -> Buffers<'a> {
        Buffers { start, data: Some(data.into()), ..Buffers::default() }
    }

    fn edge(&mut self, edge: Edge) -> &mut AlignedBuffer {
        edge_of(&mut self.edges, edge)
    }

    /// Carry out one action of this operation on the files that were live when it was planned.
    pub fn carry_out(&mut self, kind: &ActionKind, head: &HeadFiles, view: &View) -> Result<Output> {
        let done = |()| Output::Done;
        match kind {
            ActionKind::ReadEdge { edge, block, segments } => self.read_edge(*edge, *block, segments, view),
            ActionKind::ReadCopy { start, segments } => self.read_copy(*start, segments, view),
            ActionKind::Write { range, payload } => {
                head.data.write_at(self.payload(*range, *payload), range.start.0).map(done)
            }
            ActionKind::Punch { blocks } => head.data.punch(blocks.bytes()).map(done),
            ActionKind::SyncData => head.data.sync().map(done),
            ActionKind::AppendLog { offset, bytes } => head.map().write_at(bytes, *offset).map(done),
            ActionKind::SyncMap => head.map().sync().map(done),
            ActionKind::StageMap { bytes, log_len } => head.stage_map(bytes, *log_len).map(done),
            ActionKind::SwitchMap { offset, log } => head.switch_map(*offset, log).map(done),
            ActionKind::MarkFailed { reason } => {
                tracing::error!(layer = %head.dir, %reason, "the layer takes no more writes");
                head.mark_failed(reason);
                Ok(Output::Done)
            }
        }
    }

    fn read_edge(&mut self, edge: Edge, block: Block, segments: &[Segment], view: &View) -> Result<Output> {
        let buffer = self.edge(edge);
        buffer.fill(0);
        for segment in segments {
            let at = to_usize(segment.range.start.0 - block.offset().0);
            view.read_segment(*segment, &mut buffer[at..at + segment.range.len.as_usize()])?;
        }
        Ok(Output::Done)
    }

    fn read_copy(&mut self, start: ByteOffset, segments: &[Segment], view: &View) -> Result<Output> {
        let end = segments.iter().map(|segment| segment.range.end().0).max().unwrap_or(start.0);
        let mut buffer = AlignedBuffer::new(to_usize((end - start.0).next_multiple_of(BLOCK_SIZE)));
        let mut runs = Vec::new();
        for segment in segments {
            let at = to_usize(segment.range.start.0 - start.0);
            view.read_segment(*segment, &mut buffer[at..at + segment.range.len.as_usize()])?;
            nonzero_blocks(&buffer, start, segment.range, &mut runs);
        }
        self.copy = Some((start.0, buffer));
        Ok(Output::Nonzero(runs))
    }

    /// The bytes of a write at `range`.
    fn payload(&mut self, range: ByteRange, payload: Payload) -> &[u8] {
        let len = range.len.as_usize();
        match payload {
            Payload::Client => self.client(range),
            Payload::Zeros => &ZEROS[..len],
            Payload::Copy => {
                let (start, buffer) =
                    self.copy.as_ref().expect("the core asks for a copy's write after its read");
                let at = to_usize(range.start.0 - start);
                &buffer[at..at + len]
            }
            Payload::Edge { edge, client } => {
                let source = self.data.as_deref().map(|data| {
                    let at = to_usize(client.start.0 - self.start);
                    &data[at..at + client.len.as_usize()]
                });
                let buffer = edge_of(&mut self.edges, edge);
                let at = to_usize(client.start.in_block());
                let place = &mut buffer[at..at + client.len.as_usize()];
                match source {
                    Some(bytes) => place.copy_from_slice(bytes),
                    None => place.fill(0),
                }
                let at = to_usize(range.start.in_block());
                &buffer[at..at + len]
            }
        }
    }

    fn client(&self, range: ByteRange) -> &[u8] {
        let len = range.len.as_usize();
        match &self.data {
            Some(data) => {
                let at = to_usize(range.start.0 - self.start);
                &data[at..at + len]
            }
            None => &ZEROS[..len],
        }
    }
}

fn edge_of(edges: &mut [Option<AlignedBuffer>; 2], edge: Edge) -> &mut AlignedBuffer {
    let [first, last] = edges;
    let slot = match edge {
        Edge::First => first,
        Edge::Last => last,
    };
    slot.get_or_insert_with(|| AlignedBuffer::new(BLOCK_BYTES))
}

/// Zeros for the part of one block.
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Append the runs of whole blocks that `range` touches and that hold anything but zeros. `buffer` starts at `start`.
pub fn nonzero_blocks(buffer: &[u8], start: ByteOffset, range: ByteRange, runs: &mut Vec<BlockRange>) {
    let touched = range.blocks_touched();
    for number in touched.start.0..touched.end().0 {
        let at = to_usize(number * BLOCK_SIZE - start.0);
        if is_zero(&buffer[at..at + BLOCK_BYTES]) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end() == Block(number) => last.count.0 += 1,
            Some(_) | None => runs.push(BlockRange::new(number, 1)),
        }
    }
}
