//! Where the bytes of a range are: the one answer that reads, fills, extents, export and inspection come from.
//!
//! Owns [`Index`], the published state of a volume (head, frozen layers, where the image ends), and [`Segment`]. A
//! lookup is two steps, head then frozen, whatever the number of layers. A plan that is carried out later holds the
//! `Arc` of what it was made from: space that it names is given back only once that is gone (`crate::volume`).

use std::sync::Arc;

use super::{
    BlockState,
    frozen::{FrozenIndex, Slot, Value},
    head::HeadIndex,
};
use crate::units::{BlockRange, ByteLen, ByteOffset, ByteRange};

/// What a volume's blocks are at one moment between two life operations.
#[derive(Clone, Debug)]
pub struct Index {
    /// Virtual size of the volume.
    pub size: ByteLen,
    pub head: Arc<HeadIndex>,
    pub frozen: FrozenIndex,
    /// Bytes that the image below all layers has; past them it reads as zeros. 0 without an image.
    pub base_len: ByteLen,
}

/// Whose bytes a segment is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The head's file, at the volume's own offset.
    Head,
    /// A frozen layer's file, at the volume's own offset.
    Layer(Slot),
    /// The image, at the volume's own offset.
    Base,
    /// Nobody's: zeros.
    Zero,
    /// A block that damage to this layer's map has made unknown: an error, never bytes.
    Lost(Slot),
}

/// A run of bytes in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub range: ByteRange,
    pub place: Place,
}

impl Index {
    /// Where the bytes of `range` are, in order and without gaps. `range` lies within the volume.
    pub fn plan(&self, range: ByteRange) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(2);
        self.each(range, |segment| {
            push(&mut segments, segment);
            true
        });
        segments
    }

    /// Where the bytes of `range` would be if the head knew nothing of it.
    pub fn plan_below(&self, range: ByteRange) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(1);
        self.each_below(range, &mut |segment| {
            push(&mut segments, segment);
            true
        });
        segments
    }

    /// The first segments of `range`, at most `count`.
    pub fn plan_bounded(&self, range: ByteRange, count: usize) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(count.min(16));
        self.each(range, |segment| {
            push(&mut segments, segment);
            segments.len() <= count
        });
        segments.truncate(count);
        segments
    }

    /// Call `found` for each segment of `range` in order, until it says `false`. Neighbours may be in one place.
    pub fn each(&self, range: ByteRange, mut found: impl FnMut(Segment) -> bool) {
        for (run, state) in self.head.runs(range.blocks_touched()) {
            let Some(part) = run.bytes().intersect(range) else { continue };
            let go_on = match state {
                BlockState::Data => found(Segment { range: part, place: Place::Head }),
                BlockState::Zero => found(Segment { range: part, place: Place::Zero }),
                BlockState::Absent => self.each_below(part, &mut found),
            };
            if !go_on {
                return;
            }
        }
    }

    fn each_below(&self, range: ByteRange, found: &mut impl FnMut(Segment) -> bool) -> bool {
        for (run, value) in self.frozen.runs(range.blocks_touched()) {
            let Some(part) = run.bytes().intersect(range) else { continue };
            let go_on = match value {
                Value::Data(slot) => found(Segment { range: part, place: Place::Layer(slot) }),
                Value::Zero(_) => found(Segment { range: part, place: Place::Zero }),
                Value::Lost(slot) => found(Segment { range: part, place: Place::Lost(slot) }),
                Value::Absent => self.each_base(part, found),
            };
            if !go_on {
                return false;
            }
        }
        true
    }

    fn each_base(&self, range: ByteRange, found: &mut impl FnMut(Segment) -> bool) -> bool {
        let base = ByteRange { start: ByteOffset(0), len: self.base_len };
        let inside = range.intersect(base);
        if let Some(part) = inside
            && !found(Segment { range: part, place: Place::Base })
        {
            return false;
        }
        let start = inside.map_or(range.start, ByteRange::end);
        let rest = ByteRange { start, len: range.end().since(start) };
        rest.is_empty() || found(Segment { range: rest, place: Place::Zero })
    }

    /// Whether `range` reads as zeros without anybody's bytes and without the head saying so.
    pub fn is_zero_below(&self, range: BlockRange) -> bool {
        let mut zero = true;
        self.each_below(range.bytes(), &mut |segment| {
            zero = segment.place == Place::Zero;
            zero
        });
        zero
    }
}

/// Append a segment; neighbours in one place become one.
fn push(segments: &mut Vec<Segment>, segment: Segment) {
    match segments.last_mut() {
        Some(last) if last.place == segment.place && last.range.end() == segment.range.start => {
            last.range.len.0 += segment.range.len.0;
        }
        Some(_) | None => segments.push(segment),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockCount, BlockRange};

    #[test]
    fn a_plan_names_head_layer_base_and_the_zeros_past_the_image() {
        let head = HeadIndex::new(BlockCount(8));
        head.set(BlockRange::new(1, 1), BlockState::Data);
        head.set(BlockRange::new(2, 1), BlockState::Zero);
        let layer = HeadIndex::new(BlockCount(8));
        layer.set(BlockRange::new(2, 2), BlockState::Data);
        let index = Index {
            size: ByteLen(8 * 4096),
            head: Arc::new(head),
            frozen: FrozenIndex::empty().overlaid(&layer, Slot(0), &[]),
            base_len: ByteLen(5 * 4096 + 100),
        };
        let plan = index.plan(ByteRange::new(10, 8 * 4096 - 10));
        let expected = [
            (10, 4086, Place::Base),
            (4096, 4096, Place::Head),
            (8192, 4096, Place::Zero),
            (12288, 4096, Place::Layer(Slot(0))),
            (16384, 4096 + 100, Place::Base),
            (20580, 8 * 4096 - 20580, Place::Zero),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|&(start, len, place)| Segment { range: ByteRange::new(start, len), place })
            .collect();
        assert_eq!(plan, expected);
        assert_eq!(index.plan_bounded(ByteRange::new(10, 8 * 4096 - 10), 2), expected[..2]);
        assert!(index.is_zero_below(BlockRange::new(6, 2)));
        assert!(!index.is_zero_below(BlockRange::new(5, 1)));
    }
}
