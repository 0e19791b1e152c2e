//! `image create --from -`: an image whose bytes come from stdin.
//!
//! Owns the reading of stdin and the bar. The image is created first, so that a name that is taken is refused before a
//! byte is read; then the bytes are sent, and the result is waited for, as nobody could send them again.

use std::{
    io::{self, IsTerminal, Read},
    time::Duration,
};

use hyper::body::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use super::{exit::Failure, wait};
use crate::api::{
    client::{Client, Error, UploadPart},
    types::{CreateImage, Image},
};

/// What stands for stdin on the command line ...
pub const STDIN: &str = "-";
/// ... and for it in a request.
const SOURCE: &str = "upload";
/// Bytes of one read.
const READ_LEN: usize = 256 << 10;
/// Reads that wait to be sent.
const READS_AHEAD_MAX: usize = 4;

/// The image, when it is ready. `timeout` is for the wait after the last byte.
pub async fn create(
    client: &Client,
    request: CreateImage,
    timeout: Option<Duration>,
) -> Result<Image, Failure> {
    if io::stdin().is_terminal() {
        return Err(Failure::Usage("a terminal is no source of a disk's bytes; redirect stdin".to_owned()));
    }
    let image = client.create_image(&CreateImage { source: SOURCE.to_owned(), ..request }).await?;
    let image = match client.upload_image(&image.name, read_ahead(&image.name)).await {
        Ok(image) => image,
        // The node hangs up when the image has failed in the middle, and the image knows why.
        Err(error @ (Error::Broken { .. } | Error::TimedOut { .. })) => {
            client.image(&image.name).await.map_err(|_| error)?
        }
        Err(error) => return Err(error.into()),
    };
    wait::image(client, image, timeout).await
}

/// Read stdin on a thread, which ends with the process: a pipe may never say anything again.
fn read_ahead(name: &str) -> mpsc::Receiver<UploadPart> {
    let (parts, queue) = mpsc::channel(READS_AHEAD_MAX);
    // Drawn on stderr, and only on a terminal.
    let bar = ProgressBar::new_spinner().with_message(format!("{name}: sending"));
    if let Ok(style) = ProgressStyle::with_template("{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}") {
        bar.set_style(style);
    }
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; READ_LEN];
        loop {
            let part = match stdin.read(&mut buffer) {
                Ok(0) => Ok(None),
                Ok(len) => Ok(Some(Bytes::copy_from_slice(buffer.get(..len).unwrap_or_default()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let len = part.as_ref().ok().and_then(|part| part.as_ref().map(Bytes::len));
            bar.inc(len.unwrap_or_default() as u64);
            let ended = len.is_none();
            // Nobody listens any more: the upload has ended, one way or the other.
            if parts.blocking_send(part).is_err() || ended {
                break;
            }
        }
        bar.finish_and_clear();
    });
    queue
}
