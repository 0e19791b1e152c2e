//! What is measured: the table of targets.
//!
//! Owns [`Kind`]: its name, what it is, and which workloads it can take. How each is started is with [`field`]; what
//! serves a node's volumes with [`node`], and the programs of others with [`peer`].

pub mod field;
pub mod node;
pub mod peer;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::workload::{Content, Place, Step, Work, Workload};

/// How a node's mount speaks to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Classic,
    Uring,
    /// The same, and the machine's idle CPUs poll while the node is busy.
    UringLowLatency,
}

/// Who carries out the engine's actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Executor {
    Blocking,
    Ring,
}

/// How a peer is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tuning {
    Defaults,
    /// A thread of its own for the export, and the host's io_uring.
    Tuned,
}

/// Another implementation of qcow2, in a process of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Library {
    Qcow2Rs,
    Imago,
}

/// One target.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A plain file with the same bytes.
    Bare,
    /// The engine in a process of its own, without a mount.
    Engine(Executor),
    /// A node's volume, as the file of its mount.
    Fuse(Transport),
    /// A node's image, which the kernel reads without asking the node.
    Passthrough,
    /// A loop device over a node's volume.
    Loop(Transport),
    /// qemu-storage-daemon over a qcow2 overlay.
    QemuFuse(Tuning),
    QemuNbd(Tuning),
    /// nbdkit's cow filter over the base.
    NbdkitCow,
    Library(Library),
    /// What the user named.
    User(String),
}

/// Everything but what the user names, in the order of reports.
pub fn kinds() -> Vec<Kind> {
    vec![
        Kind::Bare,
        Kind::Engine(Executor::Blocking),
        Kind::Engine(Executor::Ring),
        Kind::Fuse(Transport::Classic),
        Kind::Fuse(Transport::Uring),
        Kind::Fuse(Transport::UringLowLatency),
        Kind::Passthrough,
        Kind::Loop(Transport::Classic),
        Kind::Loop(Transport::Uring),
        Kind::QemuFuse(Tuning::Defaults),
        Kind::QemuFuse(Tuning::Tuned),
        Kind::QemuNbd(Tuning::Defaults),
        Kind::QemuNbd(Tuning::Tuned),
        Kind::NbdkitCow,
        Kind::Library(Library::Qcow2Rs),
        Kind::Library(Library::Imago),
    ]
}

impl Kind {
    pub fn name(&self) -> &str {
        match self {
            Kind::Bare => "bare",
            Kind::Engine(Executor::Blocking) => "engine-blocking",
            Kind::Engine(Executor::Ring) => "engine-ring",
            Kind::Fuse(Transport::Classic) => "fuse-classic",
            Kind::Fuse(Transport::Uring) => "fuse-uring",
            Kind::Fuse(Transport::UringLowLatency) => "fuse-uring-lowlat",
            Kind::Passthrough => "passthrough",
            Kind::Loop(Transport::Classic) => "loop-classic",
            Kind::Loop(Transport::Uring | Transport::UringLowLatency) => "loop-uring",
            Kind::QemuFuse(Tuning::Defaults) => "qsd-fuse",
            Kind::QemuFuse(Tuning::Tuned) => "qsd-fuse-tuned",
            Kind::QemuNbd(Tuning::Defaults) => "qsd-nbd",
            Kind::QemuNbd(Tuning::Tuned) => "qsd-nbd-tuned",
            Kind::NbdkitCow => "nbdkit-cow",
            Kind::Library(Library::Qcow2Rs) => "qcow2-rs",
            Kind::Library(Library::Imago) => "imago",
            Kind::User(named) => named,
        }
    }

    pub fn about(&self) -> &'static str {
        match self {
            Kind::Bare => "a plain file with the same bytes",
            Kind::Engine(Executor::Blocking) => {
                "the engine in a process of its own, no mount; a thread for each request in flight"
            }
            Kind::Engine(Executor::Ring) => "the engine in a process of its own, no mount; io_uring",
            Kind::Fuse(Transport::Classic) => "a volume of `bedplate serve`, classic FUSE",
            Kind::Fuse(Transport::Uring) => "a volume of `bedplate serve`, FUSE over io_uring",
            Kind::Fuse(Transport::UringLowLatency) => {
                "a volume of `bedplate serve --low-latency`, FUSE over io_uring"
            }
            Kind::Passthrough => "an image of `bedplate serve`, read by the kernel (FUSE passthrough)",
            Kind::Loop(Transport::Classic) => "`bedplate volume attach`: a loop device over classic FUSE",
            Kind::Loop(Transport::Uring | Transport::UringLowLatency) => {
                "`bedplate volume attach`: a loop device over FUSE over io_uring"
            }
            Kind::QemuFuse(Tuning::Defaults) => "qemu-storage-daemon, a qcow2 overlay as a FUSE export",
            Kind::QemuFuse(Tuning::Tuned) => "the same with an iothread and aio=io_uring",
            Kind::QemuNbd(Tuning::Defaults) => "qemu-storage-daemon, a qcow2 overlay over NBD",
            Kind::QemuNbd(Tuning::Tuned) => "the same with an iothread and aio=io_uring",
            Kind::NbdkitCow => "nbdkit with its cow filter, over NBD",
            Kind::Library(Library::Qcow2Rs) => "qcow2-rs in process, reading an overlay of a qcow2 base",
            Kind::Library(Library::Imago) => "imago in process, reading an overlay of a qcow2 base",
            Kind::User(_) => "named with --target",
        }
    }

    /// Whether every figure is also told as a ratio to this one.
    pub const fn is_yardstick(&self) -> bool {
        match self {
            Kind::Bare
            | Kind::QemuFuse(_)
            | Kind::QemuNbd(_)
            | Kind::NbdkitCow
            | Kind::Library(_)
            | Kind::User(_) => true,
            Kind::Engine(_) | Kind::Fuse(_) | Kind::Passthrough | Kind::Loop(_) => false,
        }
    }

    /// Whether this target can be asked to do this at all. One that could and cannot on this machine says why when it
    /// is started.
    pub fn takes(&self, workload: &Workload) -> bool {
        match &workload.work {
            Work::Requests { pattern, .. } => self.takes_requests(workload, pattern.writes()),
            Work::Life(step) => self.takes_step(*step),
        }
    }

    fn takes_requests(&self, workload: &Workload, writes: bool) -> bool {
        let (content, place) = (workload.content, workload.place);
        match self {
            Kind::Bare => !matches!(content, Content::Layers(_)),
            Kind::Fuse(_) => true,
            Kind::Engine(_) => !matches!(content, Content::Storm(_)) && !workload.is_synced(),
            Kind::Passthrough => content == Content::Base && !writes,
            Kind::Loop(_) => matches!(content, Content::Base | Content::Own),
            Kind::QemuFuse(_) => !matches!(content, Content::Layers(_)),
            // fio's NBD engine has no sync.
            Kind::QemuNbd(_) => {
                matches!(content, Content::Base | Content::Own | Content::Fresh) && !workload.is_synced()
            }
            Kind::NbdkitCow => {
                // Its overlay is a file of the page cache that nobody can open past it.
                matches!(content, Content::Base | Content::Own | Content::Fresh) && place != Place::Disk
            }
            Kind::Library(_) => content == Content::Base && !writes && place == Place::PageCache,
            Kind::User(named) => match content {
                Content::Base => place == Place::PageCache && !writes,
                Content::Own => !(workload.is_synced() && is_nbd(named)),
                Content::Fresh | Content::Layers(_) | Content::Storm(_) => false,
            },
        }
    }

    fn takes_step(&self, step: Step) -> bool {
        match self {
            Kind::Fuse(Transport::Classic | Transport::Uring) => true,
            Kind::QemuFuse(Tuning::Defaults) => matches!(step, Step::Create | Step::Open),
            Kind::Bare
            | Kind::NbdkitCow
            | Kind::Engine(_)
            | Kind::Fuse(Transport::UringLowLatency)
            | Kind::Passthrough
            | Kind::Loop(_)
            | Kind::QemuFuse(Tuning::Tuned)
            | Kind::QemuNbd(_)
            | Kind::Library(_)
            | Kind::User(_) => false,
        }
    }

    /// Whether it mounts something or makes a device, which only root may.
    pub const fn needs_root(&self) -> bool {
        match self {
            Kind::Fuse(_) | Kind::Passthrough | Kind::Loop(_) | Kind::QemuFuse(_) => true,
            Kind::Bare
            | Kind::Engine(_)
            | Kind::QemuNbd(_)
            | Kind::NbdkitCow
            | Kind::Library(_)
            | Kind::User(_) => false,
        }
    }

    /// What the user named: an address of an NBD server, or a path.
    pub fn named(text: &str) -> Result<Kind, String> {
        if is_nbd(text) || Path::new(text).exists() {
            return Ok(Kind::User(text.to_owned()));
        }
        Err(format!(
            "{text}: no such file or device, and no address such as nbd://HOST or nbd+unix:///?socket=PATH"
        ))
    }
}

/// Whether this is an address that fio's NBD engine takes.
pub fn is_nbd(text: &str) -> bool {
    ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::workload::table;

    #[test]
    fn every_workload_has_a_target_and_every_target_a_workload() {
        let table = table(4);
        for workload in &table {
            assert!(kinds().iter().any(|kind| kind.takes(workload)), "{}", workload.name);
        }
        for kind in kinds() {
            assert!(table.iter().any(|workload| kind.takes(workload)), "{}", kind.name());
        }
    }

    #[test]
    fn targets_have_names_of_their_own() {
        let kinds = kinds();
        let names: BTreeSet<&str> = kinds.iter().map(Kind::name).collect();
        assert_eq!(names.len(), kinds.len());
    }

    #[test]
    fn a_user_names_files_devices_and_nbd_addresses() {
        assert!(Kind::named("/dev/null").is_ok() && Kind::named("nbd+unix:///?socket=/s").is_ok());
        assert!(Kind::named("/no/such/file").unwrap_err().contains("no such file"));
    }
}
