//! Bedplate's FUSE front end: the images and volumes of a node as the files of one mount.
//!
//! Owns the mount's life ([`Mount`]), its names and inode numbers, which path each open file takes ([`IoPath`]), and
//! what a block device looks like as a file. Knows the engine only by
//! [`BlockDevice`](bedplate_engine::device::BlockDevice), and the node only by [`Namespace`], which the node
//! implements. There are two transports ([`Transport`]): threads that read `/dev/fuse`, through `fuser`, and rings that
//! the kernel puts requests into; `docs/transports.md` says which file takes which path, and why.
//!
//! ```text
//! MOUNT/images/NAME     read-only, cached by the kernel or passed through to the image's own file
//! MOUNT/volumes/NAME    read-write, never cached by the kernel (except where a client maps it)
//! ```
//!
//! A volume's file behaves as a disk: its size is fixed, truncation to nothing or to its own size changes nothing,
//! past its end is "no space", `fallocate` punches and zeroes, and what `fsync`, `O_DSYNC` or `RWF_DSYNC` answered
//! survives a crash. `device_file.rs` has these rules, `tests/mount/` tries them through the kernel.

mod backing;
mod buffer;
mod classic;
mod connection;
mod device_file;
mod errno;
mod error;
mod handles;
mod invalidate;
mod latency;
mod mount;
mod mountinfo;
mod namespace;
mod options;
mod served;
mod transport;
mod tree;
mod uring;
mod warm;

pub use error::{MountError, Result};
pub use handles::IoPath;
pub use invalidate::Change;
pub use mount::{Ended, FileIdentity, Mount, Stopped, serve_io, try_io_flusher};
pub use namespace::{FileEntry, FileId, Kind, ListedFile, Namespace, OpenFile};
pub use options::{Latency, Mode, MountOptions, Sharing, THREADS_MAX, TransportChoice};
pub use transport::Transport;
pub use uring::{NoRings, RINGS_PARAMETER, rings_offered};
