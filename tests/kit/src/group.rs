//! Control groups: a limit of the kernel's on some processes, of either version.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::unistd::Pid;

use super::run::until;

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// Bytes.
    Memory,
    /// Processes and threads.
    Pids,
}

impl Controller {
    fn name(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Pids => "pids",
        }
    }

    /// The file of the limit where each controller has its own tree, and where all share one.
    fn limit_files(self) -> [&'static str; 2] {
        match self {
            Controller::Memory => ["memory.limit_in_bytes", "memory.max"],
            Controller::Pids => ["pids.max", "pids.max"],
        }
    }
}

/// A control group; it goes when its last member has.
pub struct Group {
    dir: PathBuf,
    limit: PathBuf,
}

impl Group {
    pub fn new(controller: Controller, limit: u64) -> Group {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let own_tree = Path::new("/sys/fs/cgroup").join(controller.name());
        let [of_own, of_shared] = controller.limit_files();
        let (parent, file) = match own_tree.exists() {
            true => (own_tree, of_own),
            false => {
                // Version 2 hands a controller down only when it is told to.
                let told = format!("+{}", controller.name());
                fs::write("/sys/fs/cgroup/cgroup.subtree_control", told).unwrap();
                (PathBuf::from("/sys/fs/cgroup"), of_shared)
            }
        };
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let dir = parent.join(format!("bedplate-test-{}-{number}", Pid::this()));
        fs::create_dir(&dir).unwrap();
        let group = Group { limit: dir.join(file), dir };
        group.set(limit);
        group
    }

    /// Another limit from now on.
    pub fn set(&self, limit: u64) {
        fs::write(&self.limit, limit.to_string()).unwrap();
    }

    pub fn add(&self, process: Pid) {
        fs::write(self.dir.join("cgroup.procs"), process.to_string()).unwrap();
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its members end with the node, which was made later and so is dropped before.
        until("the control group is empty", || fs::remove_dir(&self.dir).is_ok() || !self.dir.exists());
    }
}
