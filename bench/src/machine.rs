//! What a run was made on.

use std::fs;

use serde::{Deserialize, Serialize};

pub use crate::figure::Figure;

/// The machine and the moment, as far as they decide a figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub load_average: String,
    pub version: String,
}

impl Machine {
    pub fn look() -> Machine {
        let cpuinfo = line("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
        Machine {
            kernel: line("/proc/sys/kernel/osrelease"),
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            load_average: load_average(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// A file of the kernel's, without the blanks around it; empty when there is none.
pub fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

pub fn load_average() -> String {
    line("/proc/loadavg")
}

/// Memory of the machine, in bytes.
pub fn memory_total_bytes() -> u64 {
    let text = line("/proc/meminfo");
    let field = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    kib(field)
}

/// Resident anonymous memory of this process, in bytes.
pub fn memory_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib(status.lines().find_map(|line| line.strip_prefix("RssAnon:")))
}

fn kib(field: Option<&str>) -> u64 {
    let kib = field.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
