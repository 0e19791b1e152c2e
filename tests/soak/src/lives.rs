//! Lives of a node: started, loaded, ended, and everything compared after the next start.

use std::{
    fs::File,
    os::unix::fs::OpenOptionsExt,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use bedplate_testkit::{
    journal::{Dice, Durability, write_once},
    node::Node,
};
use nix::{libc::O_DSYNC, sys::signal::Signal};

use crate::{
    act::{Act, Life},
    content::{Content, WRITERS},
    lab::{Ended, Fate, Lab},
    report::Report,
    watch::Sample,
};

/// Between two samples of a node under load.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(1);
/// An act that is waited for begins within this time, or the kill comes without it.
const ACT_WITHIN: Duration = Duration::from_secs(3);

/// How a node is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub volumes: usize,
    pub size_bytes: u64,
    /// From one change of a writer to the next.
    pub write_pause: Duration,
    /// From one act of a volume's life to the next.
    pub act_pause: Duration,
}

/// When a life ends.
#[derive(Clone, Copy, Debug)]
pub enum Kill {
    After(Duration),
    /// While this is under way, so much after its begin.
    During(Act, Duration),
}

/// A volume with what it holds, and its life.
struct Volume {
    live: Content,
    life: Life,
}

/// The node, its volumes, and what was counted.
pub struct Lives {
    lab: Lab,
    volumes: Vec<Volume>,
    load: Load,
    dice: Dice,
    pub report: Report,
}

impl Lives {
    pub fn begin(node: Node, load: Load, seed: u64, report: Report) -> Lives {
        let lab = Lab::new(node, load.size_bytes, load.volumes);
        let volumes = (0..load.volumes)
            .map(|index| {
                let name = format!("v{index}");
                lab.node.run(&format!("volume create {name} --image base"));
                let dice = Dice::new(seed * 1000 + index as u64);
                Volume { live: Content::over(lab.base.clone()), life: Life::new(index, name, dice) }
            })
            .collect();
        Lives { lab, volumes, load, dice: Dice::new(seed), report }
    }

    /// One life: load until the kill, a new start, and everything is compared.
    pub fn live_and_die(&mut self, kill: Kill) {
        self.begin_anew();
        self.under_load(|lab, report| {
            match kill {
                Kill::After(time) => watch_for(time, lab, report),
                Kill::During(act, time) => wait_for(act, time, lab),
            }
            lab.expect(Fate::Killed);
            let under_way = lab.under_way();
            lab.node.signal(Signal::SIGKILL);
            report.killed(&under_way);
        });
        self.lab.node.kill();
        let start = Instant::now();
        self.lab.expect(Fate::Lives);
        self.lab.node.restart();
        self.report.restarted(start.elapsed());
        self.settle();
    }

    /// A life that ends in order; then all volumes are deleted, and nothing is left.
    pub fn live_and_clear_away(&mut self, time: Duration) {
        self.under_load(|lab, report| {
            watch_for(time, lab, report);
            lab.expect(Fate::Stops);
        });
        self.lab.expect(Fate::Lives);
        self.settle();
        let lab = &self.lab;
        for volume in &self.volumes {
            lab.when_free(|| lab.ask(&format!("volume delete {}", volume.life.name)))
                .expect("nobody kills it");
        }
        lab.when_free(|| lab.ask("image delete base")).expect("nobody kills it");
        lab.node.idle_jobs();
        lab.node.assert_nothing_is_left_over();
        self.report.left_over = lab.node.files_on_disk();
        assert_eq!(
            self.report.left_over,
            ["bedplate.json", "reserve"],
            "something is left of what was deleted"
        );
        assert!(self.lab.node.stop(Signal::SIGTERM).success(), "{}", self.lab.node.log());
        assert!(self.lab.node.mounts().is_empty());
    }

    /// Now and then a volume goes back to a snapshot, or gives way to a clone of one, or to a new one over the image:
    /// so that chains end, and what was flattened stands on the image again.
    fn begin_anew(&mut self) {
        let index = usize::try_from(self.dice.roll(self.volumes.len() as u64)).expect("a few");
        let volume = &mut self.volumes[index];
        let begun = volume.life.begin_anew(self.dice.roll(4), &self.lab);
        if let Some(content) = begun.expect("nobody kills the node here") {
            volume.live = content;
        }
    }

    /// Writers and lives of all volumes at work until `end` has said what comes.
    fn under_load(&mut self, end: impl FnOnce(&Lab, &mut Report)) {
        let (lab, load, writes) = (&self.lab, self.load, [AtomicU64::new(0), AtomicU64::new(0)]);
        let report = &mut self.report;
        thread::scope(|scope| {
            for Volume { live, life } in &mut self.volumes {
                let (live, name) = (&*live, life.name.clone());
                for writer in 0..WRITERS {
                    let (path, seed) = (lab.node.volume(&name), self.dice.roll(u64::MAX));
                    let writes = &writes;
                    scope.spawn(move || {
                        let _alarm = lab.alarm();
                        let ended = lab.alive(|| write_on(&path, live, writer, seed, lab, load, writes));
                        drop(ended);
                    });
                }
                scope.spawn(move || {
                    let _alarm = lab.alarm();
                    while lab.fate() == Fate::Lives {
                        let act = lab.wanted().unwrap_or_else(|| life.choose());
                        match life.act(act, live, lab) {
                            Ok(()) => pause(load.act_pause, lab),
                            Err(Ended::Killed) => break,
                            Err(Ended::Conflict(said)) => panic!("{act:?}: {said}"),
                        }
                    }
                });
            }
            let _alarm = lab.alarm();
            end(lab, report);
        });
        self.report.wrote(&writes);
        self.report.done(&self.lab);
    }

    /// After a start: what was under way is settled, every volume is what it has to be, and nothing else is there.
    fn settle(&mut self) {
        let lab = &self.lab;
        for Volume { live, life } in &mut self.volumes {
            life.settle(lab).expect("nobody kills the node here");
            live.check(&lab.node.volume(&life.name)).expect("the node lives");
            self.report.compared(lab.base.len() as u64);
        }
        lab.node.idle_jobs();
        lab.node.assert_nothing_is_left_over();
        let mut names: Vec<&str> = self.volumes.iter().map(|volume| volume.life.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(lab.node.names("volume"), names);
        assert_eq!(lab.node.names("image"), ["base"]);
        self.report.quiet(Sample::of(lab.node.pid()), lab.node.allocated_on_disk());
    }
}

/// Sample the node until the time is over.
fn watch_for(time: Duration, lab: &Lab, report: &mut Report) {
    let (end, process) = (Instant::now() + time, lab.node.pid());
    let mut next = Instant::now() + SAMPLE_EVERY;
    while Instant::now() < end && !lab.has_failed() {
        if Instant::now() >= next {
            report.loaded(Sample::of(process));
            next += SAMPLE_EVERY;
        }
        thread::sleep(LOOK);
    }
}

/// Until `act` has been under way for some time.
fn wait_for(act: Act, time: Duration, lab: &Lab) {
    lab.want(Some(act));
    let deadline = Instant::now() + ACT_WITHIN;
    while !lab.under_way().contains(&act) && Instant::now() < deadline && !lab.has_failed() {
        thread::sleep(LOOK);
    }
    thread::sleep(time);
    lab.want(None);
}

fn pause(time: Duration, lab: &Lab) {
    let end = Instant::now() + time;
    while Instant::now() < end && lab.fate() == Fate::Lives {
        thread::sleep(LOOK);
    }
}

/// A writer of a volume, until the node's end; every fourth time it reads back what it wrote.
fn write_on(
    path: &std::path::Path,
    live: &Content,
    writer: usize,
    seed: u64,
    lab: &Lab,
    load: Load,
    [writes, flushes]: &[AtomicU64; 2],
) -> std::io::Result<()> {
    let (durability, flags) =
        if writer.is_multiple_of(2) { (Durability::Fsync, 0) } else { (Durability::Dsync, O_DSYNC) };
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    let (mut dice, region) = (Dice::new(seed), live.region(writer));
    while lab.fate() == Fate::Lives {
        let durable = write_once(&file, &mut live.journal(writer), &mut dice, region, durability)?;
        writes.fetch_add(1, Ordering::Relaxed);
        flushes.fetch_add(u64::from(durable), Ordering::Relaxed);
        if dice.roll(4) == 0 {
            let at = region.0 + dice.roll(region.1 - 64);
            live.read_back(&file, writer, (at, 64))?;
        }
        thread::sleep(load.write_pause);
    }
    Ok(())
}
