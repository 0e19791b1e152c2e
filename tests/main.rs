//! Black-box tests of the built program: what a user does, with the tools that a user has.
//!
//! One test binary. Each module is a subject, each test a node of its own ([`util::node`]) in a temporary directory,
//! with its own disk, mount and socket. What a peer can judge, a peer judges: `qemu-img`, `fio`, `fsck`, `sha512sum`,
//! `strace`. They need root (mounts, loop devices, control groups) and the programs that `tools/test` installs.
//! `BEDPLATE_LONG=1` runs the sizes and times that a release is judged by; without it everything takes a few minutes.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod attach;
mod bench;
mod block_device;
mod cache;
mod failing_disk;
mod farm;
mod full_disk;
mod jobs;
mod kill;
mod lifecycle;
mod limits;
mod main_job;
mod memory;
mod places;
mod qcow2;
mod races;
mod sources;
mod trace;
mod upload;

use bedplate_testkit as util;
