//! The command line: what the user typed, as a request to a node, and its result printed.
//!
//! Owns the shape of the command line and [`main`]. One file for each noun; none of them decides anything about images
//! or volumes, that is the node's. `serve`, `doctor`, `inspect` and `bench` need no node.

mod bench;
mod completions;
mod doctor;
mod exit;
mod export;
mod image;
mod inspect;
mod job;
mod man;
mod output;
mod serve;
mod snapshot;
mod source;
mod upload;
mod volume;
mod wait;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use bedplate_inspect::size;
use clap::{Parser, Subcommand};

use self::exit::{EXIT_CODES, Failure};
use crate::{api::client::Client, config};

/// What the program is, for `--help` and the man page.
const ABOUT: &str = "Prepares disk images once and serves copy-on-write volumes over them";
const LONG_ABOUT: &str =
    "Bedplate prepares disk images once, keeps one verified, read-only copy of each image per \
disk, and serves any number of copy-on-write volumes over that copy, as files of one FUSE mount.

`bedplate serve` runs a node; every other command speaks to it over its Unix socket.";
const EXAMPLES: &str = "Examples:
  bedplate serve --state /var/lib/bedplate --disk /srv/bedplate
  bedplate image create debian --from https://example.org/debian.raw --wait
  bedplate volume create web1 --image debian --size 20G
  bedplate snapshot create web1 before-upgrade
  bedplate volume get web1 -o json

Sizes are a number and b, k, M, G, T, P or E, each 1024 times the one before: 10G is 10 GiB.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "bedplate", version, about = ABOUT, long_about = LONG_ABOUT, max_term_width = 100,
          propagate_version = true, after_help = EXIT_CODES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Cli {
    /// The node's Unix socket [default: STATE/bedplate.sock, /var/lib/bedplate/bedplate.sock]
    #[arg(long, global = true, value_name = "PATH", env = "BEDPLATE_SOCKET")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    noun: Noun,
}

#[derive(Debug, Subcommand)]
enum Noun {
    Serve(serve::ServeArgs),
    #[command(subcommand)]
    Image(image::Verb),
    #[command(subcommand)]
    Volume(volume::Verb),
    #[command(subcommand)]
    Snapshot(snapshot::Verb),
    #[command(subcommand)]
    Job(job::Verb),
    #[command(subcommand)]
    Inspect(inspect::Verb),
    #[command(subcommand)]
    Bench(bench::Verb),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// Run the command line in `args`, whose first is the program's name.
pub fn main(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version, too, arrive here; clap knows which stream and code each has. A reader that has gone
            // is no failure.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let what = cli.noun.describe();
    match run(cli) {
        Ok(code) => code,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bedplate: {what}: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    match cli.noun {
        Noun::Serve(args) => return serve::run(args, cli.socket).map(|()| ExitCode::SUCCESS),
        Noun::Completions(args) => return completions::run(args).map(|()| ExitCode::SUCCESS),
        Noun::Man(args) => return man::run(&args).map(|()| ExitCode::SUCCESS),
        Noun::Inspect(verb) => return inspect::run(&verb),
        Noun::Bench(verb) => return bench::run(&verb),
        Noun::Image(_) | Noun::Volume(_) | Noun::Snapshot(_) | Noun::Job(_) | Noun::Doctor(_) => {}
    }
    let client = Client::new(cli.socket.clone().unwrap_or_else(config::default_socket));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::Io { what: "start".to_owned(), source })?;
    runtime
        .block_on(async {
            match cli.noun {
                Noun::Image(verb) => image::run(verb, &client).await,
                Noun::Volume(verb) => volume::run(verb, &client).await,
                Noun::Snapshot(verb) => snapshot::run(verb, &client).await,
                Noun::Job(verb) => job::run(verb, &client).await,
                Noun::Doctor(args) => doctor::run(args, cli.socket).await,
                Noun::Serve(_) | Noun::Completions(_) | Noun::Man(_) | Noun::Inspect(_) | Noun::Bench(_) => {
                    Ok(())
                }
            }
        })
        .map(|()| ExitCode::SUCCESS)
}

impl Noun {
    /// What was tried, for errors.
    fn describe(&self) -> &'static str {
        match self {
            Noun::Serve(_) => "serve",
            Noun::Image(verb) => verb.describe(),
            Noun::Volume(verb) => verb.describe(),
            Noun::Snapshot(verb) => verb.describe(),
            Noun::Job(verb) => verb.describe(),
            Noun::Inspect(verb) => verb.describe(),
            Noun::Bench(verb) => verb.describe(),
            Noun::Doctor(_) => "doctor",
            Noun::Completions(_) => "completions",
            Noun::Man(_) => "man",
        }
    }
}

/// `NAME[@SNAPSHOT]` of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
struct VolumeAt {
    name: String,
    snapshot: Option<String>,
}

/// Parse a [`VolumeAt`].
fn volume_at(text: &str) -> Result<VolumeAt, String> {
    match text.split_once('@') {
        None => Ok(VolumeAt { name: text.to_owned(), snapshot: None }),
        Some((name, snapshot)) if !name.is_empty() && !snapshot.is_empty() => {
            Ok(VolumeAt { name: name.to_owned(), snapshot: Some(snapshot.to_owned()) })
        }
        Some(_) => Err("write NAME or NAME@SNAPSHOT".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_command_is_understood() {
        for line in [
            "bedplate serve --state /s --disk /a --disk /b --mount /m --socket /k --config /c --check-config",
            "bedplate image create a --from @/root/url",
            "bedplate image create a --from http://h/a --checksum 00 --wait --timeout 5m",
            "bedplate image list -o json",
            "bedplate image get a",
            "bedplate image delete a",
            "bedplate image cancel a",
            "bedplate image verify a",
            "bedplate image export a out --format raw",
            "bedplate volume create v --image a --size 10G --wait",
            "bedplate volume list -o table",
            "bedplate volume get v -o json",
            "bedplate volume delete v",
            "bedplate volume resize v 20G",
            "bedplate volume clone v@s w --full",
            "bedplate volume flatten v",
            "bedplate volume recover v",
            "bedplate volume attach v -o json",
            "bedplate volume detach v",
            "bedplate volume export v@s - --format raw",
            "bedplate snapshot create v s",
            "bedplate snapshot list v",
            "bedplate snapshot revert v s --snapshot-first t",
            "bedplate snapshot delete v s",
            "bedplate job list -o json",
            "bedplate job get 7 --wait --timeout 5m",
            "bedplate job cancel 7",
            "bedplate inspect info f --backing-chain --allow-references /d -o json",
            "bedplate inspect map f --start-offset 1G --max-length 64k --chart",
            "bedplate inspect check f --data",
            "bedplate inspect compare a b --strict",
            "bedplate inspect dump f --l2 0",
            "bedplate inspect convert a - --snapshot s --backing b",
            "bedplate bench run read --quick --only bare,fuse-uring --target nbd://h/e --out d",
            "bedplate bench compare a b --fail-on 10%",
            "bedplate bench map --rounds 3",
            "bedplate doctor -o json --socket /k",
            "bedplate completions bash",
            "bedplate man /tmp",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_usage_errors() {
        for line in [
            "bedplate",
            "bedplate image",
            "bedplate image create a",
            "bedplate volume create v --timeout 5m --size 1G",
            "bedplate volume create v",
            "bedplate volume clone v@ w",
            "bedplate volume resize v 10GB",
            "bedplate job cancel web1",
            "bedplate volume export v out --format vmdk",
            "bedplate volume list -o yaml",
        ] {
            assert_eq!(parse(line).map(drop).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn every_command_has_help_with_an_example_or_is_a_group() {
        fn visit(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} has no description");
            if !command.has_subcommands() {
                let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("bedplate "), "{path} has no example");
            }
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path}: {} has no help", argument.get_id());
            }
            command.get_subcommands().for_each(|command| visit(command, &path));
        }
        visit(&Cli::command(), "");
    }

    #[test]
    fn a_snapshot_is_named_after_the_volume() {
        let at = volume_at("v@s").unwrap();
        assert_eq!((at.name.as_str(), at.snapshot.as_deref()), ("v", Some("s")));
        assert!(volume_at("@s").is_err());
    }
}
