//! A node on the host, as a user of this laboratory wants it.

use std::{fmt, path::Path};

use bedplate_testkit::node::Node;
use clap::ValueEnum;
use nix::sys::signal::Signal;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Executor {
    Blocking,
    Ring,
}

impl fmt::Display for Executor {
    /// As `bedplate serve --executor` calls it.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Executor::Blocking => "blocking",
            Executor::Ring => "ring",
        })
    }
}

/// A node that is not started yet.
pub fn with(executor: Executor) -> Node {
    let mut node = Node::idle();
    node.wrap(&["env", &format!("BEDPLATE_EXECUTOR={executor}")]);
    node
}

/// A node that serves the file system in `file`, mounted as a machine does that starts again: its journal is replayed.
pub fn over(file: &Path, executor: Executor) -> Node {
    let mut node = with(executor);
    node.sh(&format!("mount -o loop '{}' $D", file.display()));
    node.restart();
    node
}

/// The orderly end of that, and of the mount.
pub fn end(mut node: Node) {
    assert!(node.stop(Signal::SIGTERM).success(), "{}", node.log());
    node.sh("umount $D");
}
