//! A report as one page that needs nothing else.
//!
//! Owns the page: machine, aims, a table and the ratios of each workload, throughput against depth, percentiles of
//! latency, targets, what is missing. No script and nothing from elsewhere; it follows the reader's light or dark and
//! prints in light.

use std::fmt::Write;

use anyhow::Result;
use bedplate_inspect::{
    page::{escaped, head},
    size,
};

use super::{
    Lane, Report,
    plot::{self, Hue, Row, Series},
    table::{grid, short_load, show_spread, verdict, yardsticks},
};
use crate::{
    aim::Verdict,
    figure::{Figure, Measure, PERCENTILES},
    workload::{Work, Workload},
};

const STYLE: &str = "body{max-width:72rem}svg{max-width:48rem;color:inherit}svg text{fill:currentColor}\
svg [stroke=\"#6E7781\"]{stroke:currentColor}th{white-space:normal}td{font-variant-numeric:tabular-nums}\
.table{overflow-x:auto}.met{color:#1a7f37}.missed{color:#b00020;font-weight:600}.note{opacity:.75}\
figure{margin:1rem 0;break-inside:avoid}figcaption{font-size:.9rem}details{margin:.4rem 0}\
h2,h3{break-after:avoid}\
@media screen and (prefers-color-scheme:dark){.met{color:#57c26e}.missed{color:#ff7a8a}}\
@media print{body{max-width:none;margin:0;font-size:11px}.table{overflow:visible}}";

/// The whole page.
pub fn page(report: &Report) -> Result<String> {
    let mut page = head(&format!("bedplate bench, {}", report.began), STYLE);
    summary(&mut page, report);
    aims(&mut page, report)?;
    page.push_str("<h2>Workloads</h2>\n");
    for workload in &report.workloads {
        if report.lanes_of(&workload.name).next().is_some() {
            one(&mut page, report, workload)?;
        }
    }
    depths(&mut page, report)?;
    latencies(&mut page, report)?;
    targets(&mut page, report);
    page.push_str("</body></html>\n");
    Ok(page)
}

// Writing to a string does not fail: the results of `write!` are dropped throughout.

fn summary(page: &mut String, report: &Report) {
    let machine = &report.machine;
    let mut rows = vec![
        ("Machine", format!("{} CPUs, {}, Linux {}", machine.cpus, machine.cpu, machine.kernel)),
        (
            "Load average",
            format!(
                "{} before, {} after",
                short_load(&machine.load_average),
                short_load(&report.load_average_after)
            ),
        ),
        (
            "Rounds",
            format!(
                "{} of {} s a lane, {} of content; interleaved, each beginning with another target",
                report.rounds,
                report.seconds,
                size::show(report.size_bytes)
            ),
        ),
        ("Bedplate", machine.version.clone()),
    ];
    rows.extend(report.surroundings.iter().map(|(name, value)| (name.as_str(), value.clone())));
    page.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(page, "<tr><th>{}</th><td>{}</td></tr>", escaped(name), escaped(&value));
    }
    page.push_str(
        "</table>\n<p class=\"note\">Figures are medians with the least and the greatest sample; ratios are made of \
         samples of the same round.</p>\n",
    );
}

fn aims(page: &mut String, report: &Report) -> Result<()> {
    if report.aims.is_empty() {
        return Ok(());
    }
    page.push_str("<h2>Aims</h2>\n<div class=\"table\"><table><tr><th></th><th>lane</th><th>aim</th><th>ratio</th></tr>");
    for aim in &report.aims {
        let class = match aim.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "note",
        };
        let ratio = aim.ratio.as_ref().map_or_else(|| "-".to_owned(), show_spread);
        let _ = write!(
            page,
            "<tr><td class=\"{class}\">{}</td><td>{}</td><td>{}</td><td>{ratio}</td></tr>",
            verdict(aim.verdict),
            escaped(&aim.words()),
            escaped(&aim.bound())
        );
    }
    page.push_str("</table></div>\n");
    let rows: Vec<Row> = report
        .aims
        .iter()
        .filter_map(|aim| {
            let ratio = aim.ratio.as_ref()?;
            let part = Figure::of(ratio.samples.iter().map(|sample| sample / aim.aim).collect());
            Some(row(aim.words(), hue_of(report, &aim.target), &part))
        })
        .collect();
    let caption = "Each ratio as a part of its aim: right of the line is met, where more is better; for time on \
                   cores left of it. Dot: median; thick: quartiles; thin: extremes.";
    figure(page, plot::ratios(&rows, "ratio / aim", 1.0)?, caption, "");
    Ok(())
}

fn one(page: &mut String, report: &Report, workload: &Workload) -> Result<()> {
    let _ = writeln!(page, "<h3>{}</h3><p>{}</p>", escaped(&workload.name), escaped(&workload.about));
    let (heads, rows) = grid(report, workload);
    page.push_str("<div class=\"table\"><table><tr>");
    heads.iter().for_each(|head| {
        let _ = write!(page, "<th>{}</th>", escaped(head));
    });
    page.push_str("</tr>");
    for row in rows {
        page.push_str("<tr>");
        row.iter().for_each(|cell| {
            let _ = write!(page, "<td>{}</td>", escaped(cell));
        });
        page.push_str("</tr>");
    }
    page.push_str("</table></div>\n");
    for yardstick in yardsticks(report, workload) {
        let rows: Vec<Row> = report
            .lanes_of(&workload.name)
            .filter_map(|lane| {
                let ratio = lane.ratios.get(yardstick)?.get(&workload.primary())?;
                Some(row(lane.target.clone(), hue_of(report, &lane.target), ratio))
            })
            .collect();
        if rows.is_empty() {
            continue;
        }
        let svg = plot::ratios(&rows, &format!("ratio to {yardstick}"), 1.0)?;
        let _ = write!(page, "<details{}>", if yardstick == "bare" { " open" } else { "" });
        let _ = write!(page, "<summary>ratios to {}</summary>", escaped(yardstick));
        figure(page, svg, "", "");
        page.push_str("</details>\n");
    }
    Ok(())
}

/// Workloads that differ in their depth only, as one plot.
fn depths(page: &mut String, report: &Report) -> Result<()> {
    let shape = |workload: &Workload| match workload.work {
        Work::Requests { pattern, block, clients, .. } => {
            Some((pattern as u8, block, clients, workload.content, workload.place))
        }
        Work::Life(_) => None,
    };
    let mut shapes: Vec<_> = report.workloads.iter().filter_map(shape).collect();
    shapes.dedup();
    page.push_str("<h2>Throughput against depth</h2>\n");
    let before = page.len();
    for wanted in shapes {
        let group: Vec<(&Workload, u32)> = report
            .workloads
            .iter()
            .filter(|workload| shape(workload) == Some(wanted))
            .filter_map(|workload| match workload.work {
                Work::Requests { depth, .. } => Some((workload, depth)),
                Work::Life(_) => None,
            })
            .collect();
        let Some((first, _)) = group.first().filter(|_| group.len() > 1) else { continue };
        // Depths are powers of two or nearly so: as far apart as their logarithms.
        let at = |depth: u32| f64::from(depth).log2();
        let places: Vec<(f64, String)> =
            group.iter().map(|(_, depth)| (at(*depth), depth.to_string())).collect();
        let measure = first.primary();
        let series = series_of(report, |target| {
            let points = group.iter().filter_map(|(workload, depth)| {
                let figure = report.lane(&workload.name, target)?.figures.get(&measure)?;
                Some((at(*depth), [figure.median, figure.min, figure.max]))
            });
            points.collect()
        });
        let svg = plot::lines(&series, &places, "depth", measure.words(), |value| measure.show(value))?;
        let about = first.about.replacen(", depth 1", "", 1);
        figure(page, svg, &about, &legend(&series));
    }
    if page.len() == before {
        page.push_str("<p class=\"note\">No workload was measured at several depths.</p>\n");
    }
    Ok(())
}

fn latencies(page: &mut String, report: &Report) -> Result<()> {
    page.push_str("<h2>Latency</h2>\n");
    let places: Vec<(f64, String)> =
        PERCENTILES.iter().zip(0u32..).map(|((_, name), at)| (f64::from(at), (*name).to_owned())).collect();
    for workload in &report.workloads {
        let series = series_of(report, |target| {
            let figures = report.lane(&workload.name, target).map(|lane: &Lane| &lane.figures);
            let points = PERCENTILES.iter().zip(0u32..).filter_map(|((measure, _), at)| {
                let figure = figures?.get(measure)?;
                Some((f64::from(at), [figure.median, figure.min, figure.max]))
            });
            points.collect()
        });
        let show = |value| Measure::LatencyP50Us.show(value);
        let svg = plot::lines(&series, &places, "percentile", "latency", show)?;
        let caption = format!("{}: {}", workload.name, workload.about);
        figure(page, svg, &caption, &legend(&series));
    }
    Ok(())
}

fn targets(page: &mut String, report: &Report) {
    page.push_str("<h2>Targets</h2>\n<div class=\"table\"><table><tr><th>name</th><th>what it is</th><th>version</th><th>options</th><th>mount</th></tr>");
    for target in &report.targets {
        page.push_str("<tr>");
        let cells = [
            &target.name,
            &target.about,
            target.version.as_deref().unwrap_or("-"),
            &target.options,
            target.mount.as_deref().unwrap_or("-"),
        ];
        for cell in cells {
            let _ = write!(page, "<td>{}</td>", escaped(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>\n");
    if report.missing.is_empty() {
        return;
    }
    page.push_str("<h2>Not measured</h2>\n<div class=\"table\"><table><tr><th>target</th><th>workload</th><th>why</th></tr>");
    for missing in &report.missing {
        let _ = write!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escaped(&missing.target),
            escaped(missing.workload.as_deref().unwrap_or("all")),
            escaped(&missing.why)
        );
    }
    page.push_str("</table></div>\n");
}

/// A line for each target that has at least one point.
fn series_of(report: &Report, points: impl Fn(&str) -> Vec<(f64, [f64; 3])>) -> Vec<Series> {
    let series = report.targets.iter().map(|target| Series {
        name: target.name.clone(),
        hue: hue_of(report, &target.name),
        points: points(&target.name),
    });
    series.filter(|series| !series.points.is_empty()).collect()
}

fn legend(series: &[Series]) -> String {
    let mut legend = String::from("<p class=\"key\">");
    for line in series {
        let (colour, name) = (line.hue.html(), escaped(&line.name));
        let _ = write!(legend, "<span><b style=\"color:{colour}\">&#9632;</b> {name}</span>");
    }
    legend.push_str("</p>");
    legend
}

fn figure(page: &mut String, svg: Option<String>, caption: &str, legend: &str) {
    if let Some(svg) = svg {
        // Fixed sizes would not shrink with the page.
        let svg = svg.replacen("<svg width=\"760\"", "<svg role=\"img\"", 1);
        let _ = writeln!(page, "<figure>{svg}{legend}<figcaption>{}</figcaption></figure>", escaped(caption));
    }
}

fn row(name: String, hue: Hue, ratio: &Figure) -> Row {
    Row {
        name,
        hue,
        median: ratio.median,
        quartiles: (ratio.lower, ratio.upper),
        extremes: (ratio.min, ratio.max),
    }
}

/// The same for a target on the whole page.
fn hue_of(report: &Report, target: &str) -> Hue {
    let Some(place) = report.targets.iter().position(|known| known.name == target) else { return Hue::Bare };
    let before = report.targets.iter().take(place);
    match report.targets.get(place) {
        Some(found) if found.name == "bare" => Hue::Bare,
        Some(found) if found.is_yardstick => {
            Hue::Yardstick(before.filter(|other| other.is_yardstick && other.name != "bare").count())
        }
        _ => Hue::Measured(before.filter(|other| !other.is_yardstick).count()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn the_page_has_plots_tables_and_nothing_from_elsewhere() {
        let page = page(&fixture()).unwrap();
        for part in [
            "<h2>Aims</h2>",
            "<svg",
            "rr4k-q32",
            "ratio to bare",
            "p99.9",
            "prefers-color-scheme:dark",
            "@media print",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for absent in ["<script", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(absent), "{absent}");
        }
        // The one address is the name space of SVG.
        assert!(
            page.match_indices("http").all(|(at, _)| page[at..].starts_with("http://www.w3.org/2000/svg"))
        );
    }

    #[test]
    fn names_of_targets_stay_text() {
        let mut report = fixture();
        for target in &mut report.targets {
            if target.name == "bare" {
                target.about = "<script>alert(1)</script>".to_owned();
            }
        }
        assert!(!page(&report).unwrap().contains("<script"));
    }
}
