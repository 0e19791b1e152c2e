//! What the log says must be on a disk after a cut, and whether it is.
//!
//! The disk is mounted as a machine does that starts again, a node serves it, and every sector of every volume is
//! compared, the snapshots through clones; the image is verified; then the file system is checked by its own tool.

use std::{
    any::Any,
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use bedplate_testkit::node::Node;

use crate::{
    disk::Entry,
    file_system::FileSystem,
    node::{self, Executor},
    script::{Bounds, WRITERS, begun_at_most, judge},
};

/// Complaints that are kept of one cut.
const COMPLAINTS_MAX: usize = 8;

/// A snapshot as the notes know it.
#[derive(Clone, Copy, Debug, Default)]
struct Snapshot {
    /// Durable in its volume when its making began.
    durable: u64,
    /// Durable when its making was over.
    done: Option<u64>,
    deleting: bool,
    deleted: bool,
}

/// What the notes up to a cut promise.
#[derive(Debug, Default)]
pub struct Promise {
    durable: BTreeMap<u64, u64>,
    snapshots: BTreeMap<(u64, u64), Snapshot>,
}

impl Promise {
    pub fn of(log: &[Entry]) -> Promise {
        let mut promise = Promise::default();
        for entry in log {
            let Entry::Note(text) = entry else { continue };
            let words: Vec<&str> = text.split(' ').collect();
            let number =
                |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            match (words.first().copied().unwrap_or(""), words.get(1).copied().unwrap_or("")) {
                ("durable", _) => drop(promise.durable.insert(number(1), number(2))),
                (when @ ("begin" | "done"), verb) => promise.step(when, verb, number(2), number(3)),
                // That the load began says nothing of what is kept.
                _ => {}
            }
        }
        promise
    }

    fn step(&mut self, when: &str, verb: &str, volume: u64, number: u64) {
        let durable = self.durable(volume);
        let snapshot = self.snapshots.entry((volume, number)).or_default();
        match (when, verb) {
            ("begin", "create") => snapshot.durable = durable,
            ("done", "create") => snapshot.done = Some(durable),
            ("begin", "delete") => snapshot.deleting = true,
            ("done", "delete") => snapshot.deleted = true,
            _ => unreachable!("the load notes no other step: {when} {verb}"),
        }
    }

    fn durable(&self, writer: u64) -> u64 {
        self.durable.get(&writer).copied().unwrap_or(0)
    }

    pub fn durable_changes(&self) -> u64 {
        self.durable.values().sum()
    }
}

/// What was found wrong after one cut; nothing, if all is well.
#[derive(Debug, Default)]
pub struct Verdict {
    pub complaints: Vec<String>,
    /// Sectors of volumes and snapshots that held what they must not.
    pub wrong_sectors: usize,
    pub snapshots_checked: usize,
}

pub struct Bench<'a> {
    pub executor: Executor,
    pub fs: FileSystem,
    pub seed: u64,
    pub image: &'a [u8],
}

impl Bench<'_> {
    /// Judge the disk in `file`.
    pub fn judge(&self, file: &Path, promise: &Promise) -> Verdict {
        let mut verdict = Verdict::default();
        let served = catch_unwind(AssertUnwindSafe(|| self.serve(file, promise, &mut verdict)));
        if let Err(panic) = served {
            verdict.complaints.push(said(&*panic));
        }
        if let Err(error) = self.fs.check(file) {
            verdict.complaints.push(format!("the file system: {error:#}"));
        }
        verdict
    }

    /// Whatever stands in the way ends it with a panic.
    fn serve(&self, file: &Path, promise: &Promise, verdict: &mut Verdict) {
        let node = node::over(file, self.executor);
        node.idle_jobs();
        node.assert_nothing_is_left_over();
        assert_eq!(node.names("volume").len() as u64, WRITERS);
        for writer in 0..WRITERS {
            let durable = promise.durable(writer);
            let bounds = Bounds { durable, begun: begun_at_most(self.seed, writer, durable) };
            self.compare(&format!("v{writer}"), writer, bounds, &node, verdict);
            self.snapshots(writer, bounds, promise, &node, verdict);
        }
        node.run("image verify base");
        assert_eq!(node.json("image get base")["state"], "ready");
        node.run("doctor");
        node::end(node);
    }

    fn compare(&self, name: &str, writer: u64, bounds: Bounds, node: &Node, verdict: &mut Verdict) {
        let content = fs::read(node.volume(name)).unwrap_or_else(|error| panic!("volume {name}: {error}"));
        let wrong = judge(self.seed, writer, bounds, self.image, &content);
        verdict.wrong_sectors += wrong.len();
        let room = COMPLAINTS_MAX.saturating_sub(verdict.complaints.len());
        verdict.complaints.extend(wrong.into_iter().take(room).map(|said| format!("{name}: {said}")));
    }

    /// Every snapshot that must be there is, none is that must not, and each holds what it must.
    fn snapshots(&self, volume: u64, now: Bounds, promise: &Promise, node: &Node, verdict: &mut Verdict) {
        let list = node.json(&format!("snapshot list v{volume}"));
        let names: Vec<&str> =
            list.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect();
        let known = promise.snapshots.iter().filter(|((of, _), _)| *of == volume);
        for ((_, number), snapshot) in known {
            let (name, there) = (format!("s{number}"), names.contains(&format!("s{number}").as_str()));
            if there && snapshot.deleted {
                verdict.complaints.push(format!("v{volume}: snapshot {name} was deleted and is there"));
            } else if !there && snapshot.done.is_some() && !snapshot.deleting {
                verdict.complaints.push(format!("v{volume}: snapshot {name} was made and is not there"));
            } else if there {
                let begun = snapshot.done.map_or(now.begun, |done| begun_at_most(self.seed, volume, done));
                let bounds = Bounds { durable: snapshot.durable, begun };
                node.run(&format!("volume clone v{volume}@{name} probe"));
                self.compare("probe", volume, bounds, node, verdict);
                node.run("volume delete probe");
                verdict.snapshots_checked += 1;
            }
        }
        let unknown = names.iter().filter(|name| {
            let number = name.trim_start_matches('s').parse::<u64>().ok();
            number.is_none_or(|number| !promise.snapshots.contains_key(&(volume, number)))
        });
        verdict
            .complaints
            .extend(unknown.map(|name| format!("v{volume}: snapshot {name}, which nobody made")));
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
