//! Holds the engine's reader of qcow2 against a corpus of images, entry by entry.
//!
//! Owns what each expectation of the manifest means for a base, which is one file: what names another is refused. What
//! such images read together with the files that they name is judged where chains are opened, in `bedplate-inspect`'s
//! test `corpus`.

use std::path::Path;

use bedplate_engine::{
    error::Error,
    image::{
        BaseImage,
        qcow2::{Qcow2Image, View},
    },
    units::ByteRange,
};

use super::{
    manifest::{Class, Content, Entry, Expectation, FoundBy, List, Loss, Refusal, Same},
    peers, sound,
    subject::{self, Subject},
    verdict::{self, Verdict, equal, says, sha512},
};

/// Reads of a damaged image: small enough to meet the border of what is lost.
const SECTOR_LEN: u64 = 512;

/// Judge every image of the corpus in `directory`. Returns how many there were and what was not as it should be.
pub fn corpus(directory: &Path) -> Result<(usize, Vec<String>), String> {
    verdict::corpus(directory, |_| true, judge)
}

fn judge(corpus: &Path, entry: &Entry) -> Verdict {
    let file = &entry.file;
    match &entry.expect {
        Expectation::Same(same) => {
            match same.references {
                true => refuses_references(corpus, file).map(drop)?,
                false => sound::is_same::<Qcow2Image>(corpus, file, same)?,
            }
            peers_agree(corpus, file, same)
        }
        Expectation::Refused(refusal) => is_refused(corpus, file, refusal),
        Expectation::Lost(loss) => loses(corpus, file, loss),
        Expectation::Reference { naming } => says(&refuses_references(corpus, file)?, naming),
        Expectation::Unlisted { what, otherwise } => {
            let image = reads_as(corpus, file, otherwise)?;
            is_unlisted(corpus, file, &image, *what)
        }
        Expectation::Readable { otherwise, .. } => reads_as(corpus, file, otherwise).map(drop),
    }
}

/// An image that names another file is no base, whatever that file is.
fn refuses_references(corpus: &Path, file: &Path) -> Result<Error, String> {
    match must_fail(Qcow2Image::open_in(corpus, file, &View::Active))? {
        error @ Error::Unsupported { .. } => Ok(error),
        other => Err(format!("it should not be supported as a base, but: {other}")),
    }
}

/// The other readers that have a say read what it should hold; they follow references by themselves.
fn peers_agree(corpus: &Path, file: &Path, same: &Same) -> Verdict {
    let Content::Sha512(expected) = &same.content else { return Ok(()) };
    for peer in &same.peers {
        let theirs = peers::read(*peer, &corpus.join(file)).map_err(|e| format!("{peer:?}: {e}"))?;
        equal(&format!("content as {peer:?} reads it"), &sha512(&theirs), expected)?;
    }
    Ok(())
}

fn is_refused(corpus: &Path, file: &Path, refusal: &Refusal) -> Verdict {
    let error = must_fail(Qcow2Image::open_in(corpus, file, &View::Active))?;
    let (class, at) = match &error {
        Error::Corrupt { at, .. } => (Class::Corrupt, Some(at.0)),
        Error::Unsupported { .. } => (Class::Unsupported, None),
        other => return Err(format!("it should be corrupt or unsupported, but: {other}")),
    };
    if refusal.class != Class::Any && refusal.class != class {
        return Err(format!("it should be {:?}, but: {error}", refusal.class));
    }
    says(&error, &refusal.naming)?;
    match refusal.at {
        Some(expected) if at != Some(expected) => Err(format!("byte {expected} is wrong, but: {error}")),
        Some(_) | None => Ok(()),
    }
}

/// Opens; what is lost fails by name, and everything else reads as in the original.
fn loses(corpus: &Path, file: &Path, loss: &Loss) -> Verdict {
    let image = Qcow2Image::open_in(corpus, file, &View::Active).map_err(|e| format!("opening: {e}"))?;
    match (image.verify_tables(), loss.found_by) {
        (Ok(()), FoundBy::Verify) => return Err("the tables are taken for sound".into()),
        (Err(error), FoundBy::Read) => return Err(format!("only reading should tell, but: {error}")),
        (Err(error), FoundBy::Verify) => says(&error, &loss.naming)?,
        (Ok(()) | Err(_), _) => {}
    }
    let original = original(corpus, &loss.otherwise)?;
    equal("size", image.len().0, original.len() as u64)?;
    subject::extents(&image)?;
    let lost: Vec<_> = loss.ranges.iter().map(|(start, len)| ByteRange::new(*start, *len)).collect();
    let mut whole = vec![0; original.len()];
    corruption(image.read_at(&mut whole, 0)).map_err(|e| format!("all at once: {e}"))?;
    let mut at = 0;
    for expected in original.chunks(usize::try_from(SECTOR_LEN).map_err(|e| e.to_string())?) {
        let range = ByteRange::new(at, expected.len() as u64);
        let mut sector = vec![0xa5; expected.len()];
        let read = image.read_at(&mut sector, at);
        if lost.iter().any(|lost| lost.intersect(range).is_some()) {
            let error = corruption(read).map_err(|e| format!("{range}: {e}"))?;
            says(&error, &loss.naming)?;
        } else {
            read.map_err(|e| format!("{range} is not lost: {e}"))?;
            if sector != expected {
                return Err(format!("{range} does not read as in {}", loss.otherwise.display()));
            }
        }
        at += SECTOR_LEN;
    }
    Ok(())
}

fn corruption(read: Result<(), Error>) -> Result<Error, String> {
    match read {
        Ok(()) => Err("it should be lost, and reads".into()),
        Err(error @ Error::Corrupt { .. }) => Ok(error),
        Err(other) => Err(format!("it should be corrupt, but: {other}")),
    }
}

/// Opens, verifies and reads as its original does.
fn reads_as(corpus: &Path, file: &Path, otherwise: &Path) -> Result<Qcow2Image, String> {
    let image = Qcow2Image::open_in(corpus, file, &View::Active).map_err(|e| format!("opening: {e}"))?;
    image.verify_tables().map_err(|e| format!("verifying: {e}"))?;
    match subject::first_difference(&subject::content(&image)?, &original(corpus, otherwise)?) {
        Some(at) => Err(format!("reads otherwise than {} at {at}", otherwise.display())),
        None => Ok(image),
    }
}

/// What the sound image reads that a damaged one was made of; it is judged by an entry of its own.
fn original(corpus: &Path, file: &Path) -> Result<Vec<u8>, String> {
    let image = Qcow2Image::open_in(corpus, file, &View::Active).map_err(|e| e.to_string())?;
    subject::content(&image)
}

/// The list is refused as corrupt, or what it lists is when that is opened.
fn is_unlisted(corpus: &Path, file: &Path, image: &Qcow2Image, what: List) -> Verdict {
    let refused = match what {
        List::Bitmaps => subject::bitmaps(image.layer()).err(),
        List::Snapshots => match subject::snapshots(image.layer()) {
            Ok(listed) => listed
                .into_iter()
                .find_map(|(id, _)| Qcow2Image::open_in(corpus, file, &View::Snapshot(id)).err()),
            Err(error) => Some(error),
        },
    };
    match refused {
        Some(Error::Corrupt { .. }) => Ok(()),
        Some(other) => Err(format!("the list should be corrupt, but: {other}")),
        None => Err("the list is taken for sound".into()),
    }
}

fn must_fail(opened: Result<Qcow2Image, Error>) -> Result<Error, String> {
    match opened {
        Err(error) => Ok(error),
        Ok(image) => Err(match image.verify_tables() {
            Ok(()) => "it opens, and its tables are taken for sound".into(),
            Err(error) => format!("it opens; only its tables are refused: {error}"),
        }),
    }
}
