//! A history before it is run: steps that each stand for themselves.
//!
//! Everything that is decided comes from the steps, so a script without some of them is a script too: that is how a
//! failure is made short. What a step names (a volume, a snapshot) is a number, taken modulo what there is.

use bedplate_engine::exec::simulated::Seed;
use serde::{Deserialize, Serialize};

use crate::{
    arrivals::script::{ImageStep, with_images},
    decay::LIES,
    faults::FaultKind,
    stats::OPERATIONS_LEAST,
};

/// Steps of a seed. Most are operations.
const STEPS: u64 = 360;
/// Clients of a seed: at least 3.
const CLIENTS_MIN: u64 = 3;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Write,
    FuaWrite,
    /// Zeros that are data.
    WriteZeros,
    Zero,
    FuaZero,
    Discard,
    Flush,
    Read,
    /// Planned at once, read part by part.
    ReadAhead,
}

/// An operation on a disk's volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    Snapshot,
    Clone,
    /// A clone of a snapshot.
    CloneSnapshot,
    FullClone,
    Revert,
    DeleteSnapshot,
    /// Merging every layer that no name holds.
    Merge,
    Flatten,
    Grow,
    Export,
    DeleteVolume,
    Recover,
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    Kill,
    Power,
    /// It flushes and closes.
    Close,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A client asks for something; then so many other things happen.
    Client {
        client: u8,
        volume: u8,
        ask: Ask,
        start: u16,
        cells: u16,
        moves: u8,
    },
    Life {
        life: Life,
        volume: u8,
        pick: u8,
    },
    /// The matching call after so many others of its kind goes wrong.
    Fault {
        fault: FaultKind,
        after: u8,
    },
    /// So many calls from now.
    Cut {
        cut: Cut,
        after: u16,
    },
    /// Something is done with an image.
    Image(ImageStep),
    /// The medium has this much room left.
    Room {
        bytes: u32,
    },
}

/// What a seed starts with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Decides the order of everything.
    pub seed: u64,
    /// Bytes of the first volume.
    pub size: u32,
    /// Bytes of its image.
    pub image: u32,
    pub write_align: u16,
    /// A medium this large: its room is then bounded.
    pub medium: Option<u32>,
    /// What the medium does in the end that it must not: one of [`LIES`].
    pub decay: Option<FaultKind>,
    /// When the steps end before there were so many operations, clients ask for more.
    #[serde(default)]
    pub operations: u16,
}

/// A history to be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    pub setup: Setup,
    pub steps: Vec<Step>,
}

/// Which faults a seed has, besides its cuts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weather {
    /// Nothing fails.
    Fair,
    /// Reads and writes fail.
    Transfers,
    Syncs,
    /// Anything may.
    Any,
    /// There is little room, and a name may fail.
    Full,
}

/// What a seed does more of than others: what meets seldom in a mixture meets often where most else is left out.
struct Habits {
    weather: Weather,
    clients: u64,
    /// What clients' ranges are multiples of, in cells.
    units: &'static [u64],
    /// Half of everything is about one volume.
    crowded: bool,
    lives: &'static [Life],
}

/// Operations on the disk, each as often as it stands here.
const LIVES: [Life; 26] = {
    use Life::*;
    [
        Snapshot,
        Snapshot,
        Snapshot,
        Snapshot,
        Snapshot,
        Clone,
        Clone,
        CloneSnapshot,
        FullClone,
        Revert,
        Revert,
        DeleteSnapshot,
        DeleteSnapshot,
        DeleteSnapshot,
        DeleteSnapshot,
        Merge,
        Merge,
        Merge,
        Merge,
        Flatten,
        Flatten,
        Grow,
        Export,
        DeleteVolume,
        Recover,
        Recover,
    ]
};
/// Those that make, fill or empty layers.
const LAYERS: [Life; 8] = {
    use Life::*;
    [Snapshot, Snapshot, DeleteSnapshot, DeleteSnapshot, Merge, Merge, Flatten, DeleteVolume]
};
/// Those that can meet in a volume that failed, and its way out.
const REPAIRS: [Life; 10] = {
    use Life::*;
    [Recover, Recover, Recover, Recover, FullClone, Merge, Flatten, Flatten, Flatten, Export]
};
/// Those that leave a head where it is.
const HEADS: [Life; 4] = [Life::Flatten, Life::Flatten, Life::Grow, Life::Export];

impl Habits {
    fn of(seed: &mut Seed, weather: Weather) -> Habits {
        const UNITS: [&[u64]; 4] = [&[1, 8, 64], &[1, 8, 64], &[8, 64], &[64]];
        let failing = matches!(weather, Weather::Syncs | Weather::Any);
        let lives: &[Life] = match seed.index(4) {
            0 if failing => &REPAIRS,
            0 | 1 => &LIVES,
            2 => &LAYERS,
            _ => &HEADS,
        };
        Habits {
            weather,
            clients: CLIENTS_MIN + seed.below(3),
            units: UNITS[seed.index(UNITS.len())],
            crowded: seed.one_in(2),
            lives,
        }
    }

    fn volume(&self, seed: &mut Seed) -> u8 {
        if self.crowded && seed.one_in(2) { 0 } else { number_of(seed.below(256)) }
    }
}

impl Script {
    /// The script of a seed.
    pub fn of(number: u64) -> Script {
        let mut seed = Seed(number);
        let weather = match seed.below(10) {
            0 => Weather::Transfers,
            1 | 2 => Weather::Syncs,
            3 => Weather::Any,
            4 => Weather::Full,
            _ => Weather::Fair,
        };
        let blocks = 3 + seed.below(10);
        let size = blocks * 4096 + 512 * seed.below(8);
        let image = match seed.below(3) {
            0 => size,
            _ => 64 * seed.below(size / 64),
        };
        let setup = Setup {
            seed: seed.number(),
            size: number_of(size),
            image: number_of(image),
            write_align: if seed.one_in(3) { 4096 } else { 512 },
            medium: (weather == Weather::Full).then_some(4 << 20),
            decay: seed.one_in(4).then(|| LIES[seed.index(LIES.len())]),
            operations: number_of(OPERATIONS_LEAST),
        };
        let habits = Habits::of(&mut seed, weather);
        let steps = (0..STEPS).map(|_| step(&mut seed, &habits)).collect();
        let steps = with_images(steps, number, |seed| fault(seed, weather));
        Script { setup, steps }
    }

    /// One step a line.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        let mut text = serde_json::to_string(&self.setup)? + "\n";
        for step in &self.steps {
            text += &serde_json::to_string(step)?;
            text += "\n";
        }
        Ok(text)
    }

    /// Read what [`Script::to_text`] wrote; empty lines and those that begin with `#` say nothing.
    pub fn parse(text: &str) -> Result<Script, String> {
        let mut lines = text.lines().zip(1..).filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
        let wrong = |number: usize| move |e: serde_json::Error| format!("line {number}: {e}");
        let (first, number) =
            lines.next().ok_or("a script begins with a line that says what it starts with")?;
        let setup = serde_json::from_str(first).map_err(wrong(number))?;
        let steps = lines.map(|(line, number)| serde_json::from_str(line).map_err(wrong(number)));
        Ok(Script { setup, steps: steps.collect::<Result<_, String>>()? })
    }
}

/// A request more, of a client that waits for what it asked before.
pub fn one_more(seed: &mut Seed) -> Step {
    const HABITS: Habits = Habits {
        weather: Weather::Fair,
        clients: CLIENTS_MIN,
        units: &[1, 8, 64],
        crowded: false,
        lives: &[],
    };
    match request(seed, &HABITS) {
        Step::Client { client, volume, ask, start, cells, moves: _ } => {
            Step::Client { client, volume, ask, start, cells, moves: 24 }
        }
        other => other,
    }
}

pub fn number_of<T: TryFrom<u64>>(number: u64) -> T
where
    T::Error: std::fmt::Debug,
{
    T::try_from(number).expect("drawn below what it holds")
}

fn step(seed: &mut Seed, habits: &Habits) -> Step {
    match seed.below(1000) {
        0..6 => Step::Cut {
            cut: one_of(seed, &[Cut::Kill, Cut::Power, Cut::Power, Cut::Close]),
            after: {
                let most = one_of(seed, &[3, 30, 200]);
                number_of(seed.below(most))
            },
        },
        6..60 => {
            let most = one_of(seed, &[2, 8, 40]);
            Step::Fault { fault: fault(seed, habits.weather), after: number_of(seed.below(most)) }
        }
        60..70 if habits.weather == Weather::Full => Step::Room { bytes: number_of(seed.below(160 << 10)) },
        60..190 => Step::Life {
            life: one_of(seed, habits.lives),
            volume: habits.volume(seed),
            pick: number_of(seed.below(256)),
        },
        _ => request(seed, habits),
    }
}

fn one_of<T: Copy>(seed: &mut Seed, all: &[T]) -> T {
    all[seed.index(all.len())]
}

fn request(seed: &mut Seed, habits: &Habits) -> Step {
    let ask = match seed.below(16) {
        0..4 => Ask::Write,
        4 | 5 => Ask::FuaWrite,
        6 => Ask::WriteZeros,
        7 => Ask::Zero,
        8 => Ask::FuaZero,
        9 | 10 => Ask::Discard,
        11 | 12 => Ask::Flush,
        13 | 14 => Ask::Read,
        _ => Ask::ReadAhead,
    };
    let unit = one_of(seed, habits.units);
    let most = one_of(seed, &[2, 9, 4 * 64 / unit]);
    let cells = unit * (1 + seed.below(most));
    Step::Client {
        client: number_of(seed.below(habits.clients)),
        volume: habits.volume(seed),
        ask,
        start: number_of(unit * seed.below(1024 / unit)),
        cells: number_of(cells),
        moves: number_of(one_of(seed, &[0, 1, 3, 8]) * seed.below(3)),
    }
}

fn fault(seed: &mut Seed, weather: Weather) -> FaultKind {
    use FaultKind::*;
    const HARMLESS: [FaultKind; 5] = [ShortTransfer, Interrupted, Slow, Slow, ClockJump];
    const TRANSFERS: [FaultKind; 5] = [TornTransfer, ReadError, WriteError, Stuck, Slow];
    const SYNCS: [FaultKind; 2] = [FailedSync, DroppedSync];
    const NAMES: [FaultKind; 2] = [NameError, Slow];
    const ANY: [FaultKind; 8] =
        [TornTransfer, ReadError, WriteError, NameError, NoSpace, FailedSync, DroppedSync, Stuck];
    let unkind: &[FaultKind] = match weather {
        Weather::Fair => &HARMLESS,
        Weather::Full => &NAMES,
        Weather::Transfers => &TRANSFERS,
        Weather::Syncs => &SYNCS,
        Weather::Any => &ANY,
    };
    // Harmless ones mostly: a fault ends much of what could still be seen.
    if seed.one_in(3) { unkind[seed.index(unkind.len())] } else { HARMLESS[seed.index(HARMLESS.len())] }
}
