//! What a start must not leave behind (invariant 12).

use std::collections::BTreeSet;

use bedplate_engine::{
    exec::storage::Storage,
    volume::record::{self, VolumeRecord},
};

/// Nothing is left that no record names; `marks` are files that layers may hold besides.
pub fn check(storage: &dyn Storage, marks: &[&str]) -> Result<(), String> {
    let list = |path: &str| storage.list(path).map_err(|e| e.to_string());
    let mut named = BTreeSet::new();
    for (name, _) in list("volumes")? {
        if name.starts_with('.') {
            return Err(format!("volumes/{name} is left"));
        }
        let path = format!("volumes/{name}/volume.json");
        let record: VolumeRecord = record::read(storage, &path).map_err(|e| e.to_string())?;
        named.extend(record.layers.iter().map(|layer| layer.uuid.to_string()));
        if list(&format!("volumes/{name}"))?.len() != 1 {
            return Err(format!("volumes/{name} holds more than its record"));
        }
    }
    let layers: BTreeSet<String> = list("layers")?.into_iter().map(|(name, _)| name).collect();
    if layers != named {
        return Err(format!("layers are {layers:?}, records name {named:?}"));
    }
    for layer in layers {
        let names = list(&format!("layers/{layer}"))?.into_iter().map(|(name, _)| name);
        let files: BTreeSet<String> = names.filter(|name| !marks.contains(&name.as_str())).collect();
        if files != BTreeSet::from(["data".to_owned(), "map".to_owned()]) {
            return Err(format!("layers/{layer} holds {files:?}"));
        }
    }
    Ok(())
}
