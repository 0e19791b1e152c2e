//! Files made to hurt: whatever bytes are changed, every verb ends within its time with one of its exit codes. The
//! seed is printed with a failure and can be given back in BEDPLATE_SEED.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

mod program;

use std::{fs, path::Path};

use program::{Outcome, qemu_img, qemu_io, run};

/// Mutants of each image.
const MUTANTS: u64 = 25;
/// Kilobytes of address space: several times what an image of 2 MiB may cost, and far less than what its fields can ask
/// for.
const ADDRESS_SPACE_KB: u64 = 1 << 20;

/// splitmix64
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

fn seed() -> u64 {
    std::env::var("BEDPLATE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Run with little memory, and not for ever.
fn bounded(args: &[&str]) -> Outcome {
    let limited = format!("ulimit -v {ADDRESS_SPACE_KB}; exec timeout 20 \"$0\" \"$@\"");
    let program = env!("CARGO_BIN_EXE_bedplate-inspect");
    run("sh", &[&["-c", &limited, program][..], args].concat())
}

/// All verbs on one file end as they may.
fn survives(path: &str, note: &str) {
    let commands: [&[&str]; 10] = [
        &["info", path, "-o", "json"],
        &["info", path, "-o", "html"],
        &["map", path, "-o", "json", "--layers"],
        &["map", path, "--chart"],
        &["check", path, "--data"],
        &["dump", path, "--header"],
        &["dump", path, "--l1"],
        &["dump", path, "--l2", "0"],
        &["dump", path, "--refcounts"],
        &["compare", path, path],
    ];
    for args in commands {
        let outcome = bounded(args);
        let allowed: &[i32] = match args[0] {
            "check" => &[0, 1, 2, 3, 63],
            "compare" => &[0, 2],
            _ => &[0, 1, 2, 5],
        };
        assert!(allowed.contains(&outcome.code), "{note} {args:?}: {outcome:?}");
        assert!(!outcome.stderr.contains("panicked"), "{note} {args:?}: {}", outcome.stderr);
    }
}

/// Change some bytes where the metadata is: mostly whole fields, to values that mean something.
fn mutated(image: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = image.to_vec();
    for _ in 0..=rng.below(4) {
        let at = if rng.below(2) == 0 { rng.below(112) } else { rng.below(bytes.len()) };
        let value = match rng.below(6) {
            0 => u64::MAX,
            1 => 1 << 63,
            2 => 0,
            3 => bytes.len() as u64,
            4 => rng.next() & 0x00ff_ffff_ffff_fe00,
            _ => rng.next(),
        };
        let at = at / 8 * 8;
        let len = if rng.below(2) == 0 { 8 } else { 4 };
        if let Some(field) = bytes.get_mut(at..at + len) {
            field.copy_from_slice(&value.to_be_bytes()[8 - len..]);
        }
    }
    if rng.below(8) == 0 {
        bytes.truncate(rng.below(image.len()));
    }
    bytes
}

#[test]
fn no_change_of_an_image_makes_a_verb_panic_hang_or_swell() {
    let seed = seed();
    let mut rng = Rng(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let images = [
        ("a", "cluster_size=512"),
        ("b", "cluster_size=16k,extended_l2=on"),
        ("c", "cluster_size=4k,compression_type=zstd"),
    ];
    for (name, options) in images {
        let (image, mutant) = (path(name), path("mutant"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "4M"]);
        qemu_io(&image, "write -P 1 0 20k; write -z 1M 64k; write -c -P 2 2M 16k");
        qemu_img(&["snapshot", "-c", "s", &image]);
        qemu_img(&["bitmap", "--add", &image, "b"]);
        qemu_io(&image, "write -P 3 8k 8k");
        let bytes = fs::read(&image).unwrap();
        for number in 0..MUTANTS {
            fs::write(&mutant, mutated(&bytes, &mut rng)).unwrap();
            survives(&mutant, &format!("seed {seed}, {name} mutant {number}"));
        }
    }
}

#[test]
fn sizes_near_the_limits_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image").to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", &image, "64T"]);
    survives(&image, "64 TiB");
    let raw = dir.path().join("raw");
    fs::File::create(&raw).unwrap().set_len(1 << 42).unwrap();
    let raw = raw.to_str().unwrap();
    for args in [["info", raw, "-ojson"], ["map", raw, "-ojson"], ["map", raw, "--chart"]] {
        let outcome = bounded(&args);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
}

/// The start of an image of version 2 with its refcount table in the second cluster and its L1 table in the fourth.
fn image_of_version_2(cluster_bits: u32, size: u64, l1: &[u64]) -> Vec<u8> {
    let cluster = 1 << cluster_bits;
    let at = 3 * cluster;
    let mut bytes = vec![0; at];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb");
    put(4, &2_u32.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &u32::try_from(l1.len()).unwrap().to_be_bytes());
    put(40, &(at as u64).to_be_bytes());
    put(48, &(cluster as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    bytes.extend(l1.iter().flat_map(|entry| entry.to_be_bytes()));
    bytes
}

#[test]
fn a_table_that_every_entry_of_many_l1_tables_names_is_followed_once_for_each_of_them() {
    const ENTRIES: u64 = 8192;
    const SNAPSHOTS: u32 = 1500;
    let mut image = image_of_version_2(9, ENTRIES * 64 * 512, &vec![1024; 8192]);
    // The third cluster is the table, and all that it names is the first byte of the L1 table's cluster.
    image[1024..1536].copy_from_slice(&1536_u64.to_be_bytes().repeat(64));
    let list = image.len() as u64;
    image[60..64].copy_from_slice(&SNAPSHOTS.to_be_bytes());
    image[64..72].copy_from_slice(&list.to_be_bytes());
    let mut snapshot = [0; 40];
    snapshot[..8].copy_from_slice(&1536_u64.to_be_bytes());
    snapshot[8..12].copy_from_slice(&8192_u32.to_be_bytes());
    image.extend(snapshot.repeat(usize::try_from(SNAPSHOTS).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image").to_str().unwrap().to_owned();
    fs::write(&path, image).unwrap();
    survives(&path, "many snapshots");
    let found = bounded(&["check", &path, "-o", "json"]);
    assert_eq!(found.code, 2);
    assert!(found.stdout.contains("shares its L2 table with an entry before it"), "{}", found.stdout);
    assert_eq!(found.json()["allocated-clusters"], 64);
}

#[test]
fn a_damaged_entry_for_half_a_tib_is_one_finding() {
    // A reserved bit in each.
    let image = image_of_version_2(21, 64 << 40, &[1 << 56 | 1; 128]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image").to_str().unwrap().to_owned();
    fs::write(&path, image).unwrap();
    survives(&path, "64 TiB damaged");
    let found = bounded(&["check", &path, "--data", "-o", "json"]);
    assert_eq!(found.code, 2, "{found:?}");
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert_eq!(run("mkfifo", &[fifo.to_str().unwrap()]).code, 0);
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    for path in [fifo.as_path(), Path::new("/dev/zero"), dir.path()] {
        for verb in ["info", "map", "check"] {
            let refused = bounded(&[verb, path.to_str().unwrap()]);
            assert!(refused.code == 1 && refused.stderr.contains("not supported"), "{refused:?}");
        }
    }
    assert_eq!(bounded(&["info", empty.to_str().unwrap()]).code, 0);
    assert_eq!(bounded(&["map", empty.to_str().unwrap(), "-o", "json"]).stdout, "[]\n");
    assert_eq!(bounded(&["info", "/nonexistent"]).code, 3);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::write(&raw, vec![1; 4 << 20]).unwrap();
    let program = env!("CARGO_BIN_EXE_bedplate-inspect");
    let piped = format!("\"{program}\" convert \"{}\" - | head -c 10 > /dev/null", raw.display());
    let outcome = run("bash", &["-c", &format!("set -o pipefail; {piped}")]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
}
