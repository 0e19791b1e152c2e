//! The report of a run: its schema, and how it is made of samples.
//!
//! Owns [`Report`]; `README.md` of this crate says what its fields mean, and [`SCHEMA`] changes with them. The shapes
//! for people are made of it and nothing else: [`table`] for a terminal, [`html`] with the plots of [`plot`].

pub mod html;
pub mod plot;
pub mod table;

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    aim::{AimResult, judge},
    figure::{Figure, Measure},
    machine::Machine,
    sample::Sample,
    target::Transport,
    workload::{Suite, Workload},
};

/// The version of the schema.
pub const SCHEMA: u32 = 1;

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub schema: u32,
    /// RFC 3339.
    pub began: String,
    pub suite: Suite,
    pub rounds: u64,
    pub seconds: u32,
    pub size_bytes: u64,
    pub machine: Machine,
    pub load_average_after: String,
    /// What else decides figures, by name: versions, memory, parameters of the kernel, file systems.
    pub surroundings: BTreeMap<String, String>,
    pub targets: Vec<TargetInfo>,
    pub workloads: Vec<Workload>,
    pub lanes: Vec<Lane>,
    pub missing: Vec<Missing>,
    pub aims: Vec<AimResult>,
}

/// A target as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    pub name: String,
    pub about: String,
    /// Whether others are told as ratios to it.
    pub is_yardstick: bool,
    pub version: Option<String>,
    /// Flags that it was started with.
    pub options: String,
    /// Kind and options of the mount that it lies on.
    pub mount: Option<String>,
}

/// A workload on a target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    pub workload: String,
    pub target: String,
    pub figures: BTreeMap<Measure, Figure>,
    /// By yardstick: this lane's figure by the yardstick's, of the same workload and round by round.
    pub ratios: BTreeMap<String, BTreeMap<Measure, Figure>>,
}

/// A lane that did not run, or not to the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    pub target: String,
    /// All of the target's when there is none.
    pub workload: Option<String>,
    pub why: String,
}

/// The samples of a run while it goes on.
#[derive(Debug, Default)]
pub struct Samples {
    lanes: BTreeMap<(String, String), Vec<Sample>>,
}

impl Samples {
    pub fn add(&mut self, workload: &str, target: &str, sample: Sample) {
        self.lanes.entry((workload.to_owned(), target.to_owned())).or_default().push(sample);
    }

    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// The lanes, in the order of the workloads and targets, with their ratios.
    pub fn lanes(&self, workloads: &[Workload], targets: &[TargetInfo]) -> Vec<Lane> {
        let figures = |workload: &str, target: &str| -> Option<BTreeMap<Measure, Figure>> {
            let samples = self.lanes.get(&(workload.to_owned(), target.to_owned()))?;
            let mut values: BTreeMap<Measure, Vec<f64>> = BTreeMap::new();
            for (measure, value) in samples.iter().flat_map(Sample::values) {
                values.entry(measure).or_default().push(value);
            }
            Some(values.into_iter().map(|(measure, values)| (measure, Figure::of(values))).collect())
        };
        let mut lanes = Vec::new();
        for workload in workloads {
            for target in targets {
                let Some(of) = figures(&workload.name, &target.name) else { continue };
                let yardsticks =
                    targets.iter().filter(|other| other.is_yardstick && other.name != target.name);
                let ratios = yardsticks.filter_map(|other| {
                    let against = figures(&workload.name, &other.name)?;
                    let pairs = of.iter().filter_map(|(measure, figure)| {
                        Some((*measure, figure.ratio(against.get(measure)?)?))
                    });
                    Some((other.name.clone(), pairs.collect()))
                });
                let ratios = ratios.collect();
                lanes.push(Lane {
                    workload: workload.name.clone(),
                    target: target.name.clone(),
                    figures: of,
                    ratios,
                });
            }
        }
        lanes
    }
}

/// The aims of these workloads, judged.
pub fn aims(lanes: &[Lane], workloads: &[Workload], best: Transport) -> Vec<AimResult> {
    let names: Vec<String> = workloads.iter().map(|workload| workload.name.clone()).collect();
    judge(lanes, &names, best)
}

impl Report {
    /// Read the JSON of a run: a file, or the directory that a run was saved to.
    pub fn read(path: &Path) -> Result<Report> {
        let file = if path.is_dir() { path.join(JSON) } else { path.to_owned() };
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let found: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
        let schema = found.get("schema").and_then(serde_json::Value::as_u64);
        let schema = schema.with_context(|| format!("{} is no report of `bench run`", file.display()))?;
        ensure!(
            schema == u64::from(SCHEMA),
            "{} has version {schema} of the schema; this program knows {SCHEMA}",
            file.display()
        );
        serde_json::from_value(found).with_context(|| format!("{} is no report", file.display()))
    }

    pub fn lane(&self, workload: &str, target: &str) -> Option<&Lane> {
        self.lanes.iter().find(|lane| lane.workload == workload && lane.target == target)
    }

    /// The lanes of a workload, in the order of the targets.
    pub fn lanes_of<'a>(&'a self, workload: &'a str) -> impl Iterator<Item = &'a Lane> {
        self.lanes.iter().filter(move |lane| lane.workload == workload)
    }
}

/// Names of the files that a run is saved as.
pub const JSON: &str = "report.json";
pub const HTML: &str = "report.html";

/// For tests: a run with two workloads and three targets.
#[cfg(test)]
pub fn fixture() -> Report {
    serde_json::from_str(include_str!("../../fixtures/report.json")).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_was_saved_is_read_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let report = fixture();
        let text = serde_json::to_string_pretty(&report).unwrap();
        fs::write(dir.path().join(JSON), &text).unwrap();
        let again = Report::read(dir.path()).unwrap();
        assert_eq!(serde_json::to_string_pretty(&again).unwrap(), text);
    }

    #[test]
    fn another_version_of_the_schema_is_refused_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("old.json");
        fs::write(&file, "{\"schema\": 99}").unwrap();
        assert!(Report::read(&file).unwrap_err().to_string().contains("version 99"));
        fs::write(&file, "{\"figures\": {}}").unwrap();
        assert!(Report::read(&file).unwrap_err().to_string().contains("no report of `bench run`"));
    }

    #[test]
    fn ratios_are_to_every_yardstick_of_the_same_workload() {
        let report = fixture();
        let mut samples = Samples::default();
        for (target, iops) in [("bare", 100.0), ("fuse-classic", 50.0), ("qsd-fuse", 10.0)] {
            let mut sample = Sample::of(1);
            sample.set(Measure::Iops, iops);
            samples.add("rr4k-q32", target, sample);
        }
        let lanes = samples.lanes(&report.workloads, &report.targets);
        assert_eq!(lanes.len(), 3);
        let ours = lanes.iter().find(|lane| lane.target == "fuse-classic").unwrap();
        assert_eq!(ours.ratios["bare"][&Measure::Iops].median, 0.5);
        assert_eq!(ours.ratios["qsd-fuse"][&Measure::Iops].median, 5.0);
    }
}
