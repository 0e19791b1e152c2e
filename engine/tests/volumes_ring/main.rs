//! The tests of `volumes` with a ring executor, and what only that has: workers with a front end of their own.

#[path = "../volumes/damage.rs"]
mod damage;
#[path = "../volumes/faults.rs"]
mod faults;
#[path = "../volumes/life.rs"]
mod life;
mod medium;
#[expect(dead_code, reason = "others measure a call, this one what happens between two")]
#[path = "../qcow2/memory.rs"]
mod memory;
#[path = "../volumes/util.rs"]
mod util;
mod worker;

use bedplate_engine::exec::choice::ExecutorChoice;

const EXECUTOR: ExecutorChoice = ExecutorChoice::Ring;
