//! The ring executor: workers with one io_uring each, everything in flight at once.
//!
//! A [`Worker`] is a thread's own: it starts requests on block devices, carries their plans out with asynchronous reads,
//! writes and syncs, and never waits for one of them while another could go on. A [`FrontEnd`] runs on the worker,
//! pushes commands of its own onto the same ring, and has its requests' bytes read straight into its own memory, its
//! [`Window`]s. Other threads reach a worker through its [`Handle`]. The core and its sequencing are those of every
//! executor; see `docs/decisions/0008-*`.
//!
//! `read.rs` gets the bytes of a range, `change.rs` carries the actions of an operation out, `flight.rs` knows what one
//! entry of the ring means when it completes, `stranded.rs` what becomes of it when none does; `window.rs` and `submission.rs` are all that touches lent memory and the
//! kernel's queues.

mod change;
mod flight;
mod read;
mod service;
#[cfg(test)]
mod setting;
mod slab;
mod stranded;
mod submission;
mod wake;
mod window;
mod worker;

pub(super) use self::wake::Post;
pub use self::{
    service::{Gate, HAND_IN_MAX, HAND_IN_WAIT_MAX, SUBMITTED_MAX, Taking, Workers},
    wake::Handle,
    window::Window,
    worker::{FrontEnd, IN_FLIGHT_MAX, IN_FLIGHT_OF_DEVICE_MAX, Job, Worker},
};

/// Whether this process can have workers, and if not, why.
pub fn probe() -> crate::error::Result<()> {
    submission::Ring::new().map(drop)
}
