//! A simulated machine: the shipped core, map, record and life code of the engine under one seed.
//!
//! [`run_seed`] runs one seed, on the calling thread alone: [`script`] says what happens, `world` is the machine and its
//! clients, `life` the operations on its disk, [`arrivals`] its images, `restart` the ends of its process, `medium` what lies below,
//! [`decay`] what a medium that lies leads to, [`faults`] the list of what goes wrong with it and [`stats`] how often
//! it did. The reference is the engine's own
//! (`engine/tests/model/cells.rs`): what each 64 bytes of a volume may hold. [`shrink`] makes a failure short.

#[path = "../../../engine/tests/model/cells.rs"]
mod cells;
#[path = "../../../engine/tests/model/image.rs"]
mod image;
#[path = "../../../engine/tests/model/leftovers.rs"]
mod leftovers;

pub mod arrivals;
mod damage;
pub mod decay;
pub mod faults;
mod life;
mod medium;
pub mod operation;
#[cfg(feature = "planted")]
pub mod planted;
mod restart;
pub mod script;
pub mod shrink;
pub mod stats;
mod turns;
mod world;

use std::{any::Any, cell::RefCell, panic::AssertUnwindSafe, rc::Rc};

use bedplate_engine::{
    units::ByteLen,
    volume::{life::Origin, record::ImageRef},
};
use uuid::Uuid;

use self::{
    cells::{CELL, Cells, image_value},
    script::{Cut, Script, Step},
    stats::Stats,
    turns::Stage,
    world::{Known, World},
};

/// How the finding of a panic begins.
const PANIC: &str = "panic: ";

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What was found.
    pub what: String,
    /// What led to it, where that was asked for.
    pub history: Vec<String>,
}

impl Failure {
    /// Whether an assertion failed, and not a comparison with the reference.
    pub fn is_panic(&self) -> bool {
        self.what.starts_with(PANIC)
    }
}

/// Whether a run keeps its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    Off,
    On,
}

/// Run the script of a seed, on this thread.
pub fn run_seed(seed: u64) -> Result<Stats, Failure> {
    run_script(&Script::of(seed), Trace::Off)
}

/// Run a script, on this thread.
pub fn run_script(script: &Script, trace: Trace) -> Result<Stats, Failure> {
    let (found, history) = tell(script, trace);
    found.map_err(|what| Failure { what, history })
}

/// What happens in a script, in order, whether it fails or not.
pub fn history(script: &Script) -> Vec<String> {
    tell(script, Trace::On).1
}

fn tell(script: &Script, trace: Trace) -> (Result<Stats, String>, Vec<String>) {
    let world = Rc::new(RefCell::new(World::new(script, trace == Trace::On)));
    let stage = Stage::set(&world);
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| play(&world)));
    drop(stage);
    let mut world = world.borrow_mut();
    let history = world.history.take().unwrap_or_default();
    let found = match ended {
        Ok(result) => result.err().or(world.finding.take()),
        Err(panic) => Some(format!("{PANIC}{}", message(&*panic))),
    };
    if let Some(what) = found {
        return (Err(what), history);
    }
    let mut stats = world.stats.clone();
    stats.add(&world.medium.stats());
    stats.fewest_operations = Some(stats.operation_count());
    (Ok(stats), history)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message").to_owned()
}

fn play(world: &Rc<RefCell<World>>) -> Result<(), String> {
    set_up(world)?;
    loop {
        let mut now = world.borrow_mut();
        if now.finding.is_some() {
            return Ok(());
        }
        if now.medium.has_stopped() {
            now.restart()?;
            continue;
        }
        if let Some(image) = now.arrivals.next_unfinished() {
            drop(now);
            arrivals::go_on(world, image);
            continue;
        }
        if now.steps.is_empty() && !now.ask_more() {
            break;
        }
        match now.steps.front() {
            None => {}
            Some(Step::Image(_)) => {
                let Some(Step::Image(step)) = now.steps.pop_front() else { break };
                drop(now);
                arrivals::run(world, step);
            }
            Some(Step::Life { .. }) => {
                let Some(Step::Life { life, volume, pick }) = now.steps.pop_front() else { break };
                drop(now);
                life::run(world, life, volume, pick);
            }
            Some(Step::Cut { cut: Cut::Close, .. }) => {
                now.steps.pop_front();
                now.close();
                if now.finding.is_none() && !now.medium.has_stopped() {
                    now.cut = Some(Cut::Close);
                    now.restart()?;
                }
            }
            Some(_) => drop(now.next_small_step()),
        }
    }
    let mut now = world.borrow_mut();
    now.drain();
    if now.finding.is_none() {
        now.cut = Some(Cut::Power);
        now.restart()?;
        drop(now);
        arrivals::go_on_with_all(world);
        now = world.borrow_mut();
        if now.finding.is_none() {
            now.decay()?;
        }
    }
    now.forget_process();
    Ok(())
}

/// A volume over an image and a clone of it, which share a frozen layer, and a volume whose head stands on the image
/// alone: its name is the first, so it is the one that crowded seeds prefer.
fn set_up(world: &Rc<RefCell<World>>) -> Result<(), String> {
    let mut now = world.borrow_mut();
    let failed = |error| format!("a disk cannot be made: {error}");
    if let Some(bytes) = now.setup.medium {
        now.medium.storage().limit(bytes.into());
    }
    let disk = now.open().map_err(failed)?;
    let (size, image) = (u64::from(now.setup.size), u64::from(now.setup.image));
    let origin = ImageRef { name: "base".into(), uuid: Uuid::from_u128(5), sha512: String::new() };
    for name in ["a", "v"] {
        disk.create_volume(name, Origin::Image(origin.clone()), Some(ByteLen(size))).map_err(failed)?;
    }
    disk.clone_volume("v", None, "w").map_err(failed)?;
    for name in ["a", "v", "w"] {
        let values =
            (0..size / CELL).map(|cell| if (cell + 1) * CELL <= image { image_value(cell) } else { 0 });
        let salt = now.fresh();
        now.known
            .insert(name.into(), Known { cells: Cells::new(values, salt), snapshots: Default::default() });
    }
    now.disk = Some(disk);
    now.take_up_images()?;
    if now.setup.medium.is_some() {
        now.medium.leave(96 << 10);
    }
    Ok(())
}
