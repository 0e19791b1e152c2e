//! The HTTP API of a node, both ends of it.
//!
//! Owns the contract ([`types`], [`problem`]), the trait that a node implements to be served ([`node`]), the routes and
//! the server behind the Unix socket, and the [`client`] that the command line and other programs use. It does not know
//! how anything is done: neither the catalog nor prep nor the mount is named here.

pub mod client;
mod content;
pub mod node;
pub mod problem;
pub mod routes;
pub mod server;
pub mod socket;
pub mod types;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
