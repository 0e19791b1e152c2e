//! Requests that have no bytes of a file in them.
//!
//! They may wait: for a disk that is asked about a file, for a lock of the node, for a device. So a worker has them
//! answered by a thread of a pool and goes on. What a call means is `served.rs`'s, which also keeps a panic from getting
//! here. An entry has one request at most, which bounds the pool's queue.

use fuser::Errno;

use super::protocol::{
    Call, attr_out, directory_out, entry_out, lseek_out, open_directory_out, open_out, statfs_out,
};
use crate::served::Served;

/// What an answer consists of.
pub(super) type Answer = Result<Vec<u8>, Errno>;

impl Call {
    pub(super) fn answer(self, served: &Served) -> Answer {
        match self {
            Call::Lookup { parent, name } => {
                served.lookup(parent, &name).map(|(attr, generation)| entry_out(&attr, generation))
            }
            Call::GetAttr { ino } => served.attr(ino).map(|attr| attr_out(&attr)),
            Call::SetAttr { ownership: true, .. } => Err(Errno::EPERM),
            Call::SetAttr { ino, ownership: false, size } => {
                served.set_attr(ino, size).map(|attr| attr_out(&attr))
            }
            Call::Open { ino, flags } => {
                served.open(ino, flags).map(|(number, route)| open_out(number, &route))
            }
            Call::Release { fh } => served.release(fh).map(|()| Vec::new()),
            Call::Allocate { fh, mode, offset, len } => {
                served.allocate(fh, mode, offset, len).map(|()| Vec::new())
            }
            Call::Seek { fh, offset, whence } => served.seek(fh, offset, whence).map(lseek_out),
            Call::OpenDirectory { ino } => served.open_directory(ino).map(open_directory_out),
            Call::ReadDirectory { fh, offset, len } => {
                let names = served.handles.directory(fh.0).ok_or(Errno::EBADF)?;
                Ok(directory_out(&names, offset, len))
            }
            Call::ReleaseDirectory { fh } => {
                served.handles.release_directory(fh.0);
                Ok(Vec::new())
            }
            Call::StatFs => Ok(statfs_out(served.file_count())),
        }
    }
}
