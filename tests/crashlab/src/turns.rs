//! One thread for the whole machine: whoever would wait, or calls the storage, lets others have their turn.
//!
//! A life operation of a disk is ordinary blocking code. It runs on the thread's stack, and at each of its storage
//! calls, and wherever it waits for the core, the world takes steps: clients ask, actions are carried out and told,
//! housekeeping runs. What the world itself does is not interrupted, which [`RefCell`] tells.

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use bedplate_engine::exec::pool::{Job, Turns};

use crate::{life, world::World};

thread_local! {
    static WORLD: RefCell<Option<Rc<RefCell<World>>>> = const { RefCell::new(None) };
    static JOBS: RefCell<VecDeque<Job>> = const { RefCell::new(VecDeque::new()) };
}

/// The world of this thread, until this is dropped.
pub struct Stage {
    _private: (),
}

impl Stage {
    /// Let `world` be the one that takes turns.
    pub fn set(world: &Rc<RefCell<World>>) -> Stage {
        WORLD.set(Some(world.clone()));
        Stage { _private: () }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(WORLD.take());
        clear_jobs();
    }
}

/// The world, unless it is just doing something.
fn with_world<R>(then: impl FnOnce(&mut World) -> R) -> Option<R> {
    let world = WORLD.with_borrow(Clone::clone)?;
    let mut world = world.try_borrow_mut().ok()?;
    Some(then(&mut world))
}

/// A few things happen, or nothing.
pub fn others_go_on() {
    with_world(World::interlude);
}

/// Other operations on the disk happen, if the one under way lets them in.
pub fn others_live() {
    if let Some(world) = WORLD.with_borrow(Clone::clone) {
        life::others_live(&world);
    }
}

/// A number below `count`, by the seed.
pub fn choose(count: usize) -> usize {
    with_world(|world| world.seed.index(count)).unwrap_or(0)
}

/// Housekeeping that waits.
pub fn jobs() -> usize {
    JOBS.with_borrow(VecDeque::len)
}

/// Run the job with this number.
pub fn run_job(n: usize) {
    if let Some(job) = JOBS.with_borrow_mut(|jobs| jobs.remove(n)) {
        job();
    }
}

/// The process is gone.
pub fn clear_jobs() {
    drop(JOBS.take());
}

/// What the engine's pool is given.
#[derive(Debug)]
pub struct OneThread;

impl Turns for OneThread {
    fn queue(&self, job: Job) {
        JOBS.with_borrow_mut(|jobs| jobs.push_back(job));
    }

    fn next(&self) -> bool {
        // What the world itself waits for is housekeeping.
        with_world(World::turn).unwrap_or_else(|| {
            let waiting = jobs() > 0;
            run_job(0);
            waiting
        })
    }
}
