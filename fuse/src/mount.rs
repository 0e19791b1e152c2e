//! A mount's life: made, served, told of changes, ended by us or by somebody else.
//!
//! Owns [`Mount`]. States: *serving* until the kernel ends the connection, then
//! *ended* with the reason ([`Ended`]), which never changes again. Whoever ends it, open files are let go of then.
//! Every wait has a deadline: [`Mount::stop`] unmounts; where that is refused it detaches and waits for the users to
//! go; at the deadline it cuts them off.

use std::{
    fmt, fs,
    fs::OpenOptions,
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    unistd::{getgid, getuid},
};

use crate::{
    connection,
    error::{MountError, Result},
    handles::{Handles, IoPath},
    invalidate::{Change, Invalidator},
    latency::Wakefulness,
    mountinfo::MountEntry,
    namespace::{FileId, Namespace},
    options::{Latency, MountOptions, THREADS_MAX, TransportChoice},
    served::Served,
    transport::{self, Started, Transport},
    tree::{Owner, Tree},
    uring::NoRings,
    warm::Warming,
};

/// How long INIT may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long the serving threads may take to end once the connection is cut. Longer only if a device does not answer.
const CUT_OFF_MAX: Duration = Duration::from_secs(2);
/// How long a busy mount is asked again before it is detached: a scanner, or a process between fork and exec, is gone
/// sooner than that.
const BUSY_MAX: Duration = Duration::from_millis(300);
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// The deadline of a mount that is dropped without having been stopped.
const DROP_DEADLINE: Duration = Duration::from_secs(5);

/// Why a mount does not serve any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was unmounted, by us or by somebody else, and its last user has gone.
    Unmounted,
    /// Its connection was aborted.
    Aborted,
    /// The transport failed, with this error.
    Failed(String),
}

/// How [`Mount::stop`] ended it. The names are those of the files that were open when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nobody used it.
    Unmounted,
    /// It was busy and therefore detached; the last user went before the deadline.
    Drained { open: Vec<String> },
    /// It was busy until the deadline: detached, and what was still open now gives errors.
    CutOff { open: Vec<String> },
    /// It had ended before.
    Already(Ended),
}

/// What no other file has at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// `MAJOR:MINOR`.
    pub file_system: String,
    pub inode: u64,
}

/// A mount that serves, until it is stopped or dropped.
pub struct Mount {
    dir: PathBuf,
    entry: MountEntry,
    served: Arc<Served>,
    end: Arc<End>,
    invalidator: Invalidator,
    /// Whether dropping it has nothing left to do.
    stopped: AtomicBool,
}

/// The one-way switch from serving to ended.
#[derive(Default)]
pub(crate) struct End {
    reason: Mutex<Option<Ended>>,
    changed: Condvar,
}

impl Mount {
    /// Mount `namespace` on `dir`, which is made if it is missing. A dead mount of ours on it is cleared away first; a
    /// living one, a foreign one and a directory with files in it are refused.
    pub fn start(dir: &Path, namespace: Arc<dyn Namespace>, mut options: MountOptions) -> Result<Mount> {
        options.threads =
            NonZeroUsize::new(THREADS_MAX).map_or(options.threads, |max| max.min(options.threads));
        let dir = absolute(dir)?;
        connection::clear_stale(&dir)?;
        check_directory(&dir)?;
        let device = OpenOptions::new().read(true).write(true).open(connection::DEVICE);
        let device = device.map_err(|e| MountError::io("open", connection::DEVICE, e))?;
        let device = Arc::new(OwnedFd::from(device));
        let served = Arc::new(Served {
            namespace,
            owner: Owner { uid: getuid().as_raw(), gid: getgid().as_raw() },
            tree: Arc::new(Tree::default()),
            handles: Handles::default(),
            started: SystemTime::now(),
            passthrough: AtomicBool::new(false),
            device: Arc::downgrade(&device),
            rings: AtomicBool::new(false),
            awake: awake(options.latency),
            warming: Warming::new(options.threads.get()),
            options,
        });
        let entry = connection::attach(&dir, device.as_fd(), served.options.sharing)?;
        let device_number = entry.device;
        Mount::serve(dir.clone(), entry, device, served).inspect_err(|_| {
            // Nobody uses it yet, and what the start itself asked for need not be waited for.
            if let Err(error) = connection::abort(device_number) {
                tracing::warn!(dir = %dir.display(), %error, "the connection of a mount that was given up was not cut");
            }
            if let Err(error) = connection::detach(&dir) {
                tracing::warn!(dir = %dir.display(), %error, "a mount that was given up stays");
            }
        })
    }

    /// The directory that it is mounted on.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `stat` says of a file of this mount, without asking the mount: the number of its file system and its own.
    /// `None` where no more files can have a number.
    pub fn identity(&self, file: FileId) -> Option<FileIdentity> {
        let inode = self.served.number(file).ok()?.0;
        Some(FileIdentity { file_system: self.file_system(), inode })
    }

    /// `MAJOR:MINOR` of the mount's file system, which no other has while this one has users.
    pub fn file_system(&self) -> String {
        format!("{}:{}", self.entry.device.major, self.entry.device.minor)
    }

    /// The path of a file's bytes while it is open, else `None`.
    pub fn io_path(&self, file: FileId) -> Option<IoPath> {
        self.served.handles.io_path(file)
    }

    /// How requests come.
    pub fn transport(&self) -> Transport {
        self.served.transport()
    }

    /// Files that are open through this mount.
    pub fn open_files(&self) -> Vec<FileId> {
        self.served.handles.open_files()
    }

    /// Tell the kernel of a change; the namespace shows it already. Waits until that is done, two seconds at most, and
    /// says whether it was. Not to be called from within the [`Namespace`], nor holding a lock that it takes.
    pub fn invalidate(&self, change: Change) -> bool {
        self.invalidator.tell(change)
    }

    /// Why it ended; `None` while it serves.
    pub fn ended(&self) -> Option<Ended> {
        self.end.wait(Instant::now())
    }

    /// Wait for it to end, by whatever cause.
    pub fn wait_ended(&self, timeout: Duration) -> Option<Ended> {
        self.end.wait(Instant::now() + timeout)
    }

    /// Unmount, with all that `Stopped` says. Returns by `timeout` and at most a few seconds later.
    pub fn stop(&self, timeout: Duration) -> Stopped {
        self.stopped.store(true, Ordering::Relaxed);
        self.stop_by(Instant::now() + timeout)
    }

    fn serve(dir: PathBuf, entry: MountEntry, device: Arc<OwnedFd>, served: Arc<Served>) -> Result<Mount> {
        let end = Arc::new(End::default());
        let (ready, started) = mpsc::sync_channel(1);
        let server =
            transport::Server { device, served: served.clone(), end: end.clone(), entry: entry.clone() };
        thread::Builder::new()
            .name("fuse-transport".into())
            .spawn(move || server.run(&ready))
            .map_err(MountError::Thread)?;
        let timed_out = || MountError::io("start serving", &dir, io::ErrorKind::TimedOut);
        let Started { notifier, expected } =
            started.recv_timeout(HANDSHAKE_MAX).unwrap_or_else(|_| Err(timed_out()))?;
        match transport::find_out(&served, &dir, expected, HANDSHAKE_MAX) {
            Some(Transport::Uring) => served.warming.end(),
            Some(Transport::Classic) if served.options.transport == TransportChoice::Uring => {
                return Err(MountError::NoRings(match expected {
                    Transport::Classic => NoRings::NotOffered,
                    Transport::Uring => NoRings::NotTaken,
                }));
            }
            Some(Transport::Classic) => served.warming.gather(&dir, served.options.threads.get()),
            None => return Err(timed_out()),
        }
        tracing::info!(dir = %dir.display(), transport = served.transport().name(), "mounted");
        connection::raise_read_ahead(entry.device);
        let invalidator = Invalidator::start(notifier, served.tree.clone())?;
        Ok(Mount { dir, entry, served, end, invalidator, stopped: AtomicBool::new(false) })
    }

    fn stop_by(&self, deadline: Instant) -> Stopped {
        let open = self.open_names();
        if let Some(ended) = self.ended() {
            // An aborted connection leaves its mount behind.
            self.in_helper("detach", connection::detach, Instant::now() + CUT_OFF_MAX);
            return Stopped::Already(ended);
        }
        match self.unmount(deadline) {
            Some(Ok(())) if self.end.wait(deadline).is_some() => return Stopped::Unmounted,
            // Another mount namespace has a copy of it.
            Some(Ok(())) => {}
            Some(Err(Errno::EBUSY)) => {
                tracing::warn!(dir = %self.dir.display(), ?open, "the mount is in use; it is detached");
                self.in_helper("detach", connection::detach, deadline);
                if self.end.wait(deadline).is_some() {
                    return Stopped::Drained { open };
                }
            }
            // Not mounted here any more, but still used; or the kernel waits for a device that does not answer.
            Some(Err(_)) | None => {
                if self.end.wait(deadline).is_some() {
                    return Stopped::Drained { open };
                }
            }
        }
        self.cut_off();
        Stopped::CutOff { open }
    }

    /// Unmount, asking again for a moment while it is busy.
    fn unmount(&self, deadline: Instant) -> Option<nix::Result<()>> {
        let busy_until = deadline.min(Instant::now() + BUSY_MAX);
        loop {
            let result = self.in_helper("unmount", connection::unmount, deadline);
            if result != Some(Err(Errno::EBUSY)) || Instant::now() >= busy_until {
                return result;
            }
            self.end.wait(Instant::now() + BUSY_PAUSE);
        }
    }

    /// End the connection under its users' feet.
    fn cut_off(&self) {
        if let Err(error) = connection::abort(self.entry.device) {
            tracing::warn!(dir = %self.dir.display(), %error, "the connection was not cut; it ends with this process");
        }
        let grace = Instant::now() + CUT_OFF_MAX;
        self.in_helper("detach", connection::detach, grace);
        if self.end.wait(grace).is_none() {
            tracing::warn!(dir = %self.dir.display(), "a device does not answer; its thread is left behind");
        }
    }

    /// Run a mount operation beside us, because it may wait in the kernel for requests to be served. It is done only
    /// if the mount on `dir` is this one. `None`: not done by the deadline, or not started.
    fn in_helper(
        &self,
        op: &'static str,
        work: fn(&Path) -> nix::Result<()>,
        deadline: Instant,
    ) -> Option<nix::Result<()>> {
        let (dir, device) = (self.dir.clone(), self.entry.device);
        let (sender, done) = mpsc::sync_channel(1);
        let helper = thread::Builder::new().name("fuse-unmount".into()).spawn(move || {
            let is_ours =
                connection::look(&dir).is_ok_and(|entry| entry.is_some_and(|entry| entry.device == device));
            // The receiver may have given up; then nobody needs the answer.
            let _ = sender.send(if is_ours { work(&dir) } else { Err(Errno::EINVAL) });
        });
        if let Err(error) = helper {
            tracing::warn!(op, %error, "no thread to do it in");
            return None;
        }
        done.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }

    fn open_names(&self) -> Vec<String> {
        let name = |file: FileId| match self.served.namespace.stat(file) {
            Some(entry) => format!("{}/{}", file.kind.directory(), entry.name),
            None => file.to_string(),
        };
        self.open_files().into_iter().map(name).collect()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.stopped.load(Ordering::Relaxed) {
            self.stop_by(Instant::now() + DROP_DEADLINE);
        }
    }
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mount").field("dir", &self.dir).field("ended", &self.ended()).finish_non_exhaustive()
    }
}

impl End {
    pub(crate) fn set(&self, reason: Ended) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.changed.notify_all();
    }

    fn wait(&self, deadline: Instant) -> Option<Ended> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(reason, left, |reason| reason.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// What keeps processors awake, if that is wanted and allowed.
fn awake(latency: Latency) -> Option<Wakefulness> {
    match latency {
        Latency::Normal => None,
        Latency::Low => Wakefulness::start()
            .inspect_err(|error| tracing::warn!(%error, "processors are not kept awake, /dev/cpu_dma_latency does not open"))
            .ok(),
    }
}

/// Whether this process may have threads that the kernel does not make wait for their own writes: the state that a
/// mount's threads take where they may. Leaves the calling thread as a new one is.
pub fn try_io_flusher() -> io::Result<()> {
    rustix::process::configure_io_flusher_behavior(true)?;
    Ok(rustix::process::configure_io_flusher_behavior(false)?)
}

/// Mark the calling thread as one that serves I/O. A host short of memory writes dirty pages through us; the kernel must
/// not make us wait for that in turn. For threads of the engine too, on which requests wait. Refused, it is said once.
pub fn serve_io() {
    static SAID: Once = Once::new();
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        SAID.call_once(|| {
            tracing::warn!(
                %error,
                "serving without the IO_FLUSHER state, which needs CAP_SYS_RESOURCE: a memory limit that this process \
                 shares with the mount's users may then stop both"
            );
        });
    }
}

/// The path as `mountinfo` will have it, without touching its last component, which may be a dead mount.
fn absolute(dir: &Path) -> Result<PathBuf> {
    let (Some(name), parent) = (dir.file_name(), dir.parent()) else {
        return Err(MountError::NotADirectory { dir: dir.into() });
    };
    let parent = parent.filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| MountError::io("make", parent, e))?;
    let parent = parent.canonicalize().map_err(|e| MountError::io("find", parent, e))?;
    Ok(parent.join(name))
}

/// Make the directory if it is missing, and see that a mount hides nothing.
fn check_directory(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(MountError::io("make", dir, error));
        }
        Ok(()) | Err(_) => {}
    }
    let is_directory = fs::symlink_metadata(dir).map_err(|e| MountError::io("look at", dir, e))?.is_dir();
    if !is_directory {
        return Err(MountError::NotADirectory { dir: dir.into() });
    }
    let mut names = fs::read_dir(dir).map_err(|e| MountError::io("list", dir, e))?;
    if names.next().is_some() { Err(MountError::NotEmpty { dir: dir.into() }) } else { Ok(()) }
}
