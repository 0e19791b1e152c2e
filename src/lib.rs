//! The node.

pub mod catalog;
pub mod directory;
pub mod images;
pub mod prep;
