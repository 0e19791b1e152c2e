//! The node under load, what everybody under it shares, and how an end of the node is told from a failure.
//!
//! Whoever kills the node says so first ([`Lab::expect`]): an error that comes before is a defect, and ends the run.

use std::{
    collections::BTreeMap,
    io,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bedplate_testkit::{
    content::{pattern, sparse_image},
    node::Node,
    origin::Origin,
    run::{DEADLINE, Running, until},
};

use crate::act::Act;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// What the command line ends with when something is in use.
const CONFLICT: i32 = 4;

/// What is going to happen to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lives,
    /// Errors are due.
    Killed,
    /// Everybody finishes what is under way.
    Stops,
}

/// Why something came to no end.
#[derive(Debug)]
pub enum Ended {
    /// The node was killed meanwhile.
    Killed,
    /// Something is in use.
    Conflict(String),
}

pub struct Lab {
    pub node: Node,
    pub origin: Origin,
    /// The bytes of the image `base`.
    pub base: Arc<Vec<u8>>,
    pub base_sha512: String,
    fate: AtomicU8,
    failed: AtomicBool,
    /// What each volume's life is at.
    doing: Vec<Mutex<Option<Act>>>,
    /// What the lives are to do next.
    wanted: Mutex<Option<Act>>,
    pub done: Mutex<BTreeMap<Act, u64>>,
}

impl Lab {
    /// A node with an image of `size_bytes`, some of it holes.
    pub fn new(mut node: Node, size_bytes: u64, volumes: usize) -> Lab {
        let file = node.scratch("base.raw");
        sparse_image(&file, size_bytes);
        let mut base = std::fs::read(&file).expect("it has just been written");
        // And data at its end, where cuts are found.
        let tail = pattern(1 << 20, 99);
        let at = base.len() - tail.len();
        base[at..].copy_from_slice(&tail);
        std::fs::write(&file, &base).expect("the scratch directory is there");
        let base_sha512 = node.sha512(&file);
        node.restart();
        node.run("image create base --from base.raw --wait");
        Lab {
            origin: Origin::start(base.clone()),
            base: Arc::new(base),
            base_sha512,
            fate: AtomicU8::new(Fate::Lives as u8),
            failed: AtomicBool::new(false),
            doing: (0..volumes).map(|_| Mutex::new(None)).collect(),
            wanted: Mutex::new(None),
            done: Mutex::new(BTreeMap::new()),
            node,
        }
    }

    // ---- the node's fate

    /// Say what comes, before it does.
    pub fn expect(&self, fate: Fate) {
        self.fate.store(fate as u8, Ordering::SeqCst);
    }

    pub fn fate(&self) -> Fate {
        match self.fate.load(Ordering::SeqCst) {
            fate if fate == Fate::Lives as u8 => Fate::Lives,
            fate if fate == Fate::Killed as u8 => Fate::Killed,
            _ => Fate::Stops,
        }
    }

    /// What only a killed node may fail at.
    pub fn alive<T>(&self, work: impl FnOnce() -> io::Result<T>) -> Result<T, Ended> {
        work().map_err(|error| {
            assert!(self.fate() == Fate::Killed, "an error, and nobody killed the node: {error}");
            Ended::Killed
        })
    }

    /// Held by every thread of a life: one that panics ends the life at once.
    pub fn alarm(&self) -> Alarm<'_> {
        Alarm(self)
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    // ---- commands

    /// A command that the life of volume `index` gives as a part of `act`.
    pub fn run(&self, index: usize, act: Act, command: &mut Command) -> Result<(), Ended> {
        *self.doing[index].lock().expect("held for a moment") = Some(act);
        let ended = self.command(command);
        *self.doing[index].lock().expect("held for a moment") = None;
        if ended.is_ok() {
            *self.done.lock().expect("held for a moment").entry(act).or_default() += 1;
        }
        ended
    }

    pub fn ask(&self, line: &str) -> Result<(), Ended> {
        self.command(&mut self.node.command(line))
    }

    fn command(&self, command: &mut Command) -> Result<(), Ended> {
        let mut running = Running::start(command);
        until("a command ends", || !running.is_running() || self.fate() == Fate::Killed);
        if running.is_running() {
            return Err(Ended::Killed);
        }
        let ended = running.wait(DEADLINE);
        match ended.status.code() {
            Some(0) => Ok(()),
            _ if self.fate() == Fate::Killed => Err(Ended::Killed),
            Some(CONFLICT) => Err(Ended::Conflict(ended.stderr)),
            _ => panic!("{command:?}: {}: {}", ended.status, ended.stderr),
        }
    }

    /// Again until nothing is in the way: the kernel tells of a file that was closed when it gets to it.
    pub fn when_free(&self, mut ask: impl FnMut() -> Result<(), Ended>) -> Result<(), Ended> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match ask() {
                Err(Ended::Conflict(said)) => assert!(Instant::now() < deadline, "still: {said}"),
                other => return other,
            }
            thread::sleep(LOOK);
        }
    }

    // ---- what goes on

    /// What the lives are to do next, instead of anything.
    pub fn want(&self, act: Option<Act>) {
        *self.wanted.lock().expect("held for a moment") = act;
    }

    pub fn wanted(&self) -> Option<Act> {
        *self.wanted.lock().expect("held for a moment")
    }

    /// What is under way at this moment.
    pub fn under_way(&self) -> Vec<Act> {
        self.doing.iter().filter_map(|doing| *doing.lock().expect("held for a moment")).collect()
    }
}

/// See [`Lab::alarm`].
pub struct Alarm<'a>(&'a Lab);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
            // The others need not go on.
            self.0.expect(Fate::Stops);
        }
    }
}
