//! The machine's switch for FUSE over io_uring, while tests need it.
//!
//! The kernel looks at it when a mount is made, not later. So a test holds a shared lock on it meanwhile, and the last one
//! to let go puts it back if a test had turned it on; which a file in `/run` remembers, for other test programs.

use std::{
    fs::{self, File},
    path::Path,
};

use bedplate_fuse::{RINGS_PARAMETER, TransportChoice};
use nix::fcntl::{Flock, FlockArg};

use crate::TRANSPORT;

/// There while the switch is on because of a test.
const TURNED_ON: &str = "/run/bedplate-tests-turned-rings-on";

/// Run `work` with the switch on, if this program's transport needs that.
pub fn with_rings<T>(work: impl FnOnce() -> T) -> T {
    match TRANSPORT {
        TransportChoice::Uring => {}
        TransportChoice::Auto | TransportChoice::Classic => return work(),
    }
    let held = lock(FlockArg::LockShared);
    if read() != "Y" {
        fs::write(TURNED_ON, "").unwrap();
        fs::write(RINGS_PARAMETER, "Y").unwrap();
    }
    let result = work();
    drop(held);
    put_back();
    result
}

/// Run `work` with the switch off, and nobody else making a mount by rings.
#[allow(dead_code, reason = "used where rings are what is tested")]
pub fn without_rings<T>(work: impl FnOnce() -> T) -> T {
    let held = lock(FlockArg::LockExclusive);
    let before = read();
    fs::write(RINGS_PARAMETER, "N").unwrap();
    let result = work();
    fs::write(RINGS_PARAMETER, before).unwrap();
    drop(held);
    result
}

fn put_back() {
    let Ok(_alone) = Flock::lock(File::open(RINGS_PARAMETER).unwrap(), FlockArg::LockExclusiveNonblock)
    else {
        return;
    };
    if Path::new(TURNED_ON).exists() {
        fs::write(RINGS_PARAMETER, "N").unwrap();
        fs::remove_file(TURNED_ON).unwrap();
    }
}

fn lock(arg: FlockArg) -> Flock<File> {
    let file = File::open(RINGS_PARAMETER).expect("a kernel with FUSE over io_uring");
    Flock::lock(file, arg).map_err(|(_, error)| error).unwrap()
}

fn read() -> String {
    fs::read_to_string(RINGS_PARAMETER).unwrap().trim().into()
}
