//! `bedplate bench`: hands the arguments over to the benchmark, which starts nodes of its own.

use std::process::ExitCode;

use super::exit::Failure;
pub use bedplate_bench::Verb;

/// Run a verb. The exit code says whether a comparison found a loss.
pub fn run(verb: &Verb) -> Result<ExitCode, Failure> {
    verb.run().map(ExitCode::from).map_err(Failure::Bench)
}
