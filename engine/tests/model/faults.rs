//! Errors of the medium, one at each place where it can have one.
//!
//! A failed sync ends writing, says so to everybody who waits, and stays so over a restart (invariant 7). A full medium
//! fails what needs room and nothing else (invariant 8).

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bedplate_engine::{
    cow::core::{Op, Synced},
    device::{BlockDevice, Durability, ExtentKind},
    error::{Error, Result},
    exec::{
        head::{data_path, failed_path},
        simulated::{Event, Move, Planning, Simulated, Tag},
        storage::{
            Storage,
            memory::{Call, CallKind, Fault},
        },
    },
    units::ByteRange,
    volume::{device::VolumeState, disk::Disk},
};

use crate::{
    cells::{CELL, Cells, Content},
    disk::{self, Stack},
    enumerated::{Before, Bench, Kind, SIZE},
    life::{Images, VOLUME, create_volume},
};

fn write(start: u64, len: u64, durability: Durability) -> Op {
    Op::Write { range: ByteRange::new(start, len), durability }
}

fn discard(start: u64, len: u64) -> Op {
    Op::Zero { range: ByteRange::new(start, len), durability: Durability::Volatile }
}

/// Carry everything out in order; returns what ended, and how.
fn run_all(sim: &mut Simulated) -> Vec<(Tag, Result<()>)> {
    let mut ended = Vec::new();
    loop {
        for event in sim.events() {
            match event {
                Event::Ended { tag, result } => ended.push((tag, result)),
                Event::Read { .. } => panic!("nobody reads"),
            }
        }
        let Some(next) = sim.moves().first().copied() else { return ended };
        sim.make(next);
    }
}

/// Fail the call of this kind with this number, counted from now; returns whether it came.
fn fail_nth(bench: &Bench, kind: CallKind, nth: u64, fault: Fault) -> Arc<AtomicBool> {
    let hit = Arc::new(AtomicBool::new(false));
    let (seen, mut count) = (hit.clone(), 0);
    bench.storage.set_faults(move |call| {
        if call.kind != kind {
            return None;
        }
        count += 1;
        (count == nth + 1).then(|| {
            seen.store(true, Ordering::Relaxed);
            fault
        })
    });
    hit
}

/// Run one operation alone, which may fail.
fn attempt(bench: &mut Bench, op: Op, content: Content) -> Result<()> {
    let admitted = bench.sim.core().failed().is_none();
    if !admitted {
        return bench.sim.submit(op, None).map(drop);
    }
    let flight = bench.submit(op, content);
    let ended = run_all(&mut bench.sim);
    let (_, result) = ended.into_iter().find(|(tag, _)| *tag == flight.tag).expect("it ends");
    match (&result, &flight.kind) {
        (Ok(()), kind) => kind.acknowledge(&mut bench.model),
        (Err(_), Kind::Change(id, _)) => bench.model.failed(*id),
        (Err(_), Kind::Flush(_) | Kind::Other) => {}
    }
    result
}

#[test]
fn a_sync_that_fails_anywhere_ends_writing_and_loses_nothing_that_was_flushed() {
    let mut points = 0;
    for fault in [Fault::Error(ErrorKind::Other), Fault::Dropped] {
        for before in [Before::Absent, Before::Data, Before::Zero] {
            for nth in 0.. {
                let mut bench = Bench::new(before, 512);
                let hit = fail_nth(&bench, CallKind::Sync, nth, fault);
                let volatile = Durability::Volatile;
                let workload = [
                    (write(4096, 4096, volatile), Content::Stamped),
                    (Op::Flush, Content::Zeros),
                    (write(4096 + 512, 1024, volatile), Content::Stamped),
                    (discard(8192, 4096), Content::Zeros),
                    (write(0, 512, Durability::Fua), Content::Stamped),
                    (write(8192, 512, volatile), Content::Stamped),
                    (Op::Flush, Content::Zeros),
                    (write(8192, 4096, Durability::Fua), Content::Stamped),
                    (Op::Flush, Content::Zeros),
                ];
                for (op, content) in workload {
                    let failed_before = bench.sim.core().failed().is_some();
                    let result = attempt(&mut bench, op, content);
                    if failed_before {
                        assert!(matches!(result, Err(Error::Failed { .. })), "{op:?}: {result:?}");
                    }
                }
                let what = format!("{fault:?} {before:?} sync {nth}");
                bench.storage.clear_faults();
                bench.check_crashed(bench.storage.crash_losing_all(), &what);
                bench.check_crashed(bench.storage.crash(|_, outcomes| outcomes - 1), &what);
                if !hit.load(Ordering::Relaxed) {
                    break;
                }
                points += 1;
                // A checkpoint that cannot be staged is no reason to stop; every other failed sync is.
                if let Some(reason) = bench.sim.core().failed() {
                    let left = bench.storage.crash_losing_all();
                    let mark = left.bytes(&failed_path(&bench.sim.head().dir)).expect("the mark is durable");
                    assert_eq!(mark, reason.as_bytes(), "{what}");
                }
            }
        }
    }
    println!("{points} failed syncs");
}

/// Read `range` with the last of its parts after everything else that can happen.
fn read(bench: &mut Bench, range: ByteRange) -> Result<Vec<u8>> {
    let tag = bench.sim.read(range, Planning::PartByPart);
    loop {
        let found = bench.sim.events().into_iter().find_map(|event| match event {
            Event::Read { tag: ended, result, .. } if ended == tag => Some(result),
            Event::Read { .. } | Event::Ended { .. } => None,
        });
        match found {
            Some(result) => return result,
            None => {
                let next = bench.sim.moves().first().copied().expect("the read goes on");
                bench.sim.make(next);
            }
        }
    }
}

#[test]
fn after_a_failed_sync_what_changed_since_the_last_commit_fails_and_all_else_is_read_as_it_is() {
    let volatile = Durability::Volatile;
    let workload = [
        (write(4096, 4096, volatile), Content::Stamped),
        (Op::Flush, Content::Zeros),
        // In place, which changes no map.
        (write(4096 + 512, 1024, volatile), Content::Stamped),
        (Op::Flush, Content::Zeros),
        (discard(8192, 4096), Content::Zeros),
        (write(0, 512, Durability::Fua), Content::Stamped),
        (write(4096, 512, volatile), Content::Stamped),
        (write(8192, 512, volatile), Content::Stamped),
        (write(8192 + 1024, 512, volatile), Content::Stamped),
        (Op::Flush, Content::Zeros),
    ];
    let (mut refused, mut shown) = (0, 0);
    for fault in [Fault::Error(ErrorKind::Other), Fault::Dropped] {
        for before in [Before::Absent, Before::Data, Before::Zero, Before::Frozen] {
            for nth in 0.. {
                let mut bench = Bench::new(before, 512);
                let hit = fail_nth(&bench, CallKind::Sync, nth, fault);
                let mut changed: BTreeSet<u64> = BTreeSet::new();
                for (op, content) in workload {
                    let sound = bench.sim.core().failed().is_none();
                    if let Op::Write { range, .. } | Op::Zero { range, .. } = op
                        && sound
                    {
                        let blocks = range.blocks_touched();
                        changed.extend(blocks.start.0..blocks.end().0);
                    }
                    let durable = matches!(op, Op::Flush | Op::Write { durability: Durability::Fua, .. });
                    if attempt(&mut bench, op, content).is_ok() && durable {
                        changed.clear();
                    }
                }
                let failed = bench.sim.core().failed().is_some();
                for sector in 0..bench.stack.size / 512 {
                    let range = ByteRange::new(sector * 512, 512);
                    let what = format!("{fault:?} {before:?} sync {nth}: {range}");
                    let since = bench.model.now();
                    match read(&mut bench, range) {
                        Ok(bytes) => {
                            bench
                                .model
                                .check_read(range, &bytes, since)
                                .unwrap_or_else(|e| panic!("{what}: {e}"));
                            assert!(!failed || !changed.contains(&range.start.block().0), "{what} is shown");
                            shown += 1;
                        }
                        Err(Error::Lost { .. }) => {
                            assert!(failed && changed.contains(&range.start.block().0), "{what} is refused");
                            refused += 1;
                        }
                        Err(error) => panic!("{what}: {error}"),
                    }
                }
                if !hit.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
    }
    assert!(refused > 0 && shown > 0);
    println!("{shown} sectors shown, {refused} refused");
}

#[test]
fn when_the_first_sync_after_a_kill_fails_nothing_that_the_killed_process_may_have_written_is_read() {
    for (before, second) in [(Before::Absent, 2 * 4096), (Before::Data, SIZE)] {
        let mut bench = Bench::new(before, 512);
        attempt(&mut bench, write(0, 8192, Durability::Fua), Content::Stamped).expect("no faults");
        // In place: only the killed process knew where.
        attempt(&mut bench, write(4096, 512, Durability::Volatile), Content::Stamped).expect("no faults");
        let storage = Arc::new(bench.storage.kill());
        let sim = disk::open(&storage, &bench.stack, Synced::No).expect("no faults");
        bench = Bench { storage, sim, ..bench };
        let hit = fail_nth(&bench, CallKind::Sync, 0, Fault::Dropped);
        attempt(&mut bench, Op::Flush, Content::Zeros).expect_err("the data sync fails");
        assert!(hit.load(Ordering::Relaxed));
        for sector in 0..SIZE / 512 {
            let found = read(&mut bench, ByteRange::new(sector * 512, 512));
            let lost = matches!(found, Err(Error::Lost { .. }));
            assert_eq!(lost, sector * 512 < second, "{before:?} sector {sector}: {found:?}");
        }
    }
}

#[test]
fn everybody_who_waits_for_a_sync_that_fails_is_told() {
    // The first commit's data sync and, where blocks became data, its map sync.
    for (before, nth) in [(Before::Absent, 0), (Before::Absent, 1), (Before::Data, 0)] {
        let mut bench = Bench::new(before, 512);
        attempt(&mut bench, write(4096, 8192, Durability::Volatile), Content::Stamped).expect("no faults");
        let hit = fail_nth(&bench, CallKind::Sync, nth, Fault::Error(ErrorKind::Other));
        let flights = [
            bench.submit(Op::Flush, Content::Zeros),
            // That one's data sync is planned: who comes now waits for the next commit.
            bench.submit(write(0, 4096, Durability::Fua), Content::Stamped),
            bench.submit(Op::Flush, Content::Zeros),
            bench.submit(Op::Barrier, Content::Zeros),
            bench.submit(discard(4096, 4096), Content::Zeros),
        ];
        let ended = run_all(&mut bench.sim);
        assert!(hit.load(Ordering::Relaxed));
        for flight in flights {
            let (_, result) = ended.iter().find(|(tag, _)| *tag == flight.tag).expect("everybody is told");
            assert!(result.is_err(), "{before:?}, sync {nth}: {:?}", flight.tag);
        }
    }
}

#[test]
fn an_append_that_is_torn_ends_writing_and_reads_as_before() {
    for sectors in 0..2 {
        let mut bench = Bench::new(Before::Absent, 512);
        attempt(&mut bench, write(4096, 4096, Durability::Fua), Content::Stamped).expect("no faults");
        attempt(&mut bench, write(0, 4096, Durability::Volatile), Content::Stamped).expect("no faults");
        let hit = fail_nth(&bench, CallKind::Write, 0, Fault::Torn { sectors });
        assert!(attempt(&mut bench, Op::Flush, Content::Zeros).is_err());
        assert!(hit.load(Ordering::Relaxed) && bench.sim.core().failed().is_some());
        bench.storage.clear_faults();
        let what = format!("{sectors} sectors of a record");
        bench.check_crashed(bench.storage.crash_losing_all(), &what);
        bench.check_crashed(bench.storage.crash(|_, outcomes| outcomes - 1), &what);
    }
}

#[test]
fn a_write_or_read_that_fails_anywhere_fails_its_request_and_no_other() {
    for kind in [CallKind::Write, CallKind::Read] {
        for fault in
            [Fault::Error(ErrorKind::Other), Fault::Error(ErrorKind::StorageFull), Fault::Torn { sectors: 1 }]
        {
            for nth in 0.. {
                let mut bench = Bench::new(Before::Frozen, 512);
                // Only data: what a failed append means has a test of its own.
                let data = data_path(&bench.sim.head().dir);
                let (hit, mut count) = (Arc::new(AtomicU64::new(0)), 0);
                let seen = hit.clone();
                bench.storage.set_faults(move |call: &Call| {
                    let ours = call.kind == kind && (kind == CallKind::Read || call.path == data);
                    count += u64::from(ours);
                    (ours && count == nth + 1).then(|| {
                        seen.fetch_add(1, Ordering::Relaxed);
                        fault
                    })
                });
                let volatile = Durability::Volatile;
                let workload = [
                    (write(4096 + 512, 4096, volatile), Content::Stamped),
                    (discard(8192 + CELL, 4096), Content::Zeros),
                    (write(0, 4096, volatile), Content::Stamped),
                    (write(CELL, CELL, volatile), Content::Stamped),
                ];
                let results: Vec<Result<()>> =
                    workload.into_iter().map(|(op, content)| attempt(&mut bench, op, content)).collect();
                let failed = results.iter().filter(|result| result.is_err()).count();
                let hit = hit.load(Ordering::Relaxed);
                // A torn read is no fault that exists; the hook's answer counts only for writes.
                let expected =
                    if kind == CallKind::Read && matches!(fault, Fault::Torn { .. }) { 0 } else { hit };
                assert_eq!(failed as u64, expected, "{kind:?} {nth}: {results:?}");
                assert!(bench.sim.core().failed().is_none());
                attempt(&mut bench, Op::Flush, Content::Zeros).expect("a flush needs no room");
                bench.storage.clear_faults();
                let bytes = disk::content(bench.sim.view()).expect("readable");
                let now = bench.model.now();
                let all = ByteRange::new(0, bench.stack.size);
                bench.model.check_read(all, &bytes, now).unwrap_or_else(|e| panic!("{kind:?} {nth}: {e}"));
                bench.check_crashed(bench.storage.crash_losing_all(), &format!("{kind:?} {nth}"));
                if hit == 0 {
                    break;
                }
            }
        }
    }
}

/// A volume on a medium with `room` bytes left besides the reserve.
fn nearly_full(room: u64) -> Bench {
    const SIZE: u64 = 256 * 4096;
    const LIMIT: u64 = 8 << 20;
    let storage = disk::format(512);
    disk::create_layer(&*storage, 0, SIZE, 512 * 40).expect("no faults");
    storage.limit(LIMIT);
    let reserve = LIMIT / 64;
    storage.allocate("filler", LIMIT - storage.used_bytes() - reserve - room).expect("it fits");
    let stack = Stack { size: SIZE, image: 0, frozen: Vec::new(), head: 0 };
    let sim = disk::open(&storage, &stack, Synced::Yes).expect("no faults");
    let model = Cells::new((0..SIZE / CELL).map(|_| 0), 1);
    Bench { storage, stack, sim, model }
}

#[test]
fn a_full_medium_fails_writes_and_still_flushes_and_discards() {
    for room in (0..40u64).map(|n| n * 1536) {
        let mut bench = nearly_full(room);
        let mut written = 0;
        let mut refused = 0;
        for n in 0..60 {
            match attempt(&mut bench, write(n * 4096, 4096, Durability::Volatile), Content::Stamped) {
                Ok(()) => written += 1,
                Err(Error::NoSpace { .. }) => refused += 1,
                Err(error) => panic!("room {room}: {error}"),
            }
            if n % 4 == 0 {
                attempt(&mut bench, Op::Flush, Content::Zeros).expect("a full medium flushes");
            }
        }
        assert!(refused > 0, "room {room}: {written} written");
        attempt(&mut bench, Op::Flush, Content::Zeros).expect("a full medium flushes");
        bench.check_crashed(bench.storage.crash_losing_all(), &format!("room {room}"));
        // More records than the log has sectors: a checkpoint lives on the reserve.
        for n in 0..200 {
            let op = discard(n % 256 * 4096, 4096);
            attempt(&mut bench, op, Content::Zeros)
                .unwrap_or_else(|e| panic!("room {room}, discard {n}: {e}"));
            attempt(&mut bench, Op::Flush, Content::Zeros).expect("a full medium flushes");
        }
        bench.check_crashed(bench.storage.crash_losing_all(), &format!("room {room}, discarded"));
    }
}

#[test]
fn a_log_that_cannot_be_replaced_refuses_what_needs_room_and_is_not_tried_without_end() {
    let mut bench = nearly_full(1 << 20);
    let tries = Arc::new(AtomicU64::new(0));
    let count = tries.clone();
    bench.storage.set_faults(move |call| {
        (call.kind == CallKind::Create).then(|| {
            count.fetch_add(1, Ordering::Relaxed);
            Fault::Error(ErrorKind::StorageFull)
        })
    });
    let (mut refused, mut operations) = (0, 0);
    for n in 0..60 {
        let result = attempt(&mut bench, write(n * 8192, 4096, Durability::Volatile), Content::Stamped);
        refused += u64::from(matches!(result, Err(Error::NoSpace { .. })));
        attempt(&mut bench, Op::Flush, Content::Zeros).expect("what was admitted has its room");
        operations += 2;
    }
    assert!(refused > 0 && bench.sim.core().failed().is_none());
    // Once more each time when the reserve was given up.
    assert!(tries.load(Ordering::Relaxed) <= 2 * operations, "{tries:?} tries for {operations} operations");
    bench.storage.clear_faults();
    attempt(&mut bench, write(0, 4096, Durability::Fua), Content::Stamped).expect("there is room again");
    bench.check_crashed(bench.storage.crash_losing_all(), "after all");
}

#[test]
fn a_change_of_which_one_part_landed_before_a_commit_and_another_fails_is_sound() {
    // The first edge is written and synced by a commit; then the read for the last edge fails.
    let mut bench = Bench::new(Before::Absent, 512);
    let range = ByteRange::new(4096 - 512, 1024);
    let (id, bytes) = bench.model.begin(range, Content::Stamped);
    let op = Op::Write { range, durability: Durability::Volatile };
    let tag = bench.sim.submit(op, Some(bytes)).expect("admitted");
    let flush = bench.submit(Op::Flush, Content::Zeros);
    // Both edges are read, the first is written, the second's write fails after a commit.
    let edges = bench.sim.planned().count();
    assert!(edges >= 2);
    for step in [Move::CarryOut(0), Move::Deliver(0)] {
        bench.sim.make(step);
    }
    fail_nth(&bench, CallKind::Write, 1, Fault::Error(ErrorKind::Other));
    let ended = run_all(&mut bench.sim);
    assert!(ended.iter().any(|(ended, result)| *ended == tag && result.is_err()));
    assert!(ended.iter().any(|(ended, result)| *ended == flush.tag && result.is_ok()));
    bench.model.failed(id);
    bench.storage.clear_faults();
    attempt(&mut bench, Op::Flush, Content::Zeros).expect("no faults");
    bench.check_crashed(bench.storage.crash_losing_all(), "half a write");
}

#[test]
fn a_volume_whose_sync_failed_stays_read_only_over_restarts_until_it_is_recovered() {
    for fault in [Fault::Error(ErrorKind::Other), Fault::Dropped] {
        for nth in 0..2 {
            let (storage, disk) = create_volume();
            let volume = disk.volume(VOLUME).expect("it exists");
            let old = vec![7; 4096];
            volume.write_at(&old, 4096, Durability::Fua).expect("no faults");
            volume.write_at(&[9; 4096], 8192, Durability::Volatile).expect("no faults");
            let mut count = 0;
            storage.set_faults(move |call| {
                count += u64::from(call.kind == CallKind::Sync);
                (call.kind == CallKind::Sync && count == nth + 1).then_some(fault)
            });
            assert!(volume.flush().is_err(), "{fault:?} {nth}");
            assert!(matches!(volume.flush(), Err(Error::Failed { .. })), "a flush cannot be repeated");
            assert!(matches!(volume.state(), VolumeState::ReadOnly { .. }));
            storage.clear_faults();
            let mut found = vec![0; 4096];
            volume.read_at(&mut found, 4096).expect("what was flushed is read");
            assert_eq!(found, old);
            let lost = volume.read_at(&mut found, 8192 + 512);
            assert!(matches!(&lost, Err(Error::Lost { .. })), "{lost:?}");
            assert!(
                lost.is_err_and(|error| error.to_string().contains("volume recover")),
                "the way out is named"
            );
            let all = volume.extents(ByteRange::new(0, 12288)).expect("known");
            let end = all.last().expect("a run").range.end();
            assert!(end.0 <= 8192, "what is not known is no hole: {all:?}");
            let there = volume.extents(ByteRange::new(8192, 4096)).expect("known");
            assert_eq!(there[0].kind, ExtentKind::Data);
            drop(volume);
            drop(disk);
            let mut storage = Arc::new(storage.kill());
            for round in 0..2 {
                let disk = Disk::open_storage(storage.clone(), Arc::new(Images)).expect("opens");
                let volume = disk.volume(VOLUME).expect("it exists");
                assert!(matches!(volume.state(), VolumeState::ReadOnly { .. }), "restart {round}");
                assert!(volume.write_at(&old, 0, Durability::Volatile).is_err());
                let mut found = vec![0; 4096];
                volume.read_at(&mut found, 4096).expect("what was flushed is read");
                assert_eq!(found, old);
                drop(volume);
                drop(disk);
                storage = Arc::new(storage.crash_losing_all());
            }
            let disk = Disk::open_storage(storage, Arc::new(Images)).expect("opens");
            disk.recover(VOLUME).expect("recovers");
            let volume = disk.volume(VOLUME).expect("it exists");
            assert_eq!(volume.state(), VolumeState::Ready);
            volume.write_at(&[1; 512], 4096, Durability::Fua).expect("it takes writes again");
            let mut found = vec![0; 4096];
            volume.read_at(&mut found, 4096).expect("readable");
            assert!(found[..512] == [1; 512] && found[512..] == old[512..]);
        }
    }
}
