//! Directories and files that `bedplate inspect` is given: Longhorn's replicas, Bedplate's volumes, disks with partition
//! tables. The first byte says which; the program's own verbs look at them. Run it with `-close_fd_mask=1`.
#![no_main]

use std::{path::PathBuf, sync::OnceLock};

use bedplate_fuzz_targets::tree;
use bedplate_inspect::{
    Failure, Verb,
    source::{FileArgs, OpenArgs, open},
};
use clap::Parser;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const REPLICA: [&str; 12] = [
    "replica/volume.meta",
    "replica/volume-head-001.img",
    "replica/volume-head-001.img.meta",
    "replica/volume-snap-a.img",
    "replica/volume-snap-a.img.meta",
    "replica/volume-snap-a.img.checksum",
    "replica/volume-snap-b.img",
    "replica/volume-snap-b.img.meta",
    "replica/volume-snap-b.img.checksum",
    "replica/volume-head-002.img",
    "replica/volume-head-002.img.meta",
    "replica/revision.counter",
];
const DISK: [&str; 8] = [
    "bedplate.json",
    "volumes/v-00000000/volume.json",
    "layers/00000000-0000-4000-8000-000000000001/map",
    "layers/00000000-0000-4000-8000-000000000001/data",
    "layers/00000000-0000-4000-8000-000000000002/map",
    "layers/00000000-0000-4000-8000-000000000002/data",
    "images/i-00000000/image.json",
    "images/i-00000000/image",
];
const RAW: [&str; 1] = ["disk.raw"];

/// Bytes of a volume or a replica that its digest is asked for.
const DIGEST_MAX: u64 = 16 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, input)) = bytes.split_first() else { return };
    let root = root();
    let (names, subject): (&[&str], &str) = match kind % 3 {
        0 => (&REPLICA, "replica"),
        1 => (&DISK, "volumes/v-00000000"),
        _ => (&RAW, "disk.raw"),
    };
    tree::make(root, names, input);
    let subject = root.join(subject);
    let path = subject.display().to_string();
    // Whoever asks for a digest waits for as long as the content takes, be it all zeros.
    let files = FileArgs { backing: Some("none".into()), ..FileArgs::default() };
    let opened = open(subject.as_ref(), &OpenArgs { format: None, snapshot: None, files });
    let digest: &[&str] =
        if opened.is_ok_and(|stack| stack.size() > DIGEST_MAX) { &[] } else { &["--digest"] };
    let info = [&["info", "--backing", "none"][..], digest].concat();
    for words in [
        &["info", "-o", "json", "--backing", "none"][..],
        &info,
        &["map", "-o", "json", "--backing", "none"],
        &["check", "--data"],
    ] {
        let words = ["inspect"].iter().chain(words).copied().chain([path.as_str()]);
        let cli = Cli::try_parse_from(words.clone()).unwrap_or_else(|error| panic!("{error}"));
        if let Err(failure) = cli.verb.run() {
            said(&failure);
        }
    }
});

/// Every refusal says something, and has an exit code of its own.
fn said(failure: &Failure) {
    assert!(!failure.to_string().is_empty());
    assert_ne!(failure.exit_code(), 0);
}

/// Emptied for each input; one for each process.
fn root() -> &'static PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| PathBuf::from(format!("/dev/shm/bedplate-fuzz-{}", std::process::id())))
}
