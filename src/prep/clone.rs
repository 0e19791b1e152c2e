//! Cloning a verified file: sharing its blocks where the file system can (btrfs, XFS), else copying them.
//!
//! Either way the clone is read and hashed once before it counts: a copy as it is made, a reflink from the medium. Holes
//! stay holes. The file that is cloned must not change, which images do not.

use std::{fs::File, os::fd::AsRawFd, path::PathBuf};

use bedplate_engine::{error::Error as Storage, image::Format};
use nix::errno::Errno;

use super::{
    arrival::{Arrived, Spec, arrive},
    failure::Result,
    partial::Kept,
    source::file::FileSource,
    verify::verify,
};
use crate::directory::{HeldFile, Open};

/// A file that is known to hold an image.
#[derive(Debug)]
pub struct Original {
    pub file: File,
    /// For messages.
    pub path: PathBuf,
    pub size_bytes: u64,
    pub format: Format,
}

/// Make an arrival of `original`. Checks the sum that `spec` expects.
pub fn clone(spec: &Spec, original: Original) -> Result<Arrived> {
    let path = spec.dir.path().join(spec.names.data);
    // A copy that was begun goes on as a copy.
    if Kept::load(&spec.dir, spec.names).is_none() {
        let file = spec.dir.open_system_file(spec.names.data, Open::CreateWrite)?;
        file.set_len(0).map_err(|e| Storage::io("truncate", &path, e))?;
        match reflink(&original.file, &file) {
            Ok(Reflink::Done) => return verified(spec, HeldFile::new(file, path), &original),
            Ok(Reflink::NotPossible) => {}
            Err(e) => return Err(Storage::io("clone", path, e.into()).into()),
        }
    }
    arrive(spec, &mut FileSource::from_file(original.file, &original.path))
}

/// A reflink, read from the medium before it counts.
fn verified(spec: &Spec, file: HeldFile, original: &Original) -> Result<Arrived> {
    let size_bytes = original.size_bytes;
    let sums =
        verify(&spec.dir, spec.names.data, size_bytes, spec.expected.as_ref(), &spec.meter, &spec.stop)?;
    sums.check(spec.expected.as_ref())?;
    file.sync_all()?;
    Ok(Arrived { file, size_bytes, sums, format: original.format })
}

/// Whether blocks are shared now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reflink {
    Done,
    /// Not on this file system, or not between these two files.
    NotPossible,
}

fn reflink(from: &File, to: &File) -> nix::Result<Reflink> {
    #[expect(unsafe_code, reason = "FICLONE has no safe wrapper in nix")]
    // SAFETY: both descriptors are open for the duration of the call, and FICLONE takes nothing but a descriptor.
    let result = unsafe { ioctl::ficlone(to.as_raw_fd(), from.as_raw_fd()) };
    match result {
        Ok(_) => Ok(Reflink::Done),
        Err(
            Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY | Errno::ENOSYS | Errno::EPERM,
        ) => Ok(Reflink::NotPossible),
        Err(e) => Err(e),
    }
}

mod ioctl {
    use nix::libc::c_int;

    // linux/fs.h: FICLONE is _IOW(0x94, 9, int), and its argument is the descriptor itself.
    const FICLONE: nix::sys::ioctl::ioctl_num_type = nix::request_code_write!(0x94, 9, size_of::<c_int>());
    nix::ioctl_write_int_bad!(
        /// Share the content of the file whose descriptor is the argument.
        ficlone,
        FICLONE
    );
}
