//! `bedplate image`: images and their copies.

use std::time::Duration;

use bedplate_inspect::{shown, source::NO_BACKING};
use clap::Subcommand;

use super::{
    exit::Failure,
    export::{self, ExportArgs, Origin},
    output::{self, OutputArgs},
    source, upload,
    wait::{self, TimeoutArgs, WaitArgs},
};
use crate::{
    api::{
        client::Client,
        types::{CreateImage, Image, Progress},
    },
    duration::parse_duration,
};

/// Bring in, verify, export and delete images
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bring in an image
    #[command(
        after_long_help = "The node fetches the image in the background and verifies it as it arrives; --wait \
waits for the result. A download that breaks off goes on where it was, also after a restart of the node.

SOURCE is a path, an http(s):// URL, volume:NAME[@SNAPSHOT] (a snapshot is taken when none is named), image:NAME, or - \
for the bytes of stdin. @PATH reads a URL from a file: one with a password on the command line is for everybody on \
the machine to see.

What comes on stdin is sent to the node, and the result is waited for with or without --wait; blocks of zeros \
take no space; an upload that breaks off leaves nothing but a failed image that says why, and can be sent again.

An image is refused, or its arrival ends, before the disk has less than 1 GiB free, or 2 % of its size if that is more \
(but at most a quarter of a small disk), because volumes grow on the same disk. What had come is kept for another try, \
unless the source never said how much there is.

An image that is joined from several files (a replica directory, or with --allow-references) remembers each of them \
with its SHA-512; `bedplate image get` shows them. One that is written to meanwhile ends the arrival.

Examples:
  bedplate image create debian --from https://example.org/debian.raw --checksum 5bb3a8... --wait
  bedplate image create golden --from volume:build@done --wait --timeout 10m
  bedplate image create local --from ./disk.raw
  zstdcat disk.raw.zst | bedplate image create piped --from - --checksum 5bb3a8...
  bedplate image create private --from @/root/private.url"
    )]
    Create {
        /// The image's name: letters, digits, '.', '_' and '-', at most 64, no leading dot
        name: String,
        /// Where it comes from: PATH, http(s)://URL, volume:NAME[@SNAPSHOT], image:NAME, @PATH of a file with a URL, or -
        /// for stdin
        #[arg(long, value_name = "SOURCE")]
        from: String,
        /// The file's SHA-512 in hexadecimal, or sha256:HEX; any other bytes are refused with exit code 5
        #[arg(long, value_name = "HEX")]
        checksum: Option<String>,
        /// Take this snapshot instead of what was written last: an internal one of a qcow2 file by id or name, or one of
        /// a Longhorn replica
        #[arg(long, value_name = "ID")]
        snapshot: Option<String>,
        /// The backing file of a Longhorn replica directory (raw or qcow2), none where there is none
        #[arg(long, value_name = "FILE")]
        backing: Option<String>,
        /// Join a qcow2 file and the backing and data files that it names, which must lie in this directory, into one
        /// raw image
        #[arg(long, value_name = "DIR")]
        allow_references: Option<String>,
        /// The longest that it may take (90s, 10m, 2h); then it has failed, whether or not somebody waits
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        deadline: Option<Duration>,
        #[command(flatten)]
        wait: WaitArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List images
    #[command(after_long_help = "Examples:
  bedplate image list
  bedplate image list -o json | jq -r '.[] | select(.state == \"failed\") | .name'")]
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one image
    #[command(after_long_help = "Examples:
  bedplate image get debian
  bedplate image get debian -o json | jq -r .sha512")]
    Get {
        /// The image's name or uuid
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Delete an image; one that is on its way is cancelled
    #[command(
        after_long_help = "Refused (exit 4) while a volume stands on it: delete those volumes, or make them \
independent of it with `bedplate volume flatten`.

Example:
  bedplate image delete debian"
    )]
    Delete {
        /// The image's name or uuid
        name: String,
    },
    /// Stop bringing in an image, and clear away what has arrived
    #[command(after_long_help = "The image stays, as failed, until it is deleted.

Example:
  bedplate image cancel debian")]
    Cancel {
        /// The image's name or uuid
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Read an image back from the disk and compare its checksum
    #[command(
        after_long_help = "Exits with 0 only when every byte was read and is what it was; with 5 when one is \
not, with 1 when the verification was cancelled, and with 6 when it took too long.

Example:
  bedplate image verify debian"
    )]
    Verify {
        /// The image's name or uuid
        name: String,
        #[command(flatten)]
        timeout: TimeoutArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Write an image's content into a file or to stdout
    #[command(after_long_help = "Examples:
  bedplate image export debian /srv/debian.raw
  bedplate image export debian - | ssh host 'cat > debian.raw'")]
    Export {
        /// The image's name or uuid
        name: String,
        #[command(flatten)]
        export: ExportArgs,
    },
}

impl Verb {
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::Create { .. } => "image create",
            Verb::List { .. } => "image list",
            Verb::Get { .. } => "image get",
            Verb::Delete { .. } => "image delete",
            Verb::Cancel { .. } => "image cancel",
            Verb::Verify { .. } => "image verify",
            Verb::Export { .. } => "image export",
        }
    }
}

pub async fn run(verb: Verb, client: &Client) -> Result<(), Failure> {
    match verb {
        Verb::Create {
            name,
            from,
            checksum,
            snapshot,
            backing,
            allow_references,
            deadline,
            wait,
            output,
        } => {
            let from_stdin = from == upload::STDIN;
            let source = if from_stdin { from } else { absolute_source(&source::read(&from)?)? };
            // Never less than was asked for.
            let deadline_s =
                deadline.map(|deadline| deadline.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX));
            let absolute = |path: Option<String>| path.as_deref().map(absolute_path).transpose();
            let request = CreateImage {
                name,
                source,
                checksum,
                deadline_s,
                internal_snapshot: snapshot,
                backing: if backing.as_deref() == Some(NO_BACKING) { backing } else { absolute(backing)? },
                allow_references: absolute(allow_references)?,
            };
            let image = if from_stdin {
                upload::create(client, request, wait.timeout).await?
            } else {
                let image = client.create_image(&request).await?;
                if wait.wait { wait::image(client, image, wait.timeout).await? } else { image }
            };
            output.print(&image, details)
        }
        Verb::List { output } => output.print(&client.images().await?, |images| table(images)),
        Verb::Get { name, output } => output.print(&client.image(&name).await?, details),
        Verb::Delete { name } => Ok(client.delete_image(&name).await?),
        Verb::Cancel { name, output } => output.print(&client.cancel_image(&name).await?, details),
        Verb::Verify { name, timeout, output } => {
            let image = client.verify_image(&name).await?;
            let image = wait::verification(client, image, timeout.timeout).await?;
            output.print(&image, details)
        }
        Verb::Export { name, export } => export::run(Origin::Image(name), export, client).await,
    }
}

/// A path becomes absolute here, because the node has another working directory; everything else is the node's.
fn absolute_source(from: &str) -> Result<String, Failure> {
    if source::is_url(from) || from.starts_with("volume:") || from.starts_with("image:") {
        return Ok(from.to_owned());
    }
    absolute_path(from)
}

fn absolute_path(from: &str) -> Result<String, Failure> {
    let path =
        std::path::absolute(from).map_err(|source| Failure::Io { what: format!("{from:?}"), source })?;
    path.into_os_string()
        .into_string()
        .map_err(|_| Failure::Usage(format!("{from:?} lies in a directory whose name is not UTF-8")))
}

fn table(images: &[Image]) -> String {
    output::listing(
        ["NAME", "STATE", "FORMAT", "SIZE", "ALLOCATED", "CREATED", ""],
        images.iter().map(|image| {
            [
                image.name.clone(),
                output::word(image.state),
                image.format.map_or_else(|| "-".to_owned(), output::word),
                output::bytes(image.virtual_size_bytes),
                output::bytes(Some(image.allocated_bytes)),
                output::time(image.created_at),
                remark(image),
            ]
        }),
    )
}

/// Why it is not ready, or how far it is.
fn remark(image: &Image) -> String {
    let copies = || image.copies.iter();
    let message = copies().find_map(|copy| copy.message.as_deref().map(output::shortened));
    message.or_else(|| copies().find_map(|copy| copy.progress.as_ref()).map(progress)).unwrap_or_default()
}

/// How far a job is, for people.
pub fn progress(progress: &Progress) -> String {
    let phase = output::word(progress.phase);
    if let Some(error) = progress.last_error.as_deref().filter(|_| progress.next_retry_at.is_some()) {
        return format!("attempt {} failed: {}", progress.attempt, output::shortened(error));
    }
    match progress.total_bytes {
        Some(total) if total > 0 => {
            format!(
                "{phase}, {} % of {}",
                progress.done_bytes.saturating_mul(100) / total,
                super::size::show(total)
            )
        }
        Some(_) | None => format!("{phase}, {}", super::size::show(progress.done_bytes)),
    }
}

fn details(image: &Image) -> String {
    let mut rows = vec![
        ("name", image.name.clone()),
        ("uuid", output::text(image.uuid)),
        ("state", output::word(image.state)),
        ("format", image.format.map_or_else(|| "-".to_owned(), output::word)),
        ("size", output::exact_bytes(image.size_bytes)),
        ("virtual size", output::exact_bytes(image.virtual_size_bytes)),
        ("allocated", output::exact_bytes(Some(image.allocated_bytes))),
        ("sha512", output::text(image.sha512.as_ref())),
        ("source", image.source.clone()),
        ("I/O path", image.io_path.map_or_else(|| "-".to_owned(), output::word)),
        ("created", output::time(image.created_at)),
    ];
    for file in &image.sources {
        // Whoever made a directory of layers named its files.
        let (path, size) = (shown(&file.path), output::exact_bytes(Some(file.size_bytes)));
        rows.push(("joined from", format!("{path} ({size})")));
        rows.push(("", format!("sha512 {}", file.sha512)));
    }
    for copy in &image.copies {
        rows.push(("copy on", format!("{} ({})", copy.disk, output::word(copy.state))));
        if let Some(at) = &copy.progress {
            rows.push(("", progress(at)));
        }
        if let Some(message) = &copy.message {
            rows.push(("", shown(message)));
        }
    }
    output::properties(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::SourceFile;

    #[test]
    fn a_name_that_somebody_else_gave_a_file_does_not_reach_the_terminal_as_it_is() {
        let mut image = crate::api::fake::image("a");
        let path = "/replica/volume-snap-\u{1b}[2J.img".to_owned();
        image.sources = vec![SourceFile { path, size_bytes: 1, sha512: "0".repeat(128) }];
        let details = details(&image);
        assert!(!details.contains('\u{1b}') && details.contains("\\u{1b}[2J.img"), "{details}");
    }

    #[test]
    fn only_paths_are_made_absolute() {
        for source in ["http://h/a", "s3://b/k", "volume:v@s", "image:a", "/a/b"] {
            assert_eq!(absolute_source(source).unwrap(), source);
        }
        let here = std::env::current_dir().unwrap();
        for (from, path) in [("a.raw", "a.raw"), ("./volume:v", "volume:v"), ("a b://c", "a b:/c")] {
            assert_eq!(absolute_source(from).unwrap(), here.join(path).display().to_string());
        }
    }
}
