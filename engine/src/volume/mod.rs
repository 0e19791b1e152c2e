//! A volume's life in terms of the core: what is on a disk, and how it changes.
//!
//! [`claim`] says whose a directory is; [`disk`] opens a disk and knows its volumes; [`device`] is one volume; [`life`] are the operations that switch a
//! record (create, delete, snapshot, clone, revert, resize), [`merge`] (with `fold`), [`flatten`] and [`copy`] those that move bytes,
//! [`recover`] the way out of damage. [`layer`] and [`record`] are the files.

pub mod claim;
pub mod copy;
pub mod device;
pub mod disk;
pub mod flatten;
mod fold;
pub mod layer;
pub mod life;
pub mod merge;
pub mod record;
pub mod recover;
mod tree;
