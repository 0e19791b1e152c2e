//! The state directory: what a node remembers beside its disks.
//!
//! Owns how its records are read and replaced. Nothing in them is needed to serve: the disks are the truth. They only
//! tell what an earlier node did, so one that cannot be read is set aside and said so, never a reason not to start.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Serialize, de::DeserializeOwned};

/// Its lock lasts as long as the process that holds it.
const LOCK: &str = "node.lock";

/// A directory that only this node writes to; the mount and the socket in it are for others, too.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Arc<Flock<File>>,
}

impl StateDir {
    /// Lock it, since a second node would take the first one's records for those of a node that is gone; an error of
    /// the kind `ResourceBusy` tells that.
    pub fn open(path: &Path) -> io::Result<StateDir> {
        DirBuilder::new().recursive(true).mode(0o755).create(path)?;
        let file = File::options().create(true).truncate(false).write(true).open(path.join(LOCK))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => io::Error::new(io::ErrorKind::ResourceBusy, "another node uses it"),
            errno => errno.into(),
        })?;
        Ok(StateDir { path: path.to_owned(), _lock: Arc::new(lock) })
    }

    /// The record `name`, or what there is before it has been written.
    pub fn load<T: DeserializeOwned + Default>(&self, name: &str) -> T {
        let path = self.path.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return T::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a record is not read");
                return T::default();
            }
        };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            let aside = path.with_extension("unreadable");
            tracing::warn!(path = %path.display(), %error, "a record is not sound; set aside as *.unreadable");
            if let Err(error) = fs::rename(&path, &aside) {
                tracing::warn!(path = %path.display(), %error, "rename");
            }
            T::default()
        })
    }

    /// Replace the record `name`.
    pub fn store<T: Serialize>(&self, name: &str, record: &T) -> io::Result<()> {
        let path = self.path.join(name);
        let new = self.path.join(format!("{name}.new"));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.path)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn records_are_read_back_and_damaged_ones_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("a/b")).unwrap();
        assert!(state.load::<BTreeMap<String, u32>>("r.json").is_empty());
        state.store("r.json", &BTreeMap::from([("a", 1)])).unwrap();
        assert_eq!(state.load::<BTreeMap<String, u32>>("r.json").get("a"), Some(&1));
        fs::write(dir.path().join("a/b/r.json"), "{").unwrap();
        assert!(state.load::<BTreeMap<String, u32>>("r.json").is_empty());
        assert_eq!(fs::read(dir.path().join("a/b/r.unreadable")).unwrap(), b"{");
    }

    #[test]
    fn a_directory_that_a_node_uses_is_refused_to_another_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        assert_eq!(StateDir::open(dir.path()).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        StateDir::open(dir.path()).unwrap();
    }
}
