//! What is done to a volume while it is written to, and what may be there of it after a kill.
//!
//! A [`Life`] knows the snapshots of one volume and what each holds. Before it asks for anything that could outlive a
//! kill, it notes what that would have to hold ([`Life::unsettled`]); after the restart whatever is there of it is
//! compared, and goes.

use std::{collections::BTreeMap, fs::File, path::PathBuf};

use bedplate_testkit::{
    journal::{Dice, Durability, SECTOR, write_until},
    run::until,
};
use serde::Serialize;

use crate::{
    content::{Content, WRITERS},
    lab::{Ended, Lab},
};

/// Snapshots of a volume, at most.
const SNAPSHOTS_MAX: usize = 4;
/// How much larger than its writers' part a volume becomes.
const GROWTH_MAX: u64 = 4 << 20;

/// A kind of thing that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    Snapshot,
    /// The layer is merged.
    DeleteSnapshot,
    Clone,
    FullClone,
    Revert,
    Flatten,
    Export,
    ExportQcow2,
    ImageOfSnapshot,
    CloneImage,
    Download,
    Upload,
    Grow,
}

impl Act {
    pub const ALL: [Act; 13] = [
        Act::Snapshot,
        Act::DeleteSnapshot,
        Act::Clone,
        Act::FullClone,
        Act::Revert,
        Act::Flatten,
        Act::Export,
        Act::ExportQcow2,
        Act::ImageOfSnapshot,
        Act::CloneImage,
        Act::Download,
        Act::Upload,
        Act::Grow,
    ];
}

/// Something that a kill may leave, or not.
#[derive(Clone, Debug)]
enum Thing {
    Snapshot(String),
    NoSnapshot(String),
    Volume(String),
    Image(String),
    File(PathBuf),
}

/// What one volume goes through.
pub struct Life {
    pub name: String,
    index: usize,
    snapshots: BTreeMap<String, Content>,
    unsettled: Vec<(Thing, Content)>,
    serial: u64,
    dice: Dice,
}

impl Life {
    pub fn new(index: usize, name: String, dice: Dice) -> Life {
        Life { name, index, snapshots: BTreeMap::new(), unsettled: Vec::new(), serial: 0, dice }
    }

    /// Any act.
    pub fn choose(&mut self) -> Act {
        let count = Act::ALL.len() as u64;
        Act::ALL[usize::try_from(self.dice.roll(count)).expect("a few")]
    }

    /// Do it; `live` is what the volume's writers write.
    pub fn act(&mut self, act: Act, live: &Content, lab: &Lab) -> Result<(), Ended> {
        let done = self.perform(act, live, lab);
        if done.is_ok() {
            assert!(
                self.unsettled.is_empty(),
                "{act:?} left {:?}",
                self.unsettled.first().map(|(thing, _)| thing)
            );
        }
        done
    }

    fn perform(&mut self, act: Act, live: &Content, lab: &Lab) -> Result<(), Ended> {
        match act {
            Act::Snapshot if self.snapshots.len() >= SNAPSHOTS_MAX => self.delete_snapshot(lab),
            Act::Snapshot => self.snapshot(live, lab),
            Act::Grow => self.grow(lab),
            Act::Flatten => self.ask(act, lab, &format!("volume flatten {}", self.name)),
            Act::CloneImage | Act::Download | Act::Upload => {
                let image = self.fresh("image");
                self.leave(Thing::Image(image.clone()), Content::over(lab.base.clone()));
                let (url, sum) = (lab.origin.url(), &lab.base_sha512);
                match act {
                    Act::CloneImage => {
                        self.ask(act, lab, &format!("image create {image} --from image:base --wait"))?
                    }
                    Act::Download => self.ask(
                        act,
                        lab,
                        &format!("image create {image} --from {url} --checksum {sum} --wait"),
                    )?,
                    _ => {
                        let script = format!("exec $B image create {image} --from - < base.raw");
                        lab.run(self.index, act, &mut lab.node.shell(&script))?;
                    }
                }
                self.check_and_delete(lab)
            }
            // The others need a snapshot.
            _ if self.snapshots.is_empty() => self.snapshot(live, lab),
            Act::DeleteSnapshot => self.delete_snapshot(lab),
            Act::Clone | Act::FullClone => {
                let pet = self.clone_snapshot(act, lab)?;
                self.write_a_bit(&pet, lab)?;
                self.check_and_delete(lab)
            }
            Act::Revert => self.revert(lab),
            Act::Export | Act::ExportQcow2 => {
                let (snapshot, content) = self.any_snapshot();
                let extension = if act == Act::Export { "raw" } else { "qcow2" };
                let file = format!("{}.{extension}", self.fresh("out"));
                self.leave(Thing::File(lab.node.scratch(&file)), content);
                let format = if act == Act::Export { "" } else { " --format qcow2 --compress zstd" };
                self.ask(act, lab, &format!("volume export {}@{snapshot} {file}{format}", self.name))?;
                self.check_and_delete(lab)
            }
            Act::ImageOfSnapshot => {
                let ((snapshot, content), image) = (self.any_snapshot(), self.fresh("golden"));
                self.leave(Thing::Image(image.clone()), content);
                let source = format!("volume:{}@{snapshot}", self.name);
                self.ask(act, lab, &format!("image create {image} --from {source} --wait"))?;
                self.check_and_delete(lab)
            }
        }
    }

    fn snapshot(&mut self, live: &Content, lab: &Lab) -> Result<(), Ended> {
        let name = self.fresh("s");
        live.watch();
        let asked = self.ask(Act::Snapshot, lab, &format!("snapshot create {} {name}", self.name));
        let moment = live.moment();
        match &asked {
            Ok(()) => drop(self.snapshots.insert(name, moment)),
            Err(_) => self.leave(Thing::Snapshot(name), moment),
        }
        asked
    }

    fn delete_snapshot(&mut self, lab: &Lab) -> Result<(), Ended> {
        let (name, content) = self.any_snapshot();
        self.leave(Thing::NoSnapshot(name.clone()), content);
        self.ask(Act::DeleteSnapshot, lab, &format!("snapshot delete {} {name}", self.name))?;
        self.unsettled.clear();
        self.snapshots.remove(&name);
        Ok(())
    }

    fn grow(&mut self, lab: &Lab) -> Result<(), Ended> {
        let size = lab.base.len() as u64 + SECTOR * self.dice.roll(GROWTH_MAX / SECTOR);
        let now = lab.alive(|| lab.node.volume(&self.name).metadata())?.len();
        self.ask(Act::Grow, lab, &format!("volume resize {} {}b", self.name, size.max(now)))
    }

    fn revert(&mut self, lab: &Lab) -> Result<(), Ended> {
        let pet = self.clone_snapshot(Act::Clone, lab)?;
        self.ask(Act::Snapshot, lab, &format!("snapshot create {pet} back"))?;
        let snapshot = self.left().copy();
        self.left().watch();
        self.write_a_bit(&pet, lab)?;
        // While the command runs it is the one or the other.
        *self.left() = self.left().moment();
        lab.when_free(|| self.ask(Act::Revert, lab, &format!("snapshot revert {pet} back")))?;
        *self.left() = snapshot;
        self.check_and_delete(lab)
    }

    /// A volume that begins as a snapshot and is compared with it.
    fn clone_snapshot(&mut self, act: Act, lab: &Lab) -> Result<String, Ended> {
        let ((snapshot, content), pet) = (self.any_snapshot(), self.fresh("pet"));
        self.leave(Thing::Volume(pet.clone()), content);
        let full = if act == Act::FullClone { " --full" } else { "" };
        self.ask(act, lab, &format!("volume clone {}@{snapshot} {pet}{full}", self.name))?;
        lab.alive(|| self.left().check(&lab.node.volume(&pet)))?;
        // What was found is what the snapshot holds.
        let found = self.left().copy();
        self.snapshots.insert(snapshot, found);
        Ok(pet)
    }

    fn write_a_bit(&mut self, pet: &str, lab: &Lab) -> Result<(), Ended> {
        let (path, seed) = (lab.node.volume(pet), self.dice.roll(u64::MAX));
        let content = self.left();
        lab.alive(|| {
            let (file, mut dice) = (File::options().read(true).write(true).open(path)?, Dice::new(seed));
            for writer in 0..WRITERS {
                let (region, mut journal) = (content.region(writer), content.journal(writer));
                write_until(&file, &mut journal, &mut dice, region, Durability::Fsync, |flushes| {
                    flushes > 1
                })?;
            }
            Ok(())
        })
    }

    /// Become something else, while nobody writes: what the volume holds then, if `dice` says so.
    pub fn begin_anew(&mut self, dice: u64, lab: &Lab) -> Result<Option<Content>, Ended> {
        let content = match dice {
            0 if !self.snapshots.is_empty() => {
                let (snapshot, content) = self.any_snapshot();
                lab.when_free(|| lab.ask(&format!("snapshot revert {} {snapshot}", self.name)))?;
                lab.alive(|| content.check(&lab.node.volume(&self.name)))?;
                self.snapshots.insert(snapshot, content.copy());
                content
            }
            1 if !self.snapshots.is_empty() => {
                let ((snapshot, content), heir) = (self.any_snapshot(), self.fresh("heir"));
                lab.ask(&format!("volume clone {}@{snapshot} {heir}", self.name))?;
                lab.when_free(|| lab.ask(&format!("volume delete {}", self.name)))?;
                self.name = heir;
                self.snapshots.clear();
                lab.alive(|| content.check(&lab.node.volume(&self.name)))?;
                content
            }
            2 => {
                lab.when_free(|| lab.ask(&format!("volume delete {}", self.name)))?;
                lab.ask(&format!("volume create {} --image base", self.name))?;
                self.snapshots.clear();
                Content::over(lab.base.clone())
            }
            _ => return Ok(None),
        };
        Ok(Some(content))
    }

    // ---- what a kill may leave

    /// `thing` may be there from now on, and would hold `content`.
    fn leave(&mut self, thing: Thing, content: Content) {
        self.unsettled.push((thing, content));
    }

    /// What the newest of these things holds.
    fn left(&mut self) -> &mut Content {
        &mut self.unsettled.last_mut().expect("something was left").1
    }

    /// The newest of these things is as it should be, and goes.
    fn check_and_delete(&mut self, lab: &Lab) -> Result<(), Ended> {
        let (thing, content) = self.unsettled.last().expect("something was left");
        thing.check_and_delete(content, lab)?;
        self.unsettled.pop();
        Ok(())
    }

    /// After a restart: compare whatever is there of what was under way, and leave only the volume and its snapshots.
    pub fn settle(&mut self, lab: &Lab) -> Result<(), Ended> {
        let listed = lab.node.json(&format!("snapshot list {}", self.name));
        let listed =
            |name: &str| listed.as_array().into_iter().flatten().any(|snapshot| snapshot["name"] == name);
        for (thing, content) in std::mem::take(&mut self.unsettled) {
            match thing {
                Thing::Snapshot(name) if listed(&name) => drop(self.snapshots.insert(name, content)),
                Thing::NoSnapshot(name) if !listed(&name) => drop(self.snapshots.remove(&name)),
                Thing::Snapshot(_) | Thing::NoSnapshot(_) => {}
                Thing::Volume(_) | Thing::Image(_) | Thing::File(_) => {
                    if thing.is_there(lab) {
                        thing.check_and_delete(&content, lab)?;
                    }
                }
            }
        }
        for name in self.snapshots.keys() {
            assert!(listed(name), "snapshot {name} of {} is gone", self.name);
        }
        Ok(())
    }

    // ---- small things

    fn ask(&mut self, act: Act, lab: &Lab, line: &str) -> Result<(), Ended> {
        lab.run(self.index, act, &mut lab.node.command(line))
    }

    /// A name that nothing of this volume had yet.
    fn fresh(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{kind}-{}-{}", self.index, self.serial)
    }

    fn any_snapshot(&mut self) -> (String, Content) {
        let index = self.dice.roll(self.snapshots.len() as u64);
        let (name, content) =
            self.snapshots.iter().nth(usize::try_from(index).expect("a few")).expect("an index of it");
        (name.clone(), content.copy())
    }
}

impl Thing {
    /// Whether it is there once nothing arrives any more.
    fn is_there(&self, lab: &Lab) -> bool {
        match self {
            Thing::Snapshot(_) | Thing::NoSnapshot(_) => false,
            Thing::Volume(name) => lab.node.names("volume").contains(name),
            Thing::File(path) => path.exists(),
            Thing::Image(name) => {
                let state = |lab: &Lab| {
                    let list = lab.node.json("image list");
                    let found =
                        list.as_array().into_iter().flatten().find(|image| image["name"] == name.as_str());
                    found.map(|image| image["state"].as_str().unwrap_or_default().to_owned())
                };
                let mut found = None;
                until("the image has arrived or not", || {
                    found = state(lab);
                    !matches!(found.as_deref(), Some("pending" | "in_progress" | "unknown"))
                });
                if found.as_deref() == Some("failed") {
                    lab.node.run(&format!("image delete {name}"));
                }
                found.as_deref() == Some("ready")
            }
        }
    }

    fn check_and_delete(&self, content: &Content, lab: &Lab) -> Result<(), Ended> {
        let node = &lab.node;
        match self {
            Thing::Snapshot(_) | Thing::NoSnapshot(_) => Ok(()),
            Thing::Volume(name) => {
                lab.alive(|| content.check(&node.volume(name)))?;
                lab.when_free(|| lab.ask(&format!("volume delete {name}")))
            }
            Thing::Image(name) => {
                lab.alive(|| content.check(&node.image(name)))?;
                lab.when_free(|| lab.ask(&format!("image delete {name}")))
            }
            Thing::File(path) => {
                if path.extension().is_some_and(|extension| extension == "qcow2") {
                    let raw = path.with_extension("decoded");
                    let (from, to) = (path.display(), raw.display());
                    node.sh(&format!("$B inspect convert '{from}' '{to}'"));
                    std::fs::rename(&raw, path).expect("both are in one directory");
                }
                content.check(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                std::fs::remove_file(path).expect("it has just been read");
                Ok(())
            }
        }
    }
}
