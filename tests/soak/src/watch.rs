//! What the daemon takes, sampled, and the rule by which that is flat.
//!
//! The rule: of each figure the median of the last quarter of a run is at most that of the first quarter, a tenth more,
//! and a small allowance ([`Flat`]), which is for what a few samples vary by. The first tenth of a run, in which
//! snapshots come up to their number, is left out.

use std::{fs, path::PathBuf};

use nix::unistd::Pid;
use serde::Serialize;

/// Fewer samples say nothing.
const SAMPLES_MIN: usize = 20;

/// The daemon at a moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Memory of its own, without files that it maps.
    pub memory_kib: u64,
    pub descriptors: u64,
    pub threads: u64,
}

impl Sample {
    /// None when the process has gone.
    pub fn of(process: Pid) -> Option<Sample> {
        let proc = PathBuf::from(format!("/proc/{process}"));
        let status = fs::read_to_string(proc.join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
        };
        Some(Sample {
            memory_kib: field("RssAnon")?,
            descriptors: fs::read_dir(proc.join("fd")).ok()?.count() as u64,
            threads: field("Threads")?,
        })
    }
}

/// A figure that is not to grow.
#[derive(Clone, Debug, Serialize)]
pub struct Flat {
    pub what: &'static str,
    pub samples: usize,
    /// Medians.
    pub first_quarter: u64,
    pub last_quarter: u64,
    pub most: u64,
    pub allowance: u64,
    /// None while there are too few samples to say.
    pub flat: Option<bool>,
}

impl Flat {
    pub fn judge(what: &'static str, figures: &[u64], allowance: u64) -> Flat {
        let figures = &figures[figures.len() / 10..];
        let quarter = figures.len() / 4;
        let (first, last) = (median(&figures[..quarter]), median(&figures[figures.len() - quarter..]));
        let flat = (figures.len() >= SAMPLES_MIN).then(|| last <= first + first / 10 + allowance);
        let most = figures.iter().copied().max().unwrap_or(0);
        Flat { what, samples: figures.len(), first_quarter: first, last_quarter: last, most, allowance, flat }
    }
}

pub fn median(figures: &[u64]) -> u64 {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}
