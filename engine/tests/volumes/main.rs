//! Volumes on a real file system: every operation against plain byte vectors.
//!
//! Requests are submitted and carried out by whoever submits them; `volumes_ring` runs the same tests on workers.

mod damage;
mod faults;
mod life;
mod util;

use bedplate_engine::exec::choice::ExecutorChoice;

const EXECUTOR: ExecutorChoice = ExecutorChoice::Blocking;
