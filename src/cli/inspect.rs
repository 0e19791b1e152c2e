//! `bedplate inspect`: hands the arguments over to the inspection library, which needs no node.

use std::process::ExitCode;

use super::exit::Failure;
pub use bedplate_inspect::Verb;

/// Run a verb. The exit code says what was found.
pub fn run(verb: &Verb) -> Result<ExitCode, Failure> {
    verb.run().map(ExitCode::from).map_err(Failure::Inspect)
}
