//! Opening what is inspected: a file, a chain of files, or a directory of layers, always read-only.
//!
//! Owns [`OpenArgs`], the flags that say how, and [`open`], which makes a [`Stack`] of anything, so that what compares,
//! converts, verifies or maps knows no format. Formats are told by their magic unless the user or a header says.

use std::{
    collections::HashSet,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use bedplate_engine::{
    error::{Error, Result},
    image::{
        Format, PROBE_LEN,
        qcow2::{Qcow2Layer, Source, View, header::Header},
        references::{AllowedDirectory, CHAIN_DEPTH_MAX},
    },
};
use clap::{Args, ValueEnum};

use crate::{
    directory::{self, Directory},
    layer::{FileLayer, QcowLayer, check_kind, open_file},
    stack::{Floor, Layer, Stack},
};

/// What `--backing` says where there is no backing file.
pub const NO_BACKING: &str = "none";

/// What to do about a file that may not be opened.
const REMEDY: &str = "name a directory that holds it with --allow-references DIR";

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// Its bytes are the content, whatever they look like
    Raw,
    Qcow2,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Format {
        match name {
            FormatName::Raw => Format::Raw,
            FormatName::Qcow2 => Format::Qcow2,
        }
    }
}

/// The flags of every command that reads content.
#[derive(Args, Clone, Debug, Default)]
pub struct OpenArgs {
    /// Read the file as this format, whatever it begins with
    #[arg(id = "as", long = "as", value_enum, value_name = "FORMAT")]
    pub format: Option<FormatName>,
    /// Read an internal snapshot of a qcow2 file (id or name), or a snapshot of a replica or volume
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    #[command(flatten)]
    pub files: FileArgs,
}

/// Which other files may be opened.
#[derive(Args, Clone, Debug, Default)]
pub struct FileArgs {
    /// Open the backing and data files that a file names, if they are beneath this directory
    #[arg(long, value_name = "DIR")]
    pub allow_references: Option<PathBuf>,
    /// The backing file of a Longhorn replica (raw or qcow2), `none` where there is none; or the image of a volume
    #[arg(long, value_name = "FILE")]
    pub backing: Option<PathBuf>,
}

impl FileArgs {
    /// The directory beneath which names are followed.
    pub fn allowed(&self) -> Result<Option<AllowedDirectory>> {
        self.allow_references.as_deref().map(AllowedDirectory::open).transpose()
    }
}

/// Open `path` for reading its content.
pub fn open(path: &Path, args: &OpenArgs) -> Result<Stack> {
    if path.is_dir() {
        return match directory::open(path)? {
            Directory::Replica(replica) => replica.into_stack(args.snapshot.as_deref(), &args.files),
            Directory::Volume(volume) => volume.into_stack(args.snapshot.as_deref(), &args.files),
        };
    }
    let file = open_file(path)?;
    refuse_backing(path, &args.files)?;
    let format = match args.format {
        Some(format) => format.into(),
        None => probe(&file, path)?,
    };
    let view = args.snapshot.clone().map_or(View::Active, View::Snapshot);
    let allowed = args.files.allowed()?;
    let chain = Chain::open(file, path, format, &view, allowed.as_ref())?;
    Ok(chain.into_stack())
}

/// `--backing` is for directories of layers: a qcow2 file says itself what is below it.
fn refuse_backing(path: &Path, args: &FileArgs) -> Result<()> {
    match args.backing {
        None => Ok(()),
        Some(_) => Err(Error::Invalid(format!(
            "--backing is for directories of layers, and {} is a file; see --allow-references",
            path.display()
        ))),
    }
}

/// The format of a file by its magic.
pub fn probe(file: &File, path: &Path) -> Result<Format> {
    let mut start = [0; PROBE_LEN];
    let mut filled = 0;
    while let Some(rest) = start.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64).map_err(|e| Error::io("read", path, e))? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(Format::of(start.get(..filled).unwrap_or_default()))
}

/// A file and those below it, as far as they may be opened: it stands also where the rest of it may not be. At most
/// [`CHAIN_DEPTH_MAX`] files, and none of them, external data files included, takes part twice.
pub struct Chain {
    /// Top first.
    pub links: Vec<Link>,
    pub floor: Floor,
}

/// One file of a chain.
pub enum Link {
    Raw { layer: FileLayer, path: PathBuf },
    Qcow2 { layer: Box<Qcow2Layer>, path: PathBuf },
}

impl Link {
    pub fn path(&self) -> &Path {
        match self {
            Link::Raw { path, .. } | Link::Qcow2 { path, .. } => path,
        }
    }

    fn into_layer(self) -> Box<dyn Layer> {
        match self {
            Link::Raw { layer, .. } => Box::new(layer),
            Link::Qcow2 { layer, path } => {
                Box::new(QcowLayer { layer: *layer, name: path.display().to_string() })
            }
        }
    }
}

impl Chain {
    /// `view` is of the top file; of those below, what was written last is what shows through.
    pub fn open(
        file: File,
        path: &Path,
        format: Format,
        view: &View,
        allowed: Option<&AllowedDirectory>,
    ) -> Result<Chain> {
        let mut chain = Chain { links: Vec::new(), floor: Floor::Zeros };
        let mut seen = Seen::default();
        let mut next = Some((file, path.to_owned(), format));
        while let Some((file, path, format)) = next.take() {
            seen.meet(&file, &path)?;
            if chain.links.len() == CHAIN_DEPTH_MAX {
                let what = format!("a chain of more than {CHAIN_DEPTH_MAX} files (CHAIN_DEPTH_MAX)");
                return Err(Error::Unsupported { path, what });
            }
            let view = if chain.links.is_empty() { view.clone() } else { View::Active };
            match format {
                Format::Raw if view != View::Active => {
                    let what = "an internal snapshot of a raw file".to_owned();
                    return Err(Error::Unsupported { path, what });
                }
                Format::Raw => {
                    chain.links.push(Link::Raw { layer: FileLayer::raw(file, &path)?, path });
                }
                Format::Qcow2 => {
                    let mut layer = Qcow2Layer::open(file, &path, &view)?;
                    attach_data_file(&mut layer, &path, allowed, &mut seen)?;
                    next = chain.below(layer.header(), &path, allowed)?;
                    chain.links.push(Link::Qcow2 { layer: Box::new(layer), path });
                }
            }
        }
        Ok(chain)
    }

    /// The file below the one with this header; where it may not be opened, the floor says so.
    fn below(
        &mut self,
        header: &Header,
        path: &Path,
        allowed: Option<&AllowedDirectory>,
    ) -> Result<Option<(File, PathBuf, Format)>> {
        let Some(backing) = &header.backing else { return Ok(None) };
        let Some(allowed) = allowed else {
            let name = String::from_utf8_lossy(&backing.name).into_owned();
            let refusal = refusal(path, &backing.name);
            self.floor = Floor::Unopened { name, refusal };
            return Ok(None);
        };
        let (file, below) = reference(allowed, path, &backing.name)?;
        let format = match backing.format.as_deref() {
            None => probe(&file, &below)?,
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                let what = format!("a backing file of the format {other:?}");
                return Err(Error::Unsupported { path: path.to_owned(), what });
            }
        };
        Ok(Some((file, below, format)))
    }

    pub fn into_layers(self) -> (Vec<Box<dyn Layer>>, Floor) {
        (self.links.into_iter().map(Link::into_layer).collect(), self.floor)
    }

    pub fn into_stack(self) -> Stack {
        let (layers, floor) = self.into_layers();
        let size = layers.first().map_or(0, |top| top.size());
        Stack::new(layers, floor, size)
    }
}

/// The files of a chain so far, by device and inode.
#[derive(Default)]
struct Seen(HashSet<(u64, u64)>);

impl Seen {
    /// Take a file in, which must be new.
    fn meet(&mut self, file: &File, path: &Path) -> Result<()> {
        let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
        if self.0.insert((meta.dev(), meta.ino())) {
            return Ok(());
        }
        let what = "a chain of files that comes back to one that it has already".to_owned();
        Err(Error::Unsupported { path: path.to_owned(), what })
    }
}

/// Open the file that holds the clusters, if the header names one and it may be opened; else reading them is refused.
fn attach_data_file(
    layer: &mut Qcow2Layer,
    path: &Path,
    allowed: Option<&AllowedDirectory>,
    seen: &mut Seen,
) -> Result<()> {
    let name = layer.header().data_file.as_ref().and_then(|data_file| data_file.name.clone());
    if let (Some(name), Some(allowed)) = (name, allowed) {
        let (file, data_path) = reference(allowed, path, &name)?;
        check_kind(&file, &data_path)?;
        seen.meet(&file, &data_path)?;
        layer.attach_data_file(Source::new(file, &data_path)?);
    }
    Ok(())
}

/// Open what the image at `path` calls `name`, relative to its own directory.
fn reference(allowed: &AllowedDirectory, path: &Path, name: &[u8]) -> Result<(File, PathBuf)> {
    let own = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let own = own.canonicalize().map_err(|e| Error::io("open", own, e))?;
    allowed.open_reference(path, &own, name)
}

/// Why the backing file `name` of the image at `path` is not opened when no directory was allowed.
fn refusal(path: &Path, name: &[u8]) -> Error {
    let what =
        format!("reading the backing file {:?} without leave ({REMEDY})", String::from_utf8_lossy(name));
    Error::Unsupported { path: path.to_owned(), what }
}
