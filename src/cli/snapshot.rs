//! `bedplate snapshot`: what volumes held at a moment.

use clap::Subcommand;

use super::{
    exit::Failure,
    output::{self, OutputArgs},
    wait::{self, TimeoutArgs},
};
use crate::api::{
    client::Client,
    types::{CreateSnapshot, RevertVolume, Snapshot},
};

/// Take, list, go back to and delete snapshots of volumes
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Take a snapshot; the volume may be in use
    #[command(
        after_long_help = "Every write that was acknowledged before is in it and durable: a snapshot is also a \
flush. A file system inside that is mounted is caught as a power failure would catch it.

Example:
  bedplate snapshot create web1 before-upgrade"
    )]
    Create {
        /// The volume
        volume: String,
        /// The snapshot's name: letters, digits, '.', '_' and '-', at most 64
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List a volume's snapshots, oldest first
    #[command(after_long_help = "Example:\n  bedplate snapshot list web1 -o json")]
    List {
        /// The volume
        volume: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Go back to a snapshot
    #[command(
        after_long_help = "Drops what was written since the newest snapshot; every snapshot stays, so that you \
can go forth again. The size is the snapshot's or the volume's, whichever is larger. Refused (exit 4) while anything \
has the volume open.

Examples:
  bedplate snapshot revert web1 before-upgrade
  bedplate snapshot revert web1 before-upgrade --snapshot-first broken"
    )]
    Revert {
        /// The volume
        volume: String,
        /// The snapshot
        name: String,
        /// Keep what the volume holds now as a snapshot of this name
        #[arg(long, value_name = "NAME")]
        snapshot_first: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Delete a snapshot; the volume may be in use
    #[command(
        after_long_help = "What only this snapshot holds is given back. Nothing else that can be read changes.

Example:
  bedplate snapshot delete web1 before-upgrade"
    )]
    Delete {
        /// The volume
        volume: String,
        /// The snapshot
        name: String,
        #[command(flatten)]
        timeout: TimeoutArgs,
    },
}

impl Verb {
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::Create { .. } => "snapshot create",
            Verb::List { .. } => "snapshot list",
            Verb::Revert { .. } => "snapshot revert",
            Verb::Delete { .. } => "snapshot delete",
        }
    }
}

pub async fn run(verb: Verb, client: &Client) -> Result<(), Failure> {
    match verb {
        Verb::Create { volume, name, output } => {
            let snapshot = client.create_snapshot(&volume, &CreateSnapshot { name }).await?;
            output.print(&snapshot, |snapshot| table(std::slice::from_ref(snapshot)))
        }
        Verb::List { volume, output } => output.print(&client.snapshots(&volume).await?, |list| table(list)),
        Verb::Revert { volume, name, snapshot_first, output } => {
            let volume = client.revert_volume(&volume, &name, &RevertVolume { snapshot_first }).await?;
            output.print(&volume, super::volume::details)
        }
        Verb::Delete { volume, name, timeout } => {
            let job = client.delete_snapshot(&volume, &name).await?;
            wait::job(client, job, timeout.timeout).await.map(drop)
        }
    }
}

fn table(snapshots: &[Snapshot]) -> String {
    output::listing(
        ["NAME", "SIZE", "CREATED"],
        snapshots.iter().map(|snapshot| {
            [
                snapshot.name.clone(),
                output::bytes(Some(snapshot.size_bytes)),
                output::time(snapshot.created_at),
            ]
        }),
    )
}
