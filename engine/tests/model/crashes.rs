//! Every way, or many ways, in which a crash can leave a medium.

use std::collections::HashMap;

use bedplate_engine::exec::{
    simulated::Seed,
    storage::memory::{Effect, MemoryStorage},
};

/// Effects of one block of one file are split into two groups, even and odd sectors, each of which survives alike; the
/// sampled outcomes choose every sector by itself.
const SECTORS_PER_BLOCK: u64 = 8;

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

/// Call `check` with media that a crash now may leave: every combination of what groups of effects do while there are
/// at most `most`, else the extreme ones and samples. Returns their number.
pub fn each_crash(
    storage: &MemoryStorage,
    most: usize,
    seed: &mut Seed,
    mut check: impl FnMut(MemoryStorage),
) -> u64 {
    let effects = storage.unsynced();
    let mut groups: Vec<usize> = Vec::new();
    let mut numbers: HashMap<Group, usize> = HashMap::new();
    let mut group_of = Vec::with_capacity(effects.len());
    for (number, (effect, outcomes)) in effects.iter().enumerate() {
        let group = *numbers.entry(group(number, *effect, *outcomes)).or_insert_with(|| {
            groups.push(*outcomes);
            groups.len() - 1
        });
        group_of.push(group);
    }
    let combinations = groups.iter().try_fold(1usize, |product, outcomes| product.checked_mul(*outcomes));
    // Which names survive decides which files are asked about, so outcomes are found by effect, not by order.
    let index: HashMap<Effect, usize> =
        effects.iter().zip(&group_of).map(|((effect, _), group)| (*effect, *group)).collect();
    let mut count = 0;
    let mut run = |choice: &[usize]| {
        count += 1;
        check(storage.crash(|effect, outcomes| {
            index.get(&effect).map_or(0, |group| choice[*group].min(outcomes - 1))
        }));
    };
    match combinations {
        Some(combinations) if combinations <= most => {
            let mut choice = vec![0; groups.len()];
            for mut number in 0..combinations {
                for (chosen, outcomes) in choice.iter_mut().zip(&groups) {
                    *chosen = number % outcomes;
                    number /= outcomes;
                }
                run(&choice);
            }
        }
        _ => {
            run(&vec![0; groups.len()]);
            run(&groups.iter().map(|outcomes| outcomes - 1).collect::<Vec<_>>());
            for _ in 0..most.min(SAMPLES_MAX) / 2 {
                let choice: Vec<usize> = groups.iter().map(|outcomes| seed.index(*outcomes)).collect();
                run(&choice);
            }
        }
    }
    if effects.is_empty() {
        return count;
    }
    for _ in 0..most.min(SAMPLES_MAX) / 4 {
        count += 1;
        check(storage.crash(|_, outcomes| seed.index(outcomes)));
    }
    count
}

/// Samples of one crash point.
const SAMPLES_MAX: usize = 64;
