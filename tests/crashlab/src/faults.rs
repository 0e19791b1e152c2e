//! What can go wrong on the simulated machine: the one list, with what each kind threatens.
//!
//! The numbers are those of the invariants in `engine/docs/design.md`, "Promises". A run has to see each kind often
//! enough, see [`crate::stats`].

use serde::{Deserialize, Serialize};

macro_rules! faults {
    ($($kind:ident $name:literal $invariants:expr, $what:literal;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum FaultKind {
            $(#[doc = $what] $kind,)*
        }

        impl FaultKind {
            /// Every kind.
            pub const ALL: &[FaultKind] = &[$(FaultKind::$kind,)*];

            pub fn name(self) -> &'static str {
                match self { $(FaultKind::$kind => $name,)* }
            }

            /// The invariants that it threatens.
            pub fn threatens(self) -> &'static [u8] {
                match self { $(FaultKind::$kind => &$invariants,)* }
            }

            /// What happens.
            pub fn what(self) -> &'static str {
                match self { $(FaultKind::$kind => $what,)* }
            }
        }
    };
}

faults! {
    Reordered "reordered completion" [0, 1, 2, 3], "an action is carried out, or its end told, before an older one";
    ShortTransfer "short transfer" [0, 2, 3], "a read or write moves a part, others have their turn, then it goes on";
    TornTransfer "torn transfer" [0, 2, 8], "a write moves some sectors, then fails";
    LostData "lost data" [1, 2, 3, 5], "a power cut loses unsynced sectors of a file";
    LostPunch "lost punch" [2, 4], "a power cut brings punched sectors back";
    LostSize "lost size" [1, 2], "a power cut loses an unsynced length of a file";
    LostName "lost name" [1, 5, 6, 10, 12], "a power cut loses a name that was made, removed or renamed";
    FailedSync "failed sync" [5, 7, 9], "a sync fails; what it should have kept may still arrive";
    DroppedSync "failed sync that drops pages" [1, 5, 7], "a sync fails and the medium never gets what was written before it; the next one succeeds";
    ReadError "EIO on read" [0, 12], "a read fails";
    WriteError "EIO on write" [0, 2, 8, 12], "a write or punch fails, and nothing of it happens";
    NameError "EIO on a name" [6, 9, 10, 12], "making, renaming, removing a name or syncing its directory fails";
    NoSpace "ENOSPC" [8], "the medium has no room";
    Interrupted "EINTR" [0, 2], "a transfer is interrupted before it moves anything, others have their turn, it is tried again";
    Stuck "stuck operation" [0, 9, 12], "an operation's actions never end while the process lives";
    Slow "slow operation" [0, 1, 2], "an operation's actions wait while many others go on";
    BitFlip "bit flip" [2, 7, 10], "a bit of a file on the medium changes while the machine is off";
    MisdirectedRead "misdirected read" [0, 2, 10], "a read is given another place's bytes";
    MisdirectedWrite "misdirected write" [1, 2, 10], "a write goes to another place and is reported as done";
    ProcessKill "process kill" [1, 2, 3, 5, 6, 9, 12], "the process dies; what the system knows stays, synced or not";
    PowerCut "power cut" [1, 2, 3, 4, 5, 6, 9], "the machine stops; any subset of what was not synced is lost";
    OlderRecord "restart with an older record" [10, 12], "a volume's record is an earlier one when the process starts";
    ClockJump "clock jump" [6, 9, 12], "the clock jumps years, forwards or back";
}

impl FaultKind {
    /// Whether an operation may fail because of it.
    pub fn is_error(self) -> bool {
        matches!(
            self,
            FaultKind::TornTransfer
                | FaultKind::FailedSync
                | FaultKind::DroppedSync
                | FaultKind::ReadError
                | FaultKind::WriteError
                | FaultKind::NameError
                | FaultKind::NoSpace
        )
    }
}
