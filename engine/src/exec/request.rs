//! The buffers of one operation while it is carried out, and what each action does with them.
//!
//! Owns [`Buffers`]: the client's bytes, the two edge blocks and the copy buffer. Every executor learns from
//! [`Buffers::begin`] which bytes an action moves, so the way they are put together is the same under test and in use;
//! [`Buffers::carry_out`] moves them in the calling thread.

use std::{borrow::Cow, sync::Arc};

use super::{
    buffer::{AlignedBuffer, is_zero},
    head::HeadFiles,
    storage::StorageFile,
    view::View,
};
use crate::{
    cow::{
        core::{ActionKind, Edge, Output, Payload},
        plan::Segment,
    },
    error::Result,
    planted::{self, Bug},
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

/// What an action asks for, in terms of files and bytes.
#[derive(Debug)]
pub enum Work<'b> {
    /// Read these into `buffer`, which begins at `start` of the volume.
    Read {
        segments: &'b [Segment],
        start: ByteOffset,
        buffer: &'b mut [u8],
    },
    Write {
        file: Arc<dyn StorageFile>,
        offset: u64,
        bytes: &'b [u8],
    },
    Sync {
        file: Arc<dyn StorageFile>,
    },
    Punch {
        file: Arc<dyn StorageFile>,
        range: ByteRange,
    },
    /// More than one call: [`run_procedure`].
    Procedure,
}

impl<'a> Buffers<'a> {
    /// For a write of `data` at `start`.
    pub fn of_write(start: u64, data: impl Into<Cow<'a, [u8]>>) -> Buffers<'a> {
        Buffers { start, data: Some(data.into()), ..Buffers::default() }
    }

    fn edge(&mut self, edge: Edge) -> &mut AlignedBuffer {
        edge_of(&mut self.edges, edge)
    }

    /// What an action of this operation asks of the files that were live when it was planned.
    pub fn begin<'b>(&'b mut self, kind: &'b ActionKind, head: &HeadFiles) -> Work<'b> {
        match kind {
            ActionKind::ReadEdge { edge, block, segments } => {
                let buffer = self.edge(*edge);
                buffer.fill(0);
                Work::Read { segments, start: block.offset(), buffer }
            }
            ActionKind::ReadCopy { start, segments } => {
                let end = segments.iter().map(|segment| segment.range.end().0).max().unwrap_or(start.0);
                let buffer = AlignedBuffer::new(to_usize((end - start.0).next_multiple_of(BLOCK_SIZE)));
                let (_, buffer) = self.copy.insert((start.0, buffer));
                Work::Read { segments, start: *start, buffer }
            }
            ActionKind::Write { range, payload } => {
                let bytes = self.payload(*range, *payload);
                Work::Write { file: head.data.clone(), offset: range.start.0, bytes }
            }
            ActionKind::Punch { blocks } => Work::Punch { file: head.data.clone(), range: blocks.bytes() },
            ActionKind::SyncData => Work::Sync { file: head.data.clone() },
            ActionKind::AppendLog { offset, bytes } => {
                Work::Write { file: head.map(), offset: *offset, bytes }
            }
            ActionKind::SyncMap => Work::Sync { file: head.map() },
            ActionKind::StageMap { .. } | ActionKind::SwitchMap { .. } | ActionKind::MarkFailed { .. } => {
                Work::Procedure
            }
        }
    }

    /// What the core is told of an action that succeeded.
    pub fn end(&self, kind: &ActionKind) -> Output {
        let ActionKind::ReadCopy { segments, .. } = kind else { return Output::Done };
        let mut runs = Vec::new();
        if let Some((start, buffer)) = &self.copy {
            for segment in segments {
                nonzero_blocks(buffer, ByteOffset(*start), segment.range, &mut runs);
            }
        }
        Output::Nonzero(runs)
    }

    /// Carry out one action of this operation in this thread.
    pub fn carry_out(&mut self, kind: &ActionKind, head: &HeadFiles, view: &View) -> Result<Output> {
        match self.begin(kind, head) {
            Work::Read { segments, start, buffer } => {
                for segment in segments {
                    let at = to_usize(segment.range.start.0 - start.0);
                    view.read_segment(*segment, &mut buffer[at..at + segment.range.len.as_usize()])?;
                }
            }
            Work::Write { file, offset, bytes } => file.write_at(bytes, offset)?,
            Work::Sync { .. } if planted::is(Bug::NoSync) => {}
            Work::Sync { file } => file.sync()?,
            Work::Punch { file, range } => file.punch(range)?,
            Work::Procedure => run_procedure(kind, head)?,
        }
        Ok(self.end(kind))
    }

    /// The bytes of a write at `range`.
    fn payload(&mut self, range: ByteRange, payload: Payload) -> &[u8] {
        let len = range.len.as_usize();
        match payload {
            Payload::Client => self.client(range),
            Payload::Zeros => &ZEROS.0[..len],
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
            None => &ZEROS.0[..len],
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

/// Carry out an action that is more than one call.
pub fn run_procedure(kind: &ActionKind, head: &HeadFiles) -> Result<()> {
    match kind {
        ActionKind::StageMap { bytes, log_len } => head.stage_map(bytes, *log_len),
        ActionKind::SwitchMap { offset, log } => head.switch_map(*offset, log),
        ActionKind::MarkFailed { reason } => {
            tracing::error!(layer = %head.dir, %reason, "the layer takes no more writes");
            head.mark_failed(reason);
            Ok(())
        }
        ActionKind::ReadEdge { .. }
        | ActionKind::ReadCopy { .. }
        | ActionKind::Write { .. }
        | ActionKind::Punch { .. }
        | ActionKind::SyncData
        | ActionKind::AppendLog { .. }
        | ActionKind::SyncMap => Ok(()),
    }
}

#[repr(align(4096))]
struct ZeroBlock([u8; BLOCK_BYTES]);

/// Zeros for the part of one block, where direct I/O takes them.
static ZEROS: ZeroBlock = ZeroBlock([0; BLOCK_BYTES]);

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
