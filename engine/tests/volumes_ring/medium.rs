//! What a ring, or the thread that syncs for it, is told by a medium that fails: errors, full, less than was asked for.
//!
//! The simulated medium has no descriptors, so with it a worker leaves everything to threads. Here the head's data is a
//! real file, and what the ring gets can be another one's descriptor.

use std::{
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::{Error, Result},
    exec::{
        asynchronous::{Cache, Descriptor},
        storage::{EntryKind, Open, Storage, StorageFile, file::FileStorage},
    },
    units::{ByteLen, ByteRange},
    volume::{
        device::VolumeState,
        disk::{Disk, Held},
        life::Origin,
    },
};

use crate::util::{Served, served};

/// What the ring is given in place of a data file, when it is.
#[derive(Debug)]
struct Other {
    file: File,
    used: AtomicBool,
}

/// A directory whose data files the ring may find to be another file.
#[derive(Debug)]
struct Switched {
    real: FileStorage,
    other: Arc<Other>,
}

#[derive(Debug)]
struct SwitchedFile {
    real: Arc<dyn StorageFile>,
    other: Arc<Other>,
}

impl StorageFile for SwitchedFile {
    fn descriptor(&self) -> Option<Descriptor<'_>> {
        let other = Descriptor { fd: self.other.file.as_fd(), cache: Cache::Buffered };
        if self.other.used.load(Ordering::SeqCst) { Some(other) } else { self.real.descriptor() }
    }

    fn path(&self) -> &Path {
        self.real.path()
    }

    fn len(&self) -> Result<u64> {
        self.real.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.real.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.real.write_at(data, offset)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.real.set_len(len)
    }

    fn punch(&self, range: ByteRange) -> Result<()> {
        self.real.punch(range)
    }

    fn sync(&self) -> Result<()> {
        if self.other.used.load(Ordering::SeqCst) {
            return self.other.file.sync_data().map_err(|e| Error::io("sync", self.path(), e));
        }
        self.real.sync()
    }

    fn drop_cache(&self) -> Result<()> {
        self.real.drop_cache()
    }

    fn write_align(&self) -> u64 {
        self.real.write_align()
    }

    fn allocated(&self) -> Result<u64> {
        self.real.allocated()
    }

    fn data_ranges(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        self.real.data_ranges(range)
    }
}

impl Storage for Switched {
    fn open(&self, path: &str, how: Open) -> Result<Arc<dyn StorageFile>> {
        let real = self.real.open(path, how)?;
        let is_data = path.ends_with("/data");
        Ok(if is_data { Arc::new(SwitchedFile { real, other: self.other.clone() }) } else { real })
    }

    fn full_path(&self, path: &str) -> PathBuf {
        self.real.full_path(path)
    }

    fn create_dir(&self, path: &str) -> Result<()> {
        self.real.create_dir(path)
    }

    fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>> {
        self.real.list(path)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.real.rename(from, to)
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        self.real.remove_file(path)
    }

    fn remove_dir(&self, path: &str) -> Result<()> {
        self.real.remove_dir(path)
    }

    fn sync_dir(&self, path: &str) -> Result<()> {
        self.real.sync_dir(path)
    }

    fn sync_names(&self) -> Result<()> {
        self.real.sync_names()
    }

    fn allocate(&self, path: &str, len: u64) -> Result<()> {
        self.real.allocate(path, len)
    }

    fn free_bytes(&self) -> Result<u64> {
        self.real.free_bytes()
    }

    fn total_bytes(&self) -> Result<u64> {
        self.real.total_bytes()
    }
}

struct Fixture {
    other: Arc<Other>,
    disk: Arc<Disk>,
    volume: Served,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// A volume of 64 KiB whose first 16 are sevens on disk; the ring sees its data as `other` once it is switched.
    fn new(other: File) -> Fixture {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let other = Arc::new(Other { file: other, used: AtomicBool::new(false) });
        let real = FileStorage::open(dir.path()).expect("opens");
        let storage = Arc::new(Switched { real, other: other.clone() });
        let disk = crate::util::open(Held::over(storage), Arc::default());
        disk.create_volume("v", Origin::Empty, Some(ByteLen(65536))).expect("created");
        let volume = served(&disk, "v");
        volume.write_at(&[7; 16384], 0, Durability::Fua).expect("written");
        Fixture { other, disk, volume, _dir: dir }
    }

    fn switch(&self, used: bool) {
        self.other.used.store(used, Ordering::SeqCst);
    }

    fn read(&self, offset: u64) -> Result<Vec<u8>> {
        let mut buffer = vec![1; 4096];
        self.volume.read_at(&mut buffer, offset).map(|()| buffer)
    }
}

fn full() -> File {
    File::options().read(true).write(true).open("/dev/full").expect("every Linux has it")
}

#[test]
fn a_full_medium_fails_what_is_new_and_nothing_else_and_takes_writes_again_when_there_is_room() {
    let fixture = Fixture::new(full());
    fixture.switch(true);
    for offset in [0, 100, 20480, 20500] {
        let written = fixture.volume.write_at(&[9; 4096], offset, Durability::Volatile);
        assert!(matches!(written, Err(Error::NoSpace { .. })), "{written:?}");
    }
    fixture.switch(false);
    fixture.volume.flush().expect("nothing is wrong");
    assert_eq!(fixture.read(0).expect("read"), [7; 4096]);
    assert_eq!(fixture.read(20480).expect("read"), [0; 4096], "what failed has not become data");
    fixture.volume.write_at(&[9; 4096], 20480, Durability::Fua).expect("there is room");
    assert_eq!(fixture.read(20480).expect("read"), [9; 4096]);
}

#[test]
fn a_sync_that_fails_ends_the_volumes_writes_and_what_is_uncertain_is_not_read() {
    // It cannot be synced.
    let fixture = Fixture::new(full());
    fixture.volume.write_at(&[9; 4096], 0, Durability::Volatile).expect("written in place");
    fixture.switch(true);
    let flushed = fixture.volume.flush();
    assert!(matches!(flushed, Err(Error::Io { op: "sync", .. })), "{flushed:?}");
    fixture.switch(false);
    assert!(matches!(fixture.volume.state(), VolumeState::ReadOnly { .. }));
    assert!(matches!(fixture.read(0), Err(Error::Lost { .. })));
    assert_eq!(fixture.read(4096).expect("read"), [7; 4096]);
    let refused = fixture.volume.write_at(&[9; 4096], 8192, Durability::Volatile);
    assert!(matches!(refused, Err(Error::Failed { .. })), "{refused:?}");
    assert!(fixture.disk.recover("v").is_ok(), "there is a way out");
}

#[test]
fn a_read_that_ends_early_or_fails_on_the_ring_is_finished_by_a_thread_which_has_the_last_word() {
    let short = tempfile::tempfile().expect("a file");
    std::os::unix::fs::FileExt::write_all_at(&short, &[7; 1000], 0).expect("written");
    let directory = File::open("/").expect("a directory, which cannot be read");
    for other in [short, directory] {
        let fixture = Fixture::new(other);
        fixture.switch(true);
        assert_eq!(fixture.read(0).expect("read"), [7; 4096]);
        assert_eq!(fixture.read(3000).expect("read"), [7; 4096]);
        // Now the real file is cut, too.
        let record = fixture.volume.record();
        let data = fixture.disk.path().join(format!("layers/{}/data", record.head));
        File::options().write(true).open(data).expect("there").set_len(8192).expect("cut");
        let read = fixture.read(8192);
        assert!(matches!(read, Err(Error::Io { op: "read", .. })), "{read:?}");
        assert_eq!(fixture.read(0).expect("the rest is served"), [7; 4096]);
    }
}
