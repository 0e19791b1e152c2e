//! Which parts of the file are the format's own.
//!
//! Owns [`Metadata`]: the header, the tables and the refcount blocks as ranges. No guest byte lies in them, so an
//! entry that says otherwise is damaged; and no L2 table begins where another table is.

use std::ops::Range;

/// Sorted ranges of the file that do not touch one another.
#[derive(Debug, Default)]
pub struct Metadata {
    taken: Box<[(u64, u64)]>,
}

/// Where the last question was answered: neighbours in a table mostly point into one gap.
#[derive(Clone, Debug, Default)]
pub struct Gap(Range<u64>);

impl Metadata {
    /// `ranges` in any order, overlapping or not.
    pub fn new(mut ranges: Vec<Range<u64>>) -> Metadata {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable_by_key(|range| range.start);
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for range in ranges {
            match taken.last_mut() {
                Some((_, end)) if range.start <= *end => *end = range.end.max(*end),
                Some(_) | None => taken.push((range.start, range.end)),
            }
        }
        Metadata { taken: taken.into() }
    }

    /// Whether no byte of `range`, which is not empty, is the format's own.
    pub fn is_clear(&self, range: Range<u64>, gap: &mut Gap) -> bool {
        if gap.0.start <= range.start && range.end <= gap.0.end {
            return true;
        }
        let after = self.taken.partition_point(|(start, _)| *start <= range.start);
        let before = after.checked_sub(1).and_then(|before| self.taken.get(before));
        let start = before.map_or(0, |(_, end)| *end);
        let end = self.taken.get(after).map_or(u64::MAX, |(start, _)| *start);
        if start > range.start || range.end > end {
            return false;
        }
        gap.0 = start..end;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_clear_only_between_the_taken_ones() {
        let metadata = Metadata::new(vec![40..50, 0..10, 5..20, 20..21, 30..30]);
        let mut gap = Gap::default();
        for (range, clear) in [
            (21..40, true),
            (22..23, true),
            (0..1, false),
            (20..25, false),
            (39..41, false),
            (45..46, false),
            (49..60, false),
            (50..u64::MAX, true),
            (25..30, true),
            (10..60, false),
        ] {
            assert_eq!(metadata.is_clear(range.clone(), &mut gap), clear, "{range:?}");
        }
    }
}
