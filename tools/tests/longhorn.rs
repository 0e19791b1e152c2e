//! Replica directories that Longhorn's engine left: every head and snapshot has the digest that the engine read, also
//! when `volume.meta` is missing or stale, when a kill left a head behind, and whatever the heads' numbers.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod program;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use program::{inspect, qemu_img, run};
use serde_json::Value;
use tempfile::TempDir;

/// Archive, directory in it, and its expectations.
const REPLICAS: [(&str, &str, &str); 5] = [
    ("01-plain", "replica", "expected.json"),
    ("02-raw-backing", "replica", "expected.json"),
    ("04-removed", "marked", "expected-marked.json"),
    ("04-removed", "purged", "expected-purged.json"),
    ("06-expanded", "replica", "expected.json"),
];

/// An unpacked replica.
struct Fixture {
    root: TempDir,
    replica: PathBuf,
    /// `--backing FILE`, where there is one.
    backing: Vec<String>,
    expected: Value,
}

impl Fixture {
    fn unpack((archive, directory, expected): (&str, &str, &str)) -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/longhorn");
        let file = data.join(format!("{archive}.tar.zst"));
        let into = root.path().to_str().unwrap();
        let done = run("tar", &["-I", "zstd", "-xf", file.to_str().unwrap(), "-C", into]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        let base = root.path().join(archive);
        let backing = base.join("backing/backing");
        let backing = if backing.exists() {
            vec!["--backing".to_owned(), backing.to_str().unwrap().to_owned()]
        } else {
            Vec::new()
        };
        let expected = serde_json::from_slice(&fs::read(base.join(expected)).unwrap()).unwrap();
        Fixture { root, replica: base.join(directory), backing, expected }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.replica.join(name)
    }

    /// The digest of what is read with these flags, or what was said in its place.
    fn digest(&self, flags: &[&str]) -> Result<String, (i32, String)> {
        let out = self.root.path().join("out");
        let (replica, out) = (self.replica.to_str().unwrap(), out.to_str().unwrap());
        let args = [&["convert", replica, out, "--force", "--digest", "guest"][..], flags].concat();
        let done = inspect(&args);
        match done.stdout.trim_end().strip_prefix("guest sha512:") {
            Some(digest) => Ok(digest.to_owned()),
            None => Err((done.code, done.stderr)),
        }
    }

    fn digest_with_backing(&self, flags: &[&str]) -> Result<String, (i32, String)> {
        let backing: Vec<&str> = self.backing.iter().map(String::as_str).collect();
        self.digest(&[&backing[..], flags].concat())
    }

    fn head(&self) -> String {
        self.expected["head"]["sha512"].as_str().unwrap().to_owned()
    }

    /// Change a field of `volume.meta`.
    fn edit(&self, key: &str, value: Value) {
        let path = self.path("volume.meta");
        let mut meta: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        meta[key] = value;
        fs::write(path, meta.to_string()).unwrap();
    }

    fn rename_head(&self, from: &str, to: &str) {
        for suffix in ["", ".meta"] {
            fs::rename(self.path(&format!("{from}{suffix}")), self.path(&format!("{to}{suffix}"))).unwrap();
        }
    }
}

#[test]
fn every_head_and_snapshot_reads_as_the_engine_read_it() {
    for which in REPLICAS {
        let fixture = Fixture::unpack(which);
        assert_eq!(fixture.digest_with_backing(&[]), Ok(fixture.head()), "{which:?}");
        for (name, snapshot) in fixture.expected["snapshots"].as_object().unwrap() {
            let digest = fixture.digest_with_backing(&["--snapshot", name]);
            assert_eq!(digest.as_deref(), Ok(snapshot["sha512"].as_str().unwrap()), "{which:?} {name}");
        }
        assert_eq!(fixture.digest_with_backing(&["--snapshot", "nix"]).unwrap_err().0, 3);
    }
}

#[test]
fn the_digest_of_a_directory_is_that_of_its_content_and_needs_all_of_it() {
    for which in REPLICAS {
        let fixture = Fixture::unpack(which);
        let info = |flags: &[&str]| {
            let args = ["info", fixture.replica.to_str().unwrap(), "--digest", "-o", "json"];
            inspect(&[&args[..], flags].concat())
        };
        let backing: Vec<&str> = fixture.backing.iter().map(String::as_str).collect();
        let said = info(&backing).json();
        assert_eq!(said["guest-sha512"], fixture.head(), "{which:?}");
        assert_eq!(said.get("sha512"), None);
        if !backing.is_empty() {
            let refused = info(&[]);
            assert_eq!(refused.code, 1);
            assert!(refused.stderr.contains("--backing"), "{}", refused.stderr);
        }
    }
}

/// Leave what Longhorn would have left beside a layer.
fn leave_checksum(layer: &Path, sum: &str, changed_at: &str, found: &str) {
    let text = format!(
        r#"{{"method":"crc64","checksum":"{sum}","change_time":"{changed_at}","last_hashed_at":"x","silently_corrupted":{found}}}"#
    );
    fs::write(format!("{}.checksum", layer.display()), text).unwrap();
}

#[test]
fn the_checksums_that_longhorn_left_are_held_against_the_files() {
    let fixture = Fixture::unpack(REPLICAS[0]);
    let name = fixture.expected["snapshots"].as_object().unwrap().keys().next().unwrap();
    let layer = fixture.path(&format!("volume-snap-{name}.img"));
    let changed_at = || {
        let said = run("stat", &["-c", "%z", layer.to_str().unwrap()]);
        format!("{} UTC", said.stdout.trim_end())
    };
    let sum = || {
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_GO_ISO);
        format!("{:016x}", crc.checksum(&fs::read(&layer).unwrap()))
    };
    let check = |flags: &[&str]| {
        let done = inspect(&[&["check", fixture.replica.to_str().unwrap()][..], flags].concat());
        (done.code, done.stdout)
    };
    let (then, was) = (changed_at(), sum());
    leave_checksum(&layer, &was, &then, "false");
    assert_eq!(check(&["--data"]).0, 0);

    // A byte of a hole or of data, it does not matter.
    File::options().write(true).open(&layer).unwrap().write_all_at(b"?", 12345).unwrap();
    assert_eq!(check(&[]).0, 0, "without leave to read it nothing is found");
    let (code, said) = check(&["--data"]);
    assert!(code == 3 && said.contains(&was) && said.contains(&sum()), "{code} {said}");
    leave_checksum(&layer, &was, &changed_at(), "false");
    let (code, said) = check(&["--data"]);
    assert!(code == 2 && said.contains("has not been written to since"), "{code} {said}");
    leave_checksum(&layer, &sum().to_uppercase(), &then, "false");
    assert_eq!(check(&["--data"]).0, 0, "what agrees is good, whenever it was taken");

    leave_checksum(&layer, &"9z".repeat(1000), &then, "false");
    let (code, said) = check(&["--data"]);
    assert!(code == 3 && said.contains("is no CRC-64") && said.len() < 1000, "{code} {said}");
    leave_checksum(&layer, &sum(), &then, "true");
    assert_eq!(check(&[]).0, 2);
    fs::write(format!("{}.checksum", layer.display()), "").unwrap();
    let (code, said) = check(&["--data"]);
    assert!(code == 3 && said.contains("says nothing"), "{code} {said}");
}

#[test]
fn info_shows_the_chain_and_check_finds_nothing() {
    for which in REPLICAS {
        let fixture = Fixture::unpack(which);
        let replica = fixture.replica.to_str().unwrap();
        let info = inspect(&["info", replica, "-o", "json"]);
        assert_eq!(info.code, 0, "{}", info.stdout);
        let info = info.json();
        let head = &fixture.expected["head"];
        assert_eq!(info["virtual-size"], head["virtual_size"]);
        let mut chain = info["format-specific"]["data"]["chain"].as_array().unwrap().clone();
        chain.reverse();
        assert_eq!(Value::from(chain), head["chain_oldest_first"]);
        let layers = info["format-specific"]["data"]["layers"].as_array().unwrap();
        for (name, snapshot) in fixture.expected["snapshots"].as_object().unwrap() {
            let layer = layers.iter().find(|layer| layer["snapshot"] == **name).unwrap();
            for (ours, theirs) in [("removed", "removed"), ("filename", "file"), ("created", "created")] {
                assert_eq!(layer[ours], snapshot[theirs], "{which:?} {name}");
            }
            assert_eq!(layer["size"], snapshot["layer_size"]);
        }
        let checked = inspect(&["check", replica, "--data", "-o", "json"]);
        assert_eq!((checked.code, &checked.json()["check-errors"]), (0, &0.into()), "{}", checked.stdout);
        assert!(inspect(&["info", replica]).stdout.contains("volume-head-"));
    }
}

#[test]
fn a_backing_file_is_asked_for_and_may_be_qcow2() {
    let fixture = Fixture::unpack(REPLICAS[1]);
    let (code, text) = fixture.digest(&[]).unwrap_err();
    assert!(code == 1 && text.contains("--backing FILE") && text.contains("backing-images"), "{text}");
    let qcow2 = fixture.root.path().join("backing.qcow2");
    let qcow2 = qcow2.to_str().unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", &fixture.backing[1], qcow2]);
    assert_eq!(fixture.digest(&["--backing", qcow2]), Ok(fixture.head()));
    assert_ne!(fixture.digest(&["--backing", "none"]), Ok(fixture.head()));
    let map =
        inspect(&["map", fixture.replica.to_str().unwrap(), "--layers", "--backing", &fixture.backing[1]]);
    assert!(
        map.stdout.contains("volume-snap-s1.img") && map.stdout.contains("backing/backing"),
        "{}",
        map.stdout
    );
    let (replica, backing) = (fixture.replica.to_str().unwrap(), &fixture.backing[1]);
    let out = fixture.root.path().join("out");
    let compared = inspect(&["compare", replica, out.to_str().unwrap(), "--backing", backing]);
    assert_eq!(compared.code, 1, "{}", compared.stdout);
}

#[test]
fn the_content_is_recovered_without_volume_meta() {
    for which in REPLICAS {
        let fixture = Fixture::unpack(which);
        fs::remove_file(fixture.path("volume.meta")).unwrap();
        assert!(fixture.digest(&[]).unwrap_err().1.contains("--backing none"));
        let backing = if fixture.backing.is_empty() { &["--backing", "none"][..] } else { &[] };
        assert_eq!(fixture.digest_with_backing(backing), Ok(fixture.head()), "{which:?}");
        assert_eq!(inspect(&["info", fixture.replica.to_str().unwrap()]).code, 5);
        assert_eq!(inspect(&["check", fixture.replica.to_str().unwrap()]).code, 2);
        // Empty, as a crash leaves it.
        fs::write(fixture.path("volume.meta"), "").unwrap();
        assert_eq!(fixture.digest_with_backing(backing), Ok(fixture.head()), "{which:?}");
    }
}

#[test]
fn a_stale_volume_meta_does_not_mislead() {
    let fixture = Fixture::unpack(REPLICAS[4]);
    fixture.edit("Head", "volume-head-000.img".into());
    fixture.edit("Parent", "volume-snap-small.img".into());
    fixture.edit("Size", (16 << 20).into());
    assert_eq!(fixture.digest_with_backing(&[]), Ok(fixture.head()));
    let info = inspect(&["info", fixture.replica.to_str().unwrap()]).stdout;
    assert!(info.contains("stale"), "{info}");
}

#[test]
fn the_numbers_of_heads_mean_nothing() {
    let fixture = Fixture::unpack(REPLICAS[0]);
    fixture.rename_head("volume-head-003.img", "volume-head-001.img");
    fixture.edit("Head", "volume-head-001.img".into());
    assert_eq!(fixture.digest(&[]), Ok(fixture.head()));
    // An interrupted snapshot left an empty head with a higher number, and then volume.meta was lost.
    let stray = File::create(fixture.path("volume-head-010.img")).unwrap();
    stray.set_len(16 << 20).unwrap();
    let copied = fs::copy(fixture.path("volume-head-001.img.meta"), fixture.path("volume-head-010.img.meta"));
    copied.unwrap();
    assert_eq!(fixture.digest(&[]), Ok(fixture.head()));
    assert!(inspect(&["info", fixture.replica.to_str().unwrap()]).stdout.contains("left it behind"));
    assert_eq!(inspect(&["check", fixture.replica.to_str().unwrap()]).code, 3);
    fs::remove_file(fixture.path("volume.meta")).unwrap();
    assert_eq!(fixture.digest(&["--backing", "none"]), Ok(fixture.head()));
    // With data in both nobody can tell; the user can.
    stray.write_all_at(&[1], 0).unwrap();
    let (code, text) = fixture.digest(&["--backing", "none"]).unwrap_err();
    assert!(code == 1 && text.contains("--snapshot FILE"), "{text}");
    let chosen = ["--backing", "none", "--snapshot", "volume-head-001.img"];
    assert_eq!(fixture.digest(&chosen), Ok(fixture.head()));
}

#[test]
fn a_missing_or_circular_layer_is_corruption() {
    let fixture = Fixture::unpack(REPLICAS[0]);
    let replica = fixture.replica.to_str().unwrap().to_owned();
    fs::rename(fixture.path("volume-snap-second.img"), fixture.path("elsewhere")).unwrap();
    let (code, text) = fixture.digest(&[]).unwrap_err();
    assert!(code == 5 && text.contains("volume-snap-second.img"), "{text}");
    assert_eq!((inspect(&["check", &replica]).code, inspect(&["info", &replica]).code), (2, 5));
    assert!(fixture.digest(&["--snapshot", "first"]).is_ok());
    fs::rename(fixture.path("elsewhere"), fixture.path("volume-snap-second.img")).unwrap();
    let parent = r#"{"Parent":"volume-snap-third.img"}"#;
    fs::write(fixture.path("volume-snap-first.img.meta"), parent).unwrap();
    assert_eq!(fixture.digest(&[]).unwrap_err().0, 5);
    // Neither does a record lead out of the directory, nor a link.
    let parent = r#"{"Parent":"../01-plain/replica/volume-snap-second.img"}"#;
    fs::write(fixture.path("volume-snap-third.img.meta"), parent).unwrap();
    assert_eq!(fixture.digest(&[]).unwrap_err().0, 5);
    fs::remove_file(fixture.path("volume-snap-second.img")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", fixture.path("volume-snap-second.img")).unwrap();
    assert_eq!(fixture.digest(&[]).unwrap_err().0, 1);
}
