//! All of `tests/mount` on a mount that rings serve, and what only such a mount can get wrong. Needs a kernel with FUSE
//! over io_uring; the machine's switch for it is set while a mount is made, and put back.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion, in its fixture too")]

use bedplate_fuse::TransportChoice;

#[path = "../../examples/memory_mount/memory.rs"]
mod memory;

#[path = "../mount/durability.rs"]
mod durability;
#[path = "../mount/fixture.rs"]
mod fixture;
#[path = "../mount/images.rs"]
mod images;
#[path = "../mount/invalidation.rs"]
mod invalidation;
#[path = "../mount/life.rs"]
mod life;
#[path = "../mount/load.rs"]
mod load;
#[path = "../mount/stale.rs"]
mod stale;
#[path = "../mount/switch.rs"]
mod switch;
#[path = "../mount/tools.rs"]
mod tools;
#[path = "../mount/tree.rs"]
mod tree;
#[path = "../mount/volume_io.rs"]
mod volume_io;

mod fallback;

const TRANSPORT: TransportChoice = TransportChoice::Uring;
