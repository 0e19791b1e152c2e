//! A mount's life: where it may be made, who may enter, and every way in which it ends.

use std::{
    fs,
    os::unix::{
        fs::{FileExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use bedplate_fuse::{Change, Ended, Mode, Mount, MountError, MountOptions, Sharing, Stopped};
use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use rustix::process::configure_io_flusher_behavior;

use crate::{
    fixture::{self, DEADLINE, Fixture, IMAGE, VOLUME, errno, options, until},
    memory::{MemoryDevice, MemoryNamespace},
};

/// Shorter than what a user waits for; the tests below wait for it to pass.
const SHORT: Duration = Duration::from_millis(400);

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.contains(&format!(" {} ", dir.display()))
}

fn start(dir: &Path) -> Result<Mount, MountError> {
    fixture::start(dir, Arc::new(MemoryNamespace::default()), options())
}

#[test]
fn a_mount_that_nobody_uses_is_unmounted_and_its_directory_is_as_before() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir();
    fs::read(fixture.volume_path()).unwrap();
    assert_eq!(fixture.mount().ended(), None);
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Unmounted);
    assert!(!is_mounted(&dir));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_dropped_mount_is_unmounted() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir();
    drop(fixture.take_mount());
    assert!(!is_mounted(&dir));
}

#[test]
fn a_busy_mount_is_detached_serves_its_last_user_and_ends_with_it() {
    let mut fixture = Fixture::new();
    let (dir, file, mount) = (fixture.dir(), fixture.open(0), fixture.take_mount());
    let stopping = thread::spawn(move || mount.stop(DEADLINE));
    until("the detaching", || !is_mounted(&dir));
    file.write_all_at(b"still served", 0).unwrap();
    assert_eq!(fixture.volume.peek(0, 12), b"still served");
    drop(file);
    assert_eq!(stopping.join().unwrap(), Stopped::Drained { open: vec!["volumes/v".into()] });
    assert_eq!(fixture.namespace.open_count(VOLUME), 0);
}

#[test]
fn a_mount_that_stays_busy_is_cut_off_at_the_deadline_and_its_users_get_errors() {
    let mut fixture = Fixture::new();
    let (dir, file) = (fixture.dir(), fixture.open(0));
    assert_eq!(fixture.take_mount().stop(SHORT), Stopped::CutOff { open: vec!["volumes/v".into()] });
    assert!(!is_mounted(&dir));
    assert!(matches!(errno(file.write_at(b"x", 0)), libc::ENOTCONN | libc::ECONNABORTED));
    assert_eq!(fixture.namespace.open_count(VOLUME), 0, "what the users held is let go of");
}

#[test]
fn a_device_that_does_not_answer_keeps_nobody_from_stopping() {
    let mut fixture = Fixture::new();
    fixture.volume.hold_writes_until(2);
    let (dir, file) = (fixture.dir(), fixture.open(0));
    let writer = thread::spawn(move || file.write_at(b"stuck", 0));
    until("the write in the device", || fixture.volume.most_writes_inside() == 1);
    assert!(matches!(fixture.take_mount().stop(SHORT), Stopped::CutOff { .. }));
    assert!(!is_mounted(&dir));
    assert!(matches!(errno(writer.join().unwrap()), libc::ENOTCONN | libc::ECONNABORTED));
    fixture.volume.hold_writes_until(0);
}

#[test]
fn an_unmount_from_outside_is_noticed() {
    let mut fixture = Fixture::new();
    umount2(&fixture.dir(), MntFlags::empty()).unwrap();
    assert_eq!(fixture.mount().wait_ended(DEADLINE), Some(Ended::Unmounted));
    // Telling it of a change is pointless then, and does no harm.
    fixture.mount().invalidate(Change::Content { file: VOLUME });
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Already(Ended::Unmounted));
}

#[test]
fn a_lazy_unmount_from_outside_ends_with_the_last_user() {
    let mut fixture = Fixture::new();
    let file = fixture.open(0);
    umount2(&fixture.dir(), MntFlags::MNT_DETACH).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(fixture.mount().ended(), None);
    drop(file);
    assert_eq!(fixture.mount().wait_ended(DEADLINE), Some(Ended::Unmounted));
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Already(Ended::Unmounted));
}

#[test]
fn an_aborted_connection_is_noticed_and_its_mount_cleared_away() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir();
    let control = fixture.scratch("control");
    fs::create_dir(&control).unwrap();
    mount(Some("fusectl"), &control, Some("fusectl"), MsFlags::empty(), None::<&str>).unwrap();
    let minor = nix::sys::stat::minor(nix::sys::stat::stat(&dir).unwrap().st_dev);
    fs::write(control.join(minor.to_string()).join("abort"), "1").unwrap();
    umount2(&control, MntFlags::empty()).unwrap();
    assert_eq!(fixture.mount().wait_ended(DEADLINE), Some(Ended::Aborted));
    assert!(is_mounted(&dir), "the kernel leaves it to us");
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Already(Ended::Aborted));
    assert!(!is_mounted(&dir));
}

#[test]
fn a_forced_unmount_of_a_busy_mount_is_an_abort() {
    let mut fixture = Fixture::new();
    let (dir, file) = (fixture.dir(), fixture.open(0));
    assert_eq!(umount2(&dir, MntFlags::MNT_FORCE), Err(nix::errno::Errno::EBUSY));
    assert_eq!(fixture.mount().wait_ended(DEADLINE), Some(Ended::Aborted));
    assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Already(Ended::Aborted));
    assert!(!is_mounted(&dir));
    drop(file);
}

#[test]
fn a_mount_is_made_again_where_one_was() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir();
    for _ in 0..5 {
        assert_eq!(fixture.take_mount().stop(DEADLINE), Stopped::Unmounted);
        fixture.remount(&dir);
        assert!(fs::metadata(fixture.volume_path()).is_ok());
    }
}

#[test]
fn a_missing_directory_is_made_also_with_blanks_in_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a b\tc/d\\e");
    let mount = start(&path).unwrap();
    assert!(fs::metadata(path.join("volumes")).unwrap().is_dir());
    assert_eq!(mount.stop(DEADLINE), Stopped::Unmounted);
}

#[test]
fn a_directory_with_files_and_a_file_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "kept").unwrap();
    assert!(matches!(start(dir.path()), Err(MountError::NotEmpty { .. })));
    assert!(matches!(start(&dir.path().join("file")), Err(MountError::NotADirectory { .. })));
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"kept");
}

#[test]
fn a_foreign_mount_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    mount(Some("somebody"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let refused = start(dir.path());
    assert!(is_mounted(dir.path()));
    umount2(dir.path(), MntFlags::empty()).unwrap();
    let Err(MountError::Foreign { file_system, source_name, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!((file_system.as_str(), source_name.as_str()), ("tmpfs", "somebody"));
}

#[test]
fn a_mount_that_lives_is_refused_and_goes_on() {
    let fixture = Fixture::new();
    let refused = start(&fixture.dir());
    assert!(matches!(refused, Err(MountError::Held { pid, .. }) if pid == std::process::id()), "{refused:?}");
    assert!(fs::metadata(fixture.volume_path()).is_ok());
}

#[test]
fn other_users_enter_only_if_the_mount_is_shared_and_the_files_mode_lets_them() {
    const NOBODY: u32 = 65534;
    let mode = |bits| Mode::new(bits).unwrap();
    for (sharing, image_mode, readable) in
        [(Sharing::Owner, 0o444, false), (Sharing::Others, 0o444, true), (Sharing::Others, 0o400, false)]
    {
        let options = MountOptions { sharing, image_mode: mode(image_mode), ..options() };
        let fixture = Fixture::with_options(options);
        fixture.namespace.add(IMAGE, "i", MemoryDevice::image(vec![1; 100]));
        fs::set_permissions(fixture.scratch(""), fs::Permissions::from_mode(0o755)).unwrap();
        let mut cat = Command::new("cat");
        cat.arg(fixture.path("images/i")).uid(NOBODY).gid(NOBODY);
        let output = cat.output().unwrap();
        assert_eq!(output.status.success(), readable, "{sharing:?} {image_mode:o}: {output:?}");
    }
}

#[test]
fn every_serving_thread_is_an_io_flusher_where_the_process_may_make_it_one() {
    // What PR_SET_IO_FLUSHER sets of a task's flags (include/linux/sched.h): PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
    const IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
    let allowed = configure_io_flusher_behavior(true).is_ok();
    let expected = if allowed { IO_FLUSHER } else { 0 };
    println!(
        "CAP_SYS_RESOURCE is {}",
        if allowed { "there" } else { "missing: the mount has to do without" }
    );
    let _fixture = Fixture::new();
    let enough = options().threads.get();
    until("the threads' start", || serving_flags().len() >= enough);
    assert!(serving_flags().iter().all(|flags| flags & IO_FLUSHER == expected), "{:x?}", serving_flags());
}

/// The flags of every thread of this process that serves a mount, by proc_pid_stat(5).
fn serving_flags() -> Vec<u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let flags = tasks.filter_map(|task| {
        // A thread of another test may end meanwhile.
        let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        let (name, fields) = stat.rsplit_once(')')?;
        let flags = fields.split_whitespace().nth(6)?.parse().ok()?;
        ["(fuser-", "(fuse-ring-", "(fuse-call-", "(fuse-wait-"]
            .iter()
            .any(|serving| name.contains(serving))
            .then_some(flags)
    });
    flags.collect()
}
