//! The daemon: a node from its start to its end.
//!
//! Owns the order of both. Start: state directory, disk locks, images, volumes, mount, loop devices of a node that is
//! gone, and only then the socket, so that whoever can connect finds everything. End, on SIGTERM or SIGINT: refuse new
//! work, answer what is in work, stop jobs, detach, unmount, flush. A signal during the start ends that after the step
//! that it is at. Each step has a deadline; a second signal aborts.
//! The parts are in the files beside this one, each call of the API in `node.rs`.

mod attach;
mod bases;
mod disks;
mod files;
mod jobs;
mod losetup;
mod node;
mod refuse;
mod show;
mod state;
mod systemd;
mod view;
mod volumes;

use std::{
    io,
    path::PathBuf,
    process,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::{Duration, Instant},
};

use bedplate_engine::{error::Error as Engine, image::BaseSource};
use bedplate_fuse::{Mode, Mount, MountError, MountOptions, Stopped};
use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    attach::Attachments,
    bases::{Bases, Host},
    disks::Disks,
    files::Files,
    jobs::Jobs,
    losetup::Losetup,
    node::LocalNode,
    state::StateDir,
    view::Views,
    volumes::Volumes,
};
use crate::{
    api::{
        problem::{Code, engine_code},
        routes::Context,
        server,
        socket::{ListenError, Listener},
    },
    config::{Config, Executor},
    images::{self, Images},
    telemetry::Metrics,
};

/// How long a start that is given up may take to notice that: the longest step is a call of `losetup`.
const START_GRACE: Duration = Duration::from_secs(30);
/// How long requests that are in work may take when the node stops.
const REQUESTS_GRACE: Duration = Duration::from_secs(10);
/// How long jobs may take to notice that they are to stop.
const JOBS_GRACE: Duration = Duration::from_secs(10);
/// How long the users of a busy mount are waited for.
const MOUNT_GRACE: Duration = Duration::from_secs(10);
/// How long the threads of the runtime may take at the very end.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);
/// How long a volume waits for its image to be verified again after the start.
const REOPEN_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The least address space that a node starts with: stacks and heaps of its threads, buffers and rings take up to 2 GiB.
const ADDRESS_SPACE_MIN: u64 = 4 << 30;

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("another node uses the state directory {}; stop it first, or name another --state", .0.display())]
    StateHeld(PathBuf),
    #[error("{0}; stop it first, or name another --disk")]
    Held(Engine),
    #[error("{0}; --executor auto serves without io_uring, too")]
    Executor(Engine),
    #[error(
        "the address space is limited to {limit_bytes} bytes, and a node that finds no more of it ends at that moment; \
         raise the limit to {ADDRESS_SPACE_MIN} bytes or more (ulimit -v), and limit memory by a control group"
    )]
    AddressSpace { limit_bytes: u64 },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("volumes could not be flushed; what was not flushed by its user may be lost: {0}")]
    Flush(Engine),
}

impl Error {
    /// The kind, for the exit code.
    pub fn code(&self) -> Code {
        match self {
            Error::Io { .. } => Code::Storage,
            Error::AddressSpace { .. } => Code::Busy,
            Error::StateHeld(_) => Code::InUse,
            Error::Held(error) | Error::Executor(error) | Error::Flush(error) => engine_code(error),
            Error::Mount(
                MountError::Foreign { .. } | MountError::Held { .. } | MountError::NotEmpty { .. },
            )
            | Error::Listen(ListenError::Answers { .. } | ListenError::NotASocket { .. }) => Code::InUse,
            Error::Mount(
                MountError::Io { .. }
                | MountError::NotADirectory { .. }
                | MountError::TooManyStale { .. }
                | MountError::NoRings(_)
                | MountError::Thread(_),
            )
            | Error::Listen(ListenError::Io { .. }) => Code::Storage,
        }
    }
}

/// Run a node until it is told to stop.
pub fn run(config: Config) -> Result<(), Error> {
    raise_open_files();
    check_address_space()?;
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .thread_name("node")
        .build()
        .map_err(|source| Error::Io { what: "start the runtime".to_owned(), source })?;
    let result = runtime.block_on(serve(config));
    end_runtime(runtime);
    result
}

async fn serve(config: Config) -> Result<(), Error> {
    let mut signals = Signals::new()?;
    let began = Instant::now();
    let (socket, group) = (config.socket.clone(), config.socket_group.as_ref().map(|group| group.id));
    let Some(node) = start_unless_told(config, &mut signals).await? else {
        tracing::info!("stopped before it was ready");
        return Ok(());
    };
    let listener = match Listener::bind(&socket, group) {
        Ok(listener) => listener,
        Err(error) => {
            // The reason that counts is that there is no socket.
            drop(stop(node).await);
            return Err(error.into());
        }
    };
    tracing::info!(
        socket = %listener.path().display(), mount = %node.mount_dir.display(), volumes = node.volumes.all().len(),
        "ready after {} ms", began.elapsed().as_millis()
    );
    let over = CancellationToken::new();
    let context = Context { node: node.clone(), metrics: Arc::new(Metrics::default()) };
    let server = tokio::spawn(server::serve(listener, context, over.clone(), REQUESTS_GRACE));
    let watchdog = systemd::ready();
    reopen_in_doubt(&node);

    let name = signals.next().await;
    tracing::info!("{name}: stopping; a second signal aborts");
    tokio::spawn(async move { abort(signals.next().await) });
    systemd::stopping();
    node.close();
    over.cancel();
    if let Err(error) = server.await {
        tracing::error!(%error, "the server ended badly");
    }
    let result = stop(node).await;
    drop(watchdog);
    match &result {
        Ok(()) => tracing::info!("stopped"),
        Err(error) => tracing::error!(%error, "stopped"),
    }
    result
}

/// Everything but the socket; nothing, when a signal comes first. What has been done by then is undone in order.
async fn start_unless_told(config: Config, signals: &mut Signals) -> Result<Option<Arc<LocalNode>>, Error> {
    let given_up = CancellationToken::new();
    let (seen, runtime) = (given_up.clone(), Handle::current());
    let mut start = tokio::task::spawn_blocking(move || start(&config, runtime, &seen));
    let join = |error| Error::Io { what: "start".to_owned(), source: io::Error::other(error) };
    let name = tokio::select! {
        started = &mut start => return started.map_err(join)?,
        name = signals.next() => name,
    };
    tracing::info!("{name}: the start is given up; a second signal aborts");
    given_up.cancel();
    let started = tokio::select! {
        started = timeout(START_GRACE, start) => started,
        name = signals.next() => abort(name),
    };
    match started {
        Ok(started) => match started.map_err(join)?? {
            None => Ok(None),
            // It was ready at the same moment.
            Some(node) => stop(node).await.map(|()| None),
        },
        Err(_) => {
            // No thread can be made to end; nothing has been acknowledged to anybody.
            tracing::error!("the start did not end within {} s: aborting", START_GRACE.as_secs());
            process::exit(1);
        }
    }
}

/// As with SIGKILL: the next start clears up.
fn abort(name: &str) -> ! {
    tracing::error!("{name} again: aborting; the next start clears up");
    process::exit(1)
}

fn start(
    config: &Config,
    runtime: Handle,
    given_up: &CancellationToken,
) -> Result<Option<Arc<LocalNode>>, Error> {
    let failed = |what: String| move |source| Error::Io { what, source };
    let state = StateDir::open(&config.state).map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => Error::StateHeld(config.state.clone()),
        _ => Error::Io { what: format!("open {}", config.state.display()), source },
    })?;
    if let Some(parent) = config.socket.parent() {
        std::fs::create_dir_all(parent).map_err(failed(format!("create {}", parent.display())))?;
    }
    if config.executor == Executor::Ring {
        bedplate_engine::exec::ring::probe().map_err(Error::Executor)?;
    }
    let mut disks = Disks::take(&config.disks, &state, config.executor.into()).map_err(Error::Held)?;
    if given_up.is_cancelled() {
        return Ok(None);
    }
    let jobs = Arc::new(Jobs::default());
    let views = Views::new(jobs.clone());
    let (bases, host) = (Arc::new(Bases::default()), Arc::new(Host::default()));
    let settings = images::Settings {
        jobs_running_max: config.image_jobs.get(),
        http: config.http.clone(),
        base_cache: config.base_cache,
        reserve: config.image_reserve,
        deadline: config.image_deadline,
        ..images::Settings::default()
    };
    let images = Images::open(disks.image_dirs(), settings, host.clone(), runtime.clone());
    bases.0.set(images.clone());
    disks.serve(&(bases as Arc<dyn BaseSource>), || !given_up.is_cancelled());
    let volumes = Arc::new(Volumes::new(disks.ready(), disks.unserved()));
    host.0.set((volumes.clone(), views.clone()));

    if given_up.is_cancelled() {
        runtime.block_on(stop_images(&images));
        return Ok(None);
    }
    let files = Files::new(volumes.clone(), images.clone(), config.mount.clone());
    let mount = match Mount::start(&config.mount, Arc::new(files), mount_options(config)) {
        Ok(mount) => mount,
        Err(error) => {
            // What they have is kept for the next start.
            runtime.block_on(stop_images(&images));
            return Err(error.into());
        }
    };
    // The kernel's name for it, without links: devices are known by the paths of their files.
    let mount_dir = mount.dir().to_owned();
    let losetup = Losetup::new(runtime.clone());
    let go_on = || !given_up.is_cancelled();
    let attachments = Attachments::open(losetup, state, &mount_dir, &mount.file_system(), go_on);
    volumes.disks().iter().for_each(|disk| views.tidy(disk));
    Ok(Some(Arc::new(LocalNode {
        disks,
        volumes,
        views,
        images,
        jobs,
        attachments,
        mount_dir,
        state_dir: config.state.clone(),
        mount: Mutex::new(Some(mount)),
        closing: AtomicBool::new(false),
        started_at: Timestamp::now(),
        runtime,
    })))
}

fn mount_options(config: &Config) -> MountOptions {
    MountOptions {
        volume_mode: config.mount_mode,
        image_mode: Mode::read_only(config.mount_mode),
        sharing: config.sharing,
        threads: config.threads,
        transport: config.fuse_transport.into(),
        latency: config.latency,
    }
}

/// A volume whose image is in doubt is opened as soon as the image has been verified again.
fn reopen_in_doubt(node: &Arc<LocalNode>) {
    for located in node.volumes.all() {
        let Ok(info) = node.volumes.info(&located) else { continue };
        let (true, Some(image)) = (located.open().is_err(), info.image) else { continue };
        let node = node.clone();
        tokio::spawn(async move {
            // Whatever came of it, the volume's reason is told anew.
            drop(node.images.wait(&image.uuid.to_string(), REOPEN_WAIT).await);
            let disk = located.disk.clone();
            let name = located.name.clone();
            let reopened = tokio::task::spawn_blocking(move || disk.reopen(&name)).await;
            match reopened {
                Ok(Ok(())) => tracing::info!(volume = %located.served, "served again"),
                Ok(Err(error)) => tracing::error!(volume = %located.served, %error, "not served"),
                Err(error) => tracing::error!(volume = %located.served, %error, "not served"),
            }
        });
    }
}

/// Stop what runs, let go of the mount, and have everything on disk.
async fn stop(node: Arc<LocalNode>) -> Result<(), Error> {
    node.close();
    stop_images(&node.images).await;
    let stopped = tokio::task::spawn_blocking(move || stop_blocking(&node)).await;
    stopped
        .unwrap_or_else(|error| Err(Error::Io { what: "stop".to_owned(), source: io::Error::other(error) }))
}

async fn stop_images(images: &Images) {
    if !images.shutdown(JOBS_GRACE).await {
        tracing::warn!("image jobs did not stop in time; they go on at the next start");
    }
}

fn stop_blocking(node: &LocalNode) -> Result<(), Error> {
    // First, so that whatever goes wrong later finds it on disk.
    if let Err(error) = flush(node) {
        tracing::error!(%error, "flush");
    }
    for job in node.jobs.shut_down(JOBS_GRACE) {
        tracing::warn!(object = %job, "a job did not stop in time");
    }
    for device in node.attachments.shut_down() {
        tracing::warn!(device = %device.display(), "still in use; it gives errors once the mount is gone");
    }
    let mount = node.mount().take();
    match mount.map(|mount| mount.stop(MOUNT_GRACE)) {
        None | Some(Stopped::Unmounted | Stopped::Already(_)) => {}
        Some(Stopped::Drained { open }) => {
            tracing::warn!(files = ?open, "the mount was busy and therefore detached; its last user has gone");
        }
        Some(Stopped::CutOff { open }) => {
            tracing::warn!(files = ?open, "the mount was busy and is detached; its users get errors from now on");
        }
    }
    flush(node)
}

fn flush(node: &LocalNode) -> Result<(), Error> {
    node.volumes.disks().iter().map(|disk| disk.flush()).fold(Ok(()), Result::and).map_err(Error::Flush)
}

/// Whatever of the runtime still runs must not keep the process.
fn end_runtime(runtime: Runtime) {
    runtime.shutdown_timeout(RUNTIME_GRACE);
}

/// The signals that end a node.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, Error> {
        let catch =
            |kind| signal(kind).map_err(|source| Error::Io { what: "catch signals".to_owned(), source });
        Ok(Signals { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Threads reserve far more addresses than they use memory.
fn check_address_space() -> Result<(), Error> {
    match getrlimit(Resource::RLIMIT_AS) {
        Ok((limit_bytes, _)) if limit_bytes < ADDRESS_SPACE_MIN => Err(Error::AddressSpace { limit_bytes }),
        // Without a limit it is the largest number.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Layers are files: allow as many as the system lets us.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}
