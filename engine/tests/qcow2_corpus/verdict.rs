//! Verdicts on the images of a corpus, whoever the reader is.
//!
//! Owns how entries are judged, not by what: a difference is a sentence for a person, and all entries are judged,
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

use bedplate_engine::error::Error;
use sha2::{Digest, Sha512};

use super::manifest::{Entry, Expectation, Manifest};

/// A reader that needs longer for one small image hangs. Generous: the machine may be busy.
pub const ENTRY_TIME_MAX: Duration = Duration::from_secs(60);
const WORKERS: usize = 2;

/// What is not as it should be.
pub type Verdict = Result<(), String>;

/// Have `judge` judge those images of the corpus in `directory` that are `wanted`. Returns how many there were and what
/// was not as it should be.
pub fn corpus(
    directory: &Path,
    wanted: fn(&Expectation) -> bool,
    judge: fn(&Path, &Entry) -> Verdict,
) -> Result<(usize, Vec<String>), String> {
    let mut entries = Manifest::load(directory)?.entries;
    entries.retain(|entry| wanted(&entry.expect));
    let entries = Arc::new(entries);
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

/// The error's message names what it should.
pub fn says(error: &Error, naming: &str) -> Verdict {
    let plain = |text: &str| text.to_lowercase().replace('_', " ");
    if plain(&error.to_string()).contains(&plain(naming)) {
        return Ok(());
    }
    Err(format!("the message should name {naming:?}, but: {error}"))
}

pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Verdict {
    if found == expected { Ok(()) } else { Err(format!("{what} is {found:?}, not {expected:?}")) }
}

pub fn sha512(bytes: &[u8]) -> String {
    Sha512::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
