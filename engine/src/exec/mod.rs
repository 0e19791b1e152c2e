//! Who carries the core's actions out.
//!
//! [`storage`] is the operating system as the engine sees it; [`view`] what reads follow; [`blocking`] a loop around
//! the core in the calling thread; [`simulated`] every order, for tests.

pub mod blocking;
pub mod buffer;
pub mod head;
pub mod housekeeper;
pub mod pauses;
pub mod request;
pub mod reserve;
pub mod simulated;
pub mod storage;
pub mod view;
