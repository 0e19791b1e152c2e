//! The reference: what each cell of a volume may hold, from the history of its clients alone.
//!
//! A cell is 64 bytes, so that requests need not lie at sectors. Every write leaves a stamp of its own in each cell. A
//! change is *superseded* by one that was submitted after it had ended: by an acknowledged one for reads, by a durable
//! one for crashes. Whatever is not superseded may be there (invariants 0 and 2 of `docs/design.md`).

use bedplate_engine::units::ByteRange;

/// Bytes of a cell.
pub const CELL: u64 = 64;

/// A moment of a history.
pub type Moment = u64;

/// Names a change of a [`Cells`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChangeId(usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A stamp of its own in each cell.
    Stamped,
    Zeros,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    UnderWay,
    /// It may have happened, in part or whole, until then.
    Failed(Moment),
    Acknowledged(Moment),
}

#[derive(Clone, Debug)]
struct Change {
    submitted: Moment,
    outcome: Outcome,
    durable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    value: u64,
    change: usize,
}

/// What a volume may hold.
#[derive(Clone, Debug)]
pub struct Cells {
    cells: Vec<Vec<Entry>>,
    changes: Vec<Change>,
    clock: Moment,
    /// Makes the stamps of one volume differ from another's.
    salt: u64,
}

/// The value that a cell of an image holds.
pub fn image_value(cell: u64) -> u64 {
    1 << 62 | cell
}

/// The bytes of a cell with this value.
pub fn cell_bytes(value: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn cells_of(range: ByteRange) -> std::ops::Range<usize> {
    let aligned = range.start.0.is_multiple_of(CELL) && range.len.0.is_multiple_of(CELL);
    assert!(aligned, "requests of these tests lie at cells");
    index(range.start.0 / CELL)..index(range.end().0 / CELL)
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a small volume")
}

impl Cells {
    /// A volume that durably holds `values`.
    pub fn new(values: impl Iterator<Item = u64>, salt: u64) -> Cells {
        let first = Change { submitted: 0, outcome: Outcome::Acknowledged(0), durable: true };
        let cells = values.map(|value| vec![Entry { value, change: 0 }]).collect();
        Cells { cells, changes: vec![first], clock: 1, salt }
    }

    /// A new moment.
    pub fn now(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    pub fn size(&self) -> u64 {
        self.cells.len() as u64 * CELL
    }

    /// The volume has grown; what is new reads as zeros.
    pub fn grow(&mut self, size: u64) {
        self.cells.resize(index(size / CELL), vec![Entry { value: 0, change: 0 }]);
    }

    fn stamp(&self, change: usize, cell: usize) -> u64 {
        self.salt << 48 | (change as u64) << 24 | cell as u64
    }

    /// A change is about to be submitted; returns its bytes.
    pub fn begin(&mut self, range: ByteRange, content: Content) -> (ChangeId, Vec<u8>) {
        let submitted = self.now();
        let id = self.changes.len();
        self.changes.push(Change { submitted, outcome: Outcome::UnderWay, durable: false });
        let mut bytes = Vec::with_capacity(range.len.as_usize());
        for cell in cells_of(range) {
            let value = match content {
                Content::Stamped => self.stamp(id, cell),
                Content::Zeros => 0,
            };
            bytes.extend(cell_bytes(value));
            self.cells[cell].push(Entry { value, change: id });
        }
        (ChangeId(id), bytes)
    }

    pub fn acknowledged(&mut self, id: ChangeId) {
        let now = self.now();
        self.changes[id.0].outcome = Outcome::Acknowledged(now);
    }

    /// A change with FUA was acknowledged.
    pub fn acknowledged_durable(&mut self, id: ChangeId) {
        self.acknowledged(id);
        self.changes[id.0].durable = true;
    }

    pub fn failed(&mut self, id: ChangeId) {
        let now = self.now();
        self.changes[id.0].outcome = Outcome::Failed(now);
    }

    /// A change of this range was refused: it never was.
    pub fn withdrawn(&mut self, range: ByteRange, id: ChangeId) {
        for cell in cells_of(range) {
            self.cells[cell].retain(|entry| entry.change != id.0);
        }
    }

    /// A flush that was submitted at `since` was acknowledged.
    pub fn flushed(&mut self, since: Moment) {
        for change in &mut self.changes {
            if matches!(change.outcome, Outcome::Acknowledged(at) if at < since) {
                change.durable = true;
            }
        }
    }

    fn superseded(&self, cell: usize, entry: Entry, by: impl Fn(&Change) -> bool) -> bool {
        let ended = match self.changes[entry.change].outcome {
            Outcome::UnderWay => return false,
            Outcome::Failed(at) | Outcome::Acknowledged(at) => at,
        };
        self.cells[cell].iter().any(|other| {
            let change = &self.changes[other.change];
            change.submitted > ended && by(change)
        })
    }

    /// What a read which started at `since` and ends now may find of an entry's cell.
    fn readable(&self, cell: usize, entry: Entry, since: Moment) -> bool {
        let by = |change: &Change| matches!(change.outcome, Outcome::Acknowledged(at) if at < since);
        !self.superseded(cell, entry, by)
    }

    /// What a crash now may leave of an entry's cell.
    fn survivable(&self, cell: usize, entry: Entry) -> bool {
        !self.superseded(cell, entry, |change| change.durable)
    }

    fn check(
        &self,
        range: ByteRange,
        bytes: &[u8],
        what: &str,
        allowed: impl Fn(usize, Entry) -> bool,
    ) -> Result<Vec<u64>, String> {
        let mut values = Vec::new();
        for (cell, found) in cells_of(range).zip(bytes.chunks(index(CELL))) {
            let (words, _) = found.as_chunks::<8>();
            let value = u64::from_le_bytes(words[0]);
            let entries = &self.cells[cell];
            let is_allowed = |entry: &&Entry| allowed(cell, **entry);
            let known = entries.iter().any(|entry| entry.value == value && allowed(cell, *entry));
            if words.iter().any(|word| *word != words[0]) || !known {
                let allowed: Vec<u64> = entries.iter().filter(is_allowed).map(|entry| entry.value).collect();
                let history: Vec<String> = self.cells[cell]
                    .iter()
                    .map(|entry| format!("  {:#x} by {:?}", entry.value, self.changes[entry.change]))
                    .collect();
                let block = cell as u64 * CELL / 4096;
                return Err(format!(
                    "{what}: cell {cell} (block {block}, sector {}) holds {value:#x}, allowed are {allowed:#x?}\n{}",
                    cell as u64 * CELL % 4096 / 512,
                    history.join("\n")
                ));
            }
            values.push(value);
        }
        Ok(values)
    }

    /// Check what a read that started at `since` has found.
    pub fn check_read(&self, range: ByteRange, bytes: &[u8], since: Moment) -> Result<(), String> {
        self.check(range, bytes, "read", |cell, entry| self.readable(cell, entry, since)).map(drop)
    }

    /// Check what the whole volume holds after a crash, and go on from there: what was found is durable.
    pub fn crashed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let all = ByteRange::new(0, self.size());
        let values = self.check(all, bytes, "crash", |cell, entry| self.survivable(cell, entry))?;
        // Stamps are never used twice, so old changes stay known.
        let outcome = Outcome::Acknowledged(self.now());
        let id = self.changes.len();
        self.changes.push(Change { submitted: self.clock, outcome, durable: true });
        for (cell, value) in self.cells.iter_mut().zip(values) {
            *cell = vec![Entry { value, change: id }];
        }
        self.now();
        Ok(())
    }

    /// Check what the whole volume holds after its process was killed. Readers see that from now on; a crash may still
    /// bring back whatever it could have left before.
    pub fn killed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let all = ByteRange::new(0, self.size());
        let values = self.check(all, bytes, "kill", |cell, entry| self.survivable(cell, entry))?;
        self.abandon();
        let submitted = self.now();
        let outcome = Outcome::Acknowledged(self.now());
        let id = self.changes.len();
        self.changes.push(Change { submitted, outcome, durable: false });
        for (cell, value) in self.cells.iter_mut().zip(values) {
            cell.push(Entry { value, change: id });
        }
        self.now();
        Ok(())
    }

    /// What is under way will never be answered.
    pub fn abandon(&mut self) {
        let now = self.now();
        for change in &mut self.changes {
            if change.outcome == Outcome::UnderWay {
                change.outcome = Outcome::Failed(now);
            }
        }
    }

    /// The medium was found to have lost what was not durable: readers may see whatever a crash could have left.
    pub fn lost_cache(&mut self) {
        let now = self.now();
        for change in &mut self.changes {
            if !change.durable {
                change.outcome = Outcome::Failed(now);
            }
        }
        self.now();
    }

    /// These stand in the place of `other` from now on: moments that it knew have passed.
    pub fn follow(&mut self, other: &Cells) {
        self.clock = self.clock.max(other.clock);
        self.now();
    }

    /// What a snapshot holds that was just taken: what was acknowledged, durably; perhaps what was under way.
    #[must_use]
    pub fn snapshot(&self, salt: u64) -> Cells {
        self.snapshot_between(self.clock + 1, salt)
    }

    /// The same where it was asked for at `since` and taken at some time from then on: what was acknowledged meanwhile
    /// may be in it or not.
    #[must_use]
    pub fn snapshot_between(&self, since: Moment, salt: u64) -> Cells {
        let mut copy = Cells { salt, ..self.clone() };
        copy.abandon();
        let now = copy.now();
        for change in &mut copy.changes {
            match change.outcome {
                Outcome::Acknowledged(at) if at < since => change.durable = true,
                Outcome::Acknowledged(_) => {
                    *change = Change { outcome: Outcome::Failed(now), durable: false, ..change.clone() }
                }
                Outcome::UnderWay | Outcome::Failed(_) => {}
            }
        }
        copy.now();
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells() -> Cells {
        Cells::new((0..4).map(image_value), 1)
    }

    #[test]
    fn an_acknowledged_write_must_be_read_and_may_be_lost_until_it_is_flushed() {
        let mut cells = cells();
        let range = ByteRange::new(64, 64);
        let (id, bytes) = cells.begin(range, Content::Stamped);
        let old = cell_bytes(image_value(1));
        let during = cells.now();
        assert!(
            cells.check_read(range, &old, during).is_ok() && cells.check_read(range, &bytes, during).is_ok()
        );
        cells.acknowledged(id);
        let after = cells.now();
        assert!(cells.check_read(range, &old, during).is_ok(), "that read began before the answer");
        assert!(cells.check_read(range, &old, after).is_err());
        let all = |value: [u8; 64]| {
            let mut all = Vec::new();
            (0..4).for_each(|n| all.extend(cell_bytes(image_value(n))));
            all[64..128].copy_from_slice(&value);
            all
        };
        assert!(cells.clone().crashed(&all(old)).is_ok());
        let since = cells.now();
        cells.flushed(since);
        assert!(cells.clone().crashed(&all(old)).is_err());
        assert!(cells.crashed(&all(cell_bytes(cells.stamp(1, 1)))).is_ok());
    }

    #[test]
    fn a_change_that_was_refused_is_never_read() {
        let mut cells = cells();
        let range = ByteRange::new(64, 64);
        let (id, bytes) = cells.begin(range, Content::Stamped);
        cells.withdrawn(range, id);
        let now = cells.now();
        assert!(cells.check_read(range, &bytes, now).is_err());
        assert!(cells.check_read(range, &cell_bytes(image_value(1)), now).is_ok());
    }

    #[test]
    fn a_lost_cache_may_show_what_was_durable_and_nothing_older() {
        let mut cells = cells();
        let range = ByteRange::new(64, 64);
        let mut written = Vec::new();
        for durable in [true, false] {
            let (id, bytes) = cells.begin(range, Content::Stamped);
            if durable {
                cells.acknowledged_durable(id)
            } else {
                cells.acknowledged(id)
            }
            written.push(bytes);
        }
        let reads = |cells: &mut Cells, bytes: &[u8]| {
            let now = cells.now();
            cells.check_read(range, bytes, now).is_ok()
        };
        assert!(!reads(&mut cells, &written[0]) && reads(&mut cells, &written[1]));
        cells.lost_cache();
        assert!(reads(&mut cells, &written[0]) && reads(&mut cells, &written[1]));
        assert!(!reads(&mut cells, &cell_bytes(image_value(1))));
    }

    #[test]
    fn a_flush_that_began_before_cells_took_the_place_of_others_says_nothing_of_what_came_after() {
        let mut before = cells();
        let mut after = before.snapshot(2);
        let since = (0..9).map(|_| before.now()).last().expect("a moment");
        after.follow(&before);
        let range = ByteRange::new(0, 64);
        let (id, _) = after.begin(range, Content::Zeros);
        after.acknowledged(id);
        after.flushed(since);
        let old: Vec<u8> = (0..4).flat_map(|n| cell_bytes(image_value(n))).collect();
        assert!(after.crashed(&old).is_ok(), "it was not flushed");
    }
}
