//! Which executor carries out what is submitted to a disk's volumes.

use serde::{Deserialize, Serialize};

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutorChoice {
    /// Workers with an io_uring carry everything out, also for threads that could wait; a disk that cannot have
    /// workers is not opened.
    Ring,
    /// The thread that submits carries its request out.
    Blocking,
    /// Workers, where the kernel has io_uring and lets us use it, carry out what is submitted. A thread that calls and
    /// waits does that itself, which is faster.
    #[default]
    Auto,
}

/// What is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutorKind {
    Ring,
    Blocking,
}

impl std::fmt::Display for ExecutorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ExecutorKind::Ring => "ring",
            ExecutorKind::Blocking => "blocking",
        })
    }
}
