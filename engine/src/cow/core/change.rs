//! What one write, zero or copy-up does to the head, from its decision to the moment its map change is visible.
//!
//! A request is shaped *first edge / body / last edge*; an edge is a block of which the request covers a part. An edge
//! that is *data* already is written in place, only the sectors that the client touches; any other edge is filled: its
//! block is read from below, laid under the client's bytes and written whole. The operation owns its blocks meanwhile.

use super::{
    ActionKind, CopySource, Core, Edge, Op, OpId, OpState, Output, Payload, Pending as CorePending, Step,
};
use crate::{
    cow::{
        BlockState,
        changes::ENTRIES_PER_CHANGE_MAX,
        frozen::Value,
        map::log::sectors_of,
        plan::{Index, Place, Segment},
    },
    device::Durability,
    error::{Error, Result},
    planted::{self, Bug},
    units::{BLOCK_SIZE, Block, BlockCount, BlockRange, ByteLen, ByteOffset, ByteRange},
};
use std::sync::Arc;

/// A change that was admitted.
#[derive(Debug)]
pub(super) struct Change {
    op: Op,
    blocks: BlockRange,
    /// The epoch that this change's plans were made in.
    index: Arc<Index>,
    /// Actions that have not completed.
    outstanding: usize,
    /// What the map will say, of the parts that succeeded.
    lands: Vec<(BlockRange, BlockState)>,
    /// To be given back once the map change is visible.
    punch: Option<BlockRange>,
    /// Bytes of blocks that were *data* already are written over.
    in_place: bool,
    error: Option<Error>,
}

impl Change {
    pub(super) fn blocks(&self) -> BlockRange {
        self.blocks
    }

    #[cfg(feature = "planted")]
    pub(super) fn op(&self) -> Op {
        self.op
    }

    #[cfg(feature = "planted")]
    pub(super) fn own(&mut self, blocks: BlockRange) {
        self.blocks = blocks;
    }
}

/// What an action of a change means when it completes.
#[derive(Debug)]
pub(super) enum Pending {
    /// Then the edge is written at `range`.
    EdgeRead {
        edge: Edge,
        range: ByteRange,
        client: ByteRange,
        lands: Option<BlockRange>,
    },
    /// Then these blocks are *data*.
    Written {
        lands: Option<BlockRange>,
    },
    /// Then what is not zeros is written; `zeros` of these blocks hide what lies below the layer they come from.
    CopyRead {
        zeros: Vec<BlockRange>,
    },
    Punched,
}

/// Log sectors that a change may need.
pub(super) fn sectors(op: Op) -> u64 {
    match op {
        Op::Write { .. } | Op::Zero { .. } => 1,
        Op::CopyUp { blocks, .. } => {
            sectors_of(ENTRIES_PER_CHANGE_MAX * crate::units::to_usize(blocks.count.0)).max(1)
        }
        Op::Flush | Op::Barrier => 0,
    }
}

/// A request cut at block borders.
struct Shape {
    /// The covered parts of blocks that are covered in part.
    edges: [Option<(Edge, ByteRange)>; 2],
    /// Blocks that are covered whole.
    body: BlockRange,
}

impl Shape {
    fn of(range: ByteRange) -> Shape {
        let first_whole = range.start.0.div_ceil(BLOCK_SIZE);
        let end_whole = range.end().0 / BLOCK_SIZE;
        if first_whole > end_whole {
            // Inside one block, touching neither of its ends.
            return Shape { edges: [Some((Edge::First, range)), None], body: BlockRange::new(end_whole, 0) };
        }
        let part = |start: u64, end: u64| (start < end).then(|| ByteRange::new(start, end - start));
        let first = part(range.start.0, first_whole * BLOCK_SIZE).map(|part| (Edge::First, part));
        let last = part(end_whole * BLOCK_SIZE, range.end().0).map(|part| (Edge::Last, part));
        Shape { edges: [first, last], body: BlockRange::new(first_whole, end_whole - first_whole) }
    }
}

const fn is_aligned(range: ByteRange, align: u64) -> bool {
    range.start.0.is_multiple_of(align) && range.len.0.is_multiple_of(align)
}

const fn align_out(range: ByteRange, align: u64) -> ByteRange {
    let start = range.start.0 / align * align;
    let end = range.end().0.div_ceil(align) * align;
    ByteRange::new(start, end - start)
}

/// The parts of `blocks` that none of `runs`, which are in order, covers.
fn without(blocks: BlockRange, runs: &[BlockRange]) -> Vec<BlockRange> {
    let mut parts = Vec::new();
    let mut at = blocks.start;
    for run in runs.iter().filter(|run| run.overlaps(blocks)) {
        if run.start > at {
            parts.push(BlockRange { start: at, count: run.start.since(at) });
        }
        at = run.end().min(blocks.end());
    }
    if at < blocks.end() {
        parts.push(BlockRange { start: at, count: blocks.end().since(at) });
    }
    parts
}

const fn block_range(block: Block) -> BlockRange {
    BlockRange { start: block, count: BlockCount(1) }
}

impl Core {
    pub(super) fn start_change(&mut self, id: OpId, op: Op, step: &mut Step) {
        let blocks = match op {
            Op::Write { range, .. } | Op::Zero { range, .. } => range.blocks_touched(),
            Op::CopyUp { blocks, .. } => blocks,
            Op::Flush | Op::Barrier => BlockRange::new(0, 0),
        };
        let change = Change {
            op,
            blocks,
            index: self.index.clone(),
            outstanding: 0,
            lands: Vec::new(),
            punch: None,
            in_place: false,
            error: None,
        };
        self.ops.insert(id, OpState::Change(change));
        if blocks.is_empty() || self.trespasses(id) || self.ownership.acquire(id, blocks) {
            self.decide(id, step);
        }
    }

    /// The change owns its blocks: decide what to do with them.
    fn decide(&mut self, id: OpId, step: &mut Step) {
        if self.failed().is_some() {
            return self.end_change(id, step);
        }
        let index = self.index.clone();
        let Some(OpState::Change(change)) = self.ops.get_mut(&id) else { return };
        change.index = index;
        match change.op {
            Op::Write { range, .. } => self.decide_write(id, range, step),
            Op::Zero { range, .. } => self.decide_zero(id, range, step),
            Op::CopyUp { blocks, from } => self.decide_copy(id, blocks, from, step),
            Op::Flush | Op::Barrier => {}
        }
        self.settle(id, step);
    }

    fn decide_write(&mut self, id: OpId, range: ByteRange, step: &mut Step) {
        if range.is_empty() {
            return;
        }
        let all_data = self.index.head.all(range.blocks_touched(), BlockState::Data);
        if all_data && is_aligned(range, self.write_align) {
            return self.write(id, range, Payload::Client, None, step);
        }
        let shape = Shape::of(range);
        // In-place edges that need no reading are written together with the body.
        let mut body = shape.body.bytes();
        for (edge, part) in shape.edges.into_iter().flatten() {
            let in_place = self.index.head.state(part.start.block()) == BlockState::Data;
            if in_place && is_aligned(part, self.write_align) && !shape.body.is_empty() {
                body = ByteRange { start: body.start.min(part.start), len: ByteLen(body.len.0 + part.len.0) };
            } else {
                self.edge(id, edge, part, step);
            }
        }
        if !body.is_empty() {
            let lands = (!self.index.head.all(shape.body, BlockState::Data)).then_some(shape.body);
            self.write(id, body, Payload::Client, lands, step);
        }
    }

    fn decide_zero(&mut self, id: OpId, range: ByteRange, step: &mut Step) {
        if range.is_empty() {
            return;
        }
        let shape = Shape::of(range);
        for (edge, part) in shape.edges.into_iter().flatten() {
            let block = part.start.block();
            match self.index.head.state(block) {
                BlockState::Zero => {}
                BlockState::Absent if self.index.is_zero_below(block_range(block)) => {}
                BlockState::Data if is_aligned(part, self.write_align) => {
                    self.write(id, part, Payload::Zeros, None, step);
                }
                BlockState::Data | BlockState::Absent => self.edge(id, edge, part, step),
            }
        }
        let body = shape.body;
        let untouched = !body.is_empty()
            && self.index.head.all(body, BlockState::Absent)
            && self.index.is_zero_below(body);
        let punch = self.index.head.runs(body).any(|(_, state)| state == BlockState::Data);
        let Some(OpState::Change(change)) = self.ops.get_mut(&id) else { return };
        if !body.is_empty() && !untouched {
            if !planted::is(Bug::ZeroMarkForgotten) {
                change.lands.push((body, BlockState::Zero));
            }
            change.punch = punch.then_some(body);
        }
    }

    fn decide_copy(&mut self, id: OpId, blocks: BlockRange, from: CopySource, step: &mut Step) {
        let index = self.index.clone();
        let mut segments: Vec<Segment> = Vec::new();
        let mut zero: Vec<BlockRange> = Vec::new();
        let mut copied: Vec<BlockRange> = Vec::new();
        let absent = index.head.runs(blocks).filter(|(_, state)| *state == BlockState::Absent);
        for (run, value) in absent.flat_map(|(run, _)| index.frozen.runs(run)) {
            match (value, from) {
                (Value::Data(slot), CopySource::Layer(wanted)) if slot == wanted => {
                    segments.push(Segment { range: run.bytes(), place: Place::Layer(slot) });
                    copied.push(run);
                }
                (Value::Zero(slot), CopySource::Layer(wanted)) if slot == wanted => zero.push(run),
                (Value::Absent, CopySource::Base) => {
                    let base = ByteRange { start: ByteOffset(0), len: index.base_len };
                    segments.extend(
                        run.bytes().intersect(base).map(|range| Segment { range, place: Place::Base }),
                    );
                }
                (Value::Data(_) | Value::Zero(_) | Value::Lost(_) | Value::Absent, _) => {}
            }
        }
        if let Some(OpState::Change(change)) = self.ops.get_mut(&id)
            && !planted::is(Bug::CopiedZeroForgotten)
        {
            change.lands.extend(zero.into_iter().map(|run| (run, BlockState::Zero)));
        }
        if !segments.is_empty() {
            let kind = ActionKind::ReadCopy { start: blocks.start.offset(), segments };
            self.act_for(id, Pending::CopyRead { zeros: copied }, kind, step);
        }
    }

    /// Bring the client's part of a block into the head.
    fn edge(&mut self, id: OpId, edge: Edge, client: ByteRange, step: &mut Step) {
        let block = client.start.block();
        let whole = block_range(block).bytes();
        let fills = planted::is(Bug::FillBeyondClient);
        let in_place = self.index.head.state(block) == BlockState::Data && !fills;
        let (range, lands) = if in_place {
            (align_out(client, self.write_align), None)
        } else {
            (whole, Some(block_range(block)))
        };
        if in_place && range == client {
            return self.write(id, client, Payload::Client, None, step);
        }
        // Bytes of the last block past the end of the volume are nobody's; they are kept as zeros.
        let inside =
            whole.intersect(ByteRange { start: ByteOffset(0), len: self.index.size }).unwrap_or(client);
        let plan = if fills { self.index.plan_below(inside) } else { self.index.plan(inside) };
        let segments: Vec<Segment> =
            plan.into_iter().filter(|segment| segment.place != Place::Zero).collect();
        let then = Pending::EdgeRead { edge, range, client, lands };
        if segments.is_empty() {
            self.write_edge(id, then, step);
        } else {
            self.act_for(id, then, ActionKind::ReadEdge { edge, block, segments }, step);
        }
    }

    fn write_edge(&mut self, id: OpId, read: Pending, step: &mut Step) {
        if let Pending::EdgeRead { edge, range, client, lands } = read {
            self.write(id, range, Payload::Edge { edge, client }, lands, step);
        }
    }

    fn write(
        &mut self,
        id: OpId,
        range: ByteRange,
        payload: Payload,
        lands: Option<BlockRange>,
        step: &mut Step,
    ) {
        if let Some(OpState::Change(change)) = self.ops.get_mut(&id) {
            change.in_place |= lands.is_none_or(|blocks| blocks.bytes() != range);
        }
        self.act_for(id, Pending::Written { lands }, ActionKind::Write { range, payload }, step);
    }

    fn act_for(&mut self, id: OpId, pending: Pending, kind: ActionKind, step: &mut Step) {
        if let Some(OpState::Change(change)) = self.ops.get_mut(&id) {
            change.outstanding += 1;
        }
        self.act(step, Some(id), CorePending::Change { op: id, step: pending }, kind);
    }

    pub(super) fn change_completed(
        &mut self,
        id: OpId,
        pending: Pending,
        result: Result<Output>,
        step: &mut Step,
    ) {
        if matches!(pending, Pending::Written { .. }) {
            // Also when it failed: a part of it may have been written.
            self.data_dirty = true;
        }
        let failed = self.failed().is_some();
        let Some(OpState::Change(change)) = self.ops.get_mut(&id) else { return };
        change.outstanding -= 1;
        match (result, pending) {
            // The layer takes no more writes: what is under way ends, and writes nothing that it has not yet begun.
            (Ok(_), Pending::EdgeRead { .. } | Pending::CopyRead { .. }) if failed => {}
            (Ok(_), read @ Pending::EdgeRead { .. }) => self.write_edge(id, read, step),
            (Ok(_), Pending::Written { lands }) => {
                change.lands.extend(lands.map(|blocks| (blocks, BlockState::Data)));
            }
            (Ok(Output::Nonzero(runs)), Pending::CopyRead { zeros }) => {
                let zeros = zeros.into_iter().flat_map(|blocks| without(blocks, &runs));
                change.lands.extend(zeros.map(|blocks| (blocks, BlockState::Zero)));
                for run in runs {
                    self.write(id, run.bytes(), Payload::Copy, Some(run), step);
                }
            }
            (Ok(Output::Done), Pending::CopyRead { .. }) => {
                debug_assert!(false, "a copy's read says what is not zeros")
            }
            (Ok(_) | Err(_), Pending::Punched) => {}
            (Err(error), Pending::EdgeRead { .. } | Pending::Written { .. } | Pending::CopyRead { .. }) => {
                change.error.get_or_insert(error);
            }
        }
        self.settle(id, step);
    }

    /// When nothing is outstanding: make what succeeded visible, give space back, end.
    fn settle(&mut self, id: OpId, step: &mut Step) {
        let failed = self.failed().is_some();
        let Some(OpState::Change(change)) = self.ops.get_mut(&id) else { return };
        if change.outstanding > 0 {
            return;
        }
        if failed {
            // No commit will make it durable, so nothing of it becomes visible and nothing is punched.
            return self.end_change(id, step);
        }
        let copied_in_part = change.error.is_some() && matches!(change.op, Op::CopyUp { .. });
        for (blocks, state) in std::mem::take(&mut change.lands) {
            if !copied_in_part {
                self.index.head.set(blocks, state);
                if state != BlockState::Zero || !planted::is(Bug::ZeroMarkUnrecorded) {
                    self.landed.set(blocks, state);
                }
            }
        }
        if let Some(blocks) = change.punch.take() {
            self.act_for(id, Pending::Punched, ActionKind::Punch { blocks }, step);
            if !planted::is(Bug::LatePunch) {
                return;
            }
        }
        self.end_change(id, step);
    }

    fn end_change(&mut self, id: OpId, step: &mut Step) {
        let Some(OpState::Change(change)) = self.ops.remove(&id) else { return };
        self.in_flight -= 1;
        self.reserved_sectors -= sectors(change.op);
        if change.in_place {
            self.rewritten.add(change.blocks);
        }
        let granted = if change.blocks.is_empty() {
            Vec::new()
        } else {
            self.ownership.release(id, change.blocks.start)
        };
        let fua = match change.op {
            Op::Write { durability, .. } | Op::Zero { durability, .. } => durability == Durability::Fua,
            Op::CopyUp { .. } | Op::Flush | Op::Barrier => false,
        };
        match (change.error, self.failed()) {
            (Some(error), _) => step.finished.push((id, Err(error))),
            (None, Some(_)) => step.finished.push((id, Err(self.failure()))),
            (None, None) if fua && !planted::is(Bug::FuaIgnored) => self.wait_for_commit(id),
            (None, None) => step.finished.push((id, Ok(()))),
        }
        for next in granted {
            self.decide(next, step);
        }
    }
}

impl ActionKind {
    /// Whether it is a step of a commit: those come one after another, and take nothing of their operation's buffers.
    pub fn is_of_commit(&self) -> bool {
        match self {
            ActionKind::SyncData | ActionKind::AppendLog { .. } | ActionKind::SyncMap => true,
            ActionKind::ReadEdge { .. }
            | ActionKind::ReadCopy { .. }
            | ActionKind::Write { .. }
            | ActionKind::Punch { .. }
            | ActionKind::StageMap { .. }
            | ActionKind::SwitchMap { .. }
            | ActionKind::MarkFailed { .. } => false,
        }
    }
}
