//! What the node says about itself: its log and its figures.
//!
//! Owns how the log is set up ([`init`]) and every figure of `/metrics` with its name ([`Metrics`]). Figures that the
//! node knows anyway (images, volumes, disks) are read when they are asked for, so nothing on the data path counts for
//! them; only requests are counted as they happen.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

use crate::api::types::{
    DiskState, Executor, Image, ImageState, IoPath, NodeInfo, Transport, Volume, VolumeState,
};

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people; without times under systemd, whose journal has its own.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Write the log to stderr. `filter` is a level (`info`) or directives (`info,bedplate::api=debug`), checked by
/// [`check_filter`]. Does nothing when there is a log already.
pub fn init(filter: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let set = match format {
        LogFormat::Json => log.json().try_init(),
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            log.with_ansi(false).without_time().try_init()
        }
        LogFormat::Text => {
            let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
            log.with_ansi(terminal).try_init()
        }
    };
    drop(set);
}

/// Whether the log understands this filter.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter).map(|_| ()).map_err(|error| error.to_string())
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DiskLabels {
    disk: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExecutorLabels {
    disk: String,
    executor: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TransportLabels {
    transport: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VolumeLabels {
    volume: String,
}

/// The figures of a node.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Histogram,
    /// Held while the gauges are set and written, so that two readers do not mix.
    gauges: Mutex<Gauges>,
}

#[derive(Clone, Default)]
struct Gauges {
    images: Family<StateLabels, Gauge>,
    volumes: Family<StateLabels, Gauge>,
    volume_allocated: Family<VolumeLabels, Gauge>,
    disk_size: Family<DiskLabels, Gauge>,
    disk_free: Family<DiskLabels, Gauge>,
    disk_up: Family<DiskLabels, Gauge>,
    disk_executor: Family<ExecutorLabels, Gauge>,
    mount_transport: Family<TransportLabels, Gauge>,
    open_files: Family<PathLabels, Gauge>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        let requests = Family::<RequestLabels, Counter>::default();
        let request_seconds = Histogram::new([0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0]);
        let gauges = Gauges::default();
        let mut registry = Registry::with_prefix("bedplate");
        registry.register("requests", "Requests answered", requests.clone());
        registry.register_with_unit(
            "request_duration",
            "From a request's head to the head of its answer",
            Unit::Seconds,
            request_seconds.clone(),
        );
        registry.register("images", "Images by state", gauges.images.clone());
        registry.register("volumes", "Volumes by state", gauges.volumes.clone());
        let bytes = || Unit::Bytes;
        registry.register_with_unit(
            "volume_allocated",
            "What a volume's own layers take on its disk",
            bytes(),
            gauges.volume_allocated.clone(),
        );
        registry.register_with_unit(
            "disk_size",
            "Size of a disk's file system",
            bytes(),
            gauges.disk_size.clone(),
        );
        registry.register_with_unit("disk_free", "Free space of a disk", bytes(), gauges.disk_free.clone());
        registry.register("disk_up", "Whether a disk is served", gauges.disk_up.clone());
        let about = "What carries a disk's requests out: 1 for that";
        registry.register("disk_executor", about, gauges.disk_executor.clone());
        let about = "How the mount's requests come: 1 for that";
        registry.register("mount_transport", about, gauges.mount_transport.clone());
        let about = "Images and volumes that are open through the mount, by the way that their bytes go";
        registry.register("open_files", about, gauges.open_files.clone());
        Metrics { registry, requests, request_seconds, gauges: Mutex::new(gauges) }
    }
}

impl Metrics {
    pub const MEDIA_TYPE: &'static str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

    /// A request was answered.
    pub fn request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let labels = RequestLabels { method: method.to_owned(), route: route.to_owned(), status };
        self.requests.get_or_create(&labels).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// Everything in OpenMetrics text.
    pub fn render(&self, node: &NodeInfo, images: &[Image], volumes: &[Volume]) -> String {
        let gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.set(node, images, volumes);
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "the figures are not complete");
        }
        text
    }
}

impl Gauges {
    fn set(&self, node: &NodeInfo, images: &[Image], volumes: &[Volume]) {
        let states = [
            ("pending", ImageState::Pending),
            ("in_progress", ImageState::InProgress),
            ("ready", ImageState::Ready),
            ("failed", ImageState::Failed),
            ("unknown", ImageState::Unknown),
        ];
        for (word, state) in states {
            let count = images.iter().filter(|image| image.state == state).count();
            self.images.get_or_create(&StateLabels { state: word }).set(gauge(count));
        }
        let states = [
            ("ready", VolumeState::Ready),
            ("failed", VolumeState::Failed),
            ("unknown", VolumeState::Unknown),
        ];
        for (word, state) in states {
            let count = volumes.iter().filter(|volume| volume.state == state).count();
            self.volumes.get_or_create(&StateLabels { state: word }).set(gauge(count));
        }
        // Those of volumes that are gone go too.
        self.volume_allocated.clear();
        for volume in volumes {
            let labels = VolumeLabels { volume: volume.name.clone() };
            self.volume_allocated.get_or_create(&labels).set(gauge(volume.allocated_bytes));
        }
        for (word, transport) in [("uring", Transport::Uring), ("classic", Transport::Classic)] {
            let used = u32::from(node.transport == Some(transport));
            self.mount_transport.get_or_create(&TransportLabels { transport: word }).set(used.into());
        }
        let paths = [
            ("uring", IoPath::Uring),
            ("classic", IoPath::Classic),
            ("cached", IoPath::Cached),
            ("passthrough", IoPath::Passthrough),
        ];
        for (word, path) in paths {
            let open =
                images.iter().map(|image| image.io_path).chain(volumes.iter().map(|volume| volume.io_path));
            let count = open.filter(|open| *open == Some(path)).count();
            self.open_files.get_or_create(&PathLabels { path: word }).set(gauge(count));
        }
        for disk in &node.disks {
            let labels = DiskLabels { disk: disk.path.clone() };
            self.disk_size.get_or_create(&labels).set(gauge(disk.size_bytes));
            self.disk_free.get_or_create(&labels).set(gauge(disk.free_bytes));
            let up = match disk.state {
                DiskState::Ready => 1,
                DiskState::Failed => 0,
            };
            self.disk_up.get_or_create(&labels).set(up);
            for (word, executor) in [("ring", Executor::Ring), ("blocking", Executor::Blocking)] {
                let labels = ExecutorLabels { disk: disk.path.clone(), executor: word };
                let used = u32::from(disk.executor == Some(executor));
                self.disk_executor.get_or_create(&labels).set(used.into());
            }
        }
    }
}

fn gauge(n: impl TryInto<i64>) -> i64 {
    n.try_into().unwrap_or(i64::MAX)
}
