//! What `info` and `check` say of a replica directory.
//!
//! Owns the keys below `format-specific` and the findings of a check: which layers stand on which, which are marked
//! removed, what belongs to nothing, what is missing. Checksums are `checksum.rs`'s.

use std::collections::BTreeSet;

use bedplate_engine::error::Error;
use serde::Serialize;

use super::{
    Entry, META_SUFFIX, Replica, SNAPSHOT_PREFIX,
    checksum::{self, Findings},
    record::Labels,
};
use crate::{
    info::{FormatSpecific, Info},
    print, size,
};

/// The keys below `format-specific`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    head: Option<String>,
    rebuilding: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
    encrypted: bool,
    /// From the head down, without the backing file.
    chain: Vec<String>,
    layers: Vec<LayerInfo>,
    /// What was not as it should be, and what was done about it.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct LayerInfo {
    filename: String,
    /// The snapshot's name; heads have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<String>,
    size: u64,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    removed: bool,
    user_created: bool,
    created: String,
    labels: Labels,
}

/// Fill in what the directory says.
pub fn info(replica: &Replica, info: &mut Info) {
    info.format = "longhorn-replica";
    info.virtual_size = Some(replica.size);
    info.actual_size = replica.entries.values().map(|entry| entry.allocated).sum();
    let chain = match replica.head.clone().and_then(|head| replica.chain(&head)) {
        Ok(chain) => chain,
        Err(error) => {
            info.lacks(&error);
            Vec::new()
        }
    };
    let meta = match &replica.meta {
        Ok(meta) => meta.clone(),
        Err(error) => {
            // A record that is not there is as damaged as one that cannot be parsed.
            info.damage.push(error.to_string());
            super::VolumeMeta::default()
        }
    };
    info.dirty_flag = meta.dirty;
    if !meta.backing_file_path.is_empty() {
        info.backing_filename = Some(meta.backing_file_path.clone());
    }
    if meta.rebuilding {
        info.damage.push("the replica was being rebuilt: some of its content is missing".to_owned());
    }
    if !meta.error.is_empty() {
        info.damage.push(format!("the engine gave it up: {}", meta.error));
    }
    for entry in replica.entries.values() {
        if let Err(error) = &entry.meta {
            info.damage.push(error.to_string());
        }
    }
    let layers = replica.entries.iter().map(|(name, entry)| layer(name, entry)).collect();
    info.format_specific = Some(FormatSpecific::LonghornReplica(ReplicaInfo {
        head: replica.head.clone().ok(),
        rebuilding: meta.rebuilding,
        error: meta.error,
        encrypted: meta.encrypted,
        chain,
        layers,
        notes: replica.notes.clone(),
    }));
}

fn layer(name: &str, entry: &Entry) -> LayerInfo {
    let meta = entry.meta.clone().unwrap_or_default();
    LayerInfo {
        filename: name.to_owned(),
        snapshot: snapshot_of(name).map(str::to_owned),
        size: entry.len,
        actual_size: entry.allocated,
        parent: (!meta.parent.is_empty()).then_some(meta.parent),
        removed: meta.removed,
        user_created: meta.user_created,
        created: meta.created,
        labels: meta.labels,
    }
}

/// The name of the snapshot that a layer is.
fn snapshot_of(name: &str) -> Option<&str> {
    name.strip_prefix(SNAPSHOT_PREFIX)?.strip_suffix(super::LAYER_SUFFIX)
}

impl ReplicaInfo {
    /// For people: the head's properties, before the table of layers.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = vec![("head".to_owned(), self.head.clone().unwrap_or_else(|| "unknown".to_owned()))];
        if self.encrypted {
            rows.push(("encrypted".to_owned(), "yes: the content is for the key's owner".to_owned()));
        }
        rows.extend(self.notes.iter().map(|note| ("note".to_owned(), note.clone())));
        rows
    }

    /// For people: the chain, newest first, then layers of other branches.
    pub fn table(&self) -> String {
        let in_chain =
            self.chain.iter().filter_map(|name| self.layers.iter().find(|layer| layer.filename == *name));
        let others = self.layers.iter().filter(|layer| !self.chain.contains(&layer.filename));
        let rows = in_chain.map(|layer| (layer, "")).chain(others.map(|layer| (layer, "not in the chain")));
        let rows = rows.map(|(layer, place)| {
            let removed = if layer.removed { "removed" } else { "" };
            let remarks: Vec<_> = [removed, place].into_iter().filter(|text| !text.is_empty()).collect();
            [
                layer.filename.clone(),
                size::show(layer.size),
                size::show(layer.actual_size),
                layer.created.clone(),
                remarks.join(", "),
            ]
        });
        print::listing(["LAYER", "SIZE", "ON DISK", "CREATED", ""], rows)
    }
}

/// What is wrong with the directory: corruptions, and leftovers that only waste space.
pub fn check(replica: &Replica) -> Findings {
    let Findings { mut corruptions, mut leftovers } = checksum::check(replica);
    let mut tell = |error: &Error| {
        let text = error.to_string();
        if !corruptions.contains(&text) {
            corruptions.push(text);
        }
    };
    if let Err(error) = &replica.meta {
        tell(error);
    }
    let mut used = BTreeSet::new();
    let snapshots = replica.entries.keys().filter(|name| snapshot_of(name).is_some());
    for top in replica.head.iter().chain(snapshots) {
        match replica.chain(top) {
            Ok(chain) => used.extend(chain),
            Err(error) => tell(&error),
        }
    }
    if let Err(error) = &replica.head {
        tell(error);
    }
    if let Ok(meta) = &replica.meta
        && meta.rebuilding
    {
        corruptions.push("the replica was being rebuilt: some of its content is missing".to_owned());
    }
    for (name, entry) in &replica.entries {
        if entry.len > replica.size {
            corruptions.push(format!("{name} is longer than the volume"));
        }
        if !used.contains(name) {
            leftovers.push(format!("{name} belongs to no snapshot and is not the head"));
        }
    }
    for name in &replica.strangers {
        let what = if name.ends_with(META_SUFFIX) {
            "the record of a layer that is not there"
        } else {
            "a leftover"
        };
        leftovers.push(format!("{name} is {what}"));
    }
    Findings { corruptions, leftovers }
}
