//! Processors that do not sleep while the mount is busy.
//!
//! At depth 1 a request costs what waking two processors costs: that of the client and ours. Owns [`Wakefulness`]: as long
//! as requests come, and [`LINGER`] after the last one, `/dev/cpu_dma_latency` is held at 0, and idle processors poll
//! instead of sleeping (Documentation/power/pm_qos_interface). That burns power, and on a virtual machine the host's
//! time, so it is done only on request. One thread opens and closes the file; a request costs a look at a flag.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Thread},
    time::Duration,
};

const DEVICE: &str = "/dev/cpu_dma_latency";
/// How long processors stay awake after the last request.
const LINGER: Duration = Duration::from_millis(25);

/// Keeps processors awake while it is told of requests; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Wakefulness {
    state: Arc<State>,
    thread: Thread,
}

#[derive(Debug, Default)]
struct State {
    /// Whether a request has come since the thread last looked.
    busy: AtomicBool,
    /// Whether the thread looks by itself; else it has to be woken.
    watching: AtomicBool,
}

impl Wakefulness {
    /// Start the thread. An error says that this process may not keep processors awake.
    pub(crate) fn start() -> io::Result<Wakefulness> {
        hold()?;
        let state = Arc::new(State::default());
        let watched = Arc::downgrade(&state);
        let thread = thread::Builder::new().name("fuse-awake".into()).spawn(move || run(&watched))?;
        Ok(Wakefulness { state, thread: thread.thread().clone() })
    }

    /// A request has come.
    pub(crate) fn busy(&self) {
        // Looked at before it is written: many workers would else take the line from one another.
        if !self.state.busy.load(Ordering::Relaxed) {
            self.state.busy.store(true, Ordering::SeqCst);
        }
        if !self.state.watching.load(Ordering::SeqCst) && !self.state.watching.swap(true, Ordering::AcqRel) {
            self.thread.unpark();
        }
    }
}

impl Drop for Wakefulness {
    fn drop(&mut self) {
        self.thread.unpark();
    }
}

/// Have processors poll until the file is closed.
fn hold() -> io::Result<File> {
    let mut device = OpenOptions::new().write(true).open(DEVICE)?;
    device.write_all(&0_i32.to_ne_bytes())?;
    Ok(device)
}

fn run(state: &Weak<State>) {
    while let Some(state) = state.upgrade() {
        if state.watching.load(Ordering::Acquire) {
            let held = hold();
            if let Err(error) = &held {
                tracing::warn!(%error, "processors are not kept awake");
            }
            while state.busy.swap(false, Ordering::AcqRel) {
                thread::sleep(LINGER);
            }
            // Whoever comes from now on wakes this thread; one who came just before set `busy`, which the next turn sees.
            state.watching.store(false, Ordering::SeqCst);
            drop(held);
            if state.busy.load(Ordering::SeqCst) {
                state.watching.store(true, Ordering::Release);
                continue;
            }
        }
        drop(state);
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_thread_watches_while_requests_come_sleeps_after_them_and_ends_with_its_owner() {
        let awake = Wakefulness::start().unwrap();
        for _ in 0..3 {
            awake.busy();
            assert!(awake.state.watching.load(Ordering::Acquire));
            until("it goes to sleep", || !awake.state.watching.load(Ordering::Acquire));
        }
        let state = Arc::downgrade(&awake.state);
        drop(awake);
        until("it ends", || state.strong_count() == 0);
    }
}
