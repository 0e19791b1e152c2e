//! What happened, counted: faults by kind, operations, and pairs of operations that met.

use std::{collections::BTreeMap, fmt};

use crate::{faults::FaultKind, operation::Operation};

/// Runs of at least so many seeds must have seen everything that is listed...
pub const LISTED_SEEDS: u64 = 10_000;
/// ...so many times.
pub const LISTED_LEAST: u64 = 100;
/// Operations of each seed, at least.
pub const OPERATIONS_LEAST: u64 = 200;

/// Counts of one seed, or of many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub seeds: u64,
    pub restarts: u64,
    /// Of the seed that had the fewest.
    pub fewest_operations: Option<u64>,
    faults: BTreeMap<FaultKind, u64>,
    operations: BTreeMap<Operation, u64>,
    pairs: BTreeMap<(Operation, Operation), u64>,
}

impl Stats {
    /// Nothing has happened in one seed.
    pub fn of_one() -> Stats {
        Stats { seeds: 1, ..Stats::default() }
    }

    pub fn fault(&mut self, kind: FaultKind) {
        *self.faults.entry(kind).or_default() += 1;
    }

    pub fn operation(&mut self, operation: Operation) {
        *self.operations.entry(operation).or_default() += 1;
    }

    /// Two operations were under way at the same time.
    pub fn pair(&mut self, a: Operation, b: Operation) {
        *self.pairs.entry((a.min(b), a.max(b))).or_default() += 1;
    }

    pub fn add(&mut self, other: &Stats) {
        self.seeds += other.seeds;
        self.restarts += other.restarts;
        self.fewest_operations = match (self.fewest_operations, other.fewest_operations) {
            (Some(own), Some(others)) => Some(own.min(others)),
            (own, others) => own.or(others),
        };
        other.faults.iter().for_each(|(kind, count)| *self.faults.entry(*kind).or_default() += count);
        other.operations.iter().for_each(|(kind, count)| *self.operations.entry(*kind).or_default() += count);
        other.pairs.iter().for_each(|(pair, count)| *self.pairs.entry(*pair).or_default() += count);
    }

    pub fn faults_of(&self, kind: FaultKind) -> u64 {
        self.faults.get(&kind).copied().unwrap_or(0)
    }

    pub fn pairs_of(&self, a: Operation, b: Operation) -> u64 {
        self.pairs.get(&(a.min(b), a.max(b))).copied().unwrap_or(0)
    }

    /// How many operations there were.
    pub fn operation_count(&self) -> u64 {
        self.operations.values().sum()
    }

    /// What is listed and happened fewer than `least` times, and whether a seed was too short.
    pub fn missing(&self, least: u64) -> Vec<String> {
        let faults = FaultKind::ALL.iter().filter(|kind| self.faults_of(**kind) < least);
        let faults = faults.map(|kind| format!("{}: {} times", kind.name(), self.faults_of(*kind)));
        let pairs = Operation::pairs().filter(|(a, b)| self.pairs_of(*a, *b) < least);
        let pairs = pairs.map(|(a, b)| format!("{a} with {b}: {} times", self.pairs_of(a, b)));
        let short = self.fewest_operations.filter(|fewest| *fewest < OPERATIONS_LEAST);
        let short = short.map(|fewest| format!("operations of one seed: {fewest}"));
        faults.chain(pairs).chain(short).collect()
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (operations, restarts) = (self.operation_count(), self.restarts);
        let fewest = self.fewest_operations.unwrap_or(0);
        writeln!(
            f,
            "{} seeds, {operations} operations, at least {fewest} each, {restarts} restarts",
            self.seeds
        )?;
        writeln!(f, "\n{:<32} {:<18} {:>10}", "fault", "threatens", "times")?;
        for kind in FaultKind::ALL {
            let threatened: Vec<String> = kind.threatens().iter().map(u8::to_string).collect();
            writeln!(f, "{:<32} {:<18} {:>10}", kind.name(), threatened.join(" "), self.faults_of(*kind))?;
        }
        writeln!(f, "\n{:<32} {:>29}", "operation", "times")?;
        for (operation, count) in &self.operations {
            writeln!(f, "{:<32} {count:>29}", operation.to_string())?;
        }
        writeln!(f, "\n{:<51} {:>10}", "operations at the same time", "times")?;
        for (a, b) in Operation::pairs() {
            writeln!(f, "{:<51} {:>10}", format!("{a}, {b}"), self.pairs_of(a, b))?;
        }
        Ok(())
    }
}
