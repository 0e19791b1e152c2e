//! Full disks (invariant 8), on small ext4 and XFS file systems: a write that was not acknowledged may fail, and nothing
//! else may. What was acknowledged is there, also after a kill; a full disk flushes, discards and deletes snapshots; and
//! when there is room again everything goes on.

use std::{
    fs::{self, File},
    io,
};

use nix::{errno::Errno, fcntl};

use crate::util::{
    content::{MIB, pattern, sparse_image},
    disk::{FileSystem, LoopDisk},
    journal::{Dice, Durability, Journal, write_until},
    long,
    node::Node,
};

const KIB: u64 = 1 << 10;
const IMAGE_SIZE: u64 = 8 * MIB;
const SIZE: u64 = 32 * MIB;
/// All of the volume, in sectors.
const WHOLE: (u64, u64) = (0, SIZE / 512);

/// A node on a small disk, with a volume `v` over an image, and what the volume holds.
struct Small {
    node: Node,
    disk: LoopDisk,
    base: Vec<u8>,
    journal: Journal,
    dice: Dice,
}

impl Small {
    fn start(file_system: FileSystem) -> Small {
        let mut node = Node::idle();
        let disk = LoopDisk::mount(&node, file_system, file_system.smallest_mib() + 64, 512);
        node.restart();
        sparse_image(&node.scratch("base.raw"), IMAGE_SIZE);
        let mut base = fs::read(node.scratch("base.raw")).unwrap();
        base.resize(usize::try_from(SIZE).unwrap(), 0);
        node.run("image create base --from base.raw --wait");
        node.run("volume create v --image base --size 32M");
        Small { node, disk, base, journal: Journal::default(), dice: Dice::new(1) }
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(self.node.volume("v")).unwrap()
    }

    /// Write, punch and flush until `flushes` were acknowledged, or an error.
    fn write(&mut self, flushes: u64) -> io::Result<()> {
        let file = self.file();
        write_until(&file, &mut self.journal, &mut self.dice, WHOLE, Durability::Fsync, |n| n >= flushes)
    }

    /// Write until the disk is full.
    fn write_until_full(&mut self) {
        let error = self.write(u64::MAX).expect_err("the disk is smaller than the volume");
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32), "{error}");
    }

    /// The volume holds what its journal says.
    fn check(&mut self) {
        let base = &self.base;
        let before = |sector: u64| {
            let at = usize::try_from(sector * 512).unwrap();
            base[at..at + 512].to_vec()
        };
        self.journal.check(&self.node.volume("v"), WHOLE, before).unwrap();
    }

    fn kill_and_check(&mut self) {
        self.node.kill();
        self.node.restart();
        self.check();
    }
}

fn on_each(test: impl Fn(Small)) {
    for file_system in [FileSystem::Ext4, FileSystem::Xfs] {
        eprintln!("on {file_system:?}");
        test(Small::start(file_system));
    }
}

#[test]
fn a_full_disk_fails_new_writes_and_flushes_discards_and_deletes_snapshots_and_goes_on_when_there_is_room() {
    on_each(|mut small| {
        small.write(20).unwrap();
        small.node.run("snapshot create v old");
        small.write(20).unwrap();
        small.disk.fill(2 * MIB);
        small.write_until_full();
        let file = small.file();
        file.sync_all().expect("a full disk flushes");
        // Of the write that failed, either may be there; what is there now stays.
        small.check();
        small.kill_and_check();
        let file = small.file();
        let punch = fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        small.journal.zero(4096, 8192);
        fcntl::fallocate(&file, punch, 4096 * 512, 8192 * 512).expect("a full disk discards");
        small.journal.zero(16384, 4096);
        let zero = fcntl::FallocateFlags::FALLOC_FL_ZERO_RANGE | fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fcntl::fallocate(&file, zero, 16384 * 512, 4096 * 512).expect("a full disk zeroes");
        file.sync_all().expect("a full disk flushes");
        small.journal.flushed();
        small.kill_and_check();
        small.node.run("snapshot delete v old");
        small.node.idle_jobs();
        small.check();
        small.disk.make_room();
        small.write(20).unwrap();
        small.kill_and_check();
        small.node.assert_nothing_is_left_over();
    });
}

/// What must be possible on a disk however full it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Must {
    Succeed,
    /// Or be refused for want of space, and leave nothing.
    SucceedOrRefuse,
}

/// A command, what has to be there for it, and what takes it back.
struct Try {
    before: &'static str,
    line: &'static str,
    after: &'static str,
    must: Must,
}

const fn attempt(before: &'static str, line: &'static str, after: &'static str) -> Try {
    Try { before, line, after, must: Must::SucceedOrRefuse }
}

const fn always(before: &'static str, line: &'static str, after: &'static str) -> Try {
    Try { before, line, after, must: Must::Succeed }
}

/// `w` is a volume over the image with a snapshot `a` of what it holds.
const TRIES: [Try; 17] = [
    always("", "snapshot delete w a", "snapshot create w a"),
    attempt("", "snapshot create w x", "snapshot delete w x"),
    attempt("", "volume clone w x", "volume delete x"),
    attempt("", "volume clone w@a x --full", "volume delete x"),
    attempt("", "volume create x --size 32M", "volume delete x"),
    attempt("", "volume create x --image base", "volume delete x"),
    attempt("", "snapshot revert w a", ""),
    attempt("volume create x --image base", "volume flatten x", "volume delete x"),
    attempt("volume create x --size 1M", "volume resize x 32M", "volume delete x"),
    attempt("", "image create x --from image:base --wait", "image delete x"),
    attempt("", "image create x --from volume:w@a --wait", "image delete x"),
    attempt("", "image create x --from base.raw --wait", "image delete x"),
    attempt("", "volume export w x.raw --force", ""),
    always("", "volume export w@a x.raw --force", ""),
    always("", "image verify base", ""),
    always("volume clone w x", "volume delete x", ""),
    always("image create x --from base.raw --wait", "image delete x", ""),
];

#[test]
fn every_command_at_every_amount_of_free_space_happens_or_is_refused_and_happens_when_there_is_room() {
    let left_kib: &[u64] = if long() {
        &[0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096, 8192]
    } else {
        &[0, 16, 256]
    };
    on_each(|small| {
        let node = &small.node;
        node.run("volume create w --image base");
        node.write("w", MIB + 512, &pattern(3 * MIB, 3));
        node.run("snapshot create w a");
        node.sh("sync $V/w; cp $V/w $T/expected");
        for Try { before, line, after, must } in TRIES {
            for left in left_kib {
                small.disk.make_room();
                node.idle_jobs();
                // A write takes the reserve again that the last round gave up.
                node.write("v", SIZE - MIB, &pattern(MIB, 4));
                if !before.is_empty() {
                    node.run(before);
                }
                small.disk.fill(left * KIB);
                let ended = node.try_run(line);
                let what = format!("{line}, {left} KiB left: {}", ended.stderr.trim());
                let refused = !ended.status.success();
                assert!(!refused || (must == Must::SucceedOrRefuse && says_full(&ended.stderr)), "{what}");
                // Nothing else suffers.
                node.sh("sync $V/w; sync $V/v; cmp $T/expected $V/w; cmp -n 8388608 $T/base.raw $V/v");
                small.disk.make_room();
                if node.names("image").contains(&"x".to_owned()) && refused {
                    node.run("image delete x");
                }
                if refused {
                    let again = node.try_run(line);
                    assert!(again.status.success(), "{what}; and with room: {}", again.stderr);
                }
                if !after.is_empty() {
                    node.run(after);
                }
                node.idle_jobs();
                node.assert_nothing_is_left_over();
            }
        }
        node.sh("cmp $T/expected $V/w; $B volume export w@a x.raw --force; cmp $T/expected x.raw");
    });
}

fn says_full(said: &str) -> bool {
    ["space", "full", "free"].iter().any(|word| said.contains(word))
}
