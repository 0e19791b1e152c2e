//! Inspections of generated qcow2 images, judged by `qemu-img`: `info`, `map`, `check` and `compare` give the same JSON
//! where the keys are the same, and `convert` the same content.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod program;

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use program::{Outcome, inspect, qemu_img, qemu_io};
use serde_json::Value;
use tempfile::TempDir;

/// A directory with images of many features.
struct Corpus {
    dir: TempDir,
    names: Vec<String>,
}

impl Corpus {
    fn make() -> Corpus {
        let mut corpus = Corpus { dir: tempfile::tempdir().unwrap(), names: Vec::new() };
        let writes =
            "write -P 1 0 130k; write -P 2 1M 3k; write -z 2M 256k; write -P 3 2900k 64k; discard 64k 64k";
        for (name, options) in [
            ("plain", "cluster_size=64k"),
            ("v2", "compat=0.10"),
            ("small", "cluster_size=512"),
            ("large", "cluster_size=2M"),
            ("lazy", "lazy_refcounts=on"),
            ("subclusters", "extended_l2=on,cluster_size=128k"),
            ("bits1", "refcount_bits=1"),
            ("bits64", "refcount_bits=64"),
            ("zstd", "compression_type=zstd"),
        ] {
            corpus.create(name, &["-o", options, "5M"], writes);
        }
        for (name, options) in [("zlib-c", "compression_type=zlib"), ("zstd-c", "compression_type=zstd")] {
            let out = corpus.path(name);
            qemu_img(&["convert", "-c", "-O", "qcow2", "-o", options, &corpus.path("plain"), &out]);
            corpus.names.push(name.to_owned());
        }
        corpus.create("snapshots", &["3M"], "write -P 1 0 1M");
        qemu_img(&["snapshot", "-c", "one", &corpus.path("snapshots")]);
        qemu_io(&corpus.path("snapshots"), "write -P 2 512k 1M");
        qemu_img(&["snapshot", "-c", "two", &corpus.path("snapshots")]);
        qemu_img(&["bitmap", "--add", "-g", "64k", &corpus.path("snapshots"), "b0"]);
        qemu_io(&corpus.path("snapshots"), "write -P 3 100k 10k");
        qemu_img(&["create", "-q", "-f", "raw", &corpus.path("base.raw"), "4M"]);
        qemu_io(&format!("-fraw {}", corpus.path("base.raw")), "write -P 9 0 8k; write -P 8 3M 1M");
        let base = corpus.path("base.raw");
        corpus.create("over", &["-b", &base, "-F", "raw", "6M"], "write -P 1 5M 64k; write -z 3M 64k");
        let over = corpus.path("over");
        corpus.create("over2", &["-b", &over, "-F", "qcow2", "8M"], "write -P 4 7M 64k; write -P 4 4k 1k");
        corpus
    }

    fn create(&mut self, name: &str, options: &[&str], writes: &str) {
        let path = self.path(name);
        let mut args = vec!["create", "-q", "-f", "qcow2", &path];
        // The size comes last, the file before it.
        let (size, options) = options.split_last().unwrap();
        args.splice(4..4, options.iter().copied());
        args.push(size);
        qemu_img(&args);
        qemu_io(&path, writes);
        self.names.push(name.to_owned());
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn root(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    fn images(&self) -> impl Iterator<Item = (&str, String)> {
        self.names.iter().map(|name| (name.as_str(), self.path(name)))
    }
}

/// `ours` has all that `theirs` says under these keys.
fn assert_same(name: &str, ours: &Value, theirs: &Value, keys: &[&str]) {
    for key in keys {
        assert_eq!(ours.get(*key), theirs.get(*key), "{name}: {key}\n{ours:#}\n{theirs:#}");
    }
}

/// Whether this `qemu-img` is too old to know a key: it says it of nothing at all. That is said aloud, past what gathers
/// the output of tests that pass, for what stands under the key is compared with nobody's.
fn unknown_to_qemu_img(key: &str, verb: &str, answers: &[Value]) -> bool {
    let mut rows = answers.iter().flat_map(|all| all.as_array().unwrap());
    let unknown = rows.all(|row| row.get(key).is_none());
    if unknown {
        let version = qemu_img(&["--version"]).stdout;
        let version = version.lines().next().unwrap_or_default();
        let said = format!("not compared: `{verb}` of {version} has no {key}\n");
        std::io::stderr().write_all(said.as_bytes()).unwrap();
    }
    unknown
}

#[test]
fn info_has_the_keys_of_qemu_img_with_its_values() {
    let corpus = Corpus::make();
    let theirs_of = |path: &str| qemu_img(&["info", "--output=json", "--backing-chain", path]).json();
    let said: Vec<_> = corpus.images().map(|(_, path)| theirs_of(&path)).collect();
    // Since QEMU 8.0.
    let unknown = unknown_to_qemu_img("children", "info", &said);
    for ((name, path), theirs) in corpus.images().zip(&said) {
        let args = ["info", &path, "--backing-chain", "--allow-references", corpus.root(), "-o", "json"];
        let ours = inspect(&args).json();
        let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            let keys = [
                "virtual-size",
                "format",
                "actual-size",
                "dirty-flag",
                "cluster-size",
                "backing-filename",
                "full-backing-filename",
                "backing-filename-format",
                "filename",
            ];
            assert_same(name, ours, theirs, &keys);
            if !unknown {
                assert_same(name, ours, theirs, &["children"]);
            }
            let data = |value: &Value| value.pointer("/format-specific/data").cloned().unwrap_or_default();
            let (ours_data, theirs_data) = (data(ours), data(theirs));
            let keys = [
                "compat",
                "compression-type",
                "lazy-refcounts",
                "refcount-bits",
                "corrupt",
                "extended-l2",
                "bitmaps",
            ];
            assert_same(name, &ours_data, &theirs_data, &keys);
            let snapshots = |value: &Value| value.get("snapshots").and_then(Value::as_array).cloned();
            let pairs = snapshots(ours).into_iter().flatten().zip(snapshots(theirs).into_iter().flatten());
            for (ours, theirs) in pairs {
                let keys: Vec<_> = theirs.as_object().unwrap().keys().map(String::as_str).collect();
                assert_same(name, &ours, &theirs, &keys);
            }
            assert_eq!(snapshots(ours).map(|all| all.len()), snapshots(theirs).map(|all| all.len()));
        }
    }
}

#[test]
fn map_lists_the_ranges_of_qemu_img() {
    let corpus = Corpus::make();
    for part in [&[][..], &["--start-offset=1000k", "--max-length=1500k"]] {
        let theirs_of = |path: &str| qemu_img(&[&["map", "--output=json", path], part].concat()).json();
        let said: Vec<_> = corpus.images().map(|(_, path)| theirs_of(&path)).collect();
        // Since QEMU 8.2.
        let unknown = unknown_to_qemu_img("compressed", "map", &said);
        for ((name, path), theirs) in corpus.images().zip(&said) {
            let args = ["map", &path, "--allow-references", corpus.root(), "-o", "json"];
            let mut ours = inspect(&[&args, part].concat()).json();
            if unknown {
                for range in ours.as_array_mut().unwrap() {
                    range.as_object_mut().unwrap().remove("compressed");
                }
            }
            assert_eq!(normalised(&ours), normalised(theirs), "{name}");
        }
    }
}

/// Ranges without a file: `qemu-img` gives parts of a cluster that are not there an offset, which says nothing. Joined
/// again where that was all that kept them apart.
fn normalised(map: &Value) -> Vec<Value> {
    let mut ranges: Vec<Value> = Vec::new();
    for range in map.as_array().unwrap() {
        let mut range = range.clone();
        if range["present"] == false {
            range.as_object_mut().unwrap().remove("offset");
        }
        let end = |range: &Value| range["start"].as_u64().unwrap() + range["length"].as_u64().unwrap();
        let goes_on = ranges.last().is_some_and(|last| {
            range["present"] == false && last["present"] == false && last["depth"] == range["depth"]
        });
        match ranges.last_mut() {
            Some(last) if goes_on => {
                last["length"] = (end(&range) - last["start"].as_u64().unwrap()).into();
            }
            _ => ranges.push(range),
        }
    }
    ranges
}

const CHECK_KEYS: [&str; 9] = [
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "corruptions",
    "leaks",
    "check-errors",
    "format",
];

#[test]
fn check_counts_what_qemu_img_counts() {
    let corpus = Corpus::make();
    for (name, path) in corpus.images() {
        let ours = inspect(&["check", &path, "--data", "-o", "json"]);
        let theirs = qemu_img(&["check", "--output=json", &path]);
        assert_eq!(ours.code, theirs.code, "{name}: {}", ours.stdout);
        assert_same(name, &ours.json(), &theirs.json(), &CHECK_KEYS);
    }
}

/// Copies `from` and changes 8 bytes at `at`.
fn patched(from: &str, to: &Path, at: u64, change: impl Fn(u64) -> u64) {
    std::fs::copy(from, to).unwrap();
    let file = File::options().read(true).write(true).open(to).unwrap();
    let mut word = [0; 8];
    file.read_exact_at(&mut word, at).unwrap();
    file.write_all_at(&change(u64::from_be_bytes(word)).to_be_bytes(), at).unwrap();
}

fn word(path: &str, at: u64) -> u64 {
    let mut word = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut word, at).unwrap();
    u64::from_be_bytes(word)
}

#[test]
fn damaged_refcounts_and_entries_are_counted_as_qemu_img_counts_them() {
    let corpus = Corpus::make();
    let bad = corpus.dir.path().join("bad");
    for name in ["plain", "snapshots", "zlib-c", "v2"] {
        let path = corpus.path(name);
        let offset = 0x00ff_ffff_ffff_fe00;
        let l1 = word(&path, 40);
        let l2 = word(&path, l1) & offset;
        let block = word(&path, word(&path, 48));
        let changes: [(u64, u64); 7] = [
            // The copied flag of a table and of a cluster.
            (l1, 1 << 63),
            (l2, 1 << 63),
            // Refcounts: of cluster 0 to 3 and 4 to 7, 16 bits each.
            (block, 0x0001_0000_0000_0000),
            (block, 0x0000_0000_0000_0003),
            (block + 8, 0x0003_0000_0000_0000),
            // A cluster that two entries point at, more or less.
            (l2 + 8, 0x1_0000),
            (block + 8, 0x0000_0001_0000_0000),
        ];
        for (at, flip) in changes {
            patched(&path, &bad, at, |word| word ^ flip);
            let bad = bad.to_str().unwrap();
            let (ours, theirs) =
                (inspect(&["check", bad, "-o", "json"]), qemu_img(&["check", "--output=json", bad]));
            assert_eq!(ours.code, theirs.code, "{name} {at:#x} {flip:#x}: {} {}", ours.stdout, theirs.stderr);
            if theirs.code != 1 {
                let name = format!("{name} {at:#x} {flip:#x} {}", theirs.stderr);
                assert_same(
                    &name,
                    &ours.json(),
                    &theirs.json(),
                    &["corruptions", "leaks", "image-end-offset"],
                );
            }
        }
    }
}

#[test]
fn compare_answers_as_qemu_img_does() {
    let corpus = Corpus::make();
    let root = corpus.root();
    let paths: Vec<_> = corpus.images().map(|(_, path)| path).collect();
    for (a, b) in paths.iter().zip(paths.iter().skip(1)).chain(paths.iter().zip(&paths)) {
        let ours = inspect(&["compare", a, b, "--allow-references", root]);
        let theirs = qemu_img(&["compare", a, b]);
        assert_eq!(ours.code, theirs.code, "{a} {b}: {} {}", ours.stdout, theirs.stdout);
        let offset = |outcome: &Outcome| -> Option<u64> {
            outcome.stdout.split("offset ").nth(1)?.trim_end().trim_end_matches('!').parse().ok()
        };
        assert_eq!(offset(&ours).map(|at| at / 512), offset(&theirs).map(|at| at / 512), "{a} {b}");
    }
    let longer = corpus.path("longer");
    qemu_img(&["convert", "-O", "raw", &paths[0], &longer]);
    File::options().write(true).open(&longer).unwrap().set_len(6 << 20).unwrap();
    assert_eq!(inspect(&["compare", &paths[0], &longer]).code, 0);
    assert_eq!(inspect(&["compare", &longer, &paths[0], "--strict"]).code, 1);
    assert_eq!(inspect(&["compare", &paths[0], &corpus.path("missing")]).code, 2);
}

#[test]
fn convert_keeps_the_content_in_either_format_and_of_any_snapshot() {
    let corpus = Corpus::make();
    let out = corpus.path("out");
    for (name, path) in corpus.images() {
        for options in [&[][..], &["--format", "qcow2", "--compress", "zstd", "--cluster-size", "4k"]] {
            let args = ["convert", &path, &out, "--allow-references", corpus.root(), "--force"];
            let done = inspect(&[&args[..], options].concat());
            assert_eq!(done.code, 0, "{name}: {}", done.stderr);
            let compared = qemu_img(&["compare", &path, &out]);
            // With a warning the sizes would differ.
            assert_eq!(compared.stdout, "Images are identical.\n", "{name} {options:?}");
        }
    }
    let (path, theirs) = (corpus.path("snapshots"), corpus.path("theirs"));
    qemu_img(&["convert", "-l", "one", "-O", "raw", &path, &theirs]);
    for wanted in ["one", "1"] {
        inspect(&["convert", &path, &out, "--snapshot", wanted, "--force"]);
        assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&theirs).unwrap());
    }
    let stdout = inspect(&["convert", &path, "-", "--snapshot", "one"]);
    assert!(stdout.bytes == std::fs::read(&theirs).unwrap());
    assert_eq!(inspect(&["convert", &path, &out, "--snapshot", "three", "--force"]).code, 3);
    assert_eq!(inspect(&["convert", &path, &out]).code, 4);
}

#[test]
fn a_backing_file_is_named_but_not_opened_without_leave() {
    let corpus = Corpus::make();
    let over = corpus.path("over");
    let info = inspect(&["info", &over, "-o", "json"]);
    assert_eq!((info.code, &info.json()["backing-filename"]), (0, &Value::from(corpus.path("base.raw"))));
    let map = inspect(&["map", &over, "-o", "json", "--layers"]).json();
    assert_eq!((&map[0]["present"], &map[0]["zero"]), (&Value::from(false), &Value::from(false)));
    let out = corpus.path("out");
    for args in [&["convert", &over, &out][..], &["compare", &over, &over]] {
        let refused = inspect(args);
        assert!(refused.stderr.contains("base.raw") && refused.stderr.contains("--allow-references"));
    }
    assert!(!Path::new(&out).exists());
    let elsewhere = tempfile::tempdir().unwrap();
    let elsewhere = elsewhere.path().to_str().unwrap();
    let refused = inspect(&["convert", &over, &out, "--allow-references", elsewhere]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (a, b) = (path("a"), path("b"));
    qemu_img(&["create", "-q", "-f", "qcow2", &a, "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &a, "-F", "qcow2", &b]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", &b, "-F", "qcow2", &a]);
    let root = dir.path().to_str().unwrap();
    let refused = inspect(&["map", &a, "--allow-references", root]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("comes back"), "{}", refused.stderr);
}

#[test]
fn data_in_an_external_file_is_read_with_leave_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (image, out) = (path("image"), path("out"));
    let options = format!("data_file={},data_file_raw=on", path("data"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &image, "2M"]);
    qemu_io(&image, "write -P 7 64k 128k");
    let refused = inspect(&["convert", &image, &out]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let done = inspect(&["convert", &image, &out, "--allow-references", dir.path().to_str().unwrap()]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert_eq!(qemu_img(&["compare", &image, &out]).code, 0);
    assert_eq!(inspect(&["check", &image]).code, qemu_img(&["check", &image]).code);
}

#[test]
fn a_raw_image_whose_guest_wrote_a_qcow2_header_can_be_read_as_raw() {
    let corpus = Corpus::make();
    let (path, out) = (corpus.path("plain"), corpus.path("out"));
    assert_eq!(inspect(&["convert", &path, &out, "--as", "raw"]).code, 0);
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&out).unwrap());
    let raw = inspect(&["info", &path, "--as", "raw", "-o", "json"]).json();
    assert_eq!(raw["format"], "raw");
    assert_eq!(inspect(&["check", &path, "--as", "raw"]).code, 63);
}

#[test]
fn verify_takes_either_checksum_and_tells_a_mismatch() {
    let corpus = Corpus::make();
    let path = corpus.path("plain");
    for tool in ["sha256", "sha512"] {
        let sum = program::run(&format!("{tool}sum"), &[&path]).stdout;
        let sum = sum.split(' ').next().unwrap().to_owned();
        assert_eq!(inspect(&["verify", &path, "--checksum", &format!("{tool}:{sum}")]).code, 0);
        assert_eq!(inspect(&["verify", &path, "--checksum", &sum.to_uppercase()]).code, 0);
        let other = corpus.path("small");
        assert_eq!(inspect(&["verify", &other, "--checksum", &sum]).code, 5);
    }
    assert_eq!(inspect(&["verify", &path, "--checksum", "12"]).code, 2);
}

#[test]
fn what_is_damaged_is_named_and_the_rest_is_shown() {
    let corpus = Corpus::make();
    let bad = corpus.dir.path().join("bad");
    let path = corpus.path("plain");
    let l2 = word(&path, word(&path, 40)) & 0x00ff_ffff_ffff_fe00;
    patched(&path, &bad, l2, |_| 1 << 63 | 0x00f0_0000_0000_0000);
    let bad_path = bad.to_str().unwrap();
    let map = inspect(&["map", bad_path, "-o", "json"]);
    assert_eq!(map.code, 5);
    let map = map.json();
    assert!(map[0]["damage"].as_str().unwrap().contains("L2 entry 0"), "{map}");
    assert!(map.as_array().unwrap().iter().any(|range| range["data"] == true));
    let out: PathBuf = corpus.dir.path().join("out");
    assert_eq!(inspect(&["convert", bad_path, out.to_str().unwrap()]).code, 5);
    assert!(!out.exists());
    assert_eq!(inspect(&["check", bad_path]).code, 2);
    // The table of snapshots lies nowhere.
    patched(&corpus.path("snapshots"), &bad, 64, |_| 0x7fff_0000_0000);
    let info = inspect(&["info", bad_path, "-o", "json"]);
    assert_eq!(info.code, 5);
    assert_eq!(info.json()["virtual-size"], 3 << 20);
    assert!(info.json()["damage"][0].as_str().unwrap().contains("snapshots_offset"));
}

#[test]
fn dump_shows_every_structure_beside_its_bytes() {
    let corpus = Corpus::make();
    for (name, path) in corpus.images() {
        let header = inspect(&["dump", &path, "--header", "-o", "json"]).json();
        let field = |wanted: &str| {
            header.as_array().unwrap().iter().find(|row| row["field"] == wanted).cloned().unwrap_or_default()
        };
        assert_eq!(field("magic")["bytes"], "514649fb", "{name}");
        assert_eq!(field("size")["value"], qemu_img_size(&path).to_string());
        for what in [&["--l1"][..], &["--refcounts"], &["--l2", "0"], &["--at", "1000k"]] {
            let dumped = inspect(&[&["dump", &path][..], what].concat());
            assert_eq!(dumped.code, 0, "{name} {what:?}: {}", dumped.stderr);
        }
    }
    let map = qemu_img(&["map", "--output=json", &corpus.path("plain")]).json();
    let way = inspect(&["dump", &corpus.path("plain"), "--at", "0", "-o", "json"]).json();
    assert_eq!(way[1]["value"], format!("data at {:#x}, copied", map[0]["offset"].as_u64().unwrap()));
    assert_eq!(way[2]["bytes"], "01".repeat(16));
    assert_eq!(inspect(&["dump", &corpus.path("plain")]).code, 2);
    assert_eq!(inspect(&["dump", &corpus.path("base.raw"), "--header"]).code, 5);
}

fn qemu_img_size(path: &str) -> u64 {
    qemu_img(&["info", "--output=json", path]).json()["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_chart_and_a_page_show_where_data_lies() {
    let corpus = Corpus::make();
    for (name, path) in corpus.images() {
        for args in [&["map", &path, "--chart"][..], &["map", &path, "--chart", "--layers"]] {
            let chart = inspect(&[args, &["--allow-references", corpus.root()]].concat());
            assert!(chart.code == 0 && chart.stdout.starts_with("0x0000000000000000 "), "{name} {chart:?}");
        }
        for verb in ["info", "map"] {
            let page = inspect(&[verb, &path, "-o", "html", "--allow-references", corpus.root()]);
            assert_eq!(page.code, 0, "{name} {}", page.stderr);
            let page = page.stdout;
            assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
            assert!(page.contains("<svg ") && page.contains(name));
            assert!(!page.contains("http") && !page.contains("<script"), "it needs nothing else");
        }
    }
}
