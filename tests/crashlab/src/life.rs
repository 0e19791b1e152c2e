//! Operations on the disk's volumes: the shipped ones, in the middle of everything else.
//!
//! Each is a blocking call on the thread's stack; the world is not borrowed meanwhile, so that others have their turn
//! ([`crate::turns`]). Long ones ask between their parts whether to go on: there, a further life operation may run.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use bedplate_engine::{
    device::{BlockDevice, for_each_extent},
    error::{Error, Result},
    exec::head::data_path,
    units::{ByteLen, ByteRange},
    volume::{device::VolumeState, disk::Disk, layer},
};

use crate::{
    arrivals,
    cells::{Cells, Moment},
    operation::Operation,
    script::{Life, Step},
    world::{Known, Perhaps, World, content},
};

const VOLUMES_MAX: usize = 6;
const SNAPSHOTS_MAX: usize = 5;
/// Bytes of the largest volume.
const SIZE_MAX: u64 = 24 * 4096;
/// Life operations within one another.
const DEPTH_MAX: usize = 3;
/// How much an export reads at a time.
const EXPORT_PIECE: u64 = 3 * 4096;

/// A life operation whose names are known.
struct Call {
    life: Life,
    volume: String,
    snapshot: Option<String>,
    /// The name of what it makes.
    new: String,
    size: u64,
    /// When it began, by the volume's clock.
    since: Moment,
    /// Faults so far.
    errors: u64,
    /// Whether every volume took writes.
    all_ready: bool,
}

/// Run one.
pub fn run(world: &Rc<RefCell<World>>, life: Life, volume: u8, pick: u8) {
    let begun = begin(&mut world.borrow_mut(), life, volume, pick);
    let Some((call, disk)) = begun else { return };
    let result = carry_out(world, &call, &disk);
    drop(disk);
    let mut world = world.borrow_mut();
    world.lives.pop();
    world.note(|| format!("{life:?} of {} ends {:?}", call.volume, result.as_ref().map(drop)));
    end(&mut world, call, result);
}

fn begin(world: &mut World, life: Life, volume: u8, pick: u8) -> Option<(Call, Arc<Disk>)> {
    let disk = world.disk.clone()?;
    let names = world.volume_names();
    let volume = names.get(usize::from(volume) % names.len().max(1))?.clone();
    // What may be gone, or may take another shape at the next start, is left alone until then; recovering settles it.
    let unsettled = world.perhaps.iter().any(|perhaps| perhaps.volume() == volume);
    if world.medium.has_stopped() || (unsettled && life != Life::Recover) {
        return None;
    }
    let snapshots: Vec<String> = world.known[&volume].snapshots.keys().cloned().collect();
    let picked = snapshots.get(usize::from(pick) % snapshots.len().max(1)).cloned();
    let inside = |lives: &[Life]| lives.contains(&life);
    let merging = |(life, _): &(Operation, String)| matches!(life, Operation::Merge | Operation::Flatten);
    let fits = match life {
        Life::Snapshot => snapshots.len() < SNAPSHOTS_MAX,
        Life::Clone | Life::FullClone => names.len() < VOLUMES_MAX,
        Life::CloneSnapshot => names.len() < VOLUMES_MAX && picked.is_some(),
        Life::Revert | Life::DeleteSnapshot => picked.is_some(),
        // Those that are gone perhaps are, at the next start.
        Life::DeleteVolume => {
            names.len() > 2 + world.perhaps.iter().filter(|perhaps| perhaps.is_deletion()).count()
        }
        Life::Grow => world.known[&volume].cells.size() < SIZE_MAX,
        Life::Recover => disk.volume(&volume).map_or(true, |volume| volume.state() != VolumeState::Ready),
        Life::Merge | Life::Flatten | Life::Export => true,
    };
    if !fits || (inside(&[Life::Merge, Life::Flatten]) && world.lives.iter().any(merging)) {
        return None;
    }
    let operation = Operation::from(life);
    world.stats.operation(operation);
    world.meets(operation, None);
    world.lives.push((operation, volume.clone()));
    let number = world.fresh();
    let snapshot = match life {
        Life::Export if pick.is_multiple_of(2) => None,
        Life::CloneSnapshot | Life::Revert | Life::DeleteSnapshot | Life::Export => picked,
        _ => None,
    };
    let size = world.known[&volume].cells.size() + 512 * (1 + u64::from(pick) % 20);
    let since = world.cells(&volume).now();
    let errors = world.medium.errors();
    let all_ready = world.all_ready();
    let call = Call { life, new: format!("n{number:04}"), snapshot, size, since, errors, all_ready, volume };
    world.note(|| format!("{life:?} of {} ({:?}, {})", call.volume, call.snapshot, call.new));
    Some((call, disk))
}

/// What an operation found out about what it read.
type Read = Option<Vec<u8>>;

fn carry_out(world: &Rc<RefCell<World>>, call: &Call, disk: &Arc<Disk>) -> Result<Read> {
    let (volume, new) = (call.volume.as_str(), call.new.as_str());
    let snapshot = call.snapshot.as_deref();
    let go_on = || {
        read_begins(&mut world.borrow_mut(), call);
        others_live(world);
        !world.borrow().medium.has_stopped()
    };
    let done = match call.life {
        Life::Snapshot => disk.create_snapshot(volume, new).map(drop),
        Life::Clone | Life::CloneSnapshot => disk.clone_volume(volume, snapshot, new).map(drop),
        Life::FullClone => disk.full_clone(volume, snapshot, new, |_, _| go_on()).map(drop),
        Life::Revert => disk.revert(volume, snapshot.unwrap_or_default(), None).map(drop),
        Life::DeleteSnapshot => disk.delete_snapshot(volume, snapshot.unwrap_or_default()).map(drop),
        Life::Merge => disk.reclaim(go_on),
        Life::Flatten => disk.flatten(volume, |_, _| go_on()).map(drop),
        Life::Grow => disk.resize(volume, ByteLen(call.size)).map(drop),
        Life::DeleteVolume => disk.delete_volume(volume),
        Life::Recover => disk.recover(volume).map(drop),
        Life::Export => return export(disk, volume, snapshot, go_on).map(Some),
    };
    done.map(|()| None)
}

/// Other operations on the disk, where the one under way lets them in.
pub fn others_live(world: &Rc<RefCell<World>>) {
    loop {
        let mut now = world.borrow_mut();
        if now.medium.has_stopped() || now.lives.len() >= DEPTH_MAX {
            return;
        }
        if let Some(Step::Life { life, volume, pick }) = now.steps.front().cloned() {
            now.steps.pop_front();
            drop(now);
            run(world, life, volume, pick);
            return;
        }
        if let Some(Step::Image(step)) = now.steps.front().cloned() {
            now.steps.pop_front();
            drop(now);
            arrivals::run(world, step);
            return;
        }
        if now.seed.one_in(3) || !now.next_small_step() {
            return;
        }
    }
}

/// Read a volume as exports do: by its extents, in pieces.
fn export(disk: &Disk, volume: &str, snapshot: Option<&str>, go_on: impl Fn() -> bool) -> Result<Vec<u8>> {
    let view = disk.view(volume, snapshot)?;
    let mut bytes = vec![0; view.geometry().size.as_usize()];
    for_each_extent(&view, |range, kind| {
        if kind == bedplate_engine::device::ExtentKind::Zero {
            return Ok(());
        }
        for start in (range.start.0..range.end().0).step_by(crate::world::index(EXPORT_PIECE)) {
            let piece = ByteRange::new(start, EXPORT_PIECE.min(range.end().0 - start));
            let at = crate::world::index(start);
            go_on();
            view.read_at(&mut bytes[at..at + piece.len.as_usize()], start)?;
        }
        Ok::<(), Error>(())
    })?;
    Ok(bytes)
}

/// What the reference says from here on.
fn end(world: &mut World, call: Call, result: Result<Read>) {
    if !world.known.contains_key(&call.volume) {
        // An operation that came in between has deleted it; a copy of it may be there all the same.
        if let (Life::FullClone, Some(cells)) = (call.life, world.read.remove(&call.new)) {
            match result {
                Ok(_) => drop(world.known.insert(call.new, Known { cells, snapshots: Default::default() })),
                Err(_) => world.perhaps.push(Perhaps::Volume { name: call.new, cells }),
            }
        }
        return;
    }
    match result {
        Ok(read) => happened(world, call, read),
        Err(error) => failed(world, call, &error),
    }
}

/// A copy or an export asks for the first time whether to go on: what it reads has been decided.
fn read_begins(world: &mut World, call: &Call) {
    let reads = matches!(call.life, Life::FullClone | Life::Export);
    if reads
        && !world.read.contains_key(&call.new)
        && let Some(cells) = taken(world, call)
    {
        world.read.insert(call.new.clone(), cells);
    }
}

/// What the volume, or its snapshot, was at some time since the call began.
fn taken(world: &mut World, call: &Call) -> Option<Cells> {
    if let Some(known) = world.read.remove(&call.new) {
        return Some(known);
    }
    let salt = world.fresh();
    let known = world.known.get(&call.volume)?;
    Some(match &call.snapshot {
        Some(name) => known.snapshots.get(name)?.snapshot(salt),
        None => known.cells.snapshot_between(call.since, salt),
    })
}

fn reverted(world: &mut World, call: &Call) -> Option<Cells> {
    let salt = world.fresh();
    let known = world.known.get(&call.volume)?;
    let mut cells = known.snapshots.get(call.snapshot.as_ref()?)?.snapshot(salt);
    cells.grow(known.cells.size().max(cells.size()));
    cells.follow(&known.cells);
    Some(cells)
}

fn happened(world: &mut World, call: Call, read: Read) {
    let taken = taken(world, &call);
    // What only reads is read as it is.
    let writes = world.disk.as_ref().and_then(|disk| disk.volume(&call.volume).ok());
    let writes = writes.is_some_and(|volume| volume.state() == VolumeState::Ready);
    match call.life {
        Life::Snapshot | Life::Clone | Life::FullClone if call.snapshot.is_none() && writes => {
            world.cells(&call.volume).flushed(call.since);
        }
        _ => {}
    }
    match (call.life, taken) {
        (Life::Snapshot, Some(cells)) => {
            world.known.entry(call.volume).and_modify(|known| drop(known.snapshots.insert(call.new, cells)));
        }
        (Life::Clone | Life::CloneSnapshot | Life::FullClone, Some(cells)) => {
            let snapshots = Default::default();
            world.known.insert(call.new, Known { cells, snapshots });
        }
        (Life::Export, Some(mut cells)) => {
            let read = read.unwrap_or_default();
            if read.len() as u64 != cells.size() {
                return world.found(format!("export of {}: {} bytes", call.volume, read.len()));
            }
            let device = world.disk.as_ref().and_then(|disk| disk.volume(&call.volume).ok());
            let dropped = device.is_none_or(|device| world.nobody_knows(&device));
            if let Err(error) = cells.crashed(&read)
                && (call.snapshot.is_some() || !dropped)
            {
                world.found(format!("export of {} {:?}: {error}", call.volume, call.snapshot));
            }
        }
        (Life::Revert, _) => {
            if let Some(cells) = reverted(world, &call) {
                *world.cells(&call.volume) = cells;
            }
        }
        (Life::DeleteSnapshot, _) => {
            let name = call.snapshot.unwrap_or_default();
            world.known.entry(call.volume).and_modify(|known| drop(known.snapshots.remove(&name)));
        }
        (Life::Grow, _) => world.cells(&call.volume).grow(call.size),
        (Life::DeleteVolume, _) => drop(world.known.remove(&call.volume)),
        (Life::Recover, _) => recovered(world, &call.volume),
        _ => {}
    }
}

/// A volume that was recovered holds what a crash may have left, and its record is the one that was served.
fn recovered(world: &mut World, volume: &str) {
    world.perhaps.retain(|perhaps| perhaps.volume() != volume || matches!(perhaps, Perhaps::Volume { .. }));
    let Some(disk) = world.disk.clone() else { return };
    let errors = world.medium.errors();
    let device = disk.volume(volume);
    world.unopened.remove(volume);
    let head = device.as_ref().map(|device| device.record().head).unwrap_or_default();
    if device.as_ref().is_ok_and(|device| device.state() == VolumeState::Ready) {
        match device.and_then(|device| content(&*device)) {
            Ok(bytes) => {
                if let Err(error) = world.cells(volume).crashed(&bytes) {
                    world.found(format!("volume {volume}, recovered: {error}"));
                }
                world.medium.is_known_again(&data_path(&layer::dir(head)));
            }
            Err(_) if world.medium.errors() > errors || world.medium.has_stopped() => {
                world.cells(volume).lost_cache();
            }
            Err(error) => world.found(format!("volume {volume}, recovered, does not read: {error}")),
        }
    } else if !world.medium.has_stopped() {
        world.found(format!("volume {volume} is not ready although it was recovered"));
    }
}

fn failed(world: &mut World, call: Call, error: &Error) {
    let stopped = world.medium.has_stopped();
    let full = world.setup.medium.is_some();
    let device = world.disk.as_ref().map(|disk| disk.volume(&call.volume));
    // One that did not may have been recovered meanwhile.
    let not_ready = !call.all_ready || !world.all_ready();
    let fine = match error {
        // Somebody holds it, or a snapshot came in between, or it was asked to stop.
        Error::InUse { .. } => {
            matches!(call.life, Life::Revert | Life::DeleteVolume | Life::Recover)
        }
        Error::Invalid(_) => matches!(call.life, Life::Flatten | Life::FullClone),
        Error::Failed { .. } => not_ready,
        Error::NotFound { .. } => call.life == Life::Flatten || !world.perhaps.is_empty(),
        Error::NoSpace { .. } if full => call.life != Life::DeleteSnapshot && call.life != Life::DeleteVolume,
        _ => false,
    };
    // What failed before has consequences where it left a volume that takes no writes, or did until it was recovered in
    // between, or a medium believed to be full.
    let lasting = not_ready || matches!(error, Error::NoSpace { .. } | Error::Failed { .. });
    let faults = world.medium.errors() > if lasting { 0 } else { call.errors };
    if !fine && !stopped && !faults {
        return world.found(format!("{:?} of {} failed without a fault: {error}", call.life, call.volume));
    }
    if call.life == Life::Recover && world.medium.errors() > call.errors {
        if device.is_some_and(|device| device.is_err()) {
            world.unopened.insert(call.volume.clone());
        }
        // Its sync may have been the one that lost what the kill before had left in the page cache.
        world.cells(&call.volume).lost_cache();
    }
    let name = call.snapshot.clone().unwrap_or_default();
    let volume = call.volume.clone();
    let perhaps = match call.life {
        Life::Snapshot => {
            taken(world, &call).map(|cells| Perhaps::Snapshot { volume, name: call.new.clone(), cells })
        }
        Life::Clone | Life::CloneSnapshot | Life::FullClone => {
            taken(world, &call).map(|cells| Perhaps::Volume { name: call.new.clone(), cells })
        }
        Life::Revert => reverted(world, &call).map(|cells| Perhaps::Content { volume, cells }),
        Life::DeleteSnapshot => Some(Perhaps::NoSnapshot { volume, name }),
        Life::Grow => Some(Perhaps::Size { volume, size: call.size }),
        Life::DeleteVolume => Some(Perhaps::NoVolume { name: volume }),
        Life::Merge | Life::Flatten | Life::Export | Life::Recover => None,
    };
    let untouched = matches!(error, Error::InUse { .. } | Error::Failed { .. }) && !stopped;
    world.perhaps.extend(perhaps.filter(|_| !untouched));
}
