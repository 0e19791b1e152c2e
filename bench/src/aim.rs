//! The aims: which lane is to reach what against which other one, and whether it did in a run.
//!
//! Owns the table and the verdict. A ratio is of samples of the same round. An aim is met when the median of the ratios
//! reaches it and the quartile on the bad side lies within a tenth of it: one lucky round meets nothing.

use serde::{Deserialize, Serialize};

use crate::{
    figure::{Better, Figure, Measure},
    report::Lane,
    target::Transport,
};

/// The quartile on the bad side may be off the aim by this part of it.
const SLACK: f64 = 0.1;

/// A target, or the better of two that differ in the transport only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Named(&'static str),
    /// The volume's file on the best transport that there is.
    Fuse,
    /// A loop device over it.
    Loop,
}

impl Who {
    pub const fn name(self, transport: Transport) -> &'static str {
        match (self, transport) {
            (Who::Named(name), _) => name,
            (Who::Fuse, Transport::Classic) => "fuse-classic",
            (Who::Fuse, Transport::Uring | Transport::UringLowLatency) => "fuse-uring",
            (Who::Loop, Transport::Classic) => "loop-classic",
            (Who::Loop, Transport::Uring | Transport::UringLowLatency) => "loop-uring",
        }
    }
}

/// One side of an aim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    pub workload: &'static str,
    pub who: Who,
}

/// What the ratio of two lanes is to be; whether at least or at most, the measure says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aim {
    pub of: Side,
    pub against: Side,
    pub measure: Measure,
    pub ratio: f64,
}

const URING: Who = Who::Named("fuse-uring");
const CLASSIC: Who = Who::Named("fuse-classic");
const LOWLAT: Who = Who::Named("fuse-uring-lowlat");
const BARE: Who = Who::Named("bare");
const QSD: Who = Who::Named("qsd-fuse");

const fn same(workload: &'static str, who: Who, against: Who, ratio: f64) -> Aim {
    aim(workload, who, workload, against, Measure::Iops, ratio)
}

const fn aim(
    workload: &'static str,
    who: Who,
    against_workload: &'static str,
    against: Who,
    measure: Measure,
    ratio: f64,
) -> Aim {
    let of = Side { workload, who };
    Aim { of, against: Side { workload: against_workload, who: against }, measure, ratio }
}

/// Every aim.
pub const AIMS: &[Aim] = &[
    same("rr4k-q1", URING, QSD, 1.5),
    same("rr4k-q1", LOWLAT, QSD, 5.0),
    same("rr4k-q32", URING, QSD, 6.0),
    same("rr4k-q32-j2", URING, QSD, 5.0),
    same("rw4k-q32", URING, QSD, 3.0),
    same("rw4k-q32-first", URING, QSD, 2.0),
    same("rr4k-q1", CLASSIC, QSD, 1.5),
    same("rr4k-q32", CLASSIC, QSD, 5.0),
    aim("sr1m-q8", CLASSIC, "sr1m-q8", BARE, Measure::BytesPerS, 0.7),
    aim("sr1m-q8", URING, "sr1m-q8", BARE, Measure::BytesPerS, 0.5),
    same("rr4k-q32", URING, BARE, 0.6),
    aim("rr4k-q32-layers200", Who::Fuse, "rr4k-q32-layers1", Who::Fuse, Measure::Iops, 0.95),
    same("rr4k-q32", Who::Named("passthrough"), BARE, 0.95),
    same("rr4k-q32-disk", Who::Fuse, BARE, 0.85),
    same("rr4k-q1-disk", Who::Fuse, BARE, 0.7),
    aim("rr4k-q32-cold", Who::Fuse, "rr4k-q32-disk", BARE, Measure::Iops, 0.7),
    same("rr4k-q32", Who::Loop, Who::Fuse, 0.3),
    same("sync4k-q1-disk", Who::Fuse, BARE, 0.8),
    same("sync4k-q1-first-disk", Who::Fuse, BARE, 0.45),
    same("rr4k-q32", Who::Named("engine-ring"), BARE, 0.9),
    aim("rr4k-q32-j2", URING, "rr4k-q32-j2", QSD, Measure::ServerCpuUsPerOp, 0.125),
];

/// How an aim came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Met,
    Missed,
    /// One of its lanes is missing.
    NotMeasured,
}

/// An aim in a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AimResult {
    pub workload: String,
    pub target: String,
    pub against_workload: String,
    pub against: String,
    pub measure: Measure,
    pub aim: f64,
    pub ratio: Option<Figure>,
    pub verdict: Verdict,
}

impl AimResult {
    /// `>= 6.00` or `<= 0.13`.
    pub fn bound(&self) -> String {
        let sign = match self.measure.better() {
            Better::Higher => ">=",
            Better::Lower => "<=",
        };
        // Halves of hundredths are not for people.
        format!("{sign} {}", (self.aim * 1000.0).round() / 1000.0)
    }

    /// What is compared.
    pub fn words(&self) -> String {
        let cpu = if self.measure == Measure::ServerCpuUsPerOp { ", server CPU per request" } else { "" };
        if self.workload == self.against_workload {
            format!("{}: {} / {}{cpu}", self.workload, self.target, self.against)
        } else {
            format!("{} {} / {} {}{cpu}", self.workload, self.target, self.against_workload, self.against)
        }
    }
}

impl Aim {
    /// Its lanes, when volumes are served over `best`.
    pub fn lanes(&self, best: Transport) -> [(&'static str, &'static str); 2] {
        [self.of, self.against].map(|side| (side.workload, side.who.name(best)))
    }

    fn judge(&self, lanes: &[Lane], best: Transport) -> AimResult {
        let figure = |(workload, target): (&str, &str)| {
            let lane = lanes.iter().find(|lane| lane.workload == workload && lane.target == target)?;
            lane.figures.get(&self.measure)
        };
        let [of, against] = self.lanes(best);
        let ratio = figure(of).zip(figure(against)).and_then(|(of, against)| of.ratio(against));
        let verdict = match &ratio {
            None => Verdict::NotMeasured,
            Some(ratio) if reaches(ratio, self.ratio, self.measure.better()) => Verdict::Met,
            Some(_) => Verdict::Missed,
        };
        AimResult {
            workload: of.0.to_owned(),
            target: of.1.to_owned(),
            against_workload: against.0.to_owned(),
            against: against.1.to_owned(),
            measure: self.measure,
            aim: self.ratio,
            ratio,
            verdict,
        }
    }
}

fn reaches(ratio: &Figure, aim: f64, better: Better) -> bool {
    match better {
        Better::Higher => ratio.median >= aim && ratio.lower >= aim * (1.0 - SLACK),
        Better::Lower => ratio.median <= aim && ratio.upper <= aim * (1.0 + SLACK),
    }
}

/// Every aim that has to do with these workloads.
pub fn judge(lanes: &[Lane], workloads: &[String], best: Transport) -> Vec<AimResult> {
    let concerned = AIMS.iter().filter(|aim| workloads.iter().any(|name| name == aim.of.workload));
    concerned.map(|aim| aim.judge(lanes, best)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        target::{Kind, kinds},
        workload::table,
    };

    fn lane(target: &str, measure: Measure, samples: &[f64]) -> Lane {
        Lane {
            workload: "rr4k-q32-j2".to_owned(),
            target: target.to_owned(),
            figures: BTreeMap::from([(measure, Figure::of(samples.to_vec()))]),
            ratios: BTreeMap::new(),
        }
    }

    fn verdict(measure: Measure, ours: &[f64], theirs: &[f64]) -> Verdict {
        let lanes = [lane("fuse-uring", measure, ours), lane("qsd-fuse", measure, theirs)];
        let results = judge(&lanes, &["rr4k-q32-j2".to_owned()], Transport::Uring);
        results.into_iter().find(|result| result.measure == measure).unwrap().verdict
    }

    #[test]
    fn an_aim_names_lanes_that_exist() {
        let table = table(4);
        for aim in AIMS {
            for best in [Transport::Classic, Transport::Uring] {
                for (workload, target) in aim.lanes(best) {
                    let workload = table.iter().find(|known| known.name == workload).unwrap();
                    let kind = kinds().into_iter().find(|kind: &Kind| kind.name() == target).unwrap();
                    assert!(kind.takes(workload), "{target} {}", workload.name);
                }
            }
        }
    }

    #[test]
    fn an_aim_is_met_by_its_median_with_a_quartile_near_it() {
        assert_eq!(verdict(Measure::Iops, &[50.0, 52.0, 51.0], &[10.0; 3]), Verdict::Met);
        assert_eq!(verdict(Measure::Iops, &[49.0, 49.9, 51.0], &[10.0; 3]), Verdict::Missed);
        assert_eq!(verdict(Measure::Iops, &[10.0, 11.0, 52.0, 53.0, 54.0], &[10.0; 5]), Verdict::Missed);
    }

    #[test]
    fn for_time_on_cores_less_is_better() {
        assert_eq!(verdict(Measure::ServerCpuUsPerOp, &[1.0, 1.2, 1.1], &[10.0; 3]), Verdict::Met);
        assert_eq!(verdict(Measure::ServerCpuUsPerOp, &[2.0, 2.0, 2.0], &[10.0; 3]), Verdict::Missed);
    }

    #[test]
    fn an_aim_without_both_lanes_is_not_measured() {
        let lanes = [lane("fuse-uring", Measure::Iops, &[1.0])];
        let results = judge(&lanes, &["rr4k-q32-j2".to_owned()], Transport::Uring);
        assert!(results.iter().all(|result| result.verdict == Verdict::NotMeasured));
    }

    #[test]
    fn a_bound_says_which_way_it_goes() {
        let results = judge(&[], &["rr4k-q32-j2".to_owned()], Transport::Uring);
        let bounds: Vec<String> = results.iter().map(AimResult::bound).collect();
        assert_eq!(bounds, [">= 5", "<= 0.125"]);
    }
}
