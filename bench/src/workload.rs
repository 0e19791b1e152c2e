//! What is done to a target: the table of workloads, and the suites as its parts.
//!
//! Owns [`Workload`] and [`table`]. A workload says how requests look (pattern, block, depth, clients), what content
//! they meet ([`Content`]) and where that lies ([`Place`]); it knows no target. Names are made of these, so that a name
//! says what was measured: `rr4k-q32-j2` is random reads of 4 KiB, depth 32, two clients.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::figure::Measure;

/// Blocks of the volume whose layers are counted: small enough to hold many times in memory.
pub const LAYERED_LEN: u64 = 64 << 20;
/// Layers of the deep volume.
pub const LAYERS: u64 = 200;

/// What requests look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    RandomRead,
    SequentialRead,
    RandomWrite,
    SequentialWrite,
    /// Seven reads to three writes, at random.
    Mixed,
    /// Random writes, each followed by fdatasync.
    SyncWrite,
}

impl Pattern {
    pub const fn writes(self) -> bool {
        match self {
            Pattern::RandomRead | Pattern::SequentialRead => false,
            Pattern::RandomWrite | Pattern::SequentialWrite | Pattern::Mixed | Pattern::SyncWrite => true,
        }
    }

    const fn short(self) -> &'static str {
        match self {
            Pattern::RandomRead => "rr",
            Pattern::SequentialRead => "sr",
            Pattern::RandomWrite => "rw",
            Pattern::SequentialWrite => "sw",
            Pattern::Mixed => "mix",
            Pattern::SyncWrite => "sync",
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Pattern::RandomRead => "random reads",
            Pattern::SequentialRead => "sequential reads",
            Pattern::RandomWrite => "random writes",
            Pattern::SequentialWrite => "sequential writes",
            Pattern::Mixed => "random, 70 % reads and 30 % writes",
            Pattern::SyncWrite => "random writes, each followed by fdatasync",
        }
    }
}

/// What the requests meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// A volume over a base, without a block of its own: everything is read from the base.
    Base,
    /// A volume over a base with every block written.
    Own,
    /// A volume over a base made for this sample: each block is written for the first time.
    Fresh,
    /// [`LAYERED_LEN`] bytes, the blocks dealt to this many layers in turn.
    Layers(u64),
    /// So many volumes over one base, one for each client.
    Storm(u64),
}

/// Where the content lies, and what of it is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// On the disk, read once before the sample: the page cache has it.
    PageCache,
    /// On the disk, dropped from the page cache before the sample.
    Cold,
    /// On the disk, past the page cache.
    Disk,
    /// In a memory file system.
    Memory,
}

impl Place {
    const fn words(self) -> &'static str {
        match self {
            Place::PageCache => "in the page cache",
            Place::Cold => "on the disk, page cache cold",
            Place::Disk => "on the disk, past the page cache",
            Place::Memory => "in a memory file system",
        }
    }
}

/// A step of a volume's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Make a volume over the base.
    Create,
    /// Snapshot a volume that is written to.
    Snapshot,
    /// Clone a volume that is written to.
    Clone,
    /// Start the server until the volume answers a read.
    Open,
}

/// How a sample is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Requests { pattern: Pattern, block: u64, depth: u32, clients: u32 },
    Life(Step),
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    pub name: String,
    pub about: String,
    pub work: Work,
    pub content: Content,
    pub place: Place,
    #[serde(skip, default = "no_suite")]
    pub suite: Suite,
}

const fn no_suite() -> Suite {
    Suite::All
}

impl Workload {
    /// What the workload is about.
    pub const fn primary(&self) -> Measure {
        match self.work {
            Work::Requests { block: ..0x10_0000, .. } => Measure::Iops,
            Work::Requests { .. } => Measure::BytesPerS,
            Work::Life(_) => Measure::Millis,
        }
    }

    pub const fn writes(&self) -> bool {
        match self.work {
            Work::Requests { pattern, .. } => pattern.writes(),
            Work::Life(_) => true,
        }
    }

    /// Whether each write is followed by a sync.
    pub const fn is_synced(&self) -> bool {
        matches!(self.work, Work::Requests { pattern: Pattern::SyncWrite, .. })
    }

    /// Whether content is gone over once at most: what is read or written a second time is no longer what is measured.
    pub const fn is_single_pass(&self) -> bool {
        match self.content {
            Content::Fresh | Content::Storm(_) => true,
            Content::Base | Content::Own | Content::Layers(_) => matches!(self.place, Place::Cold),
        }
    }

    fn requests(
        suite: Suite,
        (pattern, block): (Pattern, u64),
        (depth, clients): (u32, u32),
        (content, place): (Content, Place),
    ) -> Workload {
        let mut name = format!("{}{}-q{depth}", pattern.short(), short_len(block));
        let mut about = format!("{} of {}", pattern.words(), bedplate_inspect::size::show(block));
        about.push_str(&format!(", depth {depth}"));
        if clients > 1 && !matches!(content, Content::Storm(_)) {
            name.push_str(&format!("-j{clients}"));
            about.push_str(&format!(" each of {clients} clients"));
        }
        let (tail, what) = match content {
            Content::Base => (String::new(), "from the base".to_owned()),
            Content::Own => (String::new(), "blocks of the volume's own".to_owned()),
            Content::Fresh => ("-first".to_owned(), "first write over a base".to_owned()),
            Content::Layers(count) => (format!("-layers{count}"), format!("spread over {count} layers")),
            Content::Storm(count) => (format!("-storm{count}"), format!("{count} volumes over one base")),
        };
        name.push_str(&tail);
        match place {
            Place::PageCache | Place::Memory => {}
            Place::Cold => name.push_str("-cold"),
            Place::Disk => name.push_str("-disk"),
        }
        let about = format!("{about}; {what}, {}", place.words());
        let work = Work::Requests { pattern, block, depth, clients };
        Workload { name, about, work, content, place, suite }
    }

    fn life(step: Step, name: &str, about: &str, content: Content) -> Workload {
        Workload {
            name: name.to_owned(),
            about: about.to_owned(),
            work: Work::Life(step),
            content,
            place: Place::PageCache,
            suite: Suite::Life,
        }
    }
}

fn short_len(block: u64) -> String {
    if block >= 1 << 20 { format!("{}m", block >> 20) } else { format!("{}k", block >> 10) }
}

/// Parts of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    /// The lanes that an aim names, on both of its sides, and the bare file beside them
    Aims,
    /// Reads of a base that the page cache holds: 4 KiB and 64 KiB at random, 1 MiB in order; depths 1, 8, 32; 1 and 2 clients
    Read,
    /// Writes and a 70/30 mix in memory: blocks that are there, and the first write over a base
    Write,
    /// The disk itself: direct reads and writes, a cold base, writes that are synced one by one
    Disk,
    /// One layer against 200
    Layers,
    /// Many volumes over one cold base, all read at once
    Storm,
    /// Create, snapshot and clone under load, open
    Life,
    /// Everything
    All,
}

const DEPTHS: [u32; 3] = [1, 8, 32];
const CLIENTS: [u32; 2] = [1, 2];
const K4: u64 = 4 << 10;
const K64: u64 = 64 << 10;
const M1: u64 = 1 << 20;

/// Every workload; a boot storm is of `storm` volumes.
pub fn table(storm: u64) -> Vec<Workload> {
    let mut table = Vec::new();
    let base = (Content::Base, Place::PageCache);
    let own = (Content::Own, Place::Memory);
    for (suite, content, shapes) in [
        (
            Suite::Read,
            base,
            [(Pattern::RandomRead, K4), (Pattern::RandomRead, K64), (Pattern::SequentialRead, M1)],
        ),
        (
            Suite::Write,
            own,
            [(Pattern::RandomWrite, K4), (Pattern::RandomWrite, K64), (Pattern::SequentialWrite, M1)],
        ),
    ] {
        for shape in shapes {
            for clients in CLIENTS {
                let loads = DEPTHS.map(|depth| (depth, clients));
                table.extend(loads.map(|load| Workload::requests(suite, shape, load, content)));
            }
        }
    }
    for depth in DEPTHS {
        table.push(Workload::requests(Suite::Write, (Pattern::Mixed, K4), (depth, 1), own));
    }
    let fresh = (Content::Fresh, Place::Memory);
    for shape in [(Pattern::RandomWrite, K4), (Pattern::RandomWrite, K64)] {
        table.push(Workload::requests(Suite::Write, shape, (32, 1), fresh));
    }
    let disk = (Content::Own, Place::Disk);
    for pattern in [Pattern::RandomRead, Pattern::RandomWrite] {
        for depth in [1, 32] {
            table.push(Workload::requests(Suite::Disk, (pattern, K4), (depth, 1), disk));
        }
    }
    for pattern in [Pattern::SequentialRead, Pattern::SequentialWrite] {
        table.push(Workload::requests(Suite::Disk, (pattern, M1), (8, 1), disk));
    }
    let cold = (Content::Base, Place::Cold);
    table.push(Workload::requests(Suite::Disk, (Pattern::RandomRead, K4), (32, 1), cold));
    table.push(Workload::requests(Suite::Disk, (Pattern::SequentialRead, M1), (8, 1), cold));
    for content in [disk, (Content::Fresh, Place::Disk)] {
        table.push(Workload::requests(Suite::Disk, (Pattern::SyncWrite, K4), (1, 1), content));
    }
    for count in [1, LAYERS] {
        let layers = (Content::Layers(count), Place::Memory);
        table.push(Workload::requests(Suite::Layers, (Pattern::RandomRead, K4), (32, 1), layers));
    }
    let storms = (Content::Storm(storm), Place::Cold);
    let clients = u32::try_from(storm).unwrap_or(u32::MAX);
    table.push(Workload::requests(Suite::Storm, (Pattern::RandomRead, K64), (4, clients), storms));
    table.extend([
        Workload::life(Step::Create, "create", "make a volume over the base", Content::Fresh),
        Workload::life(
            Step::Snapshot,
            "snapshot-loaded",
            "snapshot a volume under random writes of 4 KiB, depth 8",
            Content::Fresh,
        ),
        Workload::life(
            Step::Clone,
            "clone-loaded",
            "clone a volume under random writes of 4 KiB, depth 8",
            Content::Fresh,
        ),
        Workload::life(Step::Open, "open", "start the server until a volume answers a read", Content::Base),
    ]);
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_workload_has_a_name_of_its_own() {
        let names: BTreeSet<String> = table(8).into_iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), table(8).len());
        for name in ["rr4k-q1", "rr4k-q32-j2", "sr1m-q8", "rw4k-q32-first", "rr4k-q32-cold", "sync4k-q1-disk"]
        {
            assert!(names.contains(name), "{name}: {names:?}");
        }
    }

    #[test]
    fn what_is_cold_or_fresh_is_gone_over_once() {
        for workload in table(8) {
            let expected = workload.name.contains("cold") || workload.name.contains("first");
            if matches!(workload.work, Work::Requests { .. }) {
                assert_eq!(workload.is_single_pass(), expected, "{}", workload.name);
            }
        }
    }
}
