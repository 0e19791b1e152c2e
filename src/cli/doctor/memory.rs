//! Whether a shortage of memory may stop the node and its users at once.
//!
//! A process that waits for memory waits for dirty pages to be written, and those of a volume are written by the node.
//! If the node has to wait for memory, too, because both share a limit, neither goes on. The kernel exempts a process
//! that is an IO_FLUSHER, for which CAP_SYS_RESOURCE is needed; without it there has to be no such limit. Owns how limits
//! of control groups are found, of both versions.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Check, capabilities, size};

/// Where control groups are mounted: version 2 itself, version 1 with a directory for each controller.
const CGROUPS: &str = "/sys/fs/cgroup";

/// CAP_SYS_RESOURCE (linux/capability.h).
const RESOURCE_BIT: u32 = 24;

/// The check, for the running node's process or, without one, for one started from here.
pub(super) fn check(node: Option<u32>) -> Check {
    let process = node.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
    let flusher = match node {
        // This check may run with other privileges than the node.
        Some(pid) => fs::read_to_string(format!("/proc/{pid}/status")).and_then(|status| allowed(&status)),
        None => bedplate_fuse::try_io_flusher(),
    };
    judge(flusher, limit(&groups, Path::new(CGROUPS)))
}

/// Whether the process of this /proc/PID/status may become an IO_FLUSHER.
fn allowed(status: &str) -> io::Result<()> {
    match capabilities(status) {
        Some(bits) if bits >> RESOURCE_BIT & 1 == 1 => Ok(()),
        Some(_) => Err(io::Error::other("the node has no CAP_SYS_RESOURCE")),
        None => Err(io::Error::other("the node's capabilities are unknown")),
    }
}

fn judge(flusher: io::Result<()>, limit: Option<Limit>) -> Check {
    const NAME: &str = "memory";
    match (flusher, limit) {
        (Ok(()), _) => Check::ok(NAME, "the node does not wait for writes that it has to do itself"),
        (Err(_), None) => Check::ok(NAME, "no limit of a control group"),
        (Err(error), Some(Limit { bytes, group })) => Check::warn(
            NAME,
            format!(
                "a limit of {} ({}), and PR_SET_IO_FLUSHER is refused: {error}",
                size::show(bytes),
                group.display()
            ),
            "a guest that is out of memory in this group may stop for good: give the node CAP_SYS_RESOURCE, or keep it \
             and its guests in groups of their own",
        ),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Limit {
    bytes: u64,
    group: PathBuf,
}

/// The lowest limit on the way from the group in `groups`, which is /proc/PID/cgroup, to the root.
fn limit(groups: &str, root: &Path) -> Option<Limit> {
    groups.lines().filter_map(|line| hierarchy(line, root)).flat_map(limits).min_by_key(|limit| limit.bytes)
}

/// Where the memory of a line's group is limited, if at all: its directory, that of the root, and the file's name.
fn hierarchy(line: &str, root: &Path) -> Option<(PathBuf, PathBuf, &'static str)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, group) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    let (top, file) = match controllers {
        "" => (root.to_owned(), "memory.max"),
        _ if controllers.split(',').any(|name| name == "memory") => {
            (root.join("memory"), "memory.limit_in_bytes")
        }
        _ => return None,
    };
    Some((top.join(group), top, file))
}

fn limits((group, top, file): (PathBuf, PathBuf, &'static str)) -> Vec<Limit> {
    let ancestors = group.ancestors().take_while(|dir| dir.starts_with(&top));
    let limited = ancestors.filter_map(|dir| {
        // "max" is none; in version 1 none is a number beyond any machine's memory.
        let bytes: u64 = fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()?;
        (bytes < 1 << 60).then(|| Limit { bytes, group: dir.to_owned() })
    });
    limited.collect()
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    fn write(root: &Path, file: &str, content: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn the_lowest_limit_up_to_the_root_counts_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "a/b/memory.max", "max\n");
        write(root, "a/memory.max", "1073741824\n");
        assert_eq!(limit("0::/a/b\n", root), Some(Limit { bytes: 1 << 30, group: root.join("a") }));
        assert_eq!(limit("0::/other\n", root), None);
        assert_eq!(limit("0::/\n", root), None);
        write(root, "memory/c/memory.limit_in_bytes", "4096\n");
        write(root, "memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit("3:cpu:/a\n2:memory:/c\n", root).map(|limit| limit.bytes), Some(4096));
        assert_eq!(limit("2:memory:/\n", root), None);
        for nonsense in ["", "\n", "1", "a:b", "2:memory:"] {
            assert_eq!(limit(nonsense, root), None, "{nonsense}");
        }
    }

    #[test]
    fn a_running_node_is_judged_by_its_own_capabilities() {
        assert!(allowed("Name:\tbedplate\nCapEff:\t000001ffffffffff\n").is_ok());
        assert!(allowed("CapPrm:\t000001ffffffffff\nCapEff:\t000001fffeffffff\n").is_err());
        assert!(allowed("CapEff:\tnonsense\n").is_err());
        assert!(allowed("").is_err());
    }

    #[test]
    fn only_a_limit_without_the_capability_is_a_warning() {
        let limit = Limit { bytes: 512 << 20, group: "/g".into() };
        let refused = || Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(judge(Ok(()), Some(limit.clone())).status, Status::Ok);
        assert_eq!(judge(refused(), None).status, Status::Ok);
        let check = judge(refused(), Some(limit));
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.contains("512.00 MiB") && check.advice.unwrap().contains("CAP_SYS_RESOURCE"));
    }
}
