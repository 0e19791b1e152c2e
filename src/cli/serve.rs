//! `bedplate serve`: a node, until it is told to stop.

use std::path::PathBuf;

use clap::Args;

use super::{exit::Failure, output};
use crate::{config::Settings, daemon, telemetry};

/// Run a node
#[derive(Args, Debug)]
#[command(
    after_long_help = "Settings come from flags, then from the environment, then from the file, then from \
defaults. The keys of the file are: state, disks, mount, socket, socket_group, mount_mode, allow_other, threads, executor, \
fuse_transport, low_latency, image_jobs, image_deadline, image_reserve, base_cache, log, log_format, and the table [http], which says how patient downloads are (here with its defaults):

  [http]
  connect_timeout = \"8s\"     # the longest that making a connection may take
  idle_timeout = \"30s\"       # the longest that a connection may say nothing
  first_byte_within = \"28s\"  # an origin that never delivers is given up within this
  stalled_max = \"15m\"        # a download that has begun is given up when nothing new came for so long

SIGTERM and SIGINT end it: new work is refused, volumes are flushed, the mount goes. A second signal aborts.

Examples:
  bedplate serve --state /var/lib/bedplate --disk /srv/a --disk /srv/b
  BEDPLATE_LOG=debug bedplate serve --config ./bedplate.toml
  bedplate serve --config /etc/bedplate/bedplate.toml --check-config"
)]
pub struct ServeArgs {
    /// Settings in TOML [default: /etc/bedplate/bedplate.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "BEDPLATE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Check the settings, print the result as a file would have it, and exit
    #[arg(long)]
    pub check_config: bool,
    #[command(flatten)]
    pub settings: Settings,
}

pub fn run(args: ServeArgs, socket: Option<PathBuf>) -> Result<(), Failure> {
    let settings = Settings { socket, ..args.settings };
    let config = settings.load(args.config.as_deref())?;
    if args.check_config {
        return output::print(config.to_toml().trim_end());
    }
    telemetry::init(&config.log, config.log_format);
    daemon::run(config).map_err(|error| Failure::Serve { code: error.code(), detail: error.to_string() })
}
