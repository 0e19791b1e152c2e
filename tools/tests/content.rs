//! Partition tables and file systems, judged by the tools that make them: `sfdisk` for the former, `blkid` for the
//! latter. A tool that is not installed is said on stderr.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod program;

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use program::{inspect, qemu_img, run};
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn file(dir: &TempDir, name: &str, len: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// Make a partition table with `sfdisk`, from its own language.
fn partition(path: &Path, script: &str) {
    let mut sfdisk = Command::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel", path.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let done = sfdisk.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn info(path: &Path) -> (i32, Value) {
    let outcome = inspect(&["info", path.to_str().unwrap(), "-o", "json"]);
    (outcome.code, outcome.json())
}

const GPT: &str = "label: gpt\n\
    size=1M, type=21686148-6449-6E6F-744E-656564454649, name=\"bios\"\n\
    size=8M, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=\"esp\"\n\
    size=4M, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=\"R\u{f6}ot <fs>\"\n\
    type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, attrs=\"LegacyBIOSBootable\"\n";
const MBR: &str = "label: dos\nlabel-id: 0x1234abcd\n\
    size=2M, type=83, bootable\nsize=4M, type=ef\ntype=5\nsize=2M, type=82\nsize=1M, type=83\ntype=8e\n";

#[test]
fn partition_tables_are_shown_as_sfdisk_made_them() {
    for (name, script) in [("gpt", GPT), ("dos", MBR)] {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "disk", 32 * MIB);
        partition(&path, script);
        let theirs = run("sfdisk", &["--json", path.to_str().unwrap()]).json()["partitiontable"].clone();
        let (code, ours) = info(&path);
        assert_eq!(code, 0, "{ours:#}");
        let content = &ours["content"];
        let (ours, theirs_all) =
            (content["partitions"].as_array().unwrap(), theirs["partitions"].as_array().unwrap());
        assert_eq!(ours.len(), theirs_all.len());
        for (ours, theirs) in ours.iter().zip(theirs_all) {
            assert_eq!(ours["start"].as_u64(), theirs["start"].as_u64().map(|at| at * 512), "{name}");
            // What is inside of an extended partition belongs to it: sfdisk says so, and so does the table.
            assert_eq!(ours["length"].as_u64(), theirs["size"].as_u64().map(|len| len * 512), "{name}");
            let text = |value: &Value| value.as_str().map(str::to_lowercase);
            let kind = text(&theirs["type"]).unwrap();
            let kind = if name == "dos" { format!("{kind:0>2}") } else { kind };
            assert_eq!(text(&ours["type"]).unwrap(), kind);
            assert_eq!(ours["name"], theirs["name"]);
            if name == "gpt" {
                assert_eq!(text(&ours["uuid"]), text(&theirs["uuid"]));
            }
            let number = theirs["node"].as_str().unwrap().trim_start_matches(path.to_str().unwrap());
            assert_eq!(ours["number"].to_string(), number);
        }
        let id = theirs["id"].as_str().unwrap().to_lowercase();
        assert_eq!(content["partition-table-uuid"], id.trim_start_matches("0x"));
        // Nothing would start it from a BIOS before there is code.
        let why = content["bootable"].to_string();
        assert!(why.contains("UEFI") && !why.contains("BIOS"), "{why}");
        File::options().write(true).open(&path).unwrap().write_all_at(&[0xeb, 0x63, 0x90], 0).unwrap();
        let why = info(&path).1["content"]["bootable"].to_string();
        assert!(why.contains("BIOS: boot code"), "{why}");
    }
}

#[test]
fn a_damaged_gpt_is_named_and_read_from_its_other_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "disk", 32 * MIB);
    partition(&path, GPT);
    let sound = info(&path).1["content"]["partitions"].clone();
    let disk = File::options().read(true).write(true).open(&path).unwrap();
    // A byte of the first array, of the first header, all of the first header, and the second header.
    for (at, what) in [
        (1024 + 40, "first array"),
        (512 + 80, "first header"),
        (512, "first header"),
        (32 * MIB - 432, "second header"),
    ] {
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at).unwrap();
        disk.write_all_at(&[byte[0] ^ 0xff], at).unwrap();
        let (code, damaged) = info(&path);
        assert_eq!(code, 5, "{what}");
        assert!(damaged["damage"].to_string().contains(what), "{what}: {}", damaged["damage"]);
        assert_eq!(damaged["content"]["partitions"], sound, "{what}");
        disk.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(info(&path).0, 0);
}

/// What `blkid` says under a key.
fn blkid(path: &Path, key: &str) -> Option<String> {
    let said = run("blkid", &["-p", "-o", "export", path.to_str().unwrap()]).stdout;
    let prefix = format!("{key}=");
    said.lines().find_map(|line| Some(line.strip_prefix(&prefix)?.to_owned()))
}

#[test]
fn file_systems_have_the_type_label_and_uuid_that_blkid_finds() {
    let uuid = "4c9a2a60-8d0c-4b53-9f5b-1d6f0a0e7a11";
    let makers: [(&str, u64, &[&str]); 11] = [
        ("mkfs.ext4", 16, &["-q", "-L", "ext four", "-U", uuid]),
        ("mkfs.ext3", 16, &["-q", "-L", "three"]),
        ("mkfs.ext2", 16, &["-q", "-b", "1024"]),
        ("mkfs.xfs", 320, &["-q", "-L", "xfs label"]),
        ("mkfs.btrfs", 128, &["-q", "-L", "butter"]),
        ("mkfs.vfat", 64, &["-F", "32", "-n", "FATTY"]),
        ("mkfs.fat", 16, &["-F", "16"]),
        ("mkfs.fat", 2, &["-F", "12", "-n", "TWELVE"]),
        ("mkswap", 4, &["-q", "-L", "swapped"]),
        (
            "cryptsetup",
            32,
            &[
                "luksFormat",
                "-q",
                "--type",
                "luks2",
                "--pbkdf",
                "pbkdf2",
                "--pbkdf-force-iterations",
                "1000",
                "--label",
                "secret",
            ],
        ),
        ("cryptsetup", 16, &["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000"]),
    ];
    for (maker, mib, args) in makers {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "disk", mib * MIB);
        let mut args: Vec<&str> = args.to_vec();
        args.push(path.to_str().unwrap());
        let key = dir.path().join("key");
        if maker == "cryptsetup" {
            std::fs::write(&key, "key").unwrap();
            args.push(key.to_str().unwrap());
        }
        let made = run(maker, &args);
        assert_eq!(made.code, 0, "{maker}: {}", made.stderr);
        judge_by_blkid(&path);
        // The same through a qcow2 file, and in a partition.
        let qcow2 = dir.path().join("disk.qcow2");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", path.to_str().unwrap(), qcow2.to_str().unwrap()]);
        assert_eq!(info(&path).1["content"], info(&qcow2).1["content"]);
    }
}

fn judge_by_blkid(path: &Path) {
    let (code, ours) = info(path);
    assert_eq!(code, 0, "{ours:#}");
    let found = &ours["content"]["file-system"];
    let kind = match (blkid(path, "TYPE").unwrap().as_str(), blkid(path, "VERSION").as_deref()) {
        ("crypto_LUKS", Some(version)) => format!("luks{version}"),
        (kind, _) => kind.to_owned(),
    };
    assert_eq!(found["type"], kind);
    assert_eq!(found["uuid"].as_str().map(str::to_owned), blkid(path, "UUID"), "{kind}");
    let label = blkid(path, "LABEL").map(|label| label.replace("\\ ", " "));
    assert_eq!(found["label"].as_str().map(str::to_owned), label, "{kind}");
    if let Some(size) = found["size"].as_u64() {
        let len = path.metadata().unwrap().len();
        assert!(size <= len && size > len / 2, "{kind}: {size} of {len}");
    }
    assert!(ours["content"].get("partition-table").is_none(), "{kind}");
}

#[test]
fn read_only_file_systems_are_told_and_a_cd_that_starts() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("boot.img"), vec![7; 2048]).unwrap();
    let (out, tree) = (dir.path().join("out"), tree.to_str().unwrap().to_owned());
    assert_eq!(run("mksquashfs", &[&tree, out.to_str().unwrap(), "-quiet"]).code, 0);
    assert_eq!(info(&out).1["content"]["file-system"]["type"], "squashfs");
    let args =
        ["-quiet", "-V", "CDROM", "-b", "boot.img", "-no-emul-boot", "-o", out.to_str().unwrap(), &tree];
    let made = run("genisoimage", &args);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let content = info(&out).1["content"].clone();
    assert_eq!(
        (&content["file-system"]["type"], &content["file-system"]["label"]),
        (&"iso9660".into(), &"CDROM".into())
    );
    assert!(content["bootable"].to_string().contains("El Torito"));
}
