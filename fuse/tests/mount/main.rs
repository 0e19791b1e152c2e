//! The front end through the kernel: each rule of a device's file, of the tree and of a mount's life, tried on a real
//! mount over disks in memory. Needs root and `/dev/fuse`, `qemu-img` and `fio`; without them it fails, it does not skip.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion, in its fixture too")]

#[path = "../../examples/memory_mount/memory.rs"]
mod memory;

mod durability;
mod fixture;
mod images;
mod invalidation;
mod life;
mod stale;
mod tools;
mod tree;
mod volume_io;
