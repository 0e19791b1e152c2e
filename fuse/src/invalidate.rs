//! Telling the kernel that what it remembers is out of date.
//!
//! Owns the one thread that sends notifications: a notification may wait in the kernel for a request that is in work,
//! so it never comes from a thread that serves requests. Callers wait for it a bounded time ([`CONFIRM_MAX`]) in a
//! queue of bounded length ([`CHANGES_MAX`]); what is not confirmed is not lost to the client either, because
//! attributes are asked for again after a second and an identity that is gone is looked up anew.

use std::{
    ffi::OsStr,
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::Duration,
};

use fuser::{INodeNo, Notifier};
use nix::libc;

use crate::{
    error::{MountError, Result},
    namespace::{FileId, Kind},
    tree::{Tree, directory_ino},
};

/// Most changes that wait to be told.
const CHANGES_MAX: usize = 1024;
/// How long a caller waits for its change to have been told.
const CONFIRM_MAX: Duration = Duration::from_secs(2);

/// What happened to a file behind the kernel's back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A name appeared.
    Created { kind: Kind, name: String },
    /// A name went, and the file with it.
    Deleted { file: FileId, name: String },
    /// The content or the size is another: resize, revert.
    Content { file: FileId },
}

/// The queue to the thread. The thread ends when this is dropped.
pub(crate) struct Invalidator(SyncSender<Job>);

struct Job {
    change: Change,
    told: SyncSender<()>,
}

impl Invalidator {
    pub(crate) fn start(notifier: Notifier, tree: Arc<Tree>) -> Result<Invalidator> {
        let (jobs, queue) = mpsc::sync_channel(CHANGES_MAX);
        thread::Builder::new()
            .name("fuse-invalidate".into())
            .spawn(move || run(&queue, &notifier, &tree))
            .map_err(MountError::Thread)?;
        Ok(Invalidator(jobs))
    }

    /// Whether the kernel was told in time.
    pub(crate) fn tell(&self, change: Change) -> bool {
        let (told, confirmed) = mpsc::sync_channel(1);
        match self.0.try_send(Job { change, told }) {
            Ok(()) => match confirmed.recv_timeout(CONFIRM_MAX) {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
            },
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

fn run(queue: &Receiver<Job>, notifier: &Notifier, tree: &Tree) {
    while let Ok(Job { change, told }) = queue.recv() {
        if let Err(error) = notify(notifier, tree, &change) {
            match error.raw_os_error() {
                // The mount is gone, and with it all that the kernel remembered.
                Some(libc::ENODEV | libc::ENOTCONN | libc::EPERM) => return,
                _ => tracing::warn!(?change, %error, "the kernel did not take an invalidation"),
            }
        }
        // A caller that has stopped waiting is no loss.
        let _ = told.try_send(());
    }
}

fn notify(notifier: &Notifier, tree: &Tree, change: &Change) -> io::Result<()> {
    match change {
        Change::Created { kind, name } => {
            let parent = directory_ino(*kind);
            notifier.inval_entry(parent, OsStr::new(name))?;
            forget_attributes(notifier, parent)
        }
        Change::Deleted { file, name } => {
            let (parent, name) = (directory_ino(file.kind), OsStr::new(name));
            match tree.known(*file) {
                // Also tells those who watch the directory (inotify). Refused while the name is busy in the kernel:
                // then it is only made to be looked up again.
                Some(ino) => {
                    notifier.delete(parent, ino, name).or_else(|_| notifier.inval_entry(parent, name))?;
                    forget_content(notifier, ino)?;
                }
                None => notifier.inval_entry(parent, name)?,
            }
            forget_attributes(notifier, parent)
        }
        Change::Content { file } => match tree.known(*file) {
            Some(ino) => forget_content(notifier, ino),
            None => Ok(()),
        },
    }
}

/// Attributes and every cached page.
fn forget_content(notifier: &Notifier, ino: INodeNo) -> io::Result<()> {
    notifier.inval_inode(ino, 0, 0)
}

/// Attributes only: a negative offset leaves the pages alone.
fn forget_attributes(notifier: &Notifier, ino: INodeNo) -> io::Result<()> {
    notifier.inval_inode(ino, -1, 0)
}
