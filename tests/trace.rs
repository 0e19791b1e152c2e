//! What the node asks of the kernel, as the kernel sees it: between the arrival of a FLUSH or of a FUA write and its
//! answer, the layer's data is synced and after that its map; and a listing of the mount opens no file.
//!
//! The first comes from the kernel's own trace points (`fuse`, `ext4`), which see a request and a sync alike whether
//! they go through calls or through a ring. The second from `strace`.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    libc::O_DSYNC,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        signal::Signal,
        stat::{major, minor},
        statfs::{EXT4_SUPER_MAGIC, statfs},
    },
};

use crate::util::{content::pattern, node::Node};

/// The trace points that are recorded.
const EVENTS: [&str; 4] = [
    "fuse/fuse_request_send",
    "fuse/fuse_request_end",
    "ext4/ext4_sync_file_enter",
    "ext4/ext4_sync_file_exit",
];
/// More than a test's events take.
const BUFFER_KIB: &str = "4096";

/// A recording of the kernel's trace points, in a buffer of its own.
struct Trace {
    file_system: PathBuf,
    instance: PathBuf,
}

impl Trace {
    fn start(node: &Node) -> Trace {
        let file_system = node.path("tracing");
        fs::create_dir(&file_system).unwrap();
        mount(Some("tracefs"), &file_system, Some("tracefs"), MsFlags::empty(), None::<&str>)
            .expect("the kernel has tracefs");
        let name = node.path("").file_name().unwrap().to_owned();
        let trace = Trace { instance: file_system.join("instances").join(name), file_system };
        fs::create_dir(&trace.instance).unwrap();
        trace.set("buffer_size_kb", BUFFER_KIB);
        for event in EVENTS {
            trace.set(&format!("events/{event}/enable"), "1");
        }
        trace
    }

    fn set(&self, name: &str, value: &str) {
        let path = self.instance.join(name);
        fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// All that was recorded, in the order of time.
    fn events(&self) -> Vec<Event> {
        self.set("tracing_on", "0");
        for entry in fs::read_dir(self.instance.join("per_cpu")).unwrap().map(Result::unwrap) {
            let stats = fs::read_to_string(entry.path().join("stats")).unwrap();
            assert!(stats.contains("\noverrun: 0\n"), "the buffer is too small: {stats}");
        }
        let text = fs::read_to_string(self.instance.join("trace")).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What is left is seen by whoever looks at the machine, and harms nobody.
        let _ = fs::remove_dir(&self.instance);
        let _ = umount2(&self.file_system, MntFlags::MNT_DETACH);
    }
}

#[derive(Debug, PartialEq)]
enum Event {
    Arrival { connection: u64, opcode: u64, unique: u64 },
    Answer { connection: u64, unique: u64 },
    SyncBegins { file: Inode },
    SyncEnds { file: Inode, result: i64 },
}

/// `MAJOR,MINOR` of the file system, and the number.
type Inode = (String, u64);

/// `TASK-PID [CPU] FLAGS TIME: NAME: FIELD VALUE FIELD VALUE ...`
fn parse(line: &str) -> Option<Event> {
    let (_, rest) = line.split_once(": ")?;
    let (name, fields) = rest.split_once(": ")?;
    let words: Vec<&str> = fields.split_whitespace().collect();
    let field = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1)?.parse::<i64>().ok()
    };
    let number = |name: &str| u64::try_from(field(name)?).ok();
    let file = || {
        let at = words.iter().position(|word| *word == "dev")?;
        Some(((*words.get(at + 1)?).to_owned(), number("ino")?))
    };
    Some(match name {
        "fuse_request_send" => Event::Arrival {
            connection: number("connection")?,
            opcode: number("opcode")?,
            unique: number("req")?,
        },
        "fuse_request_end" => Event::Answer { connection: number("connection")?, unique: number("req")? },
        "ext4_sync_file_enter" => Event::SyncBegins { file: file()? },
        "ext4_sync_file_exit" => Event::SyncEnds { file: file()?, result: field("ret")? },
        _ => return None,
    })
}

/// Numbers of requests (linux/fuse.h).
const FUSE_WRITE: u64 = 16;
const FUSE_FSYNC: u64 = 20;

/// Who is looked for.
struct Subjects {
    connection: u64,
    data: Inode,
    map: Inode,
}

/// The mount of this node and the files of its only layer.
fn subjects(node: &Node) -> Subjects {
    let files = node.files_on_disk();
    let inode = |name: &str| {
        let mut found = files.iter().filter(|file| file.starts_with("layers/") && file.ends_with(name));
        let file = found.next().expect("the volume has a layer");
        assert_eq!(found.next(), None, "there is one layer");
        let found = fs::metadata(node.path("disk").join(file)).unwrap();
        (format!("{},{}", major(found.dev()), minor(found.dev())), found.ino())
    };
    // The kernel's number of a device without a major one.
    let connection = minor(fs::metadata(node.path("mount")).unwrap().dev());
    Subjects { connection, data: inode("/data"), map: inode("/map") }
}

/// Check every request of this kind; how many there were.
fn check(events: &[Event], kind: u64, of: &Subjects) -> usize {
    let mut checked = 0;
    for (at, event) in events.iter().enumerate() {
        let Event::Arrival { connection, opcode, unique } = *event else { continue };
        if (connection, opcode) != (of.connection, kind) {
            continue;
        }
        let after = &events[at..];
        let answer = Event::Answer { connection, unique };
        let end = after.iter().position(|event| *event == answer).expect("it was answered");
        let within = &after[..end];
        let rest = synced(within, &of.data).unwrap_or_else(|| {
            panic!("request {unique} was answered without a sync of the data: {within:?}")
        });
        assert!(
            synced(rest, &of.map).is_some(),
            "request {unique} was answered without a sync of the map after that of the data: {within:?}"
        );
        checked += 1;
    }
    checked
}

/// What comes after the first sync of this file that begins and succeeds within `events`.
fn synced<'e>(events: &'e [Event], file: &Inode) -> Option<&'e [Event]> {
    let begins = Event::SyncBegins { file: file.clone() };
    let ends = Event::SyncEnds { file: file.clone(), result: 0 };
    let rest = &events[events.iter().position(|event| *event == begins)?..];
    let ended = rest.iter().position(|event| *event == ends)?;
    Some(&rest[ended..])
}

/// A node whose disk lies on ext4, as the trace points want it: where the temporary directory does not, on one of its own.
fn on_ext4() -> Node {
    let mut node = Node::idle();
    let disk = node.path("disk");
    if statfs(Path::new(&disk)).unwrap().filesystem_type() != EXT4_SUPER_MAGIC {
        node.sh("truncate -s 256M fs.img; mkfs.ext4 -q fs.img; mount -o loop fs.img $D; chmod 700 $D");
    }
    node.restart();
    node
}

#[test]
fn a_flush_is_answered_after_the_sync_of_the_data_and_then_of_the_map() {
    let mut node = on_ext4();
    node.run("volume create v --size 16M");
    let (trace, of) = (Trace::start(&node), subjects(&node));
    let file = File::options().write(true).open(node.volume("v")).unwrap();
    for n in 0..10 {
        file.write_all_at(&pattern(8192, n), n * 12_288).unwrap();
        file.sync_data().unwrap();
    }
    drop(file);
    assert_eq!(check(&trace.events(), FUSE_FSYNC, &of), 10);
    assert!(node.stop(Signal::SIGTERM).success());
}

#[test]
fn a_write_with_o_dsync_is_answered_after_the_sync_of_the_data_and_then_of_the_map() {
    let mut node = on_ext4();
    node.run("volume create v --size 16M");
    let (trace, of) = (Trace::start(&node), subjects(&node));
    let file = File::options().write(true).custom_flags(O_DSYNC).open(node.volume("v")).unwrap();
    for n in 0..10 {
        file.write_all_at(&pattern(4096 - 512 * (n % 2), n), n * 12_288).unwrap();
    }
    drop(file);
    assert_eq!(check(&trace.events(), FUSE_WRITE, &of), 10);
    assert!(node.stop(Signal::SIGTERM).success());
}

#[test]
fn a_directory_is_listed_and_the_file_system_asked_for_its_size_without_a_look_at_any_disk() {
    const TIMES: usize = 100;
    let mut node = Node::start();
    fs::write(node.scratch("base.raw"), pattern(1 << 20, 1)).unwrap();
    node.run("image create base --from base.raw --wait");
    node.run("volume create v --image base");
    assert!(node.stop(Signal::SIGTERM).success());
    let trace = node.path("opened").display().to_string();
    node.wrap(&["strace", "-f", "-qq", "-y", "-e", "trace=open,openat,openat2", "-o", &trace]);
    node.restart();
    let listed = node.sh(&format!("for i in $(seq {TIMES}); do command ls -U $I $V; stat -f $V; done"));
    assert_eq!(listed.lines().filter(|line| *line == "base").count(), TIMES);
    assert!(node.stop(Signal::SIGTERM).success());
    let opened = fs::read_to_string(trace).unwrap();
    let of_disk =
        |line: &&str| line.contains("/image\"") || line.contains("\"image\"") || line.contains("/data\"");
    let count = opened.lines().filter(of_disk).count();
    // At the start and at the end they are opened, and that is seen.
    assert!((1..TIMES).contains(&count), "{count} openings:\n{opened}");
}
