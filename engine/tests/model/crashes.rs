//! Every way, or many ways, in which a crash can leave a medium.

use std::{
    collections::HashMap,
    fmt,
    ops::AddAssign,
    time::{Duration, Instant},
};

use bedplate_engine::exec::{
    simulated::Seed,
    storage::memory::{Effect, MemoryStorage},
};

use crate::setting;

/// Effects of which every subset is tried in the long form.
const EFFECTS_MAX: usize = 12;
/// Media of a crash point with more effects than that; also combinations of all that an effect can come to.
const SAMPLES: usize = 4096;
/// Samples of one crash point in the short form.
const SHORT_SAMPLES_MAX: usize = 64;
/// In the short form effects of one block of one file are split into two groups, even and odd sectors, each of which
/// survives alike; sampled outcomes choose every sector by itself.
const SECTORS_PER_BLOCK: u64 = 8;

/// How many of the media that a crash may leave are tried.
#[derive(Clone, Copy, Debug)]
pub enum Reach {
    /// Every combination of what groups of effects do while there are at most so many, else the extreme ones and
    /// samples.
    Short(usize),
    /// Every subset of up to [`EFFECTS_MAX`] effects, at least [`SAMPLES`] samples where there are more.
    Long,
}

impl Reach {
    /// The short form, unless `BEDPLATE_SUBSETS=1` asks for the long one.
    pub fn of(short: usize) -> Reach {
        if setting("BEDPLATE_SUBSETS", 0) == 1 { Reach::Long } else { Reach::Short(short) }
    }
}

/// What was tried.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    pub workloads: u64,
    /// Moments at which the machine was stopped.
    pub points: u64,
    /// Of those, how many had every subset of their effects tried.
    pub whole: u64,
    /// Media that were one of all combinations, and samples.
    pub combinations: u64,
    pub samples: u64,
    began: Instant,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally { workloads: 0, points: 0, whole: 0, combinations: 0, samples: 0, began: Instant::now() }
    }
}

impl Tally {
    /// Of one workload that is about to run.
    pub fn of_workload() -> Tally {
        Tally { workloads: 1, ..Tally::default() }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Tally) {
        self.workloads += more.workloads;
        self.points += more.points;
        self.whole += more.whole;
        self.combinations += more.combinations;
        self.samples += more.samples;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { workloads, points, whole, combinations, samples, began } = self;
        let took = Duration::from_secs(began.elapsed().as_secs());
        write!(
            f,
            "{workloads} workloads, {points} crash points, {whole} of them whole, {combinations} combinations and \
             {samples} samples opened and checked in {took:?}"
        )
    }
}

/// What survives together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Group {
    Block { file: u64, block: u64, odd: bool, outcomes: usize },
    Alone(usize),
}

fn group(number: usize, effect: Effect, outcomes: usize) -> Group {
    match effect {
        // Neighbours with one history; log sectors written apart have another number of outcomes or stay alone.
        Effect::Sector { file, sector } if outcomes > 1 => {
            Group::Block { file, block: sector / SECTORS_PER_BLOCK, odd: sector % 2 == 1, outcomes }
        }
        Effect::Sector { .. } | Effect::Length { .. } | Effect::Name { .. } => Group::Alone(number),
    }
}

/// What may survive of a medium, and what does so together.
struct Crashes<'a> {
    storage: &'a MemoryStorage,
    /// Which names survive decides which files are asked about, so outcomes are found by effect, not by order.
    group_of: HashMap<Effect, usize>,
    /// Outcomes of each group.
    groups: Vec<usize>,
}

impl<'a> Crashes<'a> {
    fn new(storage: &'a MemoryStorage, effects: &[(Effect, usize)], grouped: bool) -> Crashes<'a> {
        let mut groups = Vec::new();
        let mut numbers: HashMap<Group, usize> = HashMap::new();
        let group_of = effects.iter().enumerate().map(|(number, (effect, outcomes))| {
            let group = if grouped { group(number, *effect, *outcomes) } else { Group::Alone(number) };
            let found = *numbers.entry(group).or_insert_with(|| {
                groups.push(*outcomes);
                groups.len() - 1
            });
            (*effect, found)
        });
        let group_of = group_of.collect();
        Crashes { storage, group_of, groups }
    }

    /// The number of all combinations, if it is at most `most`.
    fn combinations(&self, most: usize) -> Option<usize> {
        let product = self.groups.iter().try_fold(1usize, |product, outcomes| product.checked_mul(*outcomes));
        product.filter(|product| *product <= most)
    }

    fn medium(&self, choice: &[usize]) -> MemoryStorage {
        self.storage.crash(|effect, outcomes| {
            self.group_of.get(&effect).map_or(0, |group| choice[*group].min(outcomes - 1))
        })
    }

    /// Every combination.
    fn all(&self, combinations: usize) -> impl Iterator<Item = MemoryStorage> {
        (0..combinations).map(|mut number| {
            let choice: Vec<usize> = self
                .groups
                .iter()
                .map(|outcomes| {
                    let chosen = number % outcomes;
                    number /= outcomes;
                    chosen
                })
                .collect();
            self.medium(&choice)
        })
    }

    /// Every subset: each group is lost or has its newest outcome.
    fn subsets(&self) -> impl Iterator<Item = MemoryStorage> {
        (0..1usize << self.groups.len()).map(|number| {
            let newest = self.groups.iter().enumerate();
            let choice: Vec<usize> =
                newest.map(|(bit, outcomes)| (number >> bit & 1) * (outcomes - 1)).collect();
            self.medium(&choice)
        })
    }

    /// The two extreme ones.
    fn extremes(&self) -> impl Iterator<Item = MemoryStorage> {
        [false, true].into_iter().map(|newest| {
            let choice: Vec<usize> =
                self.groups.iter().map(|outcomes| if newest { outcomes - 1 } else { 0 }).collect();
            self.medium(&choice)
        })
    }

    fn sample(&self, seed: &mut Seed) -> MemoryStorage {
        let choice: Vec<usize> = self.groups.iter().map(|outcomes| seed.index(*outcomes)).collect();
        self.medium(&choice)
    }
}

/// Call `check` with media that a crash now may leave. Returns how many there were.
pub fn each_crash(
    storage: &MemoryStorage,
    reach: Reach,
    seed: &mut Seed,
    mut check: impl FnMut(MemoryStorage),
) -> Tally {
    let mut tally = Tally { points: 1, ..Tally::default() };
    let effects = storage.unsynced();
    let grouped = Crashes::new(storage, &effects, true);
    let alone = Crashes::new(storage, &effects, false);
    let mut run = |count: &mut u64, medium| {
        *count += 1;
        check(medium);
    };
    let (mut combinations, mut samples) = (0, 0);
    match reach {
        Reach::Short(most) => {
            let sampled = most.min(SHORT_SAMPLES_MAX);
            match grouped.combinations(most) {
                Some(count) => grouped.all(count).for_each(|medium| run(&mut combinations, medium)),
                None => {
                    grouped.extremes().for_each(|medium| run(&mut samples, medium));
                    (0..sampled / 2).for_each(|_| run(&mut samples, grouped.sample(seed)));
                }
            }
            if !effects.is_empty() {
                (0..sampled / 4).for_each(|_| run(&mut samples, alone.sample(seed)));
            }
            tally.whole += u64::from(alone.groups.is_empty());
        }
        Reach::Long => match alone.combinations(SAMPLES) {
            Some(count) => {
                alone.all(count).for_each(|medium| run(&mut combinations, medium));
                tally.whole += 1;
            }
            None => {
                if effects.len() <= EFFECTS_MAX {
                    alone.subsets().for_each(|medium| run(&mut combinations, medium));
                    tally.whole += 1;
                }
                alone.extremes().for_each(|medium| run(&mut samples, medium));
                // What was written together is as often seen to survive together.
                for _ in 0..SAMPLES / 2 {
                    run(&mut samples, alone.sample(seed));
                    run(&mut samples, grouped.sample(seed));
                }
            }
        },
    }
    Tally { combinations, samples, ..tally }
}
