//! `bedplate volume`: copy-on-write volumes.

use clap::Subcommand;

use super::{
    VolumeAt,
    exit::Failure,
    export::{self, ExportArgs, Origin},
    output::{self, Output, OutputArgs},
    size,
    wait::{self, TimeoutArgs, WaitArgs},
};
use crate::api::{
    client::{self, Client},
    problem::Code,
    types::{CloneMethod, CloneVolume, CreateVolume, RecoverReport, ResizeVolume, Volume},
};

/// Make, grow, clone, attach, export and delete volumes
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a volume, over an image or empty
    #[command(
        after_long_help = "A volume over an image takes no space and no time, whatever the image's size. It is \
served as the file MOUNT/volumes/NAME. The size is the image's virtual size when none is given; a smaller one is \
refused.

Examples:
  bedplate volume create web1 --image debian --size 20G
  bedplate volume create scratch --size 1T"
    )]
    Create {
        /// The volume's name: letters, digits, '.', '_' and '-', at most 64, no leading dot
        name: String,
        /// The image that it begins as
        #[arg(long, value_name = "IMAGE", required_unless_present = "size")]
        image: Option<String>,
        /// Its size, such as 10G; rounded up to 512 bytes
        #[arg(long, value_name = "SIZE", value_parser = size::parse_size)]
        size: Option<u64>,
        #[command(flatten)]
        wait: WaitArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List volumes
    #[command(after_long_help = "Example:\n  bedplate volume list -o json | jq -r '.[].path'")]
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one volume
    #[command(after_long_help = "Example:\n  bedplate volume get web1 -o json | jq .allocated_bytes")]
    Get {
        /// The volume's name or uuid
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Delete a volume with its snapshots; clones of it stay
    #[command(after_long_help = "Refused (exit 4) while anything has it open.

Example:
  bedplate volume delete web1")]
    Delete {
        /// The volume's name or uuid
        name: String,
    },
    /// Grow a volume; it may be in use
    #[command(
        after_long_help = "An attached loop device grows with it; a file system inside is grown by its own \
tool, such as resize2fs. A volume does not shrink.

Example:
  bedplate volume resize web1 40G"
    )]
    Resize {
        /// The volume's name or uuid
        name: String,
        /// The new size, such as 40G; rounded up to 512 bytes
        #[arg(value_parser = size::parse_size)]
        size: u64,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Make a volume that begins as another, or as a snapshot of it
    #[command(
        after_long_help = "A clone shares the layers below it: it takes no space and no time, and either may \
be deleted. With --full everything is copied and nothing shared, not even the image.

Examples:
  bedplate volume clone web1 web2
  bedplate volume clone web1@before-upgrade probe --full"
    )]
    Clone {
        /// The volume, or a snapshot of it
        #[arg(value_name = "NAME[@SNAPSHOT]", value_parser = super::volume_at)]
        origin: VolumeAt,
        /// The new volume's name
        #[arg(value_name = "NEW")]
        new: String,
        /// Copy what was written instead of sharing it
        #[arg(long)]
        full: bool,
        #[command(flatten)]
        timeout: TimeoutArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Copy in what a volume still reads from its image, so that it needs the image no more
    #[command(after_long_help = "The volume may be in use; its snapshots stay.

Example:
  bedplate volume flatten web1")]
    Flatten {
        /// The volume's name or uuid
        name: String,
        #[command(flatten)]
        timeout: TimeoutArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Make a volume writable again after a fault, and say what was lost
    #[command(
        after_long_help = "A volume whose disk failed a sync takes no more writes, because nobody can know \
what of the last ones arrived. This reads back what did.

Example:
  bedplate volume recover web1 -o json"
    )]
    Recover {
        /// The volume's name or uuid
        name: String,
        #[command(flatten)]
        timeout: TimeoutArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a volume a loop device, and print it
    #[command(
        after_long_help = "For programs that want a block device; the file MOUNT/volumes/NAME is faster. A \
volume that has a device keeps it.

Example:
  mount \"$(bedplate volume attach web1)\" /mnt"
    )]
    Attach {
        /// The volume's name or uuid
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Take a volume's loop device away
    #[command(
        after_long_help = "Refused (exit 4) while the device is mounted or open. Without a device there is \
nothing to do.

Example:
  bedplate volume detach web1"
    )]
    Detach {
        /// The volume's name or uuid
        name: String,
    },
    /// Write a volume, or a snapshot of it, into a file or to stdout
    #[command(
        after_long_help = "The volume may be in use: it is written as it is at the start. Holes stay holes in a \
file, and are zeros on stdout.

Examples:
  bedplate volume export web1@done /srv/web1.raw
  bedplate volume export web1 - | zstd > web1.raw.zst"
    )]
    Export {
        /// The volume, or a snapshot of it
        #[arg(value_name = "NAME[@SNAPSHOT]", value_parser = super::volume_at)]
        origin: VolumeAt,
        #[command(flatten)]
        export: ExportArgs,
    },
}

impl Verb {
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::Create { .. } => "volume create",
            Verb::List { .. } => "volume list",
            Verb::Get { .. } => "volume get",
            Verb::Delete { .. } => "volume delete",
            Verb::Resize { .. } => "volume resize",
            Verb::Clone { .. } => "volume clone",
            Verb::Flatten { .. } => "volume flatten",
            Verb::Recover { .. } => "volume recover",
            Verb::Attach { .. } => "volume attach",
            Verb::Detach { .. } => "volume detach",
            Verb::Export { .. } => "volume export",
        }
    }
}

pub async fn run(verb: Verb, client: &Client) -> Result<(), Failure> {
    match verb {
        Verb::Create { name, image, size, wait, output } => {
            let request = CreateVolume { name, image, size_bytes: size };
            output.print(&create(request, wait, client).await?, details)
        }
        Verb::List { output } => output.print(&client.volumes().await?, |volumes| table(volumes)),
        Verb::Get { name, output } => output.print(&client.volume(&name).await?, details),
        Verb::Delete { name } => Ok(client.delete_volume(&name).await?),
        Verb::Resize { name, size, output } => {
            let volume = client.resize_volume(&name, &ResizeVolume { size_bytes: size }).await?;
            output.print(&volume, details)
        }
        Verb::Clone { origin, new, full, timeout, output } => {
            let method = if full { CloneMethod::Full } else { CloneMethod::Linked };
            let request = CloneVolume { name: new.clone(), snapshot: origin.snapshot, method };
            let job = client.clone_volume(&origin.name, &request).await?;
            wait::job(client, job, timeout.timeout).await?;
            output.print(&client.volume(&new).await?, details)
        }
        Verb::Flatten { name, timeout, output } => {
            let job = client.flatten_volume(&name).await?;
            wait::job(client, job, timeout.timeout).await?;
            output.print(&client.volume(&name).await?, details)
        }
        Verb::Recover { name, timeout, output } => {
            let job = client.recover_volume(&name).await?;
            let job = wait::job(client, job, timeout.timeout).await?;
            output.print(&job.report.unwrap_or_default(), recovered)
        }
        Verb::Attach { name, output } => {
            let volume = client.attach_volume(&name).await?;
            match output.output {
                Output::Table => output::print(volume.device.as_deref().unwrap_or("-")),
                Output::Json => output.print(&volume, details),
            }
        }
        Verb::Detach { name } => Ok(client.detach_volume(&name).await.map(drop)?),
        Verb::Export { origin, export } => export::run(Origin::Volume(origin), export, client).await,
    }
}

/// Create; with --wait, after the image has become ready.
async fn create(request: CreateVolume, wait: WaitArgs, client: &Client) -> Result<Volume, Failure> {
    match (client.create_volume(&request).await, &request.image) {
        (Ok(volume), _) => Ok(volume),
        (Err(client::Error::Refused(problem)), Some(image))
            if wait.wait && problem.code == Code::NotReady =>
        {
            wait::image(client, client.image(image).await?, wait.timeout).await?;
            Ok(client.create_volume(&request).await?)
        }
        (Err(error), _) => Err(error.into()),
    }
}

fn table(volumes: &[Volume]) -> String {
    output::listing(
        ["NAME", "STATE", "SIZE", "ALLOCATED", "IMAGE", "SNAPSHOTS", "DEVICE", "CREATED"],
        volumes.iter().map(|volume| {
            [
                volume.name.clone(),
                output::word(volume.state),
                output::bytes(Some(volume.size_bytes)),
                output::bytes(Some(volume.allocated_bytes)),
                output::text(volume.image.as_ref().map(|image| &image.name)),
                volume.snapshots.len().to_string(),
                output::text(volume.device.as_ref()),
                output::time(volume.created_at),
            ]
        }),
    )
}

/// One volume for people.
pub fn details(volume: &Volume) -> String {
    let mut rows = vec![
        ("name", volume.name.clone()),
        ("uuid", volume.uuid.to_string()),
        ("state", output::word(volume.state)),
    ];
    rows.extend(volume.message.clone().map(|message| ("", message)));
    rows.extend([
        ("size", output::exact_bytes(Some(volume.size_bytes))),
        ("allocated", output::exact_bytes(Some(volume.allocated_bytes))),
        ("image", output::text(volume.image.as_ref().map(|image| &image.name))),
        ("path", output::text(volume.path.as_ref())),
        ("device", output::text(volume.device.as_ref())),
        ("I/O path", volume.io_path.map_or_else(|| "-".to_owned(), output::word)),
        ("disk", volume.disk.clone()),
        ("created", output::time(volume.created_at)),
    ]);
    rows.extend(volume.snapshots.iter().map(|snapshot| ("snapshot", snapshot.name.clone())));
    rows.extend(volume.holders.iter().map(|holder| ("held by", holder.clone())));
    output::properties(rows)
}

fn recovered(report: &RecoverReport) -> String {
    let mut lines: Vec<_> = report.faults.iter().map(|fault| format!("fault: {fault}")).collect();
    lines.extend(
        report.lost.iter().map(|range| format!("lost: {} bytes at {}", range.len_bytes, range.start_bytes)),
    );
    if report.lost.is_empty() {
        lines.push("nothing was lost".to_owned());
    }
    lines.join("\n")
}
