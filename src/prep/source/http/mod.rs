//! Bytes from an http(s) URL.

use std::time::Duration;

/// How patient a download is; [`Default`] is sound.
#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// The longest that making a connection may take.
    pub connect_timeout: Duration,
    /// The longest that a connection may say nothing.
    pub idle_timeout: Duration,
    /// An origin that has never sent a byte of the image is given up after this long.
    pub first_byte_within: Duration,
    /// A download that has begun is given up when nothing new has come for this long.
    pub stalled_max: Duration,
    /// The first pause between two attempts; each further one is twice as long ...
    pub pause_min: Duration,
    /// ... up to this.
    pub pause_max: Duration,
}

impl Default for HttpSettings {
    fn default() -> HttpSettings {
        HttpSettings {
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            first_byte_within: Duration::from_secs(25),
            stalled_max: Duration::from_secs(15 * 60),
            pause_min: Duration::from_millis(500),
            pause_max: Duration::from_secs(30),
        }
    }
}
