//! The socket's file: who may connect, and what becomes of one that a killed node left.
//!
//! Owns the path, its mode and its group. The socket is bound where only this user can reach it and gets its place once
//! mode and group are set, so that at no moment somebody connects who may not. A socket that nobody answers on is
//! replaced, one that a node answers on never, and nothing that is no socket.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, PermissionsExt, chown},
            net::UnixStream as StdUnixStream,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};
use tokio::net::{UnixListener, UnixStream};

/// Who may speak to the node: its user, and the socket's group.
const MODE: u32 = 0o660;
/// Who may look into the directory that it is bound in.
const NURSERY_MODE: u32 = 0o700;
/// The socket's name there.
const NURSERY_NAME: &str = "socket";

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{op} {}: {source}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    #[error("another node answers on {}; stop it first, or choose another --socket", path.display())]
    Answers { path: PathBuf },
    #[error("{} exists and is not a socket; remove it, or choose another --socket", path.display())]
    NotASocket { path: PathBuf },
}

/// A bound socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Bind `path`, for this process's user and the group with this number; its own group when none is given.
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Listener, ListenError> {
        let failed = |op| move |source| ListenError::Io { op, path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ListenError::NotASocket { path: path.to_owned() });
            }
            Ok(_) if StdUnixStream::connect(path).is_ok() => {
                return Err(ListenError::Answers { path: path.to_owned() });
            }
            Ok(_) => fs::remove_file(path).map_err(failed("remove the stale socket"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("stat")(error)),
        }
        let nursery = Nursery::make(path).map_err(failed("make a directory beside"))?;
        let new = nursery.socket();
        let listener = UnixListener::bind(&new).map_err(failed("bind"))?;
        if group.is_some() {
            chown(&new, None, group).map_err(failed("give a group to"))?;
        }
        fs::set_permissions(&new, Permissions::from_mode(MODE)).map_err(failed("set the mode of"))?;
        fs::rename(&new, path).map_err(failed("rename to"))?;
        Ok(Listener { listener, path: path.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub async fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept().await?;
        Ok(stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Nothing is lost when it stays: the next node replaces it.
        drop(fs::remove_file(&self.path));
    }
}

/// A directory for this user alone, beside the socket's place. It goes when this is dropped.
struct Nursery {
    dir: PathBuf,
    held: OwnedFd,
}

impl Nursery {
    fn make(socket: &Path) -> io::Result<Nursery> {
        let mut name = socket.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let dir = socket.with_file_name(name);
        // What a killed node left.
        if let Ok(held) = hold(&dir) {
            clear(held.as_fd(), &dir);
        }
        DirBuilder::new().mode(NURSERY_MODE).create(&dir)?;
        let held = hold(&dir)?;
        Ok(Nursery { dir, held })
    }

    /// Through the descriptor: short enough for a socket's address wherever the directory is.
    fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{NURSERY_NAME}", self.held.as_raw_fd()))
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        clear(self.held.as_fd(), &self.dir);
    }
}

/// The directory itself: somebody may have put a link in its place.
fn hold(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(dir, flags, Mode::empty())?)
}

/// Nothing but an empty directory or one with a socket of ours goes.
fn clear(held: BorrowedFd<'_>, dir: &Path) {
    let _ = unlinkat(held, NURSERY_NAME, UnlinkatFlags::NoRemoveDir);
    let _ = fs::remove_dir(dir);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn the_socket_has_its_mode_and_group_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // As a node that was killed while it bound.
        fs::create_dir(dir.path().join("s.new")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("s.new/socket")).unwrap());
        let listener = Listener::bind(&path, Some(12)).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.gid()), (MODE, 12));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(StdUnixStream::connect(listener.path()).is_ok());
        drop(listener);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_path_as_long_as_an_address_may_be_is_bound() {
        let dir = tempfile::tempdir().unwrap();
        let len = 107 - dir.path().as_os_str().len() - 1;
        let path = dir.path().join("s".repeat(len));
        let _listener = Listener::bind(&path, None).unwrap();
        assert!(StdUnixStream::connect(&path).is_ok());
        assert!(matches!(Listener::bind(&path, None), Err(ListenError::Answers { .. })));
    }

    #[tokio::test]
    async fn a_link_in_the_directorys_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join(NURSERY_NAME), "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, dir.path().join("s.new")).unwrap();
        let refused = Listener::bind(&dir.path().join("s"), None);
        assert!(matches!(refused, Err(ListenError::Io { op: "make a directory beside", .. })), "{refused:?}");
        assert_eq!(fs::read_to_string(other.join(NURSERY_NAME)).unwrap(), "somebody's");
        assert!(dir.path().join("s.new").is_symlink());
    }

    #[tokio::test]
    async fn only_this_user_reaches_the_directory_that_it_is_bound_in() {
        let dir = tempfile::tempdir().unwrap();
        let nursery = Nursery::make(&dir.path().join("s")).unwrap();
        assert_eq!(fs::metadata(&nursery.dir).unwrap().mode() & 0o7777, NURSERY_MODE);
        // What is there already may be anybody's.
        assert!(nursery.socket().parent().unwrap().is_dir());
        fs::write(nursery.dir.join("other"), "").unwrap();
        assert!(Nursery::make(&dir.path().join("s")).is_err());
    }
}
