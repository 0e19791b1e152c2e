//! Clients at work while the mount ends, or while one volume does not answer.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bedplate_fuse::{Ended, FileId, Stopped};
use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use uuid::Uuid;

use crate::{
    fixture::{DEADLINE, Fixture, VOLUME, errno, until},
    memory::MemoryDevice,
    stale::Victim,
};

const CLIENTS: usize = 8;
/// Shorter than what the clients would work.
const SHORT: Duration = Duration::from_millis(400);

/// Threads that read, write and sync a file until they are told to stop, or get an error.
pub struct Clients {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Option<i32>>>,
}

impl Clients {
    pub fn start(file: &Path) -> Clients {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let threads = (0..CLIENTS).map(|n| {
            let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
            let (stop, done) = (stop.clone(), done.clone());
            thread::spawn(move || {
                let offset = u64::try_from(n).unwrap() << 20;
                while !stop.load(Ordering::Relaxed) {
                    let round = one_round(&file, offset);
                    if let Err(error) = round {
                        return error.raw_os_error();
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                None
            })
        });
        let threads = threads.collect();
        let clients = Clients { stop, done, threads };
        until("some work", || clients.done.load(Ordering::Relaxed) > CLIENTS * 10);
        clients
    }

    /// The error that each got, once it has one.
    pub fn errors(self) -> Vec<Option<i32>> {
        until("the clients' end", || self.threads.iter().all(JoinHandle::is_finished));
        self.threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }
}

fn one_round(file: &File, offset: u64) -> std::io::Result<()> {
    let (data, mut back) = ([7; 9000], [0; 9000]);
    file.write_all_at(&data, offset)?;
    file.read_exact_at(&mut back, offset)?;
    assert_eq!(data, back);
    file.sync_data()
}

/// What a client gets of a connection that has ended. Which of them depends on where its request was.
fn is_end(error: &Option<i32>) -> bool {
    matches!(error, Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED | libc::EIO))
}

#[test]
fn a_mount_that_is_worked_on_is_cut_off_at_the_deadline_and_no_client_waits_for_ever() {
    let mut fixture = Fixture::new();
    let clients = Clients::start(&fixture.volume_path());
    assert_eq!(fixture.take_mount().stop(SHORT), Stopped::CutOff { open: vec!["volumes/v".into()] });
    let errors = clients.errors();
    assert!(errors.iter().all(is_end), "{errors:?}");
    assert_eq!(fixture.namespace.open_count(VOLUME), 0);
}

#[test]
fn a_mount_that_is_worked_on_ends_when_the_work_does() {
    let mut fixture = Fixture::new();
    let clients = Clients::start(&fixture.volume_path());
    let mount = fixture.take_mount();
    let stopping = thread::spawn(move || mount.stop(DEADLINE));
    let dir = fixture.dir();
    until("the detaching", || {
        !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*dir.to_string_lossy())
    });
    clients.stop.store(true, Ordering::Relaxed);
    assert_eq!(clients.errors(), [None; CLIENTS]);
    assert_eq!(stopping.join().unwrap(), Stopped::Drained { open: vec!["volumes/v".into()] });
}

#[test]
fn an_abort_under_load_fails_every_client_and_ends_the_mount() {
    let mut fixture = Fixture::new();
    let control = fixture.scratch("control");
    fs::create_dir(&control).unwrap();
    mount(Some("fusectl"), &control, Some("fusectl"), MsFlags::empty(), None::<&str>).unwrap();
    let minor = nix::sys::stat::minor(nix::sys::stat::stat(&fixture.dir()).unwrap().st_dev);
    let clients = Clients::start(&fixture.volume_path());
    fs::write(control.join(minor.to_string()).join("abort"), "1").unwrap();
    umount2(&control, MntFlags::empty()).unwrap();
    let errors = clients.errors();
    assert!(errors.iter().all(is_end), "{errors:?}");
    assert_eq!(fixture.mount().wait_ended(DEADLINE), Some(Ended::Aborted));
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Already(Ended::Aborted));
}

#[test]
fn a_serving_process_that_is_killed_at_work_leaves_no_client_waiting() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mnt");
    let mut victim = Victim::start(&dir);
    let clients = Clients::start(&dir.join("volumes/a"));
    victim.kill();
    let errors = clients.errors();
    assert!(errors.iter().all(is_end), "{errors:?}");
}

#[test]
fn a_volume_that_does_not_answer_keeps_no_other_from_it() {
    let fixture = Fixture::new();
    let other = FileId::volume(Uuid::from_u128(77));
    fixture.namespace.add(other, "other", MemoryDevice::volume(64 << 20));
    fixture.volume.hold_writes_until(usize::MAX);
    let stuck: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let file = fixture.open(0);
            thread::spawn(move || file.write_at(b"stuck", u64::try_from(n).unwrap() * 4096))
        })
        .collect();
    until("the writes in the device", || fixture.volume.most_writes_inside() == CLIENTS);
    let clients = Clients::start(&fixture.path("volumes/other"));
    assert_eq!(fs::read_dir(fixture.path("volumes")).unwrap().count(), 2);
    assert_eq!(errno(File::open(fixture.path("volumes/none"))), libc::ENOENT);
    clients.stop.store(true, Ordering::Relaxed);
    assert_eq!(clients.errors(), [None; CLIENTS]);
    assert!(stuck.iter().all(|thread| !thread.is_finished()));
    fixture.volume.hold_writes_until(0);
    for thread in stuck {
        assert_eq!(thread.join().unwrap().unwrap(), 5);
    }
}
