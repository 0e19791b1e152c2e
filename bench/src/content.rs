//! The bytes that targets serve: one base for each ground, and what keeps it in the page cache or out of it.
//!
//! Owns [`Ground`], a directory on the disk or in memory with the base that bare file, peers and engine share, and the
//! filling of volumes. The bytes are pseudo-random, without a block of zeros: nobody may skip anything.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    mount::{MntFlags, umount2},
    sys::statvfs::statvfs,
};
use tempfile::TempDir;

use crate::interrupt;

/// Bytes of one write while filling, and of one read while warming.
const PIECE_LEN: usize = 1 << 20;
const BLOCK_LEN: usize = 4096;

/// Where content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Medium {
    Disk,
    Memory,
}

/// A directory of this run with its base. Removed with it.
#[derive(Debug)]
pub struct Ground {
    dir: TempDir,
    pub len: u64,
}

impl Ground {
    /// Below `dir`, with a base of `len` bytes.
    pub fn make(dir: &Path, len: u64) -> Result<Ground> {
        let dir = tempfile::Builder::new()
            .prefix("bedplate-bench-")
            .tempdir_in(dir)
            .with_context(|| format!("make a directory in {}", dir.display()))?;
        let ground = Ground { dir, len };
        let file = File::create(ground.base())?;
        fill(&file, len)?;
        file.sync_all()?;
        Ok(ground)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn base(&self) -> PathBuf {
        self.path("base.raw")
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // What a server that had to be killed leaves.
        unmount_below(self.dir.path());
    }
}

/// Bytes that `dir`'s file system has left.
pub fn free_bytes(dir: &Path) -> Result<u64> {
    let found = statvfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    Ok(found.blocks_available() * found.fragment_size())
}

/// Write the whole of `file` in order, with bytes that do not repeat.
pub fn fill(file: &File, len: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut piece = vec![0; PIECE_LEN];
    random.read_exact(&mut piece)?;
    let mut at = 0;
    while at < len {
        interrupt::check()?;
        // Each block is another one by its number; making all of it anew would take longer than to write it.
        for (index, block) in piece.chunks_exact_mut(BLOCK_LEN).enumerate() {
            let number = (at / BLOCK_LEN as u64 + index as u64).to_le_bytes();
            block.get_mut(..number.len()).context("a block")?.copy_from_slice(&number);
        }
        let count = usize::try_from((len - at).min(PIECE_LEN as u64))?;
        file.write_all_at(piece.get(..count).context("a piece")?, at)?;
        at += count as u64;
    }
    Ok(())
}

/// Have the page cache hold these files.
pub fn warm(files: &[PathBuf]) -> Result<()> {
    let mut piece = vec![0; PIECE_LEN];
    for path in files {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        while file.read(&mut piece)? > 0 {}
    }
    Ok(())
}

/// Have the page cache hold nothing of these files.
pub fn cool(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        file.sync_data()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    Ok(())
}

/// Every regular file below `dir` that is as large as a base or larger.
pub fn large_files(dir: &Path, len: u64) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => found.extend(large_files(&entry.path(), len)),
            Ok(meta) if meta.is_file() && meta.len() >= len => found.push(entry.path()),
            // Of no interest, or gone since it was listed.
            Ok(_) | Err(_) => {}
        }
    }
    found
}

/// Fail unless `path` is a file of `len` bytes that another file system serves than that of `below`: a mount that is
/// not there leaves a plain file, and that would be measured without a word.
pub fn ensure_served(path: &Path, below: &Path, len: u64) -> Result<()> {
    let meta = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    ensure!(meta.dev() != fs::metadata(below)?.dev(), "{} is a plain file, nobody serves it", path.display());
    ensure!(meta.len() == len, "{} has {} bytes where {len} are served", path.display(), meta.len());
    Ok(())
}

/// Bytes that the block device below `dir` has read since the machine started; none for what has no such device.
pub fn disk_read_bytes(dir: &Path) -> Option<u64> {
    let dev = fs::metadata(dir).ok()?.dev();
    let (major, minor) = (nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let sectors = stat.split_whitespace().nth(2)?.parse::<u64>().ok()?;
    Some(sectors * 512)
}

/// The mount that `path` lies on: type and options, as the kernel lists them.
pub fn mount_of(path: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let path = fs::canonicalize(path).ok()?;
    let mounts = table.lines().filter_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let place = head.split(' ').nth(4)?;
        let (kind, rest) = tail.split_once(' ')?;
        let options = rest.split(' ').nth(1).unwrap_or("");
        path.starts_with(place).then(|| (place.len(), format!("{kind} {options}")))
    });
    mounts.max_by_key(|(len, _)| *len).map(|(_, text)| text)
}

/// Take off whatever is mounted below `dir`, the deepest first.
pub fn unmount_below(dir: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    let places: Vec<&Path> = places.filter(|place| place.starts_with(dir)).collect();
    for place in places.into_iter().rev() {
        if let Err(error) = umount2(place, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", place.display());
        }
    }
}

/// Write a small report file whole.
pub fn write_new(path: &Path, text: &str) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_has_no_two_blocks_alike_and_none_of_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let ground = Ground::make(dir.path(), (3 << 20) + 4096).unwrap();
        let content = fs::read(ground.base()).unwrap();
        assert_eq!(content.len(), (3 << 20) + 4096);
        let blocks: std::collections::BTreeSet<&[u8]> = content.chunks(BLOCK_LEN).collect();
        assert_eq!(blocks.len(), content.len() / BLOCK_LEN);
        assert!(!blocks.contains([0; BLOCK_LEN].as_slice()));
    }

    #[test]
    fn a_plain_file_is_not_taken_for_a_served_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("export");
        fs::write(&file, [0; 512]).unwrap();
        let error = ensure_served(&file, dir.path(), 512).unwrap_err();
        assert!(error.to_string().contains("plain file"));
    }

    #[test]
    fn the_mount_of_a_path_is_the_deepest_one() {
        assert!(mount_of(Path::new("/proc/self")).unwrap().starts_with("proc "));
        assert!(mount_of(Path::new("/")).is_some());
    }

    #[test]
    fn only_large_files_are_warmed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("deep")).unwrap();
        fs::write(dir.path().join("deep/large"), [0; 64]).unwrap();
        fs::write(dir.path().join("small"), [0; 8]).unwrap();
        assert_eq!(large_files(dir.path(), 64), [dir.path().join("deep/large")]);
    }
}
