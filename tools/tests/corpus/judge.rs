//! Holds [`source::open`] and its [`Stack`] against a corpus of qcow2 images, entry by entry.
//!
//! Owns what the manifest asks of whoever follows the names in images: with leave they read as qemu reads them, without
//! they are refused by name, and some names are never followed.

use std::{fmt, ops::ControlFlow, path::Path};

use bedplate_engine::{
    device::{BlockDevice, Extent},
    error::{Error, Result},
    image::{
        BaseImage, Format,
        qcow2::{Qcow2Layer, View},
        references::AllowedDirectory,
    },
    units::{ByteLen, ByteRange, to_usize},
};
use bedplate_inspect::{
    layer::open_file,
    source::{self, Chain, FileArgs, Link, OpenArgs},
    stack::{Kind, Stack},
};

use super::{
    manifest::{Content, Entry, Expectation, Same},
    sound,
    subject::Subject,
    verdict::{self, Verdict, equal, says, sha512},
};

/// Which images of a corpus.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// Sound ones that need no other file.
    OneFile,
    /// Sound ones that name others.
    SeveralFiles,
    /// Those that name something that must not be opened.
    NotToBeFollowed,
}

impl Part {
    pub const ALL: [Part; 3] = [Part::OneFile, Part::SeveralFiles, Part::NotToBeFollowed];
}

/// An image with what it names, beneath the corpus's directory.
struct Joined {
    stack: Stack,
    /// The image's own file.
    top: Box<Qcow2Layer>,
}

/// Judge `part` of the corpus in `directory`. Returns how many images it has and what was not as it should be.
pub fn corpus(directory: &Path, part: Part) -> Result<(usize, Vec<String>), String> {
    let wanted: fn(&Expectation) -> bool = match part {
        Part::OneFile => |expect: &Expectation| matches!(expect, Expectation::Same(same) if !same.references),
        Part::SeveralFiles => {
            |expect: &Expectation| matches!(expect, Expectation::Same(same) if same.references)
        }
        Part::NotToBeFollowed => |expect: &Expectation| matches!(expect, Expectation::Reference { .. }),
    };
    verdict::corpus(directory, wanted, judge)
}

fn judge(corpus: &Path, entry: &Entry) -> Verdict {
    match &entry.expect {
        Expectation::Same(same) => {
            if same.references {
                needs_leave(corpus, &entry.file, same)?;
            }
            sound::is_same::<Joined>(corpus, &entry.file, same)
        }
        Expectation::Reference { naming } => is_not_followed(corpus, &entry.file, naming),
        Expectation::Refused(_)
        | Expectation::Lost(_)
        | Expectation::Unlisted { .. }
        | Expectation::Readable { .. } => Err("it is of no part that is judged here".into()),
    }
}

/// Without leave its own bytes are there, and whatever another file has is refused with that file's name.
fn needs_leave(corpus: &Path, file: &Path, same: &Same) -> Verdict {
    let alone = open(corpus, file, None).map_err(|e| format!("without leave: {e}"))?;
    match read_all(&alone) {
        Err(error @ Error::Unsupported { .. }) => says(&error, &named(corpus, file)?),
        Err(other) => Err(format!("without leave it should be refused, but: {other}")),
        // Drawn images may have written all of what they stand on.
        Ok(content) if unopened(&alone)? == 0 => match &same.content {
            Content::Sha512(expected) => equal("content without leave", &sha512(&content), expected),
            Content::Extents(_) => Err("it is too large to need other files".into()),
        },
        Ok(_) => Err("it reads without leave".into()),
    }
}

/// The name of the file that it needs.
fn named(corpus: &Path, file: &Path) -> Result<String, String> {
    let joined = Joined::open_in(corpus, file, &View::Active).map_err(|e| e.to_string())?;
    let header = joined.layer().header();
    let data_file = header.data_file.as_ref().and_then(|data_file| data_file.name.as_ref());
    let name = header.backing.as_ref().map(|backing| &backing.name).or(data_file);
    let name = name.ok_or_else(|| "it names no file".to_owned())?;
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// What it names is not opened, with leave or without.
fn is_not_followed(corpus: &Path, file: &Path, naming: &str) -> Verdict {
    match open(corpus, file, None).and_then(|alone| read_all(&alone)) {
        Err(error @ Error::Unsupported { .. }) => says(&error, naming)?,
        Err(other) => return Err(format!("without leave it should be refused, but: {other}")),
        Ok(_) => return Err("it reads without leave".into()),
    }
    match open(corpus, file, Some(corpus)) {
        Err(Error::Unsupported { .. }) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(other) => Err(format!("the file that it names should be refused, but: {other}")),
        // It says that it needs another file, and not which.
        Ok(alone) if alone.names().len() == 1 => match read_all(&alone) {
            Err(error @ Error::Unsupported { .. }) => says(&error, naming),
            Err(other) => Err(format!("reading it should be refused, but: {other}")),
            Ok(_) => Err("the file that it names is opened, or taken for zeros".into()),
        },
        Ok(_) => Err("the file that it names is opened".into()),
    }
}

fn open(corpus: &Path, file: &Path, leave: Option<&Path>) -> Result<Stack> {
    open_view(corpus, file, &View::Active, leave)
}

fn open_view(corpus: &Path, file: &Path, view: &View, leave: Option<&Path>) -> Result<Stack> {
    let snapshot = match view {
        View::Active => None,
        View::Snapshot(name) => Some(name.clone()),
    };
    let files = FileArgs { allow_references: leave.map(Path::to_owned), backing: None };
    source::open(&corpus.join(file), &OpenArgs { format: None, snapshot, files })
}

fn read_all(stack: &Stack) -> Result<Vec<u8>> {
    let mut content = vec![0xa5; to_usize(stack.size())];
    stack.read_at(&mut content, 0)?;
    Ok(content)
}

/// Bytes that a file would have that is not opened.
fn unopened(stack: &Stack) -> Result<u64, String> {
    let mut bytes = 0;
    let whole = ByteRange::new(0, stack.size());
    let walked = stack.each(whole, |run| {
        if run.kind == Kind::Unopened {
            bytes += run.range.len.0;
        }
        ControlFlow::Continue(())
    });
    walked.map(|()| bytes).map_err(|e| e.to_string())
}

impl Subject for Joined {
    fn open_in(corpus: &Path, file: &Path, view: &View) -> Result<Joined> {
        let path = corpus.join(file);
        let stack = open_view(corpus, file, view, Some(corpus))?;
        // The stack does not show its files.
        let allowed = AllowedDirectory::open(corpus)?;
        let chain = Chain::open(open_file(&path)?, &path, Format::Qcow2, view, Some(&allowed))?;
        match chain.links.into_iter().next() {
            Some(Link::Qcow2 { layer, .. }) => Ok(Joined { stack, top: layer }),
            Some(Link::Raw { .. }) | None => Err(Error::Invalid(format!("{} is not qcow2", path.display()))),
        }
    }

    fn layer(&self) -> &Qcow2Layer {
        &self.top
    }
}

impl BaseImage for Joined {
    fn len(&self) -> ByteLen {
        ByteLen(self.stack.size())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.stack.read_at(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.stack.extents(range)
    }
}

impl fmt::Debug for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.stack.names()).finish()
    }
}
