//! What a run was made on.

use std::fs;

use serde::Serialize;

/// The machine and the moment, as far as they decide a figure.
#[derive(Serialize)]
pub struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    load_average: String,
    version: &'static str,
}

impl Machine {
    pub fn look() -> Machine {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpuinfo = line("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
        Machine {
            kernel: line("/proc/sys/kernel/osrelease"),
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            load_average: line("/proc/loadavg"),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// Resident anonymous memory of this process, in bytes.
pub fn memory_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = field.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Median, least and greatest of some samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Figure {
    pub fn of(mut samples: Vec<f64>) -> Figure {
        samples.sort_by(f64::total_cmp);
        let at = |n: usize| samples.get(n).copied().unwrap_or(f64::NAN);
        Figure { median: at(samples.len() / 2), min: at(0), max: at(samples.len().saturating_sub(1)) }
    }
}
