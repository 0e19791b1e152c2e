//! What one lane gave in one round.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::figure::{Measure, float};

/// The measures of one sample, and how many requests they are of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    ops: u64,
    values: BTreeMap<Measure, f64>,
}

impl Sample {
    pub fn of(ops: u64) -> Sample {
        Sample { ops, values: BTreeMap::new() }
    }

    /// Values that are no numbers are left out.
    pub fn set(&mut self, measure: Measure, value: f64) {
        if value.is_finite() {
            self.values.insert(measure, value);
        }
    }

    pub fn get(&self, measure: Measure) -> Option<f64> {
        self.values.get(&measure).copied()
    }

    pub fn ops(&self) -> u64 {
        self.ops
    }

    pub fn values(&self) -> impl Iterator<Item = (Measure, f64)> {
        self.values.iter().map(|(measure, value)| (*measure, *value))
    }

    /// Latencies in nanoseconds, in any order.
    pub fn set_latencies(&mut self, mut nanos: Vec<u64>) {
        nanos.sort_unstable();
        let Some(last) = nanos.len().checked_sub(1) else { return };
        let at = |part: usize, whole: usize| nanos.get(last * part / whole).copied().unwrap_or(0);
        let sum: u64 = nanos.iter().sum();
        let count = u64::try_from(nanos.len()).unwrap_or(1);
        self.set(Measure::LatencyMeanUs, float(sum) / float(count) / 1e3);
        self.set(Measure::LatencyP50Us, float(at(1, 2)) / 1e3);
        self.set(Measure::LatencyP90Us, float(at(9, 10)) / 1e3);
        self.set(Measure::LatencyP99Us, float(at(99, 100)) / 1e3);
        self.set(Measure::LatencyP999Us, float(at(999, 1000)) / 1e3);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_latencies() {
        let mut sample = Sample::of(1000);
        sample.set_latencies((0..=1000).rev().map(|n| n * 1000).collect());
        assert_eq!(sample.get(Measure::LatencyP50Us), Some(500.0));
        assert_eq!(sample.get(Measure::LatencyP999Us), Some(999.0));
        assert_eq!(sample.get(Measure::LatencyMeanUs), Some(500.0));
    }

    #[test]
    fn what_is_no_number_is_left_out() {
        let mut sample = Sample::of(1);
        sample.set(Measure::Iops, f64::NAN);
        assert_eq!(sample.values().count(), 0);
    }
}
