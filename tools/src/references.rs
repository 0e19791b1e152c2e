//! Files that other files name: backing files and external data files.
//!
//! Owns [`References`], the directory that the operator allowed. A name from an image is opened only beneath it (the
//! kernel resolves it there, so neither `..` nor a link leads out), only as a regular file, and never as one of QEMU's
//! protocols. Loops are the chain's affair (`source.rs`).

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use bedplate_engine::error::{Error, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// What to do about a file that may not be opened.
const REMEDY: &str = "name a directory that holds it with --allow-references DIR";

/// Where named files may be.
#[derive(Debug)]
pub struct References {
    directory: File,
    /// Without links, so that it can be compared.
    path: PathBuf,
}

impl References {
    pub fn allow(directory: &Path) -> Result<References> {
        let path = directory.canonicalize().map_err(|e| Error::io("open", directory, e))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&path, flags, Mode::empty());
        let directory = opened.map_err(|e| Error::io("open", &path, e.into()))?;
        Ok(References { directory: directory.into(), path })
    }

    /// Open what the image at `from` calls `name`. Gives the file and its path.
    pub fn open(&self, from: &Path, name: &[u8]) -> Result<(File, PathBuf)> {
        let refused = |why: &str| {
            let what = format!("the file {:?} that it names ({why})", String::from_utf8_lossy(name));
            Error::Unsupported { path: from.to_owned(), what }
        };
        if name.contains(&0) || name.is_empty() {
            return Err(refused("that is no file name"));
        }
        if is_protocol(name) {
            return Err(refused("only names of files are followed"));
        }
        let path = resolved(from, name)?;
        let outside = format!("it is not beneath {}; {REMEDY}", self.path.display());
        let beneath = path.strip_prefix(&self.path).map_err(|_| refused(&outside))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = match rustix::fs::openat2(&self.directory, beneath, flags, Mode::empty(), resolve) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::XDEV) => return Err(refused(&outside)),
            Err(e) => return Err(Error::io("open", path, e.into())),
        };
        let meta = file.metadata().map_err(|e| Error::io("stat", &path, e))?;
        if !meta.is_file() {
            return Err(refused("it is not a regular file"));
        }
        Ok((file, path))
    }
}

/// Why the file `name` of the image at `from` is not opened when no directory was allowed.
pub fn refusal(from: &Path, what: &str, name: &[u8]) -> Error {
    let what = format!("reading the {what} {:?} without leave ({REMEDY})", String::from_utf8_lossy(name));
    Error::Unsupported { path: from.to_owned(), what }
}

/// Where the image at `from` says `name` is: relative to its own directory.
fn resolved(from: &Path, name: &[u8]) -> Result<PathBuf> {
    let own = match from.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let own = own.canonicalize().map_err(|e| Error::io("open", own, e))?;
    Ok(own.join(OsStr::from_bytes(name)))
}

/// Whether QEMU would take a name for something else than a file: `nbd:`, `json:`, `file:` and so on.
fn is_protocol(name: &[u8]) -> bool {
    match name.iter().position(|byte| matches!(byte, b':' | b'/')) {
        Some(at) => name.get(at) == Some(&b':'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_are_opened_beneath_the_directory_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let allowed = root.join("allowed");
        std::fs::create_dir_all(allowed.join("deep")).unwrap();
        std::fs::write(allowed.join("base"), "b").unwrap();
        std::fs::write(root.join("secret"), "s").unwrap();
        symlink("../secret", allowed.join("out")).unwrap();
        symlink("base", allowed.join("in")).unwrap();
        symlink("allowed", root.join("alias")).unwrap();
        let references = References::allow(&root.join("alias")).unwrap();
        let image = allowed.join("deep/image");
        let absolute = allowed.join("base");
        for name in [&b"../base"[..], b"../in", b"./../base", absolute.as_os_str().as_bytes()] {
            assert!(references.open(&image, name).is_ok(), "{name:?}");
        }
        let secret = root.join("secret");
        for name in [
            &b"../../secret"[..],
            b"../out",
            b"/dev/null",
            b"/etc/passwd",
            secret.as_os_str().as_bytes(),
            b"../base\0x",
            b"",
            b"nbd:localhost:1",
            b"json:{}",
            b"file:../base",
        ] {
            assert!(matches!(references.open(&image, name), Err(Error::Unsupported { .. })), "{name:?}");
        }
        assert!(matches!(references.open(&image, b".."), Err(Error::Unsupported { .. })));
        assert!(references.open(&image, b"missing").unwrap_err().is_not_found());
    }
}
