//! The files that images name: backing files and external data files.
//!
//! Owns [`AllowedDirectory`], how such a name is opened, and [`CHAIN_DEPTH_MAX`], how far names are followed; following
//! them is `bedplate-inspect`'s, for looking into images and for flattening them. What is served is one file. A name in
//! an image is bytes from outside. It is opened only beneath a directory that the operator named, by the kernel's own
//! rule (`RESOLVE_BENEATH`), only if it is a regular file, and never as a protocol.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

use crate::error::{Error, Result};

/// Most files of one chain, without external data files.
pub const CHAIN_DEPTH_MAX: usize = 64;

/// A directory beneath which the names in images may be opened.
#[derive(Debug)]
pub struct AllowedDirectory {
    directory: OwnedFd,
    /// Without links in it.
    path: PathBuf,
}

impl AllowedDirectory {
    pub fn open(path: &Path) -> Result<AllowedDirectory> {
        let path = path.canonicalize().map_err(|e| Error::io("open", path, e))?;
        let directory = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        Ok(AllowedDirectory { directory: directory.into(), path })
    }

    /// Open the file that an image in `directory` calls `name`. Returns it with its path.
    pub fn open_reference(&self, image: &Path, directory: &Path, name: &[u8]) -> Result<(File, PathBuf)> {
        let shown = String::from_utf8_lossy(name);
        let refuse = |why: &str| Error::Unsupported {
            path: image.to_owned(),
            what: format!("a reference to {shown:?} ({why})"),
        };
        let Ok(name) = std::str::from_utf8(name) else { return Err(refuse("not UTF-8")) };
        if name.is_empty() || name.contains('\0') {
            return Err(refuse("not a name"));
        }
        let first = name.split('/').next().unwrap_or_default();
        if first.contains(':') {
            return Err(refuse("only plain files are followed, no protocols"));
        }
        let wanted = directory.join(name);
        let beneath = match wanted.strip_prefix(&self.path) {
            Ok(beneath) => beneath.to_owned(),
            Err(_) => normal(&wanted)
                .strip_prefix(&self.path)
                .map(Path::to_owned)
                .map_err(|_| refuse("outside of the directory that is allowed"))?,
        };
        if beneath.as_os_str().is_empty() {
            return Err(refuse("not a regular file"));
        }
        // A device or a pipe may not even be opened, so what the name means is found out before.
        let how = |flags| {
            OpenHow::new()
                .flags(flags | OFlag::O_CLOEXEC)
                .mode(Mode::empty())
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
        };
        let found =
            openat2(&self.directory, beneath.as_os_str(), how(OFlag::O_PATH)).map_err(
                |errno| match errno {
                    nix::errno::Errno::EXDEV | nix::errno::Errno::ELOOP => {
                        refuse("outside of the directory that is allowed")
                    }
                    errno => Error::io("open", &wanted, errno.into()),
                },
            )?;
        let found = File::from(found);
        let meta = found.metadata().map_err(|e| Error::io("stat", &wanted, e))?;
        if !meta.is_file() {
            return Err(refuse("not a regular file"));
        }
        // The very file that was looked at, whatever its name means by now.
        let again = format!("/proc/self/fd/{}", found.as_raw_fd());
        let file = File::open(again).map_err(|e| Error::io("open", &wanted, e))?;
        Ok((file, self.path.join(beneath)))
    }
}

/// `path` without `.` and `..`. What the kernel then opens beneath the allowed directory is up to the kernel.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => normal.push(component),
        }
    }
    normal
}
