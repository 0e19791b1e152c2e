//! The catalog: what images this node has, as their records on its disks say.
//!
//! Owns names ([`name`]), records ([`record`]), the directories that hold them ([`store`]) and the read-only device
//! over a raw copy. It does not fetch, hash or serve. Upholds invariant 10: a record that cannot be read is refused by
//! name, and then nothing on its disk is collected.

pub mod device;
pub mod name;
pub mod record;
pub mod store;
