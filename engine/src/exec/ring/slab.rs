//! A table whose entries keep their number, and whose memory is used again.

/// Entries by number. It grows to the most that there ever were at once.
#[derive(Debug)]
pub(super) struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn with_capacity(count: usize) -> Slab<T> {
        Slab { entries: Vec::with_capacity(count), free: Vec::with_capacity(count) }
    }

    /// The number of the new entry.
    pub fn insert(&mut self, entry: T) -> u32 {
        if let Some(at) = self.free.pop()
            && let Some(place) = self.entries.get_mut(at as usize)
        {
            *place = Some(entry);
            return at;
        }
        let at = u32::try_from(self.entries.len()).expect("tables here have far fewer entries");
        self.entries.push(Some(entry));
        at
    }

    pub fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.entries.get_mut(at as usize)?.as_mut()
    }

    pub fn remove(&mut self, at: u32) -> Option<T> {
        let entry = self.entries.get_mut(at as usize)?.take()?;
        self.free.push(at);
        Some(entry)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().flatten()
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }
}
