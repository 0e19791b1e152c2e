//! `bedplate bench compare`: what changed between two runs, beyond their noise.
//!
//! Owns the judgement. A lane is judged by its ratio to the bare file of its own run where both runs have one, since
//! that cancels much of the machine's mood, else by its figure; and by the servers' time on cores. It has changed when
//! the two ranges of noise do not meet: all samples of a figure while they are few, else the middle half.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::{
    figure::{Better, Figure, Measure, show_ratio},
    report::{Lane, Report, table},
    workload::Workload,
};

/// Tell what changed between two runs, beyond their noise
///
/// A lane is compared by its ratio to the bare file of its own run where both runs have one, and by its servers' CPU per
/// request. It has changed when the noise of the two does not meet: from the least to the greatest sample, or from
/// quartile to quartile where there are seven rounds or more.
#[derive(Args, Debug)]
#[command(after_long_help = "Exits with 1 when a lane lost more than --fail-on, beyond the noise.

Examples:
  bedplate bench compare bench/results/before bench/results/after
  bedplate bench compare old.json new.json --fail-on 10%")]
pub struct CompareArgs {
    /// The earlier run: its JSON, or the directory that it was saved to
    old: PathBuf,
    /// The later run
    new: PathBuf,
    /// Exit with 1 when a lane lost more than this, such as 10%
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    fail_on: Option<f64>,
    /// How the result is printed
    #[arg(long, short, value_enum, default_value_t = crate::Format::Table)]
    output: crate::Format,
}

/// `10%` as 0.1.
fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>();
    match number {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent / 100.0),
        Ok(_) | Err(_) => Err(format!("{text:?} is no percentage; write 10%")),
    }
}

/// Which way a lane went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    Gain,
    Loss,
    /// Within the noise.
    None,
}

/// One figure of both runs.
#[derive(Debug, Serialize)]
struct Line {
    workload: String,
    target: String,
    measure: Measure,
    /// Whether the figures are ratios to the bare file.
    is_ratio: bool,
    old: Figure,
    new: Figure,
    /// Of the medians: above zero is better, whichever way the measure goes.
    gain: f64,
    change: Change,
}

#[derive(Debug, Serialize)]
struct Comparison {
    lines: Vec<Line>,
    /// Lanes, as `workload target`, that one of the runs does not have.
    only_old: Vec<String>,
    only_new: Vec<String>,
    /// What makes the runs hard to compare.
    notes: Vec<String>,
}

/// Compare and print. The exit code is 1 for a loss beyond `--fail-on`.
pub fn run(args: &CompareArgs) -> Result<u8> {
    let comparison = compare(&Report::read(&args.old)?, &Report::read(&args.new)?);
    crate::print(args.output, &comparison, || text(&comparison))?;
    Ok(u8::from(args.fail_on.is_some_and(|limit| comparison.loses_more_than(limit))))
}

fn compare(old: &Report, new: &Report) -> Comparison {
    let mut lines = Vec::new();
    for workload in &new.workloads {
        for lane in new.lanes_of(&workload.name) {
            if let Some(before) = old.lane(&lane.workload, &lane.target) {
                lines.extend(judge(workload, before, lane));
            }
        }
    }
    let names = |of: &Report, other: &Report| {
        let lanes = of.lanes.iter().filter(|lane| other.lane(&lane.workload, &lane.target).is_none());
        lanes.map(|lane| format!("{} {}", lane.workload, lane.target)).collect()
    };
    Comparison { lines, only_old: names(old, new), only_new: names(new, old), notes: notes(old, new) }
}

fn notes(old: &Report, new: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let mut differ = |what: &str, old: String, new: String| {
        if old != new {
            notes.push(format!("{what}: {old}, then {new}"));
        }
    };
    differ("CPU", old.machine.cpu.clone(), new.machine.cpu.clone());
    differ("CPUs", old.machine.cpus.to_string(), new.machine.cpus.to_string());
    differ("kernel", old.machine.kernel.clone(), new.machine.kernel.clone());
    differ("seconds of a lane", old.seconds.to_string(), new.seconds.to_string());
    differ("bytes of content", old.size_bytes.to_string(), new.size_bytes.to_string());
    let names = old.surroundings.keys().chain(new.surroundings.keys());
    let names: std::collections::BTreeSet<&String> = names.collect();
    for name in names {
        let of = |report: &Report| report.surroundings.get(name).cloned().unwrap_or_else(|| "-".to_owned());
        differ(name, of(old), of(new));
    }
    notes
}

fn judge(workload: &Workload, old: &Lane, new: &Lane) -> Vec<Line> {
    let (mut lines, target) = (Vec::new(), &new.target);
    let mut add = |measure: Measure, is_ratio: bool, old: Option<&Figure>, new: Option<&Figure>| {
        let (Some(old), Some(new)) = (old, new) else { return false };
        if old.median <= 0.0 || new.median <= 0.0 {
            return false;
        }
        let gain = match measure.better() {
            Better::Higher => new.median / old.median - 1.0,
            Better::Lower => old.median / new.median - 1.0,
        };
        let (was, is) = (old.noise(), new.noise());
        let change = match gain {
            _ if was.0 <= is.1 && is.0 <= was.1 => Change::None,
            gain if gain > 0.0 => Change::Gain,
            _ => Change::Loss,
        };
        lines.push(Line {
            workload: workload.name.clone(),
            target: target.clone(),
            measure,
            is_ratio,
            old: old.clone(),
            new: new.clone(),
            gain,
            change,
        });
        true
    };
    let primary = workload.primary();
    let ratio = |lane: &Lane| lane.ratios.get("bare").and_then(|ratios| ratios.get(&primary)).cloned();
    if !add(primary, true, ratio(old).as_ref(), ratio(new).as_ref()) {
        add(primary, false, old.figures.get(&primary), new.figures.get(&primary));
    }
    let cpu = Measure::ServerCpuUsPerOp;
    add(cpu, false, old.figures.get(&cpu), new.figures.get(&cpu));
    lines
}

impl Comparison {
    fn loses_more_than(&self, limit: f64) -> bool {
        // A loss of a tenth is a gain of -0.1 where more is better; where less is, a tenth more is as much.
        self.lines.iter().any(|line| line.change == Change::Loss && line.loss() > limit)
    }
}

impl Line {
    /// How much worse, as a part of what was.
    fn loss(&self) -> f64 {
        match self.measure.better() {
            Better::Higher => 1.0 - self.new.median / self.old.median,
            Better::Lower => self.new.median / self.old.median - 1.0,
        }
    }

    fn show(&self, figure: &Figure) -> String {
        if self.is_ratio {
            return table::show_spread(figure);
        }
        table::shown(Some(figure), self.measure)
    }
}

fn text(comparison: &Comparison) -> String {
    let mut parts = Vec::new();
    if !comparison.notes.is_empty() {
        let notes: Vec<String> = comparison.notes.iter().map(|note| format!("  {note}")).collect();
        parts.push(format!("The runs differ in more than the program:\n{}", notes.join("\n")));
    }
    let changed: Vec<&Line> = comparison.lines.iter().filter(|line| line.change != Change::None).collect();
    let same = comparison.lines.len() - changed.len();
    if !changed.is_empty() {
        let heads = ["", "workload", "target", "measure", "old", "new", "by"].map(str::to_owned).to_vec();
        let rows = changed.into_iter().map(|line| {
            let word = if line.change == Change::Gain { "better" } else { "WORSE" };
            let measure = if line.is_ratio { "ratio to bare" } else { line.measure.words() };
            vec![
                word.to_owned(),
                line.workload.clone(),
                line.target.clone(),
                measure.to_owned(),
                line.show(&line.old),
                line.show(&line.new),
                show_ratio(line.new.median / line.old.median),
            ]
        });
        parts.push(table::listing(heads, rows.collect()));
    }
    parts.push(match (comparison.lines.is_empty(), same) {
        (true, _) => "The runs have no lane in common.".to_owned(),
        (false, same) => {
            format!("{same} of {} figures are the same within the noise.", comparison.lines.len())
        }
    });
    for (lanes, which) in [(&comparison.only_old, "old"), (&comparison.only_new, "new")] {
        if !lanes.is_empty() {
            parts.push(format!("Only in the {which} run: {}", lanes.join(", ")));
        }
    }
    parts.join("\n\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::fixture;

    /// The fixture with these samples of a lane in place of its own.
    fn with(target: &str, measure: Measure, samples: &[f64]) -> Report {
        let mut report = fixture();
        for lane in &mut report.lanes {
            if lane.workload == "rr4k-q32" && lane.target == target {
                lane.figures.insert(measure, Figure::of(samples.to_vec()));
                lane.ratios = BTreeMap::new();
            }
        }
        report
    }

    fn change(old: &[f64], new: &[f64], measure: Measure) -> (Change, bool) {
        let target = "fuse-classic";
        let comparison = compare(&with(target, measure, old), &with(target, measure, new));
        let mut lines = comparison.lines.iter().filter(|line| line.workload == "rr4k-q32");
        let line = lines.find(|line| line.measure == measure && line.target == target);
        (line.unwrap().change, comparison.loses_more_than(0.1))
    }

    #[test]
    fn a_run_compared_with_itself_has_no_change() {
        let comparison = compare(&fixture(), &fixture());
        assert!(!comparison.lines.is_empty() && comparison.notes.is_empty());
        assert!(comparison.lines.iter().all(|line| line.change == Change::None));
        assert!(text(&comparison).contains("are the same within the noise"));
    }

    #[test]
    fn what_lies_within_the_noise_is_no_change_however_the_medians_differ() {
        let found = change(&[100.0, 120.0, 60.0], &[70.0, 65.0, 101.0], Measure::Iops);
        assert_eq!(found, (Change::None, false));
    }

    #[test]
    fn a_loss_beyond_the_noise_and_the_limit_fails_and_a_smaller_one_does_not() {
        assert_eq!(change(&[100.0, 101.0, 99.0], &[80.0, 81.0, 79.0], Measure::Iops), (Change::Loss, true));
        assert_eq!(change(&[100.0, 101.0, 99.0], &[95.0, 96.0, 94.0], Measure::Iops), (Change::Loss, false));
    }

    #[test]
    fn more_time_on_cores_is_a_loss() {
        let cpu = Measure::ServerCpuUsPerOp;
        assert_eq!(change(&[2.0, 2.1, 1.9], &[3.0, 3.1, 2.9], cpu), (Change::Loss, true));
        assert_eq!(change(&[3.0, 3.1, 2.9], &[2.0, 2.1, 1.9], cpu), (Change::Gain, false));
    }

    #[test]
    fn a_lane_is_judged_by_its_ratio_to_the_bare_file_where_both_have_one() {
        let comparison = compare(&fixture(), &fixture());
        let line = comparison.lines.iter().find(|line| line.target == "fuse-classic").unwrap();
        assert!(line.is_ratio && line.measure == Measure::Iops);
    }

    #[test]
    fn runs_on_different_machines_are_told_apart() {
        let mut other = fixture();
        other.machine.kernel = "9.9".to_owned();
        other.lanes.retain(|lane| lane.target != "bare");
        let comparison = compare(&fixture(), &other);
        assert!(text(&comparison).contains("kernel: 6.18.0, then 9.9"));
        assert!(text(&comparison).contains("Only in the old run: rr4k-q1 bare"));
    }

    #[test]
    fn a_percentage_is_a_number_with_or_without_its_sign() {
        assert_eq!(parse_percent("10%"), Ok(0.1));
        assert_eq!(parse_percent("2.5"), Ok(0.025));
        assert!(parse_percent("-3%").is_err() && parse_percent("much").is_err());
    }
}
