//! Who carries the core's actions out.
//!
//! [`storage`] is the operating system as the engine sees it; [`view`] what reads follow; [`executor`] a live volume.
//! Its actions are carried out by the thread that asked (`blocking.rs`) or on a worker's ring ([`ring`]); [`simulated`]
//! has every order, for tests.

pub mod asynchronous;
mod blocking;
mod carrier;
pub mod choice;
pub mod executor;
pub(crate) mod fair;
pub mod head;
pub mod pauses;
pub mod pool;
pub mod request;
pub mod reserve;
pub mod ring;
pub mod simulated;
pub mod storage;
pub mod view;

pub use crate::buffer;
