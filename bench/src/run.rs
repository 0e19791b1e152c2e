//! `bedplate bench run`: which lanes, in which order, until when; and what is made of their samples.
//!
//! Owns the command line of a run, its plan and its rounds. In a round every lane gives one sample; the targets of a
//! workload follow one another, so that they meet the same mood of the machine, and each round begins with another
//! target. A lane that fails is not tried again, and its reason is reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bedplate_inspect::size;
use clap::Args;

use crate::{
    Failure, Format, aim,
    content::{Medium, free_bytes, mount_of, write_new},
    fio, interrupt,
    machine::{self, Machine},
    report::{self, Missing, Report, SCHEMA, Samples, TargetInfo, html, table},
    target::{
        Kind, Transport,
        field::{Field, Places, medium},
        kinds,
    },
    workload::{self, Content, Suite, Work, Workload},
};

/// A quick run begins no round that would end after this.
const QUICK_WITHIN: Duration = Duration::from_secs(165);
/// Quick, and otherwise.
const ROUNDS: [u64; 2] = [5, 7];
const SECONDS: [u32; 2] = [1, 2];
const SIZES: [u64; 2] = [256 << 20, 1 << 30];
const STORMS: [u64; 2] = [8, 50];
/// A node leaves this much of its disk to volumes.
const NODE_RESERVE: u64 = 2 << 30;

/// Measure workloads on Bedplate, the bare file and the peers that are installed, in interleaved rounds
///
/// Starts nodes, peers and loads of its own below --dir and --memory-dir, and removes them at the end. Mounts and loop
/// devices need root, the loads need fio. Peers that are installed take part: qemu-storage-daemon, nbdkit, and the
/// libraries qcow2-rs and imago where `bedplate-bench-peers` was built. Use a release build on a quiet machine.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  bedplate bench run --quick
  bedplate bench run read --rounds 9 --out bench/results/today
  bedplate bench run disk --dir /srv/bedplate --only bare,fuse-uring,qsd-fuse
  bedplate bench run read --target /dev/nvme1n1 --target 'nbd://127.0.0.1/export'
  bedplate bench run --serve '--executor blocking' --out blocking
  bedplate bench run --list")]
pub struct RunArgs {
    /// Which workloads
    #[arg(value_enum, default_value_t = Suite::Aims)]
    suite: Suite,
    /// Within three minutes on two cores: short samples, small content, as many rounds as fit
    #[arg(long)]
    quick: bool,
    /// Rounds; a sample of every lane each [default: 7, at most 5 when quick]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Seconds of one sample [default: 2, quick: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: Option<u32>,
    /// Bytes of the base and of each volume, such as 4G [default: 1G, quick: 256M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_size)]
    size: Option<u64>,
    /// Volumes of the boot storm [default: 50, quick: 8]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..=500))]
    volumes: Option<u64>,
    /// Directory on the disk to measure; a temporary one under it is used and removed
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Directory of a memory file system
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// Measure this, too: a block device, a file, or an NBD address; may be repeated
    #[arg(long, value_name = "PATH_OR_NBD_URL", value_parser = Kind::named)]
    target: Vec<Kind>,
    /// Also write to what --target names, which destroys what it holds
    #[arg(long)]
    target_writes: bool,
    /// Further flags of the nodes that are started, such as '--executor blocking'
    #[arg(
        long,
        value_name = "FLAGS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    serve: String,
    /// Only these targets, separated by commas
    #[arg(long, value_name = "TARGETS", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these workloads of the suite, separated by commas
    #[arg(long, value_name = "WORKLOADS", value_delimiter = ',')]
    workload: Vec<String>,
    /// Directory for report.json and report.html [default: bedplate-bench-TIME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Show the workloads and targets, and measure nothing
    #[arg(long)]
    list: bool,
    /// How the report is printed
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// What a run does.
struct Plan {
    workloads: Vec<Workload>,
    targets: Vec<Kind>,
    /// Places in the two lists above.
    lanes: BTreeSet<(usize, usize)>,
    best: Transport,
}

impl RunArgs {
    /// One of two defaults.
    fn default_of<T: Copy>(&self, [quick, otherwise]: [T; 2]) -> T {
        if self.quick { quick } else { otherwise }
    }

    fn plan(&self, best: Transport) -> Result<Plan, Failure> {
        let storm = self.volumes.unwrap_or_else(|| self.default_of(STORMS));
        let table = workload::table(storm);
        let mut targets = kinds();
        targets.extend(self.target.clone());
        for name in &self.only {
            check_name(name, targets.iter().map(Kind::name), "target")?;
        }
        for name in &self.workload {
            check_name(name, table.iter().map(|workload| workload.name.as_str()), "workload")?;
        }
        let only = |kind: &Kind| self.only.is_empty() || self.only.iter().any(|name| name == kind.name());
        targets.retain(|kind| matches!(kind, Kind::User(_)) || only(kind));
        let named: BTreeSet<(&str, &str)> = aim::AIMS.iter().flat_map(|aim| aim.lanes(best)).collect();
        let of_suite = |workload: &Workload| {
            let is_in = match self.suite {
                Suite::All => true,
                Suite::Aims => named.iter().any(|(name, _)| *name == workload.name),
                suite => workload.suite == suite,
            };
            is_in && (self.workload.is_empty() || self.workload.contains(&workload.name))
        };
        let workloads: Vec<Workload> = table.into_iter().filter(of_suite).collect();
        let mut lanes = BTreeSet::new();
        for (row, workload) in workloads.iter().enumerate() {
            for (column, kind) in targets.iter().enumerate() {
                let is_named = match kind {
                    Kind::Bare | Kind::User(_) => true,
                    kind => named.contains(&(workload.name.as_str(), kind.name())),
                };
                if kind.takes(workload) && (self.suite != Suite::Aims || is_named || !self.only.is_empty()) {
                    lanes.insert((row, column));
                }
            }
        }
        if lanes.is_empty() {
            return Err(Failure::Usage("no target takes any of these workloads".to_owned()));
        }
        Ok(Plan { workloads, targets, lanes, best })
    }
}

fn check_name<'a>(
    name: &str,
    known: impl Iterator<Item = &'a str> + Clone,
    what: &str,
) -> Result<(), Failure> {
    if known.clone().any(|known| known == name) {
        return Ok(());
    }
    let known: Vec<&str> = known.collect();
    Err(Failure::Usage(format!("{what} {name:?} is not known; there are {}", known.join(", "))))
}

/// Measure, save and print.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    if args.list {
        return Ok(list(args)?);
    }
    let fio_version = fio::version()?;
    let len = args.size.unwrap_or_else(|| args.default_of(SIZES)).next_multiple_of(1 << 20);
    let places = Places {
        disk: args.dir.clone(),
        memory: args.memory_dir.clone(),
        len,
        may_write_user_targets: args.target_writes,
    };
    let mut field = Field::new(places, &args.serve)?;
    let plan = args.plan(field.best_transport())?;
    check_room(&plan, args, len)?;
    let began = jiff::Timestamp::now();
    // Before anything is measured: hours of work are not lost to a directory that cannot be written.
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| format!("bedplate-bench-{}", began.strftime("%Y%m%dT%H%M%S")).into());
    fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
    if cfg!(debug_assertions) {
        eprintln!("this is a debug build: its figures mean nothing");
    }
    interrupt::listen()?;
    let machine = Machine::look();
    let run = Rounds { args, plan: &plan, seconds: args.seconds.unwrap_or_else(|| args.default_of(SECONDS)) };
    let (samples, missing, rounds) = run.measure(&mut field)?;
    let load_average_after = machine::load_average();
    let used = |column: usize| plan.lanes.iter().any(|(_, of)| *of == column);
    let targets = plan.targets.iter().enumerate().filter(|(column, _)| used(*column));
    let targets: Vec<TargetInfo> = targets.map(|(_, kind)| field.describe(kind)).collect();
    let surroundings = surroundings(args, fio_version);
    // Servers end before the report is made: what fails there leaves none behind.
    drop(field);
    let lanes = samples.lanes(&plan.workloads, &targets);
    let aims = report::aims(&lanes, &plan.workloads, plan.best);
    let report = Report {
        schema: SCHEMA,
        began: began.round(jiff::Unit::Second).unwrap_or(began).to_string(),
        suite: args.suite,
        rounds,
        seconds: run.seconds,
        size_bytes: len,
        machine,
        load_average_after,
        surroundings,
        targets,
        workloads: plan.workloads,
        lanes,
        missing,
        aims,
    };
    let json = serde_json::to_string_pretty(&report).context("the report as JSON")?;
    write_new(&out.join(report::JSON), &format!("{json}\n"))?;
    write_new(&out.join(report::HTML), &html::page(&report)?)?;
    crate::print(args.output, &report, || table::text(&report))?;
    eprintln!("saved as {} and {}", out.join(report::JSON).display(), out.join(report::HTML).display());
    Ok(interrupt::check().context("the report has what was measured until then")?)
}

fn list(args: &RunArgs) -> Result<()> {
    let storm = args.volumes.unwrap_or_else(|| args.default_of(STORMS));
    let workloads = workload::table(storm).into_iter();
    let heads = |of: &str| vec![of.to_owned(), "what it is".to_owned()];
    let targets = kinds().into_iter().map(|kind| vec![kind.name().to_owned(), kind.about().to_owned()]);
    let text = [
        table::listing(
            heads("workload"),
            workloads.map(|workload| vec![workload.name, workload.about]).collect(),
        ),
        table::listing(heads("target"), targets.collect()),
    ];
    crate::print(Format::Table, &(), || text.join("\n\n"))
}

/// The rounds of a run.
struct Rounds<'a> {
    args: &'a RunArgs,
    plan: &'a Plan,
    seconds: u32,
}

impl Rounds<'_> {
    /// The samples, what is missing, and how many rounds were begun.
    fn measure(&self, field: &mut Field) -> Result<(Samples, Vec<Missing>, u64)> {
        let (mut samples, mut failed) = (Samples::default(), BTreeMap::new());
        let (start, mut longest) = (Instant::now(), Duration::ZERO);
        let wanted = self.args.rounds.unwrap_or_else(|| self.args.default_of(ROUNDS));
        let mut begun = 0;
        while begun < wanted {
            if self.args.quick && begun > 0 && start.elapsed() + longest > QUICK_WITHIN {
                eprintln!("another round does not fit into three minutes");
                break;
            }
            let round = Instant::now();
            let is_whole = self.round(field, begun, &mut samples, &mut failed)?;
            begun += 1;
            // The first one makes what the others find.
            longest = if begun == 1 { round.elapsed() } else { longest.min(round.elapsed()) };
            if !is_whole {
                break;
            }
        }
        if samples.is_empty() {
            let why = failed.into_values().next();
            bail!("nothing could be measured: {}", why.unwrap_or_else(|| "interrupted".to_owned()));
        }
        Ok((samples, self.missing(failed), begun))
    }

    /// One sample of every lane that still runs. Whether it came to its end.
    fn round(
        &self,
        field: &mut Field,
        round: u64,
        samples: &mut Samples,
        failed: &mut BTreeMap<(usize, usize), String>,
    ) -> Result<bool> {
        for (row, workload) in self.plan.workloads.iter().enumerate() {
            let lanes = self.plan.lanes.range((row, 0)..(row + 1, 0)).copied();
            let mut lanes: Vec<_> = lanes.filter(|lane| !failed.contains_key(lane)).collect();
            let turn = usize::try_from(round)? % lanes.len().max(1);
            lanes.rotate_left(turn);
            eprintln!("round {}, {}", round + 1, workload.name);
            for lane in lanes {
                let kind = self.plan.targets.get(lane.1).context("a target of the plan")?;
                let sample = field.sample(kind, workload, self.seconds, round);
                if interrupt::check().is_err() {
                    // What was taken so far is a report, too.
                    return Ok(false);
                }
                match sample {
                    Ok(sample) => samples.add(&workload.name, kind.name(), sample),
                    Err(error) => {
                        eprintln!("  {}: {error:#}", kind.name());
                        failed.insert(lane, format!("{error:#}"));
                    }
                }
            }
        }
        Ok(true)
    }

    /// One line for a target that failed everywhere for one reason, else one for each lane.
    fn missing(&self, failed: BTreeMap<(usize, usize), String>) -> Vec<Missing> {
        let mut missing = Vec::new();
        for (column, kind) in self.plan.targets.iter().enumerate() {
            let of: Vec<(usize, &String)> = failed
                .iter()
                .filter(|((_, at), _)| *at == column)
                .map(|((row, _), why)| (*row, why))
                .collect();
            let lanes = self.plan.lanes.iter().filter(|(_, at)| *at == column).count();
            let reasons: BTreeSet<&String> = of.iter().map(|(_, why)| *why).collect();
            let target = kind.name().to_owned();
            if let (Some(why), true, 1) = (of.first(), of.len() == lanes, reasons.len()) {
                missing.push(Missing { target, workload: None, why: why.1.clone() });
                continue;
            }
            missing.extend(of.into_iter().filter_map(|(row, why)| {
                let workload = self.plan.workloads.get(row)?.name.clone();
                Some(Missing { target: target.clone(), workload: Some(workload), why: why.clone() })
            }));
        }
        missing
    }
}

/// Fail early where content would not fit.
fn check_room(plan: &Plan, args: &RunArgs, len: u64) -> Result<()> {
    for (place, dir) in [(Medium::Disk, &args.dir), (Medium::Memory, &args.memory_dir)] {
        ensure!(dir.is_dir(), "{} is no directory", dir.display());
        let needed = room_needed(plan, place, len);
        let free = free_bytes(dir)?;
        ensure!(
            needed <= free,
            "{} has {} left, and this run takes up to {} there: name another directory, a smaller --size or fewer \
             targets with --only",
            dir.display(),
            size::show(free),
            size::show(needed)
        );
    }
    Ok(())
}

/// The most that a run takes of one medium.
fn room_needed(plan: &Plan, place: Medium, len: u64) -> u64 {
    let (mut copies, mut nodes) = (BTreeSet::new(), BTreeSet::new());
    for (row, column) in &plan.lanes {
        let (Some(workload), Some(kind)) = (plan.workloads.get(*row), plan.targets.get(*column)) else {
            continue;
        };
        if medium(workload) != place {
            continue;
        }
        let writes = matches!(workload.work, Work::Requests { .. })
            && matches!(workload.content, Content::Own | Content::Fresh);
        if writes && !matches!(kind, Kind::User(_)) {
            copies.insert((kind.name(), workload.content));
        }
        if matches!(kind, Kind::Library(_)) {
            copies.insert(("library", Content::Base));
        }
        if let Kind::Fuse(transport) | Kind::Loop(transport) = kind {
            nodes.insert(*transport);
        }
        if matches!(kind, Kind::Passthrough) {
            nodes.insert(Transport::Classic);
        }
    }
    let count = |set: usize| u64::try_from(set).unwrap_or(u64::MAX);
    let reserve = if nodes.is_empty() { 0 } else { NODE_RESERVE };
    (1 + count(copies.len()) + count(nodes.len())).saturating_mul(len).saturating_add(reserve)
}

/// What else decides figures.
fn surroundings(args: &RunArgs, fio_version: String) -> BTreeMap<String, String> {
    let mut found = BTreeMap::from([("fio".to_owned(), fio_version)]);
    found.insert("memory".to_owned(), size::show(machine::memory_total_bytes()));
    for (name, path) in [
        ("fuse.enable_uring", "/sys/module/fuse/parameters/enable_uring"),
        ("haltpoll.guest_halt_poll_ns", "/sys/module/haltpoll/parameters/guest_halt_poll_ns"),
        ("cpuidle", "/sys/devices/system/cpu/cpuidle/current_driver"),
        ("cpufreq", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        ("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource"),
    ] {
        let value = machine::line(path);
        if !value.is_empty() {
            found.insert(name.to_owned(), value);
        }
    }
    let mount = |path: &Path| mount_of(path).unwrap_or_else(|| "unknown".to_owned());
    found.insert("disk".to_owned(), mount(&args.dir));
    found.insert("memory file system".to_owned(), mount(&args.memory_dir));
    let build = if cfg!(debug_assertions) { "debug: figures of this run mean nothing" } else { "release" };
    found.insert("build".to_owned(), build.to_owned());
    found
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: RunArgs,
    }

    fn plan(line: &str) -> Result<Plan, Failure> {
        let words = std::iter::once("run").chain(line.split_whitespace());
        Cli::try_parse_from(words).unwrap().args.plan(Transport::Uring)
    }

    fn names(plan: &Plan) -> Vec<(&str, &str)> {
        let lanes = plan.lanes.iter();
        lanes
            .map(|(row, column)| (plan.workloads[*row].name.as_str(), plan.targets[*column].name()))
            .collect()
    }

    #[test]
    fn the_suite_of_the_aims_has_both_sides_of_each_and_the_bare_file() {
        let plan = plan("--quick").unwrap();
        let names = names(&plan);
        for aim in aim::AIMS {
            for lane in aim.lanes(Transport::Uring) {
                assert!(names.contains(&lane), "{lane:?}");
            }
        }
        assert!(names.contains(&("rw4k-q32", "bare")) && !names.contains(&("rr4k-q8", "bare")));
        assert!(!names.contains(&("rr4k-q32", "nbdkit-cow")));
    }

    #[test]
    fn targets_and_workloads_can_be_chosen_and_a_name_that_is_none_is_usage() {
        let chosen = plan("read --only bare,nbdkit-cow --workload rr4k-q1 --target /dev/null").unwrap();
        let expected = [("rr4k-q1", "bare"), ("rr4k-q1", "nbdkit-cow"), ("rr4k-q1", "/dev/null")];
        assert_eq!(names(&chosen), expected);
        let failure = plan("read --only bear").err().unwrap();
        assert!(failure.exit_code() == 2 && failure.to_string().contains("there are bare, "), "{failure}");
        assert_eq!(plan("read --workload life").err().unwrap().exit_code(), 2);
        assert_eq!(plan("life --only bare").err().unwrap().exit_code(), 2);
    }

    #[test]
    fn the_room_that_is_needed_grows_with_the_targets_that_write() {
        let one = plan("disk --only bare").unwrap();
        let two = plan("disk --only bare,fuse-classic").unwrap();
        let len = 1 << 30;
        assert_eq!(room_needed(&one, Medium::Disk, len), 3 * len);
        assert_eq!(room_needed(&two, Medium::Disk, len), 6 * len + NODE_RESERVE);
        assert_eq!(room_needed(&one, Medium::Memory, len), len);
    }
}
