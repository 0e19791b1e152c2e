//! The operations of a history, and which of them can be under way at the same time.

use std::fmt;

use crate::script::{Ask, Life};

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Write,
    FuaWrite,
    Zero,
    FuaZero,
    Discard,
    Flush,
    Read,
    Snapshot,
    Clone,
    FullClone,
    Revert,
    DeleteSnapshot,
    Merge,
    Flatten,
    Grow,
    Export,
    DeleteVolume,
    Recover,
    Arrive,
    DeleteImage,
}

use Operation::*;

/// What clients ask of one volume.
const CLIENTS: [Operation; 7] = [Write, FuaWrite, Zero, FuaZero, Discard, Flush, Read];
/// What is done to a disk's volumes and images.
const LIVES: [Operation; 13] = [
    Snapshot,
    Clone,
    FullClone,
    Revert,
    DeleteSnapshot,
    Merge,
    Flatten,
    Grow,
    Export,
    DeleteVolume,
    Recover,
    Arrive,
    DeleteImage,
];
/// Long ones that let other operations on the disk in between.
const OUTER: [Operation; 5] = [FullClone, Merge, Flatten, Export, Arrive];

impl Operation {
    /// Every pair that can meet: two requests to one volume; a request and an operation on the disk; a long operation on
    /// the disk and another one, except merging and flattening, of which there is one at a time.
    pub fn pairs() -> impl Iterator<Item = (Operation, Operation)> {
        let requests = CLIENTS.iter().enumerate();
        let requests = requests.flat_map(|(n, a)| CLIENTS[n..].iter().map(|b| (*a, *b)));
        let mixed = CLIENTS.iter().flat_map(|a| LIVES.iter().map(|b| (*a, *b)));
        let nested = OUTER.iter().enumerate().flat_map(|(n, a)| {
            let others = LIVES.iter().filter(move |b| !OUTER[..n].contains(b));
            others.map(|b| (*a, *b)).filter(|pair| {
                let one_at_a_time = |operation| matches!(operation, Merge | Flatten);
                !(one_at_a_time(pair.0) && one_at_a_time(pair.1))
            })
        });
        requests.chain(mixed).chain(nested).map(|(a, b)| (a.min(b), a.max(b)))
    }

    /// Whether other operations on the disk can come in between.
    pub fn lets_others_in(self) -> bool {
        OUTER.contains(&self)
    }
}

impl From<Ask> for Operation {
    fn from(ask: Ask) -> Operation {
        match ask {
            Ask::Write | Ask::WriteZeros => Write,
            Ask::FuaWrite => FuaWrite,
            Ask::Zero => Zero,
            Ask::FuaZero => FuaZero,
            Ask::Discard => Discard,
            Ask::Flush => Flush,
            Ask::Read | Ask::ReadAhead => Read,
        }
    }
}

impl From<Life> for Operation {
    fn from(life: Life) -> Operation {
        match life {
            Life::Snapshot => Snapshot,
            Life::Clone | Life::CloneSnapshot => Clone,
            Life::FullClone => FullClone,
            Life::Revert => Revert,
            Life::DeleteSnapshot => DeleteSnapshot,
            Life::Merge => Merge,
            Life::Flatten => Flatten,
            Life::Grow => Grow,
            Life::Export => Export,
            Life::DeleteVolume => DeleteVolume,
            Life::Recover => Recover,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Write => "write",
            FuaWrite => "FUA write",
            Zero => "zero",
            FuaZero => "FUA zero",
            Discard => "discard",
            Flush => "flush",
            Read => "read",
            Snapshot => "snapshot",
            Clone => "clone",
            FullClone => "full clone",
            Revert => "revert",
            DeleteSnapshot => "delete snapshot",
            Merge => "merge",
            Flatten => "flatten",
            Grow => "grow",
            Export => "export",
            DeleteVolume => "delete volume",
            Recover => "recover",
            Arrive => "arrival of an image",
            DeleteImage => "delete image",
        })
    }
}
