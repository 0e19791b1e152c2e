//! A planted bug: two kinds of changes that do not wait for each other ([`Bug::Unowned`]).
//!
//! A change of the one kind takes blocks that one of the other kind owns. It owns them as well, so that every third
//! change waits for both, and what is found is this pair's doing.

use super::{Core, OpId};

#[cfg(not(feature = "planted"))]
impl Core {
    /// Whether the change begins although another one owns its blocks: never.
    #[inline]
    pub(super) const fn trespasses(&self, _: OpId) -> bool {
        false
    }
}

#[cfg(feature = "planted")]
mod planted {
    use super::{Core, OpId};
    use crate::{
        cow::core::{CopySource, Op, OpState},
        planted::{Bug, Kind, is},
        units::{BLOCK_SIZE, BlockRange},
    };

    impl Core {
        /// Whether the change begins although another one owns its blocks.
        pub(in crate::cow::core) fn trespasses(&mut self, id: OpId) -> bool {
            let Some(OpState::Change(change)) = self.ops.get(&id) else { return false };
            let (kind, blocks) = (kind(change.op()), change.blocks());
            let mut others = self.ops.iter().filter_map(|(other, state)| match state {
                OpState::Change(change) if *other != id && change.blocks().overlaps(blocks) => {
                    Some((*other, change))
                }
                OpState::Change(_) | OpState::Queued(_) | OpState::Committing | OpState::Barrier => None,
            });
            // One that another one waits for, or that waits itself, is left to its turn.
            let (Some((owner, other)), None) = (others.next(), others.next()) else { return false };
            let (theirs, other_kind) = (other.blocks(), self::kind(other.op()));
            let planted = is(Bug::Unowned(kind, other_kind)) || is(Bug::Unowned(other_kind, kind));
            if !planted || !self.ownership.owns(owner, theirs.start) {
                return false;
            }
            let start = blocks.start.min(theirs.start);
            let both = BlockRange { start, count: blocks.end().max(theirs.end()).since(start) };
            self.ownership.share(id, both);
            if let Some(OpState::Change(change)) = self.ops.get_mut(&id) {
                change.own(both);
            }
            true
        }
    }

    fn kind(op: Op) -> Kind {
        match op {
            Op::Write { range, .. }
                if range.start.0.is_multiple_of(BLOCK_SIZE) && range.len.0.is_multiple_of(BLOCK_SIZE) =>
            {
                Kind::Write
            }
            Op::Write { .. } => Kind::Fill,
            Op::Zero { .. } | Op::Flush | Op::Barrier => Kind::Zero,
            Op::CopyUp { from: CopySource::Layer(_), .. } => Kind::Merge,
            Op::CopyUp { from: CopySource::Base, .. } => Kind::Flatten,
        }
    }
}
