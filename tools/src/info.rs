//! `inspect info`: what a file is.
//!
//! Owns the command and its report with `qemu-img info`'s keys. What is damaged is said and the rest is shown; exit
//! code 5 tells scripts. What a qcow2 header says is `qcow2_info.rs`'s.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bedplate_engine::{
    error::{Error, Result as EngineResult},
    image::{Format, qcow2::View, references::AllowedDirectory},
    units::ByteRange,
};
use clap::Args;
use serde::Serialize;
use sha2::{Digest, Sha512};

use crate::{
    child::Child,
    content::{self, Content},
    convert::each_piece,
    directory::{self, Directory},
    failure::Result,
    html::{self, Mapped},
    layer::{FileLayer, open_file},
    longhorn::{self, ReplicaInfo},
    print::{self, Output, PageOutput},
    qcow2_info::{self, Qcow2Info, SnapshotInfo},
    source::{self, Chain, FileArgs, FormatName, OpenArgs},
    stack::Layer,
    verify::digest,
    volume_report::{self, VolumeReport},
};

const EXAMPLES: &str = "Examples:
  bedplate inspect info disk.qcow2
  bedplate inspect info overlay.qcow2 --backing-chain --allow-references . -o json
  bedplate inspect info disk.raw --digest
  bedplate inspect info disk.qcow2 -o html > disk.html

The keys of `-o json` are those of `qemu-img info --output=json`. Exit code 5 says that something is damaged; it is \
named under `damage`, and everything else is shown.";

/// Show what a file is: format, sizes, features, snapshots, partitions
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct InfoArgs {
    /// A raw or qcow2 file, a block device, or a directory of layers
    file: PathBuf,
    /// Read the file as this format, whatever it begins with
    #[arg(id = "as", long = "as", value_enum, value_name = "FORMAT")]
    format: Option<FormatName>,
    #[command(flatten)]
    files: FileArgs,
    /// Show the files below it too
    #[arg(long)]
    backing_chain: bool,
    /// Show the SHA-512 of the file as it is; of a directory of layers, that of the content that a guest reads
    #[arg(long)]
    digest: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: PageOutput,
}

/// One file.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// The file itself; directories have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Child>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    pub filename: String,
    pub format: &'static str,
    pub actual_size: u64,
    pub dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// What the guest sees in it; not `qemu-img`'s key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
    /// Of what a guest reads, for what is no file; neither this nor the one above is `qemu-img`'s key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_sha512: Option<String>,
    /// What is wrong; not `qemu-img`'s key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<String>,
    /// What this reader does not read, or may not; not `qemu-img`'s key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unsupported: Vec<String>,
}

/// What only one format has.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum FormatSpecific {
    Qcow2(Qcow2Info),
    LonghornReplica(ReplicaInfo),
    BedplateVolume(VolumeReport),
}

impl Info {
    /// Take in why something is not shown.
    pub fn lacks(&mut self, error: &Error) {
        let list = match error {
            Error::Corrupt { .. } | Error::Lost { .. } => &mut self.damage,
            _ => &mut self.unsupported,
        };
        let text = error.to_string();
        if !list.contains(&text) {
            list.push(text);
        }
    }

    /// For people: name and value of each property.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        row("file", self.filename.clone());
        row("format", self.format.to_owned());
        if let Some(size) = self.virtual_size {
            row("virtual size", print::exact(size));
        }
        row("on disk", print::exact(self.actual_size));
        if let Some(size) = self.cluster_size {
            row("cluster", print::exact(size));
        }
        if let Some(name) = &self.backing_filename {
            let format = self.backing_filename_format.as_deref();
            let format = format.map_or_else(String::new, |format| format!(" (format: {format})"));
            row("backing file", format!("{name}{format}"));
        }
        if self.encrypted == Some(true) {
            row("encrypted", "yes".to_owned());
        }
        if self.dirty_flag {
            row("dirty", "yes: whoever wrote last did not close it".to_owned());
        }
        if let Some(specific) = &self.format_specific {
            rows.extend(match specific {
                FormatSpecific::Qcow2(qcow2) => qcow2.rows(),
                FormatSpecific::LonghornReplica(replica) => replica.rows(),
                FormatSpecific::BedplateVolume(volume) => volume.rows(),
            });
        }
        if let Some(content) = &self.content {
            rows.extend(content.rows());
        }
        if let Some(sha512) = &self.sha512 {
            rows.push(("sha512".to_owned(), sha512.clone()));
        }
        if let Some(sha512) = &self.guest_sha512 {
            rows.push(("guest sha512".to_owned(), sha512.clone()));
        }
        rows.extend(self.unsupported.iter().map(|what| ("not read".to_owned(), what.clone())));
        rows.extend(self.damage.iter().map(|what| ("DAMAGE".to_owned(), what.clone())));
        rows
    }

    /// For people: the lists that it has, each with a title.
    pub fn tables(&self) -> Vec<(&'static str, String)> {
        let mut tables = Vec::new();
        match &self.format_specific {
            Some(FormatSpecific::LonghornReplica(replica)) => {
                tables.push(("Layers, newest first", replica.table()));
            }
            Some(FormatSpecific::BedplateVolume(volume)) => tables.extend(volume.tables()),
            Some(FormatSpecific::Qcow2(_)) | None => {}
        }
        if let Some(partitions) = self.content.as_ref().and_then(Content::table) {
            tables.push(("Partitions", partitions));
        }
        if !self.snapshots.is_empty() {
            tables.push(("Snapshots", qcow2_info::snapshot_table(&self.snapshots)));
        }
        tables
    }
}

pub fn run(args: &InfoArgs) -> Result<u8> {
    let infos = gather(args)?;
    let output = match args.output {
        PageOutput::Table => Output::Table,
        PageOutput::Json => Output::Json,
        PageOutput::Html => return page(args, &infos),
    };
    let is_damaged = infos.iter().any(|info| !info.damage.is_empty());
    let people = |infos: &[Info]| infos.iter().map(text).collect::<Vec<_>>().join("\n\n");
    match infos.as_slice() {
        [one] if !args.backing_chain => print::report(output, one, text)?,
        all => print::report(output, all, people)?,
    }
    Ok(if is_damaged { 5 } else { 0 })
}

/// As a page, with the map where the content can be read.
fn page(args: &InfoArgs, infos: &[Info]) -> Result<u8> {
    let open = OpenArgs { format: args.format, snapshot: None, files: args.files.clone() };
    let title = args.file.display().to_string();
    let page = match source::open(&args.file, &open) {
        Ok(stack) => {
            let mapped = Mapped::of(&stack, ByteRange::new(0, stack.size()))?;
            html::page(&title, infos, Some(&mapped))
        }
        // Why is among what is shown: whatever stops the map is damage or not supported.
        Err(_) => html::page(&title, infos, None),
    };
    print::line(&page)?;
    Ok(if infos.iter().any(|info| !info.damage.is_empty()) { 5 } else { 0 })
}

/// What there is to say of the file, and of those below it where that is asked for.
fn gather(args: &InfoArgs) -> Result<Vec<Info>> {
    let mut infos = vec![of_path(&args.file, args.format)?];
    if let Some(first) = infos.first_mut() {
        look_inside(args, first);
    }
    if args.backing_chain && !args.file.is_dir() {
        let file = open_file(&args.file)?;
        let format = match args.format {
            Some(format) => format.into(),
            None => source::probe(&file, &args.file)?,
        };
        let allowed = args.files.allowed()?;
        match below(file, &args.file, format, allowed.as_ref()) {
            Ok((further, refusal)) => {
                infos.extend(further);
                if let (Some(last), Some(refusal)) = (infos.last_mut(), refusal) {
                    last.lacks(&refusal);
                }
            }
            Err(error) => {
                if let Some(first) = infos.first_mut() {
                    first.lacks(&error);
                }
            }
        }
    }
    match infos.first_mut() {
        Some(directory) if args.digest && args.file.is_dir() => {
            directory.guest_sha512 = Some(digest_of_guest(args)?);
        }
        Some(_) if args.digest => {
            for info in &mut infos {
                info.sha512 = Some(digest::<Sha512>(Path::new(&info.filename))?);
            }
        }
        Some(_) | None => {}
    }
    Ok(infos)
}

fn digest_of_guest(args: &InfoArgs) -> Result<String> {
    let open = OpenArgs { format: None, snapshot: None, files: args.files.clone() };
    let stack = source::open(&args.file, &open)?;
    let bar = print::progress("hashing", stack.size());
    let mut hash = Sha512::new();
    each_piece(&stack, |bytes| {
        hash.update(bytes);
        bar.inc(bytes.len() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(print::hex(&hash.finalize()))
}

/// What there is to say of a file or directory, without those below it.
pub fn of_path(path: &Path, format: Option<FormatName>) -> EngineResult<Info> {
    if path.is_dir() {
        return of_directory(path);
    }
    let file = open_file(path)?;
    let format = match format {
        Some(format) => format.into(),
        None => source::probe(&file, path)?,
    };
    of_file(&file, path, format)
}

/// What there is to say of a directory of layers.
fn of_directory(path: &Path) -> EngineResult<Info> {
    let mut info = Info { filename: path.display().to_string(), ..Info::default() };
    match directory::open(path)? {
        Directory::Replica(replica) => longhorn::info(&replica, &mut info),
        Directory::Volume(volume) => volume_report::info(&volume, &mut info),
    }
    Ok(info)
}

/// What the guest sees, where that can be read: a map of what cannot is `map`'s affair.
fn look_inside(args: &InfoArgs, info: &mut Info) {
    let open = OpenArgs { format: args.format, snapshot: None, files: args.files.clone() };
    let looked = source::open(&args.file, &open).and_then(|stack| content::look(&stack));
    match looked {
        Ok(content) => {
            info.damage.extend(content.table_damage.iter().map(|what| format!("partition table: {what}")));
            info.content = (!content.is_empty()).then_some(content);
        }
        Err(error @ (Error::Corrupt { .. } | Error::Lost { .. })) => info.lacks(&error),
        // A file below that may not be opened is named anyway.
        Err(_) => {}
    }
}

/// The files below `file`, and why there are no more.
fn below(
    file: File,
    path: &Path,
    format: Format,
    allowed: Option<&AllowedDirectory>,
) -> EngineResult<(Vec<Info>, Option<Error>)> {
    let chain = Chain::open(file, path, format, &View::Active, allowed)?;
    let mut infos = Vec::new();
    for link in chain.links.iter().skip(1) {
        let format = match link {
            source::Link::Raw { .. } => Format::Raw,
            source::Link::Qcow2 { .. } => Format::Qcow2,
        };
        infos.push(of_file(&open_file(link.path())?, link.path(), format)?);
    }
    let refusal = match chain.floor {
        crate::stack::Floor::Zeros => None,
        crate::stack::Floor::Unopened { refusal, .. } => Some(refusal),
    };
    Ok((infos, refusal))
}

/// What there is to say of one file.
fn of_file(file: &File, path: &Path, format: Format) -> EngineResult<Info> {
    let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
    let again = || file.try_clone().map_err(|e| Error::io("open", path, e));
    let mut info = Info {
        children: vec![Child::file(file, path)?],
        filename: path.display().to_string(),
        // Blocks of `stat` have 512 bytes, whatever the file system.
        actual_size: meta.blocks() * 512,
        ..Info::default()
    };
    match format {
        Format::Raw => {
            info.format = "raw";
            info.virtual_size = Some(FileLayer::raw(again()?, path)?.size());
        }
        Format::Qcow2 => {
            info.format = "qcow2";
            qcow2_info::add(&mut info, again()?, path)?;
        }
    }
    Ok(info)
}

/// For people.
fn text(info: &Info) -> String {
    let mut text = print::properties(info.rows());
    for (title, table) in info.tables() {
        text.push_str("\n\n");
        text.push_str(title);
        text.push_str(":\n");
        text.push_str(&table);
    }
    text
}
