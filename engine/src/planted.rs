//! Bugs on purpose: what the crash lab has to find.
//!
//! Each [`Bug`] has one switch, at the place in the shipped code where somebody could have made the mistake. Without the
//! feature `planted` `is` is the constant `false`, so nothing of a switch is compiled; a build for release refuses the
//! feature. A switch counts for one thread, so that tests of several bugs can run at the same time: what a disk's
//! housekeepers and ring workers do is not planted. The last ones of the list are in the package `bedplate`, where images
//! are prepared.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("planted bugs are for tests: this feature is never part of a release build");

/// A mistake, with the invariant of `docs/design.md` that it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A commit syncs neither data nor map (1).
    NoSync,
    /// A commit's record is written before the data that it names is synced (3).
    RecordBeforeData,
    /// A zero or discard punches, but leaves no mark that hides what lies below (4).
    ZeroMarkForgotten,
    /// The mark is seen by readers, but is not in the commit's record (4).
    ZeroMarkUnrecorded,
    /// A merge brings a layer's data up, and not its zeros (6).
    CopiedZeroForgotten,
    /// Two kinds of changes do not wait for each other's blocks (0).
    Unowned(Kind, Kind),
    /// A flush is answered by the commit that was under way when it arrived (1).
    JoinedCommit,
    /// A commit's record holds what landed while its data was being synced (3).
    CutAfterSync,
    /// Space of a merged layer is given back while somebody reads by an older index (6).
    PunchBeforeReaders,
    /// A discard gives its blocks up before it has punched them, so that the punch runs over a newer write (0).
    LatePunch,
    /// The collector counts the references of the first volume only (10).
    OverlookedReference,
    /// A merge between frozen layers replaces the map before it has synced the data (3).
    MergeMapBeforeData,
    /// A merge leaves the record before what came up into the head is durable (6).
    MergeSwitchBeforeFlush,
    /// A merge between frozen layers lets the older layer's blocks win (6).
    MergeOlderWins,
    /// A damaged record with acknowledged ones behind it is taken for a torn tail (1).
    DamageAsTornTail,
    /// A map is read from the page cache, which goes on showing what a failed sync did not write (7).
    MapFromPageCache,
    /// A write with FUA is answered when it has landed (1).
    FuaIgnored,
    /// A write to a part of a block that is *data* fills and rewrites the sectors around it (2).
    FillBeyondClient,
    /// What is kept of an image's arrival is recorded before it is synced (5).
    KeptBeforeData,
    /// What is kept is recorded although its sync failed, so that the arrival goes on behind it (5).
    KeptAfterFailedSync,
    /// An image's record says ready before its file's name is durable (5).
    ReadyBeforeName,
    /// The checksum of an arrival that goes on is not compared with the expected one (5).
    ResumedUnchecked,
    /// An image's bytes are removed before its record (10).
    BytesBeforeRecord,
    /// Directories of images without a record are collected although another record cannot be read (10).
    CollectedAllTheSame,
}

/// Kinds of changes that own blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write of whole blocks.
    Write,
    /// A write with a block that it covers in part.
    Fill,
    /// Zero and discard, with the punch at its end.
    Zero,
    /// What a merge brings up into a head.
    Merge,
    /// What flatten brings up into a head.
    Flatten,
}

impl Bug {
    /// All of them. A pair of kinds is missing where nothing depends on its order: of two writes of whole blocks under
    /// way at once either may be the newer, sector by sector, and a volume has one merge or flatten at a time.
    pub const ALL: [Bug; 34] = [
        Bug::NoSync,
        Bug::RecordBeforeData,
        Bug::ZeroMarkForgotten,
        Bug::ZeroMarkUnrecorded,
        Bug::CopiedZeroForgotten,
        Bug::Unowned(Kind::Write, Kind::Fill),
        Bug::Unowned(Kind::Write, Kind::Zero),
        Bug::Unowned(Kind::Write, Kind::Merge),
        Bug::Unowned(Kind::Write, Kind::Flatten),
        Bug::Unowned(Kind::Fill, Kind::Fill),
        Bug::Unowned(Kind::Fill, Kind::Zero),
        Bug::Unowned(Kind::Fill, Kind::Merge),
        Bug::Unowned(Kind::Fill, Kind::Flatten),
        Bug::Unowned(Kind::Zero, Kind::Zero),
        Bug::Unowned(Kind::Zero, Kind::Merge),
        Bug::Unowned(Kind::Zero, Kind::Flatten),
        Bug::JoinedCommit,
        Bug::CutAfterSync,
        Bug::PunchBeforeReaders,
        Bug::LatePunch,
        Bug::OverlookedReference,
        Bug::MergeMapBeforeData,
        Bug::MergeSwitchBeforeFlush,
        Bug::MergeOlderWins,
        Bug::DamageAsTornTail,
        Bug::MapFromPageCache,
        Bug::FuaIgnored,
        Bug::FillBeyondClient,
        Bug::KeptBeforeData,
        Bug::KeptAfterFailedSync,
        Bug::ReadyBeforeName,
        Bug::ResumedUnchecked,
        Bug::BytesBeforeRecord,
        Bug::CollectedAllTheSame,
    ];
}

impl std::fmt::Display for Bug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Whether this mistake is to be made.
#[cfg(not(feature = "planted"))]
#[inline]
pub const fn is(_: Bug) -> bool {
    false
}

#[cfg(feature = "planted")]
pub use switch::{Planted, is, plant};

#[cfg(feature = "planted")]
mod switch {
    use std::{cell::Cell, marker::PhantomData};

    use super::Bug;

    thread_local! {
        static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Whether this thread is to make this mistake.
    pub fn is(bug: Bug) -> bool {
        BUG.get() == Some(bug)
    }

    /// While this lives, this thread makes the mistake.
    #[derive(Debug)]
    #[must_use = "the bug is gone when this is dropped"]
    pub struct Planted(PhantomData<*const ()>);

    /// Let this thread make this mistake, and no other.
    pub fn plant(bug: Bug) -> Planted {
        BUG.set(Some(bug));
        Planted(PhantomData)
    }

    impl Drop for Planted {
        fn drop(&mut self) {
            BUG.set(None);
        }
    }
}
