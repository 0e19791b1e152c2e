//! Files that the kernel reads in our place (passthrough), registered with a connection.
//!
//! Owns [`Backing`]: the number by which an open reply names such a file, given back when no handle uses it any more.
//! It belongs to the connection, whichever transport answers with it; therefore not `fuser`'s own type, which only a
//! reply on `/dev/fuse` can make.

#![expect(
    unsafe_code,
    reason = "a number is given back by an ioctl, and handed to fuser as one that it did not make"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Weak,
};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};

// include/uapi/linux/fuse.h: FUSE_DEV_IOC_BACKING_CLOSE.
nix::ioctl_write_ptr!(close, 229, 2, u32);

/// A registered file.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Weak: a registration keeps no connection alive.
    device: Weak<OwnedFd>,
    id: u32,
}

impl Backing {
    /// Have the kernel read `file` where an open reply says so.
    pub(crate) fn register(device: &Weak<OwnedFd>, file: &File) -> io::Result<Backing> {
        let connection = device.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Backing { device: device.clone(), id: BackingId::create_raw(&*connection, file)? })
    }

    /// How an open reply names it.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Answer an open that came on `/dev/fuse`.
    pub(crate) fn answer(&self, reply: ReplyOpen, fh: FileHandle) {
        // SAFETY: the number belongs to this connection and is open as long as `self`; and what would give it back is
        // taken apart below, before that ends.
        let id = unsafe { reply.wrap_backing(self.id) };
        reply.opened_passthrough(fh, FopenFlags::empty(), &id);
        id.into_raw();
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let Some(device) = self.device.upgrade() else { return };
        // SAFETY: the kernel reads one number from a pointer to one.
        if let Err(error) = unsafe { close(device.as_raw_fd(), &self.id) } {
            tracing::debug!(id = self.id, %error, "the kernel does not take back a file that it passed through");
        }
    }
}
