//! The front end through the kernel: each rule of a device's file, of the tree and of a mount's life, tried on a real
//! mount over disks in memory. Needs root and `/dev/fuse`, `qemu-img` and `fio`; without them it fails, it does not skip.
//! This program is about the classic transport; `tests/mount_uring` is the same about the other.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion, in its fixture too")]

use bedplate_fuse::TransportChoice;

#[path = "../../examples/memory_mount/memory.rs"]
mod memory;

mod durability;
mod fixture;
mod images;
mod invalidation;
mod life;
mod load;
mod stale;
mod switch;
mod tools;
mod tree;
mod volume_io;

const TRANSPORT: TransportChoice = TransportChoice::Classic;
