//! Ctrl-C and SIGTERM: the run ends in order, so that no server, mount or directory is left behind.
//!
//! Owns the flag that every wait of a run looks at. The signals are handled and not blocked: programs that are started
//! would inherit a mask, and then not end when they are told to.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, bail};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From here on a signal sets the flag; the second one ends the process.
pub fn listen() -> Result<()> {
    let interrupted = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: the first signal finds the flag down.
        flag::register_conditional_shutdown(signal, 1, interrupted.clone()).context("handle signals")?;
        flag::register(signal, interrupted.clone()).context("handle signals")?;
    }
    Ok(())
}

/// Fail once a signal has come.
pub fn check() -> Result<()> {
    if INTERRUPTED.get().is_some_and(|interrupted| interrupted.load(Ordering::Relaxed)) {
        bail!("interrupted");
    }
    Ok(())
}
