//! A file that appears under its name only when it is whole.
//!
//! Until then it has no name where the file system can do that, so that a killed process leaves nothing behind.
//! Elsewhere it has a hidden name beside its own, and a lock that dies with its process: the next export into that
//! directory removes those that nobody holds.

use std::{
    fs::{File, OpenOptions, TryLockError},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2},
    libc,
    unistd::linkat,
};
use uuid::Uuid;

use super::Existing;
use crate::error::{Error, Result};

/// The hidden name of an unfinished export, around a uuid.
const DRAFT_PREFIX: &str = ".bedplate-export-";
const DRAFT_SUFFIX: &str = ".partial";
/// Names that are looked at for abandoned drafts.
const DIRECTORY_ENTRIES_MAX: usize = 100_000;

/// A file that is not under its own name yet.
pub(super) struct Draft {
    /// Locked for as long as it is open.
    pub file: File,
    naming: Naming,
    /// The name that it has, or gets on its way to its own.
    hidden: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// Gone with the process that has it open.
    Unnamed,
    /// The file system has no unnamed files.
    Hidden,
}

impl Draft {
    pub fn create(directory: &Path) -> Result<Draft> {
        let hidden = directory.join(format!("{DRAFT_PREFIX}{}{DRAFT_SUFFIX}", Uuid::new_v4().simple()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
            Ok(file) => Draft { file, naming: Naming::Unnamed, hidden }.locked(),
            // EISDIR is what kernels say that do not know the flag.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                Draft::create_hidden(hidden)
            }
            Err(e) => Err(Error::io("create a file in", directory, e)),
        }
    }

    fn create_hidden(hidden: PathBuf) -> Result<Draft> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).create_new(true);
        let file = options.open(&hidden).map_err(|e| Error::io("create", &hidden, e))?;
        Draft { file, naming: Naming::Hidden, hidden }.locked()
    }

    /// Nobody else takes it for abandoned from now on. One that was, in the moment before, fails when it is published.
    fn locked(self) -> Result<Draft> {
        match self.file.try_lock() {
            Ok(()) => Ok(self),
            // What cannot be locked is not removed by others either: they cannot lock it themselves.
            Err(TryLockError::Error(_)) => Ok(self),
            Err(TryLockError::WouldBlock) => Err(Error::InUse {
                kind: "file",
                name: self.hidden.display().to_string(),
                by: "another export".to_owned(),
            }),
        }
    }

    /// Give it its name.
    pub fn publish(&self, path: &Path, existing: Existing) -> nix::Result<()> {
        let rename = |flags| renameat2(AT_FDCWD, &self.hidden, AT_FDCWD, path, flags);
        match (self.naming, existing) {
            (Naming::Unnamed, Existing::Refuse) => link(&self.file, path),
            // A link replaces nothing, a rename does.
            (Naming::Unnamed, Existing::Replace) => {
                link(&self.file, &self.hidden)?;
                rename(RenameFlags::empty())
            }
            (Naming::Hidden, Existing::Refuse) => {
                self.name_hidden(path, || rename(RenameFlags::RENAME_NOREPLACE))
            }
            (Naming::Hidden, Existing::Replace) => rename(RenameFlags::empty()),
        }
    }

    fn name_hidden(&self, path: &Path, rename: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
        match rename() {
            // NFS and 9p, which have no unnamed files either, refuse every flag. A link replaces nothing, too; the hidden
            // name goes with the draft.
            Err(Errno::EINVAL) => linkat(AT_FDCWD, &self.hidden, AT_FDCWD, path, AtFlags::empty()),
            renamed => renamed,
        }
    }
}

/// Name an open file; refused where the name is taken.
fn link(file: &File, path: &Path) -> nix::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// Remove the drafts in a directory whose process is gone. What goes wrong is no reason not to export.
pub(super) fn clear_abandoned(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.take(DIRECTORY_ENTRIES_MAX).flatten() {
        let is_draft = entry.file_type().is_ok_and(|kind| kind.is_file())
            && entry.file_name().to_str().is_some_and(|name| {
                let uuid = name.strip_prefix(DRAFT_PREFIX).and_then(|name| name.strip_suffix(DRAFT_SUFFIX));
                uuid.is_some_and(|uuid| Uuid::try_parse(uuid).is_ok())
            });
        if !is_draft {
            continue;
        }
        let path = entry.path();
        let abandoned = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .is_ok_and(|file| file.try_lock().is_ok() && std::fs::remove_file(&path).is_ok());
        if abandoned {
            tracing::info!(path = %path.display(), "removed what an interrupted export left");
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Nothing is there when it was published or never had a name.
        let _ = std::fs::remove_file(&self.hidden);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_draft_whose_process_is_gone_is_removed_and_one_that_is_written_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = || dir.path().join(format!("{DRAFT_PREFIX}{}{DRAFT_SUFFIX}", Uuid::new_v4().simple()));
        let foreign = format!("{DRAFT_PREFIX}mine{DRAFT_SUFFIX}");
        std::fs::write(dir.path().join(&foreign), "x").unwrap();
        let (gone, going_on) = (hidden(), hidden());
        std::fs::write(&gone, "x").unwrap();
        let draft = Draft::create_hidden(going_on.clone()).unwrap();
        clear_abandoned(dir.path());
        assert!(!gone.exists() && going_on.exists());

        draft.publish(&dir.path().join("out"), Existing::Refuse).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [foreign, "out".to_owned()]);
        assert_eq!(draft.publish(&dir.path().join("out"), Existing::Refuse), Err(Errno::ENOENT));
    }

    #[test]
    fn a_draft_gets_its_name_where_rename_knows_no_flags_and_replaces_nothing_there() {
        let dir = tempfile::tempdir().unwrap();
        let (out, hidden) = (dir.path().join("out"), dir.path().join("hidden"));
        let draft = Draft::create_hidden(hidden).unwrap();
        draft.file.set_len(7).unwrap();
        draft.name_hidden(&out, || Err(Errno::EINVAL)).unwrap();
        assert_eq!(draft.name_hidden(&out, || Err(Errno::EINVAL)), Err(Errno::EEXIST));
        drop(draft);
        assert_eq!((names(dir.path()), out.metadata().unwrap().len()), (vec!["out".to_owned()], 7));
    }

    #[test]
    fn a_draft_without_a_name_replaces_a_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::write(&out, "old").unwrap();
        let draft = Draft::create(dir.path()).unwrap();
        assert_eq!(draft.naming, Naming::Unnamed);
        assert_eq!(draft.publish(&out, Existing::Refuse), Err(Errno::EEXIST));
        draft.publish(&out, Existing::Replace).unwrap();
        assert_eq!((names(dir.path()), out.metadata().unwrap().len()), (vec!["out".to_owned()], 0));
    }
}
