//! The directory tree of a simulated medium.
//!
//! Names are a flat table from (directory, name) to a node, once as it is and once as it is on the medium for certain.
//! What lies between is a list of operations in their order; a crash keeps any subset of them, a rename whole or not at
//! all. A sync of a directory makes its operations durable; one between two directories needs both.

use std::{
    collections::{BTreeMap, HashSet},
    io::ErrorKind,
};

use rustc_hash::FxHashSet;

use super::{Effect, EntryKind, file::FileNode};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodeId(u64);

const ROOT: NodeId = NodeId(0);

#[derive(Clone, Debug)]
pub(super) enum Node {
    File(FileNode),
    Directory,
}

type Name = (NodeId, String);
type Table = BTreeMap<Name, NodeId>;

#[derive(Clone, Debug)]
enum Change {
    Link { name: Name, node: NodeId },
    Unlink { name: Name },
    Rename { from: Name, to: Name, node: NodeId },
}

/// A change and the directories whose sync it still needs.
#[derive(Clone, Debug)]
struct Unsynced {
    number: u64,
    change: Change,
    awaits: Vec<NodeId>,
}

#[derive(Clone, Debug)]
pub(super) struct Names {
    nodes: BTreeMap<NodeId, Node>,
    shown: Table,
    kept: Table,
    unsynced: Vec<Unsynced>,
    changes: u64,
}

impl Change {
    fn apply(&self, table: &mut Table) {
        match self {
            Change::Link { name, node } => {
                table.insert(name.clone(), *node);
            }
            Change::Unlink { name } => {
                table.remove(name);
            }
            Change::Rename { from, to, node } => {
                if table.get(from) == Some(node) {
                    table.remove(from);
                }
                table.insert(to.clone(), *node);
            }
        }
    }

    fn directories(&self) -> Vec<NodeId> {
        match self {
            Change::Link { name, .. } | Change::Unlink { name } => vec![name.0],
            Change::Rename { from, to, .. } => vec![from.0, to.0],
        }
    }
}

impl Names {
    pub(super) fn new() -> Names {
        Names {
            nodes: BTreeMap::from([(ROOT, Node::Directory)]),
            shown: Table::new(),
            kept: Table::new(),
            unsynced: Vec::new(),
            changes: 0,
        }
    }

    /// Bytes of the files that have a name or are open.
    pub(super) fn used_bytes(&self) -> u64 {
        let named: FxHashSet<NodeId> = self.shown.values().copied().collect();
        let files = self.nodes.iter().filter_map(|(id, node)| match node {
            Node::File(file) if file.handles > 0 || named.contains(id) => Some(file.used_bytes()),
            Node::File(_) | Node::Directory => None,
        });
        files.sum()
    }

    pub(super) fn unsynced_holes(&self) -> HashSet<(u64, u64)> {
        let files = self.nodes.iter().filter_map(|(id, node)| match node {
            Node::File(file) => Some((id.0, file)),
            Node::Directory => None,
        });
        files.flat_map(|(id, file)| file.unsynced_holes().map(move |sector| (id, sector))).collect()
    }

    pub(super) fn find(&self, path: &str) -> Result<NodeId, ErrorKind> {
        path.split('/').filter(|part| !part.is_empty()).try_fold(ROOT, |directory, part| {
            self.shown.get(&(directory, part.to_owned())).copied().ok_or(ErrorKind::NotFound)
        })
    }

    fn name(&self, path: &str) -> Result<Name, ErrorKind> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if name.is_empty() || name == "." || name == ".." {
            return Err(ErrorKind::InvalidInput);
        }
        let directory = self.find(parent)?;
        match self.nodes.get(&directory) {
            Some(Node::Directory) => Ok((directory, name.to_owned())),
            Some(Node::File(_)) => Err(ErrorKind::NotADirectory),
            None => Err(ErrorKind::NotFound),
        }
    }

    pub(super) fn file_mut(&mut self, node: NodeId) -> Result<&mut FileNode, ErrorKind> {
        match self.nodes.get_mut(&node) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Directory) => Err(ErrorKind::IsADirectory),
            None => Err(ErrorKind::NotFound),
        }
    }

    pub(super) fn create(&mut self, path: &str, made: Node) -> Result<NodeId, ErrorKind> {
        let name = self.name(path)?;
        if self.shown.contains_key(&name) {
            return Err(ErrorKind::AlreadyExists);
        }
        let node = NodeId(self.nodes.last_key_value().map_or(0, |(last, _)| last.0) + 1);
        self.nodes.insert(node, made);
        self.change(Change::Link { name, node });
        Ok(node)
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.shown);
        let awaits = change.directories();
        self.unsynced.push(Unsynced { number: self.changes, change, awaits });
        self.changes += 1;
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<(), ErrorKind> {
        let node = self.find(from)?;
        let (from, to) = (self.name(from)?, self.name(to)?);
        let replaced = self.shown.get(&to).copied();
        if let Some(replaced) = replaced
            && matches!(self.nodes.get(&replaced), Some(Node::Directory))
            && self.children(replaced).next().is_some()
        {
            return Err(ErrorKind::DirectoryNotEmpty);
        }
        self.change(Change::Rename { from, to, node });
        self.collect();
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &str, kind: EntryKind) -> Result<(), ErrorKind> {
        let name = self.name(path)?;
        let node = *self.shown.get(&name).ok_or(ErrorKind::NotFound)?;
        match (self.nodes.get(&node), kind) {
            (Some(Node::File(_)), EntryKind::File) => {}
            (Some(Node::Directory), EntryKind::Directory) if self.children(node).next().is_some() => {
                return Err(ErrorKind::DirectoryNotEmpty);
            }
            (Some(Node::Directory), EntryKind::Directory) => {}
            (Some(Node::File(_)), _) => return Err(ErrorKind::NotADirectory),
            (Some(Node::Directory), _) => return Err(ErrorKind::IsADirectory),
            (None, _) => return Err(ErrorKind::NotFound),
        }
        self.change(Change::Unlink { name });
        self.collect();
        Ok(())
    }

    fn children(&self, directory: NodeId) -> impl Iterator<Item = (&String, NodeId)> {
        let after = (NodeId(directory.0 + 1), String::new());
        self.shown.range((directory, String::new())..after).map(|((_, name), node)| (name, *node))
    }

    pub(super) fn list(&self, path: &str) -> Result<Vec<(String, EntryKind)>, ErrorKind> {
        let directory = self.find(path)?;
        let kind = |node| match self.nodes.get(&node) {
            Some(Node::File(_)) => EntryKind::File,
            Some(Node::Directory) => EntryKind::Directory,
            None => EntryKind::Other,
        };
        Ok(self.children(directory).map(|(name, node)| (name.clone(), kind(node))).collect())
    }

    pub(super) fn sync(&mut self, path: &str) -> Result<(), ErrorKind> {
        let directory = self.find(path)?;
        for change in &mut self.unsynced {
            change.awaits.retain(|awaited| *awaited != directory);
        }
        let unsynced = self.unsynced.len();
        // In order: a change that is durable may follow one on the same name that is not.
        while self.unsynced.first().is_some_and(|first| first.awaits.is_empty()) {
            self.unsynced.remove(0).change.apply(&mut self.kept);
        }
        if self.unsynced.len() < unsynced {
            self.collect();
        }
        Ok(())
    }

    pub(super) fn sync_all(&mut self) {
        self.unsynced.clear();
        self.kept = self.shown.clone();
        self.collect();
    }

    pub(super) fn close(&mut self, node: NodeId) {
        if let Ok(file) = self.file_mut(node) {
            file.handles = file.handles.saturating_sub(1);
            if file.handles == 0 && !self.shown.values().any(|named| *named == node) {
                self.collect();
            }
        }
    }

    /// Forget files that nobody can reach any more. A file whose removal a crash may undo keeps its bytes.
    fn collect(&mut self) {
        let mut reachable: FxHashSet<NodeId> =
            self.shown.values().chain(self.kept.values()).copied().collect();
        for unsynced in &self.unsynced {
            if let Change::Link { node, .. } | Change::Rename { node, .. } = &unsynced.change {
                reachable.insert(*node);
            }
        }
        self.nodes.retain(|id, node| match node {
            Node::File(file) => file.handles > 0 || reachable.contains(id),
            Node::Directory => *id == ROOT || reachable.contains(id),
        });
    }

    /// The tree after a crash of which `choose` picks the outcome.
    pub(super) fn survivors(&self, choose: &mut impl FnMut(Effect, usize) -> usize) -> Names {
        let mut table = self.kept.clone();
        for unsynced in &self.unsynced {
            let survives =
                unsynced.awaits.is_empty() || choose(Effect::Name { number: unsynced.number }, 2) == 1;
            if survives {
                unsynced.change.apply(&mut table);
            }
        }
        let mut names = Names { kept: Table::new(), ..Names::new() };
        let mut directories = vec![ROOT];
        while let Some(directory) = directories.pop() {
            let after = (NodeId(directory.0 + 1), String::new());
            for (name, node) in table.range((directory, String::new())..after) {
                match self.nodes.get(node) {
                    Some(Node::File(file)) => {
                        let survivor = file.survivor(node.0, choose);
                        names.nodes.insert(*node, Node::File(survivor));
                    }
                    Some(Node::Directory) => {
                        names.nodes.insert(*node, Node::Directory);
                        directories.push(*node);
                    }
                    None => continue,
                }
                names.kept.insert(name.clone(), *node);
            }
        }
        names.shown = names.kept.clone();
        names
    }
}
