//! Which transport a mount has, and the thread that runs it.
//!
//! Owns the choice: rings are prepared if they are wanted and can be had, asked for in INIT, and registered after it.
//! `fuser`'s threads read `/dev/fuse` in any case. Which of the two it became is what the first request shows
//! ([`find_out`]): the kernel holds requests back until the rings are complete or refused.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, SyncSender},
    },
    thread,
    time::Duration,
};

use fuser::{Config, Notifier, Session, SessionACL};
use nix::libc;

use crate::{
    classic::{Classic, Terms},
    connection,
    error::{MountError, Result},
    mount::{End, Ended, serve_io},
    mountinfo::MountEntry,
    options::TransportChoice,
    served::Served,
    uring::{NoRings, Rings},
};

/// A name that does not exist; asking for it shows how requests come.
const PROBE: &str = ".bedplate-probe";

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// On `/dev/fuse`.
    Classic,
    /// By io_uring.
    Uring,
}

impl Transport {
    /// What people call it.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Classic => "/dev/fuse",
            Transport::Uring => "io_uring",
        }
    }
}

/// A transport that has answered INIT.
pub(crate) struct Started {
    pub(crate) notifier: Notifier,
    /// What it is, unless the kernel refuses the rings.
    pub(crate) expected: Transport,
}

/// What runs on the transport's own thread.
pub(crate) struct Server {
    pub(crate) device: Arc<OwnedFd>,
    pub(crate) served: Arc<Served>,
    pub(crate) end: Arc<End>,
    pub(crate) entry: MountEntry,
}

/// How requests come, by asking for something. `None`: no answer within `timeout`.
pub(crate) fn find_out(
    served: &Served,
    dir: &Path,
    expected: Transport,
    timeout: Duration,
) -> Option<Transport> {
    if expected == Transport::Classic {
        return Some(Transport::Classic);
    }
    let (answer, answered) = mpsc::sync_channel(1);
    let path: PathBuf = dir.join(PROBE);
    let asking = thread::Builder::new().name("fuse-probe".into()).spawn(move || {
        // It does not exist; the receiver may have given up.
        let _ = fs::symlink_metadata(path);
        let _ = answer.try_send(());
    });
    if let Err(error) = asking {
        tracing::warn!(%error, "no thread to try the mount with");
        return None;
    }
    answered.recv_timeout(timeout).ok()?;
    let found = served.transport();
    if found == Transport::Classic {
        tracing::warn!(reason = %NoRings::NotTaken, "serving by /dev/fuse");
    }
    Some(found)
}

impl Server {
    pub(crate) fn run(self, ready: &SyncSender<Result<Started>>) {
        // Threads inherit it: `fuser` makes its serving threads from this one.
        serve_io();
        let mut rings = match self.rings() {
            Ok(rings) => rings,
            Err(error) => {
                self.end.set(Ended::Failed(error.to_string()));
                // Refused only if the start was given up.
                let _ = ready.try_send(Err(error));
                return;
            }
        };
        let result = self.serve(&mut rings, ready);
        let ended = match &result {
            // A forced unmount cuts the connection, and leaves the mount where it is if that is busy.
            Ok(()) if connection::is_mounted(self.entry.device) => Ended::Aborted,
            Ok(()) => Ended::Unmounted,
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ended::Aborted,
            Err(error) => {
                // Threads and descriptors may be left that nobody serves: no request is to wait for them.
                if let Err(error) = connection::abort(self.entry.device) {
                    tracing::warn!(%error, "the connection of a failed mount was not cut");
                }
                Ended::Failed(error.to_string())
            }
        };
        if let Some(rings) = rings {
            rings.join();
        }
        tracing::info!(dir = %self.entry.mount_point.display(), ?ended, "the mount has ended");
        self.served.handles.clear();
        self.end.set(ended);
        if let Err(error) = result {
            // Heard only before the handshake; later on the channel's other end is gone.
            let dir = &self.entry.mount_point;
            let _ = ready.try_send(Err(MountError::io("start serving", dir, error)));
        }
    }

    /// Rings, if they are wanted and can be had.
    fn rings(&self) -> Result<Option<Rings>> {
        match self.served.options.transport {
            TransportChoice::Classic => Ok(None),
            TransportChoice::Uring => {
                Ok(Some(Rings::prepare(&self.served, &self.device, self.entry.device)?))
            }
            TransportChoice::Auto => {
                let rings = Rings::prepare(&self.served, &self.device, self.entry.device);
                Ok(rings.inspect_err(|reason| tracing::info!(%reason, "serving by /dev/fuse")).ok())
            }
        }
    }

    /// Answer INIT, say so, and serve until the connection ends.
    fn serve(&self, rings: &mut Option<Rings>, ready: &SyncSender<Result<Started>>) -> io::Result<()> {
        let mut config = Config::default();
        config.clone_fd = true;
        config.n_threads = Some(self.served.options.threads.get());
        let terms = Terms {
            rings: rings.as_ref().map(|rings| (rings.request_bytes(), rings.depth())),
            ..Terms::default()
        };
        let terms = Arc::new(terms);
        let classic = Classic { served: self.served.clone(), terms: terms.clone() };
        // Who may enter is checked by the kernel; `fuser` would refuse requests that the kernel sends for nobody.
        let session = Session::from_fd(classic, self.device.try_clone()?, SessionACL::All, config)?;
        let unwanted = rings.take_if(|_| !terms.accepted.load(Ordering::Relaxed));
        if let Some(unwanted) = unwanted {
            tracing::info!(reason = %NoRings::NotOffered, "serving by /dev/fuse");
            unwanted.join();
        }
        let expected = match rings {
            Some(rings) => {
                rings.start();
                Transport::Uring
            }
            None => Transport::Classic,
        };
        // Refused only if the start was given up; then the session ends as well.
        ready
            .send(Ok(Started { notifier: session.notifier(), expected }))
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        session.run()
    }
}
