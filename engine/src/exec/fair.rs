//! Places for requests and jobs: a limit for all, a limit for each device or file, and turns for those that wait.

use std::{collections::VecDeque, sync::Arc};

use rustc_hash::FxHashMap;

/// Tells devices, files and volumes apart while they have requests: where they are in memory.
pub type Key = usize;

pub fn key_of<T: ?Sized>(what: &Arc<T>) -> Key {
    Arc::as_ptr(what).cast::<()>().addr()
}

/// How many requests may be under way.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub all: usize,
    pub each: usize,
}

/// Who has how many places, and what waits for one.
#[derive(Debug)]
pub struct Places<T> {
    limits: Limits,
    lines: FxHashMap<Key, Line<T>>,
    /// Lines that need nothing but a place.
    turns: VecDeque<Key>,
    taken: usize,
}

/// What one device has. Nobody keeps one that has nothing.
#[derive(Debug)]
struct Line<T> {
    taken: usize,
    waiting: VecDeque<T>,
}

impl<T> Places<T> {
    pub fn new(limits: Limits) -> Places<T> {
        Places { limits, lines: FxHashMap::default(), turns: VecDeque::new(), taken: 0 }
    }

    /// Whether nothing is under way or waits.
    pub fn is_quiet(&self) -> bool {
        self.lines.is_empty()
    }

    /// Take a place; without one, `item` waits for [`Places::next`].
    pub fn take(&mut self, key: Key, item: T) -> Option<T> {
        let line = self.lines.entry(key).or_insert_with(|| Line { taken: 0, waiting: VecDeque::new() });
        if line.taken >= self.limits.each {
            line.waiting.push_back(item);
        } else if self.taken >= self.limits.all || !self.turns.is_empty() {
            if line.waiting.is_empty() {
                self.turns.push_back(key);
            }
            line.waiting.push_back(item);
        } else {
            line.taken += 1;
            self.taken += 1;
            return Some(item);
        }
        None
    }

    /// What has a place now.
    pub fn next(&mut self) -> Option<T> {
        if self.taken >= self.limits.all {
            return None;
        }
        let key = self.turns.pop_front()?;
        let line = self.lines.get_mut(&key)?;
        let item = line.waiting.pop_front()?;
        line.taken += 1;
        self.taken += 1;
        if !line.waiting.is_empty() && line.taken < self.limits.each {
            self.turns.push_back(key);
        }
        Some(item)
    }

    /// Give a place back.
    pub fn give_back(&mut self, key: Key) {
        let Some(line) = self.lines.get_mut(&key) else { return };
        // It had all that it may have, so it was in no turn.
        if line.taken == self.limits.each && !line.waiting.is_empty() {
            self.turns.push_back(key);
        }
        line.taken -= 1;
        self.taken -= 1;
        if line.taken == 0 && line.waiting.is_empty() {
            self.lines.remove(&key);
        }
    }

    /// Forget what waits.
    pub fn turn_away(&mut self) {
        self.turns.clear();
        self.lines.retain(|_, line| {
            line.waiting.clear();
            line.taken > 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_take_turns_and_each_keeps_its_order() {
        let mut places = Places::new(Limits { all: 1, each: 1 });
        assert_eq!(places.take(6, (6, 0)), Some((6, 0)));
        for item in [(7, 0), (7, 1), (7, 2), (8, 0), (9, 0), (9, 1)] {
            assert_eq!(places.take(item.0, item), None);
        }
        let mut running = 6;
        let taken: Vec<(usize, u32)> = std::iter::from_fn(|| {
            assert_eq!(places.next(), None, "there is no place");
            places.give_back(running);
            let next = places.next()?;
            running = next.0;
            Some(next)
        })
        .collect();
        assert_eq!(taken, [(7, 0), (8, 0), (9, 0), (7, 1), (9, 1), (7, 2)]);
        assert!(places.is_quiet());
    }

    #[test]
    fn a_device_that_never_ends_anything_leaves_places_for_the_others() {
        let mut places = Places::new(Limits { all: 10, each: 4 });
        let begun = (0..100).filter_map(|n| places.take(1, n)).count();
        assert_eq!((begun, places.next()), (4, None));
        for n in 0..50 {
            assert_eq!(places.take(2, n), Some(n));
            places.give_back(2);
        }
        places.turn_away();
        assert!(!places.is_quiet() && places.next().is_none());
        for _ in 0..4 {
            places.give_back(1);
        }
        assert!(places.is_quiet());
    }
}
