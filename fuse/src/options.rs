//! How a mount is made: who may use its files, and by which transport and how many threads it is served.
//!
//! Owns [`MountOptions`] with its defaults. The limits of the transport are constants next to what they limit.

use std::num::NonZeroUsize;

/// Most threads that serve one mount; each keeps two buffers of 1 MiB in memory.
pub const THREADS_MAX: usize = 128;

/// What a mount is asked to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Permission bits of volume files. Write bits are taken from those that are read-only.
    pub volume_mode: Mode,
    /// Permission bits of image files; write bits never show.
    pub image_mode: Mode,
    /// Who may enter the mount at all.
    pub sharing: Sharing,
    /// Threads that read `/dev/fuse`: as many requests are in work at once. Where rings serve, as many threads answer
    /// what may wait. At most [`THREADS_MAX`].
    pub threads: NonZeroUsize,
    pub transport: TransportChoice,
    pub latency: Latency,
}

/// What a mount does about processors that would sleep between two requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Latency {
    /// Nothing.
    #[default]
    Normal,
    /// Keeps them awake while requests come.
    Low,
}

/// How requests are to come from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// By rings where they can be had, else on `/dev/fuse`; the log says why.
    #[default]
    Auto,
    /// By rings, or the mount is not made.
    Uring,
    /// On `/dev/fuse`.
    Classic,
}

/// Permission bits, `0o777` at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(u16);

/// Who may enter the mount, before any file's permission bits are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Only the user that mounted.
    Owner,
    /// Every user that the permission bits let in (the kernel's `allow_other`).
    Others,
}

impl Mode {
    /// The bits, if they are permission bits only: no set-user-id, set-group-id or sticky bit.
    pub const fn new(bits: u16) -> Option<Mode> {
        if bits & !0o777 == 0 { Some(Mode(bits)) } else { None }
    }

    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The same without anybody's write bit.
    pub const fn read_only(self) -> Mode {
        Mode(self.0 & !0o222)
    }
}

impl Default for MountOptions {
    /// Files for root alone, and 16 threads.
    fn default() -> MountOptions {
        MountOptions {
            volume_mode: Mode(0o600),
            image_mode: Mode(0o400),
            sharing: Sharing::Owner,
            threads: THREADS_DEFAULT,
            transport: TransportChoice::Auto,
            latency: Latency::Normal,
        }
    }
}

/// A compromise: with 32, direct I/O at depth 32 is up to a tenth faster for a fifth more CPU, and reads of a cached
/// base, where threads only get in each other's way, are a third slower.
const THREADS_DEFAULT: NonZeroUsize = NonZeroUsize::new(16).expect("16 is not zero");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_holds_permission_bits_only() {
        assert_eq!(Mode::new(0o4755), None);
        assert_eq!(Mode::new(0o1777), None);
        assert_eq!(Mode::new(0o660).map(Mode::bits), Some(0o660));
    }

    #[test]
    fn read_only_takes_every_write_bit_and_no_other() {
        assert_eq!(Mode(0o777).read_only(), Mode(0o555));
    }
}
