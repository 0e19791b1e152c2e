//! A report for a terminal.
//!
//! Owns the tables: one for each workload with a line for each target, the aims, and what is missing. A figure is its
//! median with the least and the greatest sample; a ratio is of the workload's own measure.

use comfy_table::{CellAlignment, Table, presets};

use super::{Lane, Report};
use crate::{
    aim::Verdict,
    figure::{Figure, Measure, show_ratio},
    workload::Workload,
};

/// Measures beside a workload's own, where they were taken.
const COLUMNS: [Measure; 5] = [
    Measure::LatencyP50Us,
    Measure::LatencyP99Us,
    Measure::ClientCpuUsPerOp,
    Measure::ServerCpuUsPerOp,
    Measure::DiskReadRatio,
];

/// The whole report.
pub fn text(report: &Report) -> String {
    let mut parts = vec![head(report)];
    for workload in &report.workloads {
        if report.lanes_of(&workload.name).next().is_some() {
            parts.push(format!("{}: {}\n{}", workload.name, workload.about, lanes(report, workload)));
        }
    }
    if !report.aims.is_empty() {
        parts.push(format!("Aims\n{}", aims(report)));
    }
    if !report.missing.is_empty() {
        parts.push(format!("Not measured\n{}", missing(report)));
    }
    parts.join("\n\n")
}

fn head(report: &Report) -> String {
    let machine = &report.machine;
    format!(
        "{} CPUs ({}), Linux {}; load average {} before, {} after\n{} rounds of {} s, {}; medians (least..greatest); \
         ratios are of the same round; p50, p99: latency; CPU: time on cores of one request",
        machine.cpus,
        machine.cpu,
        machine.kernel,
        short_load(&machine.load_average),
        short_load(&report.load_average_after),
        report.rounds,
        report.seconds,
        bedplate_inspect::size::show(report.size_bytes),
    )
}

/// The three averages of `/proc/loadavg`.
pub fn short_load(load: &str) -> String {
    load.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The yardsticks that a workload's lanes are told as ratios to.
pub fn yardsticks<'a>(report: &'a Report, workload: &'a Workload) -> Vec<&'a str> {
    let targets = report.targets.iter().filter(|target| target.is_yardstick);
    targets
        .map(|target| target.name.as_str())
        .filter(|name| report.lane(&workload.name, name).is_some())
        .collect()
}

/// The heads and the cells of a workload's table.
pub fn grid(report: &Report, workload: &Workload) -> (Vec<String>, Vec<Vec<String>>) {
    let primary = workload.primary();
    let yardsticks = yardsticks(report, workload);
    let columns: Vec<Measure> = COLUMNS
        .into_iter()
        .filter(|measure| report.lanes_of(&workload.name).any(|lane| lane.figures.contains_key(measure)))
        .collect();
    let mut heads = vec!["target".to_owned(), primary.words().to_owned()];
    heads.extend(yardsticks.iter().map(|name| format!("/ {name}")));
    heads.extend(columns.iter().map(|measure| measure.words().to_owned()));
    let row = |lane: &Lane| {
        let mut row = vec![lane.target.clone(), shown(lane.figures.get(&primary), primary)];
        row.extend(yardsticks.iter().map(|name| {
            let ratio = lane.ratios.get(*name).and_then(|ratios| ratios.get(&primary));
            ratio.map_or_else(none, |ratio| show_ratio(ratio.median))
        }));
        row.extend(columns.iter().map(|measure| {
            lane.figures.get(measure).map_or_else(none, |figure| measure.show(figure.median))
        }));
        row
    };
    (heads, report.lanes_of(&workload.name).map(row).collect())
}

fn lanes(report: &Report, workload: &Workload) -> String {
    let (heads, rows) = grid(report, workload);
    listing(heads, rows)
}

fn aims(report: &Report) -> String {
    let heads = ["", "lane", "aim", "ratio"].map(str::to_owned).to_vec();
    let rows = report.aims.iter().map(|aim| {
        let ratio = aim.ratio.as_ref().map_or_else(none, show_spread);
        vec![verdict(aim.verdict).to_owned(), aim.words(), aim.bound(), ratio]
    });
    listing(heads, rows.collect())
}

fn missing(report: &Report) -> String {
    let heads = ["target", "workload", "why"].map(str::to_owned).to_vec();
    let rows = report.missing.iter().map(|missing| {
        let workload = missing.workload.clone().unwrap_or_else(|| "all".to_owned());
        vec![missing.target.clone(), workload, missing.why.clone()]
    });
    listing(heads, rows.collect())
}

pub const fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Met => "met",
        Verdict::Missed => "MISSED",
        Verdict::NotMeasured => "not measured",
    }
}

/// A figure with its extremes.
pub fn shown(figure: Option<&Figure>, measure: Measure) -> String {
    figure.map_or_else(none, |figure| {
        let show = |value| measure.show(value);
        format!("{} ({}..{})", show(figure.median), show(figure.min), show(figure.max))
    })
}

/// A ratio with its extremes.
pub fn show_spread(ratio: &Figure) -> String {
    format!("{} ({}..{})", show_ratio(ratio.median), show_ratio(ratio.min), show_ratio(ratio.max))
}

fn none() -> String {
    "-".to_owned()
}

/// Columns aligned by blanks alone, numbers to the right.
pub fn listing(heads: Vec<String>, rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(heads);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2)).set_cell_alignment(CellAlignment::Left);
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn the_terminal_shows_medians_with_their_spread_ratios_aims_and_what_is_missing() {
        let text = text(&fixture());
        for part in [
            "120k (110k..130k)",
            "0.40x",
            "6.00x",
            "met",
            "not measured",
            "fuse-uring",
            "echo Y",
            "load average 0.10",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }
}
