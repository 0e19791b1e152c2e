//! The configuration of a node: file, then environment, then flags.
//!
//! Owns [`Config`], what a node runs with; [`Settings`], one layer of it as it was given; and the file's reading, which
//! refuses unknown keys by name. The environment and the flags arrive as one layer, because the command line parser
//! lets a flag win over its variable. Everything is checked here, before anything is opened: past this file a
//! configuration is sound, and its paths are absolute.

use std::{
    env,
    ffi::OsString,
    fs, io,
    num::NonZeroUsize,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use bedplate_engine::exec::choice::ExecutorChoice;
use bedplate_fuse::{Latency, Mode, Sharing, TransportChoice};
use clap::Args;
use nix::unistd::Group;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::{
    duration::{parse_duration, show_duration},
    images::{BaseCache, HttpSettings},
    prep::room::Reserve,
    telemetry::{self, LogFormat},
};

/// Read when it exists and no other file is named.
pub const CONFIG_FILE_DEFAULT: &str = "/etc/bedplate/bedplate.toml";
const STATE_DEFAULT: &str = "/var/lib/bedplate";
const SOCKET_NAME: &str = "bedplate.sock";
/// How alike an unknown key and a known one must be for a suggestion.
const SUGGESTION_LIKENESS_MIN: f64 = 0.7;
/// Links that are followed in one path, as many as the kernel does.
const LINKS_MAX: usize = 40;
/// Image jobs that run at once.
pub const IMAGE_JOBS_MAX: usize = 64;
const IMAGE_DEADLINE_DEFAULT: Duration = Duration::from_secs(24 * 60 * 60);

/// One layer: what the file, or the environment and the flags, say. A field is a key of the file.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Directory for what the node keeps beside its disks [default: /var/lib/bedplate]
    #[arg(long, value_name = "DIR", env = "BEDPLATE_STATE")]
    pub state: Option<PathBuf>,
    /// Directory on a local file system that holds images and volumes; may be repeated [default: STATE/disk]
    ///
    /// In the environment several are separated by colons; in the file the key is `disks`, a list.
    #[arg(long = "disk", value_name = "DIR", env = "BEDPLATE_DISKS", value_delimiter = ':')]
    pub disks: Option<Vec<PathBuf>>,
    /// Directory to mount on, for images/NAME and volumes/NAME [default: STATE/mount]
    #[arg(long, value_name = "DIR", env = "BEDPLATE_MOUNT")]
    pub mount: Option<PathBuf>,
    /// Permission bits of volume files, octal; image files have them without the write bits [default: 0600]
    #[arg(long, value_name = "MODE", env = "BEDPLATE_MOUNT_MODE")]
    pub mount_mode: Option<String>,
    /// Let users other than the node's into the mount, as far as the mode allows
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL",
          env = "BEDPLATE_ALLOW_OTHER")]
    pub allow_other: Option<bool>,
    /// Threads that serve the mount [default: 16]
    #[arg(long, value_name = "COUNT", env = "BEDPLATE_THREADS")]
    pub threads: Option<NonZeroUsize>,
    /// What carries requests out: workers with an io_uring each (ring), the thread that asks (blocking), or each
    /// where it is faster and works [default: auto]
    #[arg(long, value_name = "EXECUTOR", env = "BEDPLATE_EXECUTOR")]
    pub executor: Option<Executor>,
    /// How the mount's requests come: by io_uring, on /dev/fuse, or by io_uring where the kernel offers it
    /// [default: auto]
    #[arg(long, value_name = "TRANSPORT", env = "BEDPLATE_FUSE_TRANSPORT")]
    pub fuse_transport: Option<FuseTransport>,
    /// Keep processors from sleeping while requests come, so that single requests may be answered sooner: idle processors
    /// burn power, and on a virtual machine the host's time
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL",
          env = "BEDPLATE_LOW_LATENCY")]
    pub low_latency: Option<bool>,
    /// Images that are fetched or verified at once; others wait [default: 4]
    #[arg(long, value_name = "COUNT", env = "BEDPLATE_IMAGE_JOBS")]
    pub image_jobs: Option<NonZeroUsize>,
    /// The longest that bringing in or verifying an image may take where nobody says another (90s, 10m, 24h) [default: 24h]
    #[arg(long, value_name = "TIME", env = "BEDPLATE_IMAGE_DEADLINE", value_parser = parse_duration)]
    #[serde(deserialize_with = "duration_of_text")]
    pub image_deadline: Option<Duration>,
    /// Whether the page cache keeps what volumes read of their images: one copy that all share, or none, for a machine
    /// whose memory belongs to its guests [default: shared]
    #[arg(long, value_name = "CACHE", env = "BEDPLATE_BASE_CACHE")]
    pub base_cache: Option<BaseCache>,
    /// Free bytes that images leave on each disk for volumes: a size (512M, 10G), or auto, which is 1 GiB or 2 % of the
    /// file system if that is more, but at most a quarter of it [default: auto]
    #[arg(long, value_name = "SIZE", env = "BEDPLATE_IMAGE_RESERVE")]
    pub image_reserve: Option<Reserve>,
    /// What to log: error, warn, info, debug, trace, or directives such as info,bedplate::api=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "BEDPLATE_LOG")]
    pub log: Option<String>,
    /// How a line of the log looks [default: text]
    #[arg(long, value_name = "FORMAT", env = "BEDPLATE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Group whose members may speak to the node, too [default: the node's own group]
    #[arg(long, value_name = "GROUP", env = "BEDPLATE_SOCKET_GROUP")]
    pub socket_group: Option<String>,
    /// Given on the command line for every command, so no flag of this group.
    #[arg(skip)]
    pub socket: Option<PathBuf>,
    /// Only in the file.
    #[arg(skip)]
    pub http: Option<HttpPatience>,
}

/// What carries requests out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Executor {
    /// Workers with an io_uring each, for everything; without io_uring nothing is served.
    Ring,
    /// The thread that asks.
    Blocking,
    /// Workers for what is submitted, where the kernel has io_uring and allows it; whoever waits anyway does it itself.
    #[default]
    Auto,
}

impl From<Executor> for ExecutorChoice {
    fn from(executor: Executor) -> ExecutorChoice {
        match executor {
            Executor::Ring => ExecutorChoice::Ring,
            Executor::Blocking => ExecutorChoice::Blocking,
            Executor::Auto => ExecutorChoice::Auto,
        }
    }
}

/// How the mount's requests come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FuseTransport {
    /// By io_uring, or the node does not start: Linux 6.14 or later, switched on (see `bedplate doctor`).
    Uring,
    /// On /dev/fuse.
    Classic,
    /// By io_uring where the kernel offers it.
    #[default]
    Auto,
}

impl From<FuseTransport> for TransportChoice {
    fn from(transport: FuseTransport) -> TransportChoice {
        match transport {
            FuseTransport::Uring => TransportChoice::Uring,
            FuseTransport::Classic => TransportChoice::Classic,
            FuseTransport::Auto => TransportChoice::Auto,
        }
    }
}

/// The table `[http]`: how patient downloads are. Times are as 30s or 15m, and none is below 1s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpPatience {
    #[serde(deserialize_with = "duration_of_text")]
    pub connect_timeout: Option<Duration>,
    #[serde(deserialize_with = "duration_of_text")]
    pub idle_timeout: Option<Duration>,
    #[serde(deserialize_with = "duration_of_text")]
    pub first_byte_within: Option<Duration>,
    #[serde(deserialize_with = "duration_of_text")]
    pub stalled_max: Option<Duration>,
}

/// The keys of the file.
const KEYS: [&str; 18] = [
    "state",
    "disks",
    "mount",
    "mount_mode",
    "allow_other",
    "threads",
    "executor",
    "fuse_transport",
    "low_latency",
    "image_jobs",
    "image_deadline",
    "image_reserve",
    "base_cache",
    "log",
    "log_format",
    "socket",
    "http",
    "socket_group",
];

/// A group that the system knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketGroup {
    pub name: String,
    pub id: u32,
}

/// What a node runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub state: PathBuf,
    pub disks: Vec<PathBuf>,
    pub mount: PathBuf,
    pub socket: PathBuf,
    pub socket_group: Option<SocketGroup>,
    pub mount_mode: Mode,
    pub sharing: Sharing,
    pub threads: NonZeroUsize,
    pub executor: Executor,
    pub fuse_transport: FuseTransport,
    pub latency: Latency,
    pub image_jobs: NonZeroUsize,
    pub image_deadline: Duration,
    pub image_reserve: Reserve,
    pub http: HttpSettings,
    pub base_cache: BaseCache,
    pub log: String,
    pub log_format: LogFormat,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {message}", path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("{}: unknown key {key:?}; {}", path.display(), advice(suggestion.as_deref()))]
    UnknownKey { path: PathBuf, key: String, suggestion: Option<&'static str> },
    #[error("{key} = {value:?}: {reason}")]
    Value { key: &'static str, value: String, reason: String },
}

fn advice(suggestion: Option<&str>) -> String {
    match suggestion {
        Some(key) => format!("did you mean {key:?}?"),
        None => format!("the keys are {}", KEYS.join(", ")),
    }
}

/// Where the command line finds the node when nobody says.
pub fn default_socket() -> PathBuf {
    socket_in(env::var_os("BEDPLATE_STATE"))
}

/// Beside the state that a node would have with this environment.
fn socket_in(state: Option<OsString>) -> PathBuf {
    let state = state.filter(|state| !state.is_empty());
    state.map_or_else(|| PathBuf::from(STATE_DEFAULT), PathBuf::from).join(SOCKET_NAME)
}

impl Settings {
    /// The layer in a file.
    pub fn from_file(path: &Path) -> Result<Settings, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Settings::parse(&text, path)
    }

    /// The layer that `text` describes; `path` is named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Settings, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            message: one_line(text, &error),
        };
        let table: toml::Table = toml::from_str(text).map_err(syntax)?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let likeness = |known: &str| strsim::jaro_winkler(key, known);
            let suggestion = KEYS
                .into_iter()
                .filter(|known| likeness(known) >= SUGGESTION_LIKENESS_MIN)
                .max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key: key.clone(), suggestion });
        }
        toml::from_str(text).map_err(syntax)
    }

    /// This layer, and `below` where it is silent.
    pub fn over(self, below: Settings) -> Settings {
        Settings {
            state: self.state.or(below.state),
            disks: self.disks.or(below.disks),
            mount: self.mount.or(below.mount),
            mount_mode: self.mount_mode.or(below.mount_mode),
            allow_other: self.allow_other.or(below.allow_other),
            threads: self.threads.or(below.threads),
            executor: self.executor.or(below.executor),
            fuse_transport: self.fuse_transport.or(below.fuse_transport),
            low_latency: self.low_latency.or(below.low_latency),
            image_jobs: self.image_jobs.or(below.image_jobs),
            image_deadline: self.image_deadline.or(below.image_deadline),
            image_reserve: self.image_reserve.or(below.image_reserve),
            base_cache: self.base_cache.or(below.base_cache),
            log: self.log.or(below.log),
            log_format: self.log_format.or(below.log_format),
            socket: self.socket.or(below.socket),
            http: self.http.or(below.http),
            socket_group: self.socket_group.or(below.socket_group),
        }
    }

    /// The configuration of these settings over those of `file`, or of the default file where there is one.
    pub fn load(self, file: Option<&Path>) -> Result<Config, ConfigError> {
        let below = match file {
            Some(path) => Settings::from_file(path)?,
            None if Path::new(CONFIG_FILE_DEFAULT).exists() => {
                Settings::from_file(Path::new(CONFIG_FILE_DEFAULT))?
            }
            None => Settings::default(),
        };
        self.over(below).finish()
    }

    /// Fill in the defaults and check everything.
    pub fn finish(self) -> Result<Config, ConfigError> {
        let state = absolute("state", self.state.unwrap_or_else(|| STATE_DEFAULT.into()))?;
        let disks = self.disks.unwrap_or_else(|| vec![state.join("disk")]);
        let disks = disks.into_iter().map(|disk| absolute("disks", disk)).collect::<Result<Vec<_>, _>>()?;
        // By the name that the kernel has for it: its files are told by it, and it is compared with others.
        let mount = resolve(&absolute("mount", self.mount.unwrap_or_else(|| state.join("mount")))?);
        let socket = absolute("socket", self.socket.unwrap_or_else(|| state.join(SOCKET_NAME)))?;
        check_places(&disks, &mount, &socket)?;
        let socket_group = self.socket_group.map(find_group).transpose()?;

        let mode = self.mount_mode.unwrap_or_else(|| "0600".to_owned());
        let mount_mode = u16::from_str_radix(&mode, 8).ok().and_then(Mode::new).ok_or_else(|| {
            let reason = "not permission bits in octal, such as 0600 or 0660".to_owned();
            ConfigError::Value { key: "mount_mode", value: mode, reason }
        })?;
        let threads = at_most("threads", self.threads, 16, bedplate_fuse::THREADS_MAX)?;
        let image_jobs = at_most("image_jobs", self.image_jobs, 4, IMAGE_JOBS_MAX)?;
        let image_deadline =
            at_least_a_second("image_deadline", self.image_deadline, IMAGE_DEADLINE_DEFAULT)?;
        let http = self.http.unwrap_or_default().finish()?;
        let log = self.log.unwrap_or_else(|| "info".to_owned());
        telemetry::check_filter(&log).map_err(|reason| ConfigError::Value {
            key: "log",
            value: log.clone(),
            reason,
        })?;
        let sharing = match self.allow_other {
            Some(true) => Sharing::Others,
            Some(false) | None => Sharing::Owner,
        };
        let log_format = self.log_format.unwrap_or_default();
        Ok(Config {
            state,
            disks,
            mount,
            socket,
            socket_group,
            mount_mode,
            sharing,
            threads,
            executor: self.executor.unwrap_or_default(),
            fuse_transport: self.fuse_transport.unwrap_or_default(),
            latency: match self.low_latency {
                Some(true) => Latency::Low,
                Some(false) | None => Latency::Normal,
            },
            image_jobs,
            image_deadline,
            image_reserve: self.image_reserve.unwrap_or_default(),
            http,
            base_cache: self.base_cache.unwrap_or_default(),
            log,
            log_format,
        })
    }
}

impl HttpPatience {
    fn finish(self) -> Result<HttpSettings, ConfigError> {
        let sound = HttpSettings::default();
        Ok(HttpSettings {
            connect_timeout: at_least_a_second(
                "connect_timeout",
                self.connect_timeout,
                sound.connect_timeout,
            )?,
            idle_timeout: at_least_a_second("idle_timeout", self.idle_timeout, sound.idle_timeout)?,
            first_byte_within: at_least_a_second(
                "first_byte_within",
                self.first_byte_within,
                sound.first_byte_within,
            )?,
            stalled_max: at_least_a_second("stalled_max", self.stalled_max, sound.stalled_max)?,
            ..sound
        })
    }
}

impl Config {
    /// As a file that gives this configuration.
    pub fn to_toml(&self) -> String {
        #[derive(Serialize)]
        struct File<'a> {
            state: &'a Path,
            disks: &'a [PathBuf],
            mount: &'a Path,
            socket: &'a Path,
            #[serde(skip_serializing_if = "Option::is_none")]
            socket_group: Option<&'a str>,
            mount_mode: String,
            allow_other: bool,
            threads: NonZeroUsize,
            executor: Executor,
            fuse_transport: FuseTransport,
            low_latency: bool,
            image_jobs: NonZeroUsize,
            image_deadline: String,
            image_reserve: Reserve,
            base_cache: BaseCache,
            log: &'a str,
            log_format: LogFormat,
            http: Http,
        }
        #[derive(Serialize)]
        struct Http {
            connect_timeout: String,
            idle_timeout: String,
            first_byte_within: String,
            stalled_max: String,
        }
        let file = File {
            state: &self.state,
            disks: &self.disks,
            mount: &self.mount,
            socket: &self.socket,
            socket_group: self.socket_group.as_ref().map(|group| group.name.as_str()),
            mount_mode: format!("{:04o}", self.mount_mode.bits()),
            allow_other: matches!(self.sharing, Sharing::Others),
            threads: self.threads,
            executor: self.executor,
            fuse_transport: self.fuse_transport,
            low_latency: matches!(self.latency, Latency::Low),
            image_jobs: self.image_jobs,
            image_deadline: show_duration(self.image_deadline),
            image_reserve: self.image_reserve,
            base_cache: self.base_cache,
            log: &self.log,
            log_format: self.log_format,
            http: Http {
                connect_timeout: show_duration(self.http.connect_timeout),
                idle_timeout: show_duration(self.http.idle_timeout),
                first_byte_within: show_duration(self.http.first_byte_within),
                stalled_max: show_duration(self.http.stalled_max),
            },
        };
        // Only a path that is not UTF-8 cannot be written; it is said instead.
        toml::to_string(&file).unwrap_or_else(|error| format!("# cannot be written as a file: {error}\n"))
    }
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|error| ConfigError::Value {
        key,
        value: path.display().to_string(),
        reason: error.to_string(),
    })
}

/// The path without links and dots, as far as that can be told. Nothing on the way is asked for more than where it
/// leads, since a look at a mount whose node is gone may hang; what is not there yet is no link.
fn resolve(path: &Path) -> PathBuf {
    let mut found = PathBuf::new();
    let mut links = 0;
    let mut rest = vec![path.to_owned()];
    while let Some(next) = rest.pop() {
        let mut components = next.components();
        let Some(component) = components.next() else { continue };
        rest.push(components.as_path().to_owned());
        match component {
            Component::RootDir => found = PathBuf::from("/"),
            Component::ParentDir => {
                found.pop();
            }
            Component::CurDir | Component::Prefix(_) => {}
            Component::Normal(name) => match found.join(name).read_link() {
                Ok(target) if links < LINKS_MAX => {
                    links += 1;
                    rest.push(target);
                }
                Ok(_) | Err(_) => found.push(name),
            },
        }
    }
    found
}

/// Refuse directories that would hide or hold one another, whatever links lead there; `mount` has none.
fn check_places(disks: &[PathBuf], mount: &Path, socket: &Path) -> Result<(), ConfigError> {
    let refuse = |key, path: &Path, reason: String| {
        Err(ConfigError::Value { key, value: path.display().to_string(), reason })
    };
    if disks.is_empty() {
        return refuse("disks", Path::new(""), "a node needs at least one disk".to_owned());
    }
    let real: Vec<PathBuf> = disks.iter().map(|disk| resolve(disk)).collect();
    for (index, (disk, real_disk)) in disks.iter().zip(&real).enumerate() {
        if real.iter().take(index).any(|other| other == real_disk) {
            return refuse("disks", disk, "named twice".to_owned());
        }
        if mount.starts_with(real_disk) || real_disk.starts_with(mount) {
            return refuse("mount", mount, format!("must lie apart from the disk {}", disk.display()));
        }
    }
    if socket.starts_with(mount) || resolve(socket).starts_with(mount) {
        return refuse("socket", socket, format!("must not lie under the mount {}", mount.display()));
    }
    Ok(())
}

fn find_group(name: String) -> Result<SocketGroup, ConfigError> {
    let reason = match Group::from_name(&name) {
        Ok(Some(group)) => return Ok(SocketGroup { name, id: group.gid.as_raw() }),
        Ok(None) => "no such group; `getent group` lists what there is".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(ConfigError::Value { key: "socket_group", value: name, reason })
}

fn at_most(
    key: &'static str,
    value: Option<NonZeroUsize>,
    default: usize,
    max: usize,
) -> Result<NonZeroUsize, ConfigError> {
    let value = value.or(NonZeroUsize::new(default)).unwrap_or(NonZeroUsize::MIN);
    if value.get() > max {
        return Err(ConfigError::Value { key, value: value.to_string(), reason: format!("at most {max}") });
    }
    Ok(value)
}

/// No bound that a node or a network could never keep.
fn at_least_a_second(
    key: &'static str,
    value: Option<Duration>,
    default: Duration,
) -> Result<Duration, ConfigError> {
    let value = value.unwrap_or(default);
    if value < Duration::from_secs(1) {
        let reason = "at least 1s".to_owned();
        return Err(ConfigError::Value { key, value: show_duration(value), reason });
    }
    Ok(value)
}

fn duration_of_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).map(Some).map_err(D::Error::custom)
}

/// What the parser found wrong, with its line, on one line.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', ", ");
    match error.span() {
        Some(span) => {
            let line = text.get(..span.start).unwrap_or("").matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
    }
}

#[cfg(test)]
mod tests;
