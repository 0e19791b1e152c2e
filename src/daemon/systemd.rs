//! What systemd is told: ready, stopping, alive. Without systemd nothing is told to nobody.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio_util::task::AbortOnDropHandle;

/// Parts of the watchdog's time after which it is told that we live.
const WATCHDOG_PARTS: u32 = 3;

/// The node takes requests. As long as the answer is kept, the watchdog is told that the node lives, if it asked.
pub fn ready() -> Option<AbortOnDropHandle<()>> {
    tell(&[NotifyState::Ready]);
    let pause: Duration = sd_notify::watchdog_enabled()? / WATCHDOG_PARTS;
    let watchdog = tokio::spawn(async move {
        loop {
            tell(&[NotifyState::Watchdog]);
            tokio::time::sleep(pause).await;
        }
    });
    Some(AbortOnDropHandle::new(watchdog))
}

/// The node goes down.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd is not told");
    }
}
