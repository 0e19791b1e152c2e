//! fio: the load on everything that is outside of this process.
//!
//! Owns the command line and the reading of its JSON. Version 3.33 takes a fraction of a second as 0 and then makes one
//! pass, so times are whole seconds; and it writes notes before its JSON, which are skipped. What is read only is opened
//! with `--readonly`, whatever the workload says.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    figure::{Measure, float},
    process::{self, Server, finish},
    sample::Sample,
    workload::Pattern,
};

/// How long fio may take beyond the time it is given.
const PATIENCE: Duration = Duration::from_secs(60);

/// What fio opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// One file for each client, or one for all.
    Files(Vec<PathBuf>),
    /// An NBD address, `nbd+unix:///?socket=...`.
    Nbd(String),
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    Buffered,
    Direct,
}

/// How long a load lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// Going over the content again and again.
    Seconds(u32),
    /// Until each block was met once, or this time is over.
    OnePass { seconds_max: u32 },
}

/// One run of fio.
#[derive(Clone, Debug)]
pub struct Load {
    pub subject: Subject,
    pub pattern: Pattern,
    pub block: u64,
    pub depth: u32,
    pub clients: u32,
    pub client: Client,
    pub lasts: Lasts,
    /// How much of the content is met.
    pub len: u64,
    pub seed: u64,
}

/// The version, or how to come by it.
pub fn version() -> Result<String> {
    if !process::is_installed("fio") {
        bail!("fio is not installed, and it drives most lanes: apt-get install fio, or dnf install fio");
    }
    Ok(process::succeed(Command::new("fio").arg("--version"), PATIENCE)?.trim().to_owned())
}

/// Whether fio was built with its NBD engine.
pub fn speaks_nbd() -> bool {
    let engines = process::succeed(Command::new("fio").arg("--enghelp"), PATIENCE);
    engines.is_ok_and(|engines| engines.lines().any(|line| line.trim() == "nbd"))
}

impl Load {
    fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let mut add = |key: &str, value: &str| args.push(format!("--{key}={value}"));
        add("output-format", "json");
        // From submission on: an answer out of the page cache is complete before the submission returns.
        add("lat_percentiles", "1");
        add("percentile_list", "50:90:99:99.9");
        add("group_reporting", "1");
        add("randrepeat", "1");
        add("randseed", &self.seed.to_string());
        let rw = match self.pattern {
            Pattern::RandomRead => "randread",
            Pattern::SequentialRead => "read",
            Pattern::RandomWrite | Pattern::SyncWrite => "randwrite",
            Pattern::SequentialWrite => "write",
            Pattern::Mixed => "randrw",
        };
        add("rw", rw);
        if self.pattern == Pattern::Mixed {
            add("rwmixread", "70");
        }
        if self.pattern == Pattern::SyncWrite {
            add("fdatasync", "1");
        }
        if !self.pattern.writes() {
            args.push("--readonly".to_owned());
        }
        let mut add = |key: &str, value: &str| args.push(format!("--{key}={value}"));
        add("bs", &self.block.to_string());
        add("iodepth", &self.depth.to_string());
        add("size", &self.len.to_string());
        // A lost or shrunken target must not quietly become a plain file that fio makes.
        add("allow_file_create", "0");
        match self.lasts {
            Lasts::Seconds(seconds) => {
                add("time_based", "1");
                add("runtime", &seconds.to_string());
            }
            Lasts::OnePass { seconds_max } => add("runtime", &seconds_max.to_string()),
        }
        match &self.subject {
            Subject::Nbd(uri) => {
                add("ioengine", "nbd");
                add("uri", uri);
            }
            Subject::Files(_) => {
                add("ioengine", if self.pattern == Pattern::SyncWrite { "psync" } else { "io_uring" });
                add("direct", if self.client == Client::Direct { "1" } else { "0" });
                // The content is warm or cold as the workload says; fio leaves it alone.
                add("invalidate", "0");
            }
        }
        match &self.subject {
            Subject::Files(files) if files.len() > 1 => {
                for (index, file) in files.iter().enumerate() {
                    args.push(format!("--name=client{index}"));
                    args.push(format!("--filename={}", escaped(file)));
                }
            }
            Subject::Files(files) => {
                args.push("--name=client".to_owned());
                args.extend(files.iter().map(|file| format!("--filename={}", escaped(file))));
                args.push(format!("--numjobs={}", self.clients));
            }
            Subject::Nbd(_) => {
                args.push("--name=client".to_owned());
                args.push(format!("--numjobs={}", self.clients));
            }
        }
        args
    }

    /// Start it beside something else; it ends when what is returned is dropped.
    pub fn start(&self, log: &Path) -> Result<Server> {
        Server::start("fio", "fio".as_ref(), &self.args(), &[], log)
    }

    /// Run it and read what it found.
    pub fn run(&self) -> Result<Sample> {
        let (Lasts::Seconds(seconds) | Lasts::OnePass { seconds_max: seconds }) = self.lasts;
        let output =
            finish(Command::new("fio").args(self.args()), Duration::from_secs(seconds.into()) + PATIENCE)?;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            // What went wrong is said last, after notes.
            let said = stderr.lines().rev().chain(stdout.lines()).find(|line| !line.trim().is_empty());
            let said = said.unwrap_or("failed without a word").trim();
            bail!("fio: {}", said.strip_prefix("fio: ").unwrap_or(said));
        }
        parse(&stdout)
    }
}

/// fio splits file names at colons.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(':', "\\:")
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Side,
    write: Side,
    /// How long syncs took, where there were any.
    sync: Option<Sync>,
    usr_cpu: f64,
    sys_cpu: f64,
    /// Milliseconds of all clients together.
    job_runtime: f64,
}

#[derive(Deserialize)]
struct Side {
    iops: f64,
    /// Bytes a second.
    bw_bytes: f64,
    total_ios: u64,
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Sync {
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    #[serde(rename = "N")]
    count: u64,
    mean: f64,
    #[serde(default)]
    percentile: BTreeMap<String, f64>,
}

/// Read fio's JSON.
pub fn parse(text: &str) -> Result<Sample> {
    let start = text.find('{').context("fio printed no JSON")?;
    let mut stream = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Report>();
    let report = stream.next().context("fio printed no JSON")?.context("fio's JSON")?;
    let [job] = report.jobs.as_slice() else { bail!("fio reports {} groups", report.jobs.len()) };
    ensure!(job.error == 0, "fio: {}", std::io::Error::from_raw_os_error(i32::try_from(job.error)?));
    let ops = job.read.total_ios + job.write.total_ios;
    ensure!(ops > 0, "fio made no request");
    let main = if job.read.total_ios >= job.write.total_ios { &job.read } else { &job.write };
    let mut sample = Sample::of(ops);
    sample.set(Measure::Iops, job.read.iops + job.write.iops);
    sample.set(Measure::BytesPerS, job.read.bw_bytes + job.write.bw_bytes);
    // Of a write and its sync, the sync is what one waits for.
    let synced = job.sync.as_ref().map(|sync| &sync.lat_ns).filter(|latency| latency.count > 0);
    let latency = synced.unwrap_or(&main.lat_ns);
    sample.set(Measure::LatencyMeanUs, latency.mean / 1e3);
    for (key, measure) in [
        ("50.000000", Measure::LatencyP50Us),
        ("90.000000", Measure::LatencyP90Us),
        ("99.000000", Measure::LatencyP99Us),
        ("99.900000", Measure::LatencyP999Us),
    ] {
        if let Some(nanos) = latency.percentile.get(key) {
            sample.set(measure, nanos / 1e3);
        }
    }
    let cpu_us = (job.usr_cpu + job.sys_cpu) / 100.0 * job.job_runtime * 1e3;
    sample.set(Measure::ClientCpuUsPerOp, cpu_us / float(ops));
    Ok(sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load {
            subject: Subject::Files(vec!["/m/v:1".into()]),
            pattern: Pattern::RandomRead,
            block: 4096,
            depth: 32,
            clients: 2,
            client: Client::Direct,
            lasts: Lasts::Seconds(2),
            len: 1 << 30,
            seed: 7,
        }
    }

    #[test]
    fn reads_never_open_a_target_for_writing_and_no_load_makes_a_file() {
        let args = load().args();
        assert!(
            args.contains(&"--readonly".to_owned()) && args.contains(&"--allow_file_create=0".to_owned())
        );
        assert!(args.contains(&"--filename=/m/v\\:1".to_owned()), "{args:?}");
        let write = Load { pattern: Pattern::Mixed, ..load() };
        assert!(!write.args().contains(&"--readonly".to_owned()));
    }

    #[test]
    fn many_files_are_many_clients_and_one_pass_is_not_repeated() {
        let files = Subject::Files(vec!["/a".into(), "/b".into()]);
        let args = Load { subject: files, lasts: Lasts::OnePass { seconds_max: 9 }, ..load() }.args();
        assert!(args.contains(&"--name=client1".to_owned()) && !args.contains(&"--time_based=1".to_owned()));
    }

    #[test]
    fn the_json_of_fio_becomes_a_sample() {
        let sample = parse(include_str!("../fixtures/fio.json")).unwrap();
        let get = |measure| sample.get(measure).unwrap();
        assert_eq!(sample.ops(), 66_000);
        assert_eq!(get(Measure::Iops), 66_000.0);
        assert_eq!(get(Measure::LatencyP99Us), 41.728);
        // 25 % and 50 % of two clients' second each.
        assert!((get(Measure::ClientCpuUsPerOp) - 1.5e6 / 66e3).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_report_or_an_error_of_fio_is_said() {
        assert!(parse("fio: bad option").is_err());
        let failed = include_str!("../fixtures/fio.json").replace("\"error\" : 0", "\"error\" : 28");
        assert!(parse(&failed).unwrap_err().to_string().contains("No space left"));
    }
}
