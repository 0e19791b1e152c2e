//! What the load writes, as plain logic: both the writer in the guest and the judge on the host derive it from the seed.
//!
//! A volume has one writer, and a writer's change follows from the seed, the writer and the change's number alone. Each
//! sector that is written names its writer, its place and its change, so that a torn, moved or older one is told apart.
//! After a cut a sector holds what its last flushed change left, or what a later change *to that sector* left
//! (invariant 2); a sector that nobody changed holds the image's bytes.

use std::collections::BTreeMap;

use bedplate_testkit::{content::pattern, journal::Dice};

pub const SECTOR: usize = 512;
/// Sectors of a volume, and of the image below it.
pub const VOLUME_SECTORS: u64 = 8 << 11;
pub const WRITERS: u64 = 3;
/// A change is at most this long.
const CHANGE_SECTORS_MAX: u64 = 160;

/// Dice that depend on all of these numbers.
pub fn dice(parts: &[u64]) -> Dice {
    parts.iter().fold(Dice::new(0), |mut dice, part| Dice::new(dice.roll(u64::MAX) ^ part.rotate_left(17)))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    /// A punched hole: reads as zeros, whatever lies below.
    Punch,
}

/// A change of one writer to its volume.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub number: u64,
    pub first: u64,
    pub count: u64,
    pub kind: Kind,
    /// A flush follows it, or it is durable by itself; then it is noted before the next begins.
    pub durable: bool,
}

/// Whether every change of this writer is one with O_DSYNC; the others call fsync now and then.
pub fn is_dsync(writer: u64) -> bool {
    writer % WRITERS == 1
}

/// Change `number`, from 1.
pub fn change(seed: u64, writer: u64, number: u64) -> Change {
    let mut dice = dice(&[seed, writer, number]);
    let count = 1 + if dice.roll(5) == 0 { dice.roll(CHANGE_SECTORS_MAX) } else { dice.roll(16) };
    let first = dice.roll(VOLUME_SECTORS - count);
    let kind = if !is_dsync(writer) && dice.roll(8) == 0 { Kind::Punch } else { Kind::Write };
    let durable = is_dsync(writer) || dice.roll(4) == 0;
    Change { number, first, count, kind, durable }
}

/// The last change that may have begun once `noted` is the last that is known to be durable.
pub fn begun_at_most(seed: u64, writer: u64, noted: u64) -> u64 {
    (noted + 1..).find(|number| change(seed, writer, *number).durable).expect("one in four is")
}

pub fn bytes_of(writer: u64, change: &Change) -> Vec<u8> {
    (change.first..change.first + change.count)
        .flat_map(|sector| sector_bytes(writer, sector, change.number))
        .collect()
}

/// The image: a third of it data, in runs of 64 KiB.
pub fn image(seed: u64) -> Vec<u8> {
    let sectors = 0..VOLUME_SECTORS;
    sectors
        .flat_map(|sector| match dice(&[seed, sector / 128]).roll(3) {
            0 => sector_bytes(u64::MAX, sector, 0),
            _ => vec![0; SECTOR],
        })
        .collect()
}

fn sector_bytes(writer: u64, sector: u64, number: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SECTOR);
    for word in [writer, sector, number] {
        bytes.extend(word.to_le_bytes());
    }
    let rest = SECTOR as u64 - bytes.len() as u64;
    bytes.extend(pattern(rest, dice(&[writer, sector, number]).roll(u64::MAX)));
    bytes
}

/// What a volume may hold: everything up to `durable` is there, nothing past `begun` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub durable: u64,
    pub begun: u64,
}

/// Sectors of `content` that hold what they must not; each says why. No more than a few are described.
pub fn judge(seed: u64, writer: u64, bounds: Bounds, image: &[u8], content: &[u8]) -> Vec<String> {
    let mut histories: BTreeMap<u64, Vec<Change>> = BTreeMap::new();
    for number in 1..=bounds.begun {
        let change = change(seed, writer, number);
        for sector in change.first..change.first + change.count {
            let history = histories.entry(sector).or_default();
            if number <= bounds.durable {
                history.clear();
            }
            history.push(change);
        }
    }
    let mut wrong = Vec::new();
    let sectors = content.chunks(SECTOR).zip(image.chunks(SECTOR));
    for (sector, (found, below)) in (0..).zip(sectors) {
        let history = histories.get(&sector).map_or(&[][..], Vec::as_slice);
        let before = history.first().is_none_or(|change| change.number > bounds.durable);
        let allowed = before && found == below
            || history.iter().any(|change| match change.kind {
                Kind::Write => found == sector_bytes(writer, sector, change.number),
                Kind::Punch => found.iter().all(|byte| *byte == 0),
            });
        if !allowed {
            let may: Vec<String> =
                history.iter().map(|change| format!("{:?} {}", change.kind, change.number)).collect();
            wrong.push(format!(
                "sector {sector} holds {}, where durable is {} and allowed are {may:?}{}",
                describe(found),
                bounds.durable,
                if before { " and the image" } else { "" }
            ));
        }
    }
    wrong
}

fn describe(found: &[u8]) -> String {
    if found.iter().all(|byte| *byte == 0) {
        return "zeros".to_owned();
    }
    let words: Vec<u64> =
        found.chunks(8).take(3).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default())).collect();
    match words[..] {
        [u64::MAX, sector, 0] => format!("the image's sector {sector}"),
        [writer, sector, number] if writer < WRITERS => {
            format!("sector {sector} of writer {writer}'s change {number}")
        }
        _ => format!("something else: {words:x?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume after these changes.
    fn after(seed: u64, writer: u64, numbers: impl IntoIterator<Item = u64>, image: &[u8]) -> Vec<u8> {
        let mut content = image.to_vec();
        for number in numbers {
            let change = change(seed, writer, number);
            let range = usize::try_from(change.first).unwrap_or_default() * SECTOR;
            let len = usize::try_from(change.count).unwrap_or_default() * SECTOR;
            match change.kind {
                Kind::Write => content[range..range + len].copy_from_slice(&bytes_of(writer, &change)),
                Kind::Punch => content[range..range + len].fill(0),
            }
        }
        content
    }

    #[test]
    fn a_volume_with_all_durable_changes_and_any_later_one_is_right() {
        let image = image(3);
        let bounds = Bounds { durable: 60, begun: 64 };
        for last in 60..=64 {
            assert_eq!(judge(3, 0, bounds, &image, &after(3, 0, 1..=last, &image)), Vec::<String>::new());
        }
        let with_a_gap = after(3, 0, (1..=60).chain([63]), &image);
        assert_eq!(judge(3, 0, bounds, &image, &with_a_gap), Vec::<String>::new());
    }

    #[test]
    fn a_durable_change_that_is_missing_is_found_and_so_is_one_that_never_began() {
        let image = image(3);
        let bounds = Bounds { durable: 60, begun: 64 };
        assert!(!judge(3, 0, bounds, &image, &after(3, 0, 1..=59, &image)).is_empty());
        assert!(!judge(3, 0, bounds, &image, &after(3, 0, 1..=65, &image)).is_empty());
    }

    #[test]
    fn bytes_in_another_place_are_found() {
        let image = image(3);
        let mut content = after(3, 1, 1..=9, &image);
        let change = change(3, 1, 9);
        let from = usize::try_from(change.first).unwrap_or_default() * SECTOR;
        let moved = content[from..from + SECTOR].to_vec();
        content[from + 64 * SECTOR..][..SECTOR].copy_from_slice(&moved);
        assert_eq!(judge(3, 1, Bounds { durable: 9, begun: 10 }, &image, &content).len(), 1);
    }
}
