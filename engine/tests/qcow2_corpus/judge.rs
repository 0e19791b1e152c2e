//! Holds our reader against a corpus of qcow2 images, entry by entry.
//!
//! Owns what each expectation of the manifest means. A difference is a sentence for a person; all entries are judged,
//! whatever the first ones say. A panic or an entry that takes longer than [`ENTRY_TIME_MAX`] is a difference too.

use std::{
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use bedplate_engine::{
    device::ExtentKind,
    error::Error,
    image::{
        BaseImage,
        chain::Chain,
        qcow2::{Qcow2Image, Qcow2Layer, View},
    },
    units::ByteRange,
};
use sha2::{Digest, Sha512};

use super::{
    manifest::{
        Class, Content, DataExtent, Entry, Expectation, FoundBy, List, Loss, Manifest, Refusal, Same,
    },
    peers,
    subject::{self, Subject},
};

/// A reader that needs longer for one small image hangs. Generous: the machine may be busy.
pub const ENTRY_TIME_MAX: Duration = Duration::from_secs(60);
const WORKERS: usize = 2;
/// Reads of a damaged image: small enough to meet the border of what is lost.
const SECTOR_LEN: u64 = 512;

type Verdict = Result<(), String>;

/// Judge every image of the corpus in `directory`. Returns how many there were and what was not as it should be.
pub fn corpus(directory: &Path) -> Result<(usize, Vec<String>), String> {
    let entries = Arc::new(Manifest::load(directory)?.entries);
    let next = Arc::new(AtomicUsize::new(0));
    let (send, receive) = mpsc::channel();
    for _ in 0..WORKERS {
        let (entries, next, send) = (entries.clone(), next.clone(), send.clone());
        let directory = directory.to_owned();
        thread::spawn(move || {
            while let Some(entry) = entries.get(next.fetch_add(1, Ordering::Relaxed)) {
                let judged = panic::catch_unwind(AssertUnwindSafe(|| judge(&directory, entry)));
                let verdict = judged.unwrap_or_else(|_| Err("it panicked".into()));
                if send.send((entry.name.clone(), verdict)).is_err() {
                    return;
                }
            }
        });
    }
    drop(send);
    let mut differences = Vec::new();
    let mut missing: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    while !missing.is_empty() {
        match receive.recv_timeout(ENTRY_TIME_MAX) {
            Ok((name, verdict)) => {
                missing.retain(|other| *other != name);
                if let Err(said) = verdict {
                    differences.push(format!("{name}: {said}"));
                }
            }
            Err(_) => {
                let late = &missing[..missing.len().min(WORKERS)];
                differences.push(format!("nothing more within {ENTRY_TIME_MAX:?}; in work are {late:?}"));
                break;
            }
        }
    }
    Ok((entries.len(), differences))
}

fn judge(corpus: &Path, entry: &Entry) -> Verdict {
    let file = &entry.file;
    match &entry.expect {
        Expectation::Same(same) if same.references => {
            refuses_references(corpus, file)?;
            is_same::<Chain>(corpus, file, same)
        }
        Expectation::Same(same) => {
            is_same::<Qcow2Image>(corpus, file, same)?;
            is_same::<Chain>(corpus, file, same)
        }
        Expectation::Refused(refusal) => is_refused(corpus, file, refusal),
        Expectation::Lost(loss) => loses(corpus, file, loss),
        Expectation::Reference { naming } => is_reference(corpus, file, naming),
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

/// Names a file that is not opened, as a base or in a chain.
fn is_reference(corpus: &Path, file: &Path, naming: &str) -> Verdict {
    says(&refuses_references(corpus, file)?, naming)?;
    match Chain::open_in(corpus, file, &View::Active) {
        Ok(_) => Err("the file that it names is opened".into()),
        Err(Error::Unsupported { .. }) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(other) => Err(format!("the file that it names should be refused, but: {other}")),
    }
}

fn is_same<I: Subject>(corpus: &Path, file: &Path, same: &Same) -> Verdict {
    let image = I::open_in(corpus, file, &View::Active).map_err(|e| e.to_string())?;
    let layer = layer(&image)?;
    layer.verify_tables().map_err(|e| format!("verifying: {e}"))?;
    equal("size", image.len().0, same.size)?;
    equal("dirty", layer.header().is_dirty(), same.dirty)?;
    equal("marked corrupt", layer.header().is_marked_corrupt(), same.corrupt)?;
    if let Some(expected) = same.data_bytes {
        let extents = subject::extents(&image)?;
        let data = extents.iter().filter(|(_, kind)| *kind == ExtentKind::Data);
        equal("bytes of data extents", data.map(|(range, _)| range.len.0).sum(), expected)?;
    }
    match &same.content {
        Content::Sha512(expected) => {
            let content = subject::content(&image)?;
            equal("content", &sha512(&content), expected)?;
            for peer in &same.peers {
                let theirs = peers::read(*peer, &corpus.join(file)).map_err(|e| format!("{peer:?}: {e}"))?;
                if let Some(at) = subject::first_difference(&content, &theirs) {
                    return Err(format!("{peer:?} reads otherwise at {at}"));
                }
            }
        }
        Content::Extents(expected) => holds_extents(&image, expected)?,
    }
    holds_snapshots::<I>(corpus, file, layer, same)?;
    equal("bitmaps", subject::bitmaps(layer).map_err(|e| e.to_string())?, same.bitmaps.clone())
}

fn layer(image: &impl Subject) -> Result<&Qcow2Layer, String> {
    image.layer().ok_or_else(|| "it is not qcow2".into())
}

/// A disk too large to read as a whole: zeros but for what is expected.
fn holds_extents(image: &dyn BaseImage, expected: &[DataExtent]) -> Verdict {
    for extent in expected {
        let mut bytes = vec![0xa5; usize::try_from(extent.len).map_err(|e| e.to_string())?];
        image.read_at(&mut bytes, extent.start).map_err(|e| e.to_string())?;
        equal(&format!("content from {} on", extent.start), &sha512(&bytes), &extent.sha512)?;
    }
    for (range, kind) in subject::extents(image)? {
        if kind == ExtentKind::Zero {
            continue;
        }
        let mut uncovered = range.len.0;
        for extent in expected {
            let overlap = ByteRange::new(extent.start, extent.len).intersect(range);
            uncovered -= overlap.map_or(0, |overlap| overlap.len.0);
        }
        equal(&format!("bytes of data in {range} that should be zeros"), uncovered, 0)?;
    }
    Ok(())
}

fn holds_snapshots<I: Subject>(corpus: &Path, file: &Path, active: &Qcow2Layer, same: &Same) -> Verdict {
    let listed = subject::snapshots(active).map_err(|e| format!("listing snapshots: {e}"))?;
    let expected: Vec<_> = same.snapshots.iter().map(|s| (s.id.clone(), s.name.clone())).collect();
    equal("snapshots", listed, expected)?;
    for snapshot in &same.snapshots {
        for wanted in [&snapshot.id, &snapshot.name] {
            let said = |e: &dyn std::fmt::Display| format!("snapshot {wanted:?}: {e}");
            let image = I::open_in(corpus, file, &View::Snapshot(wanted.clone())).map_err(|e| said(&e))?;
            layer(&image)?.verify_tables().map_err(|e| said(&e))?;
            equal(&format!("size of snapshot {wanted:?}"), image.len().0, snapshot.size)?;
            let content = subject::content(&image).map_err(|e| said(&e))?;
            equal(&format!("content of snapshot {wanted:?}"), &sha512(&content), &snapshot.sha512)?;
        }
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

fn says(error: &Error, naming: &str) -> Verdict {
    let plain = |text: &str| text.to_lowercase().replace('_', " ");
    if plain(&error.to_string()).contains(&plain(naming)) {
        return Ok(());
    }
    Err(format!("the message should name {naming:?}, but: {error}"))
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Verdict {
    if found == expected { Ok(()) } else { Err(format!("{what} is {found:?}, not {expected:?}")) }
}

fn sha512(bytes: &[u8]) -> String {
    Sha512::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
