//! `/proc/self/mountinfo`: what is mounted where, told without touching it.
//!
//! Owns the parser. A dead or stopped FUSE server makes `stat` of its mount fail or hang; this file is how a mount is
//! looked at first. The format is that of proc_pid_mountinfo(5).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// Where the kernel lists the mounts of this process's namespace.
pub(crate) const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    pub(crate) device: DeviceNumber,
    pub(crate) mount_point: PathBuf,
    /// With its subtype: `fuse.NAME`.
    pub(crate) file_system: String,
    pub(crate) source: String,
}

/// `st_dev` of what is mounted. For FUSE the minor number is also the number of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Every mount, lower ones before those on top of them.
pub(crate) fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read(MOUNTINFO)?))
}

/// The mount that a path walk to `mount_point` ends in.
pub(crate) fn topmost(mount_point: &Path) -> io::Result<Option<MountEntry>> {
    Ok(read()?.into_iter().rfind(|entry| entry.mount_point == mount_point))
}

/// Lines that are not as documented are passed over: what cannot be understood is not ours.
fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = parse_device(fields.nth(2)?)?;
    let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    // Optional fields end at a single dash.
    fields.find(|field| *field == b"-")?;
    let file_system = String::from_utf8(unescape(fields.next()?)).ok()?;
    let source = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    Some(MountEntry { device, mount_point, file_system, source })
}

fn parse_device(field: &[u8]) -> Option<DeviceNumber> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The kernel writes space, tab, newline, backslash and `#` as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields_are_read() {
        let text = b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            98 22 0:45 / /srv/a\\040b rw shared:7 master:1 - fuse.bedplate bedplate-12-99 rw,user_id=0\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].file_system, "ext4");
        assert_eq!(
            mounts[1],
            MountEntry {
                device: DeviceNumber { major: 0, minor: 45 },
                mount_point: PathBuf::from("/srv/a b"),
                file_system: "fuse.bedplate".into(),
                source: "bedplate-12-99".into(),
            }
        );
    }

    #[test]
    fn lines_that_are_cut_anywhere_are_passed_over_without_a_panic() {
        let line = b"98 22 0:45 / /srv/a\\040b rw shared:7 - fuse.x name rw";
        for len in 0..line.len() {
            let _ = parse(&line[..len]);
        }
        assert!(parse(b"98 22 045 / /x rw - fuse y rw\nnothing\n\n").is_empty());
    }

    #[test]
    fn escapes_that_are_none_are_kept_as_they_are() {
        assert_eq!(unescape(br"a\134b\09"), br"a\b\09");
        assert_eq!(unescape(br"\777"), br"\777");
    }

    #[test]
    fn the_kernels_own_list_is_read_and_has_a_root() {
        assert!(topmost(Path::new("/")).unwrap().is_some());
    }
}
