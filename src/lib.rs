//! The node: daemon, HTTP API and command line.
//!
//! A library, so that other programs can use the client ([`api::client`]) and tests can stand a node of their own
//! behind the API. The binary is [`cli::main`].

pub mod api;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod directory;
pub mod duration;
pub mod images;
pub mod prep;
pub mod telemetry;
