//! What a run counted, as JSON that is written anew after every life.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    act::Act,
    lab::Lab,
    watch::{Flat, Sample, median},
};

/// A run so far.
#[derive(Debug, Serialize)]
pub struct Report {
    pub command: String,
    pub node: String,
    pub seconds: u64,
    pub kills: u64,
    /// What was under way at a kill.
    pub kills_during: BTreeMap<Act, u64>,
    /// Commands that were done.
    pub acts: BTreeMap<Act, u64>,
    pub writes: u64,
    pub flushes: u64,
    pub compared_mib: u64,
    pub restart_ms_median: u64,
    pub restart_ms_most: u64,
    pub flat: Vec<Flat>,
    /// On the disk after everything was deleted.
    pub left_over: Vec<String>,
    /// What the run came to; a run that failed has none.
    pub verdict: Option<&'static str>,
    #[serde(skip)]
    file: Option<PathBuf>,
    #[serde(skip)]
    started: Instant,
    #[serde(skip)]
    restarts_ms: Vec<u64>,
    #[serde(skip)]
    compared_bytes: u64,
    #[serde(skip)]
    loaded: Vec<Sample>,
    #[serde(skip)]
    quiet: Vec<(Sample, u64)>,
}

impl Report {
    pub fn new(node: String, file: Option<PathBuf>) -> Report {
        Report {
            command: std::env::args().collect::<Vec<_>>().join(" "),
            node,
            seconds: 0,
            kills: 0,
            kills_during: BTreeMap::new(),
            acts: BTreeMap::new(),
            writes: 0,
            flushes: 0,
            compared_mib: 0,
            restart_ms_median: 0,
            restart_ms_most: 0,
            flat: Vec::new(),
            left_over: Vec::new(),
            verdict: None,
            file,
            started: Instant::now(),
            restarts_ms: Vec::new(),
            compared_bytes: 0,
            loaded: Vec::new(),
            quiet: Vec::new(),
        }
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    // ---- what happened

    pub fn killed(&mut self, under_way: &[Act]) {
        self.kills += 1;
        under_way.iter().for_each(|act| *self.kills_during.entry(*act).or_default() += 1);
    }

    pub fn restarted(&mut self, took: Duration) {
        self.restarts_ms.push(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    pub fn wrote(&mut self, [writes, flushes]: &[AtomicU64; 2]) {
        self.writes += writes.load(Ordering::SeqCst);
        self.flushes += flushes.load(Ordering::SeqCst);
    }

    pub fn done(&mut self, lab: &Lab) {
        self.acts = lab.done.lock().expect("held for a moment").clone();
    }

    pub fn compared(&mut self, bytes: u64) {
        self.compared_bytes += bytes;
    }

    /// A sample under load.
    pub fn loaded(&mut self, sample: Option<Sample>) {
        self.loaded.extend(sample);
    }

    /// A sample of a node that has nothing to do, and what its disk holds.
    pub fn quiet(&mut self, sample: Option<Sample>, disk_bytes: u64) {
        self.quiet.extend(sample.map(|sample| (sample, disk_bytes)));
    }

    // ---- what it says

    /// Work out the figures, write the file, and say in a line where the run is.
    pub fn write(&mut self) {
        self.seconds = self.elapsed().as_secs();
        self.compared_mib = self.compared_bytes >> 20;
        self.restart_ms_median = median(&self.restarts_ms);
        self.restart_ms_most = self.restarts_ms.iter().copied().max().unwrap_or(0);
        let loaded = |of: fn(&Sample) -> u64| self.loaded.iter().map(of).collect::<Vec<_>>();
        let quiet =
            |of: fn(&Sample) -> u64| self.quiet.iter().map(|(sample, _)| of(sample)).collect::<Vec<_>>();
        let disk: Vec<u64> = self.quiet.iter().map(|(_, bytes)| bytes >> 10).collect();
        self.flat = vec![
            Flat::judge("memory under load, KiB", &loaded(|sample| sample.memory_kib), 2048),
            Flat::judge("memory when quiet, KiB", &quiet(|sample| sample.memory_kib), 2048),
            Flat::judge("descriptors under load", &loaded(|sample| sample.descriptors), 8),
            Flat::judge("descriptors when quiet", &quiet(|sample| sample.descriptors), 4),
            Flat::judge("threads under load", &loaded(|sample| sample.threads), 4),
            Flat::judge("disk when quiet, KiB", &disk, 32 << 10),
        ];
        println!(
            "{:6} s  {} kills  {} writes  {} flushes  {} MiB compared  restart {}/{} ms",
            self.seconds,
            self.kills,
            self.writes,
            self.flushes,
            self.compared_mib,
            self.restart_ms_median,
            self.restart_ms_most
        );
        if let Some(file) = &self.file {
            fs::write(file, self.json()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is made of names and numbers")
    }

    /// What grew, if anything did.
    pub fn grew(&self) -> Vec<&Flat> {
        self.flat.iter().filter(|figure| figure.flat == Some(false)).collect()
    }
}
