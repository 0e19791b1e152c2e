//! The guest whose disk is a volume: writers that put files into a file system on it, and the look at what an earlier
//! life of the machine left.
//!
//! A writer writes a file whole, syncs it, renames it into place and syncs the directory, or removes one; then it notes
//! that, and only then goes on. So after any end of the machine each file is what the writer's last noted step left; of
//! the one step after it, all or nothing.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, ensure};
use bedplate_testkit::content::pattern;
use nix::mount::{MsFlags, mount, umount};

use crate::{file_system::FileSystem, notes::Notes, script::dice};

pub const WRITERS: u64 = 3;
/// The first word of the note that everything is as it must be; the number of files follows.
pub const SOUND: &str = "sound";
/// Files of a writer.
const FILES: u64 = 20;
const FILE_LEN_MAX: u64 = 300 << 10;

/// One life of the machine.
pub struct Life {
    pub seed: u64,
    pub fs: FileSystem,
    pub device: PathBuf,
    pub notes: PathBuf,
    /// The last step of each writer that an earlier life noted.
    pub durable: Vec<u64>,
}

struct Step {
    file: u64,
    /// The new content, if the file is not removed.
    content: Option<Vec<u8>>,
}

/// Step `number`, from 1.
fn step(seed: u64, writer: u64, number: u64) -> Step {
    let mut dice = dice(&[seed, writer, number]);
    let file = dice.roll(FILES);
    let content = (dice.roll(8) > 0).then(|| {
        let mut content = format!("step {number} of writer {writer}\n").into_bytes();
        content.extend(pattern(dice.roll(FILE_LEN_MAX), dice.roll(u64::MAX)));
        content
    });
    Step { file, content }
}

impl Life {
    /// Look at what is there, then go on until something fails.
    pub fn live(&self) -> Result<Infallible> {
        let place = Path::new("/disk");
        ensure!(self.durable.len() as u64 == WRITERS, "there are {WRITERS} writers");
        // Replays its journal.
        self.mount(place)?;
        let files = self.check(place)?;
        umount(place)?;
        self.fs.check(&self.device)?;
        self.mount(place)?;
        Notes::open(&self.notes, WRITERS)?.note(&format!("{SOUND} {files}"))?;
        let writers: Vec<_> = (0..)
            .zip(self.durable.iter().copied())
            .map(|(writer, durable)| {
                let (seed, notes) = (self.seed, Notes::open(&self.notes, writer)?);
                Ok(thread::spawn(move || -> () {
                    let error = write(seed, writer, durable + 1, place, &notes)
                        .expect_err("it goes on until it fails");
                    notes.fail(&error.context(format!("writer {writer}")))
                }))
            })
            .collect::<Result<_>>()?;
        for writer in writers {
            writer.join().expect("a writer ends the process");
        }
        unreachable!("a writer ends the process")
    }

    fn mount(&self, place: &Path) -> Result<()> {
        let fs = self.fs.to_string();
        mount(Some(&self.device), place, Some(fs.as_str()), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("{} is not mounted", self.device.display()))
    }

    /// How many files there are, each as it must be.
    fn check(&self, place: &Path) -> Result<usize> {
        let mut allowed: BTreeMap<String, Vec<Option<Vec<u8>>>> = BTreeMap::new();
        for (writer, durable) in (0..).zip(&self.durable) {
            for number in 1..=*durable {
                let Step { file, content } = step(self.seed, writer, number);
                allowed.insert(name(writer, file), vec![content]);
            }
            let Step { file, content } = step(self.seed, writer, durable + 1);
            allowed.entry(name(writer, file)).or_insert_with(|| vec![None]).push(content);
        }
        for (name, contents) in &allowed {
            let found = match fs::read(place.join(name)) {
                Ok(found) => Some(found),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(error).context(name.clone()),
            };
            ensure!(contents.contains(&found), "{name} holds {}", describe(found.as_deref(), contents));
        }
        let mut files = 0;
        for entry in fs::read_dir(place)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // What a step had not renamed yet, and what mkfs made.
            if name.starts_with("new") || name == "lost+found" {
                continue;
            }
            ensure!(allowed.contains_key(&name), "{name} is there, and nobody made it");
            files += 1;
        }
        Ok(files)
    }
}

fn name(writer: u64, file: u64) -> String {
    format!("w{writer}-{file}")
}

fn describe(found: Option<&[u8]>, allowed: &[Option<Vec<u8>>]) -> String {
    let one = |content: Option<&[u8]>| match content {
        None => "nothing".to_owned(),
        Some(content) => {
            let first = content.split(|byte| *byte == b'\n').next().unwrap_or_default();
            format!("{} bytes of {:?}", content.len(), String::from_utf8_lossy(&first[..first.len().min(40)]))
        }
    };
    let allowed: Vec<String> = allowed.iter().map(|content| one(content.as_deref())).collect();
    format!("{} (or it differs further on), where {} is right", one(found), allowed.join(" or "))
}

fn write(seed: u64, writer: u64, first: u64, place: &Path, notes: &Notes) -> Result<Infallible> {
    for number in first.. {
        let Step { file, content } = step(seed, writer, number);
        let path = place.join(name(writer, file));
        match content {
            Some(content) => {
                let new = place.join(format!("new{writer}"));
                fs::write(&new, content)?;
                File::open(&new)?.sync_all()?;
                fs::rename(&new, &path)?;
            }
            None if path.exists() => fs::remove_file(&path)?,
            None => {}
        }
        File::open(place)?.sync_all()?;
        notes.note(&format!("durable {writer} {number}"))?;
    }
    unreachable!("numbers do not end")
}
