//! The catalog: what images this node has, as their records on its disks say.
//!
//! Owns names ([`name`]), records ([`record`], [`sources`]) and the directories that hold them ([`store`]). It does not
//! fetch, hash or serve. Upholds invariant 10: a record that cannot be read is refused by name, and then nothing on its
//! disk is collected.

pub mod name;
pub mod record;
pub mod sources;
pub mod store;
#[cfg(test)]
pub mod testing;
