//! What a mount does about rings that cannot be had, and that those which it has stay.

use std::{fs, sync::Arc};

use bedplate_fuse::{
    Mount, MountError, MountOptions, NoRings, Stopped, Transport, TransportChoice, rings_offered,
};

use crate::{
    fixture::{DEADLINE, Fixture, VOLUME},
    memory::{MemoryDevice, MemoryNamespace},
    switch::without_rings,
};

fn start(transport: TransportChoice) -> (tempfile::TempDir, Result<Mount, MountError>) {
    let dir = tempfile::tempdir().unwrap();
    let namespace = Arc::new(MemoryNamespace::default());
    namespace.add(VOLUME, "v", MemoryDevice::volume(1 << 20));
    let options = MountOptions { transport, ..MountOptions::default() };
    let mount = Mount::start(&dir.path().join("mnt"), namespace, options);
    (dir, mount)
}

#[test]
fn a_mount_of_this_program_is_served_by_rings() {
    assert_eq!(Fixture::new().mount().transport(), Transport::Uring);
}

#[test]
fn where_rings_are_switched_off_a_mount_that_may_do_without_is_served_on_the_device() {
    let (dir, mount) = without_rings(|| start(TransportChoice::Auto));
    let mount = mount.unwrap();
    assert_eq!(mount.transport(), Transport::Classic);
    assert_eq!(fs::read(dir.path().join("mnt/volumes/v")).unwrap(), vec![0; 1 << 20]);
    assert_eq!(mount.stop(DEADLINE), Stopped::Unmounted);
}

#[test]
fn where_rings_are_switched_off_a_mount_that_insists_is_refused_with_the_reason_and_leaves_nothing() {
    let (dir, refused, offered) = without_rings(|| {
        let (dir, refused) = start(TransportChoice::Uring);
        (dir, refused, rings_offered())
    });
    let error = refused.unwrap_err();
    assert!(matches!(error, MountError::NoRings(NoRings::Off)), "{error}");
    assert!(error.to_string().contains("enable_uring"), "{error}");
    assert!(matches!(offered, Err(NoRings::Off)));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*dir.path().to_string_lossy()));
}

#[test]
fn a_mount_keeps_its_rings_when_they_are_switched_off() {
    let fixture = Fixture::new();
    fixture.volume.poke(0, b"still here");
    without_rings(|| {
        let bytes = fs::read(fixture.volume_path()).unwrap();
        assert_eq!(&bytes[..10], b"still here");
    });
}

#[test]
fn a_mount_that_was_asked_to_be_classic_is_that_also_where_rings_are_on() {
    let options = MountOptions { transport: TransportChoice::Classic, ..MountOptions::default() };
    assert_eq!(Fixture::with_options(options).mount().transport(), Transport::Classic);
}
