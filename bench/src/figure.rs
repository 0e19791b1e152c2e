//! Figures: samples of one measurement with what a reader needs of them, and the kinds of measurement there are.
//!
//! Owns [`Figure`] (median, quartiles, extremes, and the samples in the order of their rounds, so that ratios are made
//! of samples of the same round), and [`Measure`] with its unit and direction. Quartiles are interpolated as most
//! statistics programs do (type 7).

use serde::{Deserialize, Serialize};

/// Samples of one measurement. All of them are finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// The lower and the upper quartile.
    pub lower: f64,
    pub upper: f64,
    /// In the order of the rounds.
    pub samples: Vec<f64>,
}

impl Figure {
    /// Of samples in the order of their rounds; without any, everything is NaN.
    pub fn of(samples: Vec<f64>) -> Figure {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
        Figure {
            median: quantile(&sorted, 1, 2),
            min: at(0),
            max: at(sorted.len().saturating_sub(1)),
            lower: quantile(&sorted, 1, 4),
            upper: quantile(&sorted, 3, 4),
            samples,
        }
    }

    /// This by `other`, round by round.
    pub fn ratio(&self, other: &Figure) -> Option<Figure> {
        let pairs = self.samples.iter().zip(&other.samples);
        let ratios: Vec<f64> = pairs.map(|(a, b)| a / b).filter(|ratio| ratio.is_finite()).collect();
        (!ratios.is_empty()).then(|| Figure::of(ratios))
    }

    /// The range that counts as this figure's noise: all samples while they are few, the middle half of many.
    pub fn noise(&self) -> (f64, f64) {
        if self.samples.len() < SAMPLES_OF_QUARTILES {
            (self.min, self.max)
        } else {
            (self.lower, self.upper)
        }
    }
}

/// With fewer samples than these, quartiles say nothing.
const SAMPLES_OF_QUARTILES: usize = 7;

/// The quantile `part / whole` of sorted samples.
fn quantile(sorted: &[f64], part: usize, whole: usize) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
    let (below, rest) = (last * part / whole, last * part % whole);
    if rest == 0 {
        return at(below);
    }
    at(below) + (at(below + 1) - at(below)) * float_of(rest) / float_of(whole)
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    Iops,
    BytesPerS,
    LatencyMeanUs,
    LatencyP50Us,
    LatencyP90Us,
    LatencyP99Us,
    #[serde(rename = "latency_p99_9_us")]
    LatencyP999Us,
    ClientCpuUsPerOp,
    ServerCpuUsPerOp,
    /// Bytes that the disk read, by the bytes that there were to read.
    DiskReadRatio,
    /// How long one step of a volume's life takes.
    Millis,
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

impl Measure {
    pub const fn better(self) -> Better {
        match self {
            Measure::Iops | Measure::BytesPerS => Better::Higher,
            Measure::LatencyMeanUs
            | Measure::LatencyP50Us
            | Measure::LatencyP90Us
            | Measure::LatencyP99Us
            | Measure::LatencyP999Us
            | Measure::ClientCpuUsPerOp
            | Measure::ServerCpuUsPerOp
            | Measure::DiskReadRatio
            | Measure::Millis => Better::Lower,
        }
    }

    /// For the heads of tables.
    pub const fn words(self) -> &'static str {
        match self {
            Measure::Iops => "requests a second",
            Measure::BytesPerS => "bytes a second",
            Measure::LatencyMeanUs => "mean",
            Measure::LatencyP50Us => "p50",
            Measure::LatencyP90Us => "p90",
            Measure::LatencyP99Us => "p99",
            Measure::LatencyP999Us => "p99.9",
            Measure::ClientCpuUsPerOp => "client CPU",
            Measure::ServerCpuUsPerOp => "server CPU",
            Measure::DiskReadRatio => "read from the disk",
            Measure::Millis => "time",
        }
    }

    /// A value as people read it.
    pub fn show(self, value: f64) -> String {
        match self {
            Measure::Iops => match value {
                v if v >= 1e6 => format!("{:.2}M", v / 1e6),
                v if v >= 1e4 => format!("{:.0}k", v / 1e3),
                v if v >= 1e3 => format!("{:.1}k", v / 1e3),
                v => format!("{v:.0}"),
            },
            Measure::BytesPerS => format!("{:.0} MiB/s", value / f64::from(1 << 20)),
            Measure::LatencyMeanUs
            | Measure::LatencyP50Us
            | Measure::LatencyP90Us
            | Measure::LatencyP99Us
            | Measure::LatencyP999Us
            | Measure::ClientCpuUsPerOp
            | Measure::ServerCpuUsPerOp => match value {
                v if v >= 1e4 => format!("{:.1} ms", v / 1e3),
                v if v >= 100.0 => format!("{v:.0} us"),
                v => format!("{v:.1} us"),
            },
            Measure::DiskReadRatio => format!("{value:.2}x"),
            Measure::Millis => format!("{value:.2} ms"),
        }
    }
}

/// The percentiles of latency, in order, with their place on an axis.
pub const PERCENTILES: [(Measure, &str); 4] = [
    (Measure::LatencyP50Us, "p50"),
    (Measure::LatencyP90Us, "p90"),
    (Measure::LatencyP99Us, "p99"),
    (Measure::LatencyP999Us, "p99.9"),
];

/// A ratio as people read it.
pub fn show_ratio(ratio: f64) -> String {
    if ratio >= 10.0 { format!("{ratio:.1}x") } else { format!("{ratio:.2}x") }
}

/// A count as a figure.
#[expect(clippy::cast_precision_loss, reason = "figures have four digits")]
pub const fn float(n: u64) -> f64 {
    n as f64
}

fn float_of(n: usize) -> f64 {
    float(u64::try_from(n).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        let figure = Figure::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((figure.median, figure.min, figure.max), (2.5, 1.0, 4.0));
        assert_eq!((figure.lower, figure.upper), (1.75, 3.25));
        assert_eq!(figure.samples, [4.0, 1.0, 3.0, 2.0]);
    }

    #[test]
    fn one_sample_is_its_own_quartiles_and_none_is_not_a_number() {
        let one = Figure::of(vec![7.0]);
        assert_eq!((one.median, one.lower, one.upper), (7.0, 7.0, 7.0));
        assert!(Figure::of(Vec::new()).median.is_nan());
    }

    #[test]
    fn a_ratio_is_made_of_samples_of_the_same_round() {
        let (a, b) = (Figure::of(vec![10.0, 40.0]), Figure::of(vec![5.0, 10.0, 99.0]));
        let ratio = a.ratio(&b).unwrap();
        assert_eq!(ratio.samples, [2.0, 4.0]);
        assert_eq!(a.ratio(&Figure::of(vec![0.0, 0.0])), None);
    }

    #[test]
    fn few_samples_are_all_noise_and_of_many_the_middle_half() {
        assert_eq!(Figure::of(vec![1.0, 9.0, 5.0]).noise(), (1.0, 9.0));
        assert_eq!(Figure::of((1..=9).map(f64::from).collect()).noise(), (3.0, 7.0));
    }

    #[test]
    fn measures_have_the_names_of_the_schema() {
        let words = [Measure::Iops, Measure::LatencyP999Us, Measure::ServerCpuUsPerOp];
        let text = serde_json::to_string(&words).unwrap();
        assert_eq!(text, r#"["iops","latency_p99_9_us","server_cpu_us_per_op"]"#);
    }
}
