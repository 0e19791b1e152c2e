//! Serve a few disks in memory, as small as a use of `bedplate-fuse` can be.
//!
//! `cargo run --example memory_mount -- DIR [auto|uring|classic]` mounts two volumes and an image on DIR until its standard
//! input ends.
//! What is written is gone afterwards. The tests kill this program to see what the next start does about its mount.

mod memory;

use std::{env, error::Error, io, path::PathBuf, sync::Arc, time::Duration};

use bedplate_fuse::{FileId, Mount, MountOptions, TransportChoice};
use memory::{MemoryDevice, MemoryNamespace};
use uuid::Uuid;

const VOLUME_SIZE: u64 = 64 << 20;
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(env::args_os().nth(1).ok_or("usage: memory_mount DIR [auto|uring|classic]")?);
    let transport = match env::args().nth(2).as_deref() {
        None | Some("auto") => TransportChoice::Auto,
        Some("uring") => TransportChoice::Uring,
        Some("classic") => TransportChoice::Classic,
        Some(other) => return Err(format!("there is no transport {other:?}").into()),
    };
    let namespace = Arc::new(MemoryNamespace::default());
    for (name, uuid) in [("a", 1), ("b", 2)] {
        namespace.add(FileId::volume(Uuid::from_u128(uuid)), name, MemoryDevice::volume(VOLUME_SIZE));
    }
    namespace.add(
        FileId::image(Uuid::from_u128(3)),
        "base",
        MemoryDevice::image(b"the content of an image\n".repeat(512)),
    );

    let mount = Mount::start(&dir, namespace, MountOptions { transport, ..MountOptions::default() })?;
    println!("mounted");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    println!("{:?}", mount.stop(STOP_TIMEOUT));
    Ok(())
}
