//! A device's content as the body of an answer, and an image's as the body of a request.
//!
//! Owns the streams. That of an answer is bounded, read ahead by [`CHUNKS_AHEAD_MAX`] on a thread that may block, holes never read from disk.
//! A read that fails cuts the connection before the announced length, so that a client cannot take what it has for
//! the whole; HTTP has no other word for it once the status is sent.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use bedplate_engine::{
    device::{BlockDevice, ExtentKind},
    error::Error,
    units::{ByteRange, to_usize},
};
use futures_util::{StreamExt, stream};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use super::{
    node::UploadParts,
    problem::{Code, Refusal},
};

/// Bytes of one piece of the body.
const CHUNK_LEN: u64 = 1 << 20;
/// Pieces that wait for a slow client; with [`CHUNK_LEN`] the memory of one stream.
const CHUNKS_AHEAD_MAX: usize = 4;
/// How much of the device is asked about at once.
const EXTENTS_WINDOW: u64 = 1 << 30;

/// How long a client may take nothing before its stream, and the view that it reads, are given up.
const CLIENT_MAX: Duration = Duration::from_secs(120);

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// All bytes of `device`, with their number announced.
pub fn response(device: Arc<dyn BlockDevice>) -> Response {
    response_within(device, CLIENT_MAX)
}

fn response_within(device: Arc<dyn BlockDevice>, patience: Duration) -> Response {
    let len = device.geometry().size.0;
    let (chunks, queue) = mpsc::channel(CHUNKS_AHEAD_MAX);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = feed(device.as_ref(), &chunks, &runtime, patience) {
            tracing::warn!(%error, "a stream of content ends early");
            // Where there is no room the client reads nothing; the missing bytes tell it the same.
            drop(chunks.try_send(Err(error)));
        }
    });
    let body = stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, len.to_string()),
    ];
    (headers, Body::from_stream(body)).into_response()
}

/// Hand the bytes of a request's body on, as they come and are taken. Ends early, without an error, when nobody takes
/// them any more.
pub async fn receive(body: Body, parts: UploadParts) -> Result<(), Refusal> {
    let mut body = body.into_data_stream();
    loop {
        let next = tokio::select! {
            next = body.next() => next,
            () = parts.closed() => return Ok(()),
        };
        let part = match next {
            Some(Ok(bytes)) => Some(bytes),
            Some(Err(error)) => {
                return Err(Refusal::new(Code::Invalid, format!("the upload broke off: {error}")));
            }
            None => None,
        };
        let last = part.is_none();
        if parts.send(part).await.is_err() || last {
            return Ok(());
        }
    }
}

/// Send everything in order; ends early, without an error, when nobody listens any more.
fn feed(
    device: &dyn BlockDevice,
    chunks: &mpsc::Sender<Result<Bytes, Error>>,
    runtime: &Handle,
    patience: Duration,
) -> Result<(), Error> {
    let size = device.geometry().size.0;
    let mut at = 0;
    while at < size {
        let asked = at;
        for extent in device.extents(ByteRange::new(at, EXTENTS_WINDOW.min(size - at)))? {
            let end = extent.range.end().0;
            while at < end {
                let len = CHUNK_LEN.min(end - at);
                let chunk = match extent.kind {
                    ExtentKind::Zero => Bytes::from_static(&ZEROS).slice(..to_usize(len)),
                    ExtentKind::Data => {
                        let mut buffer = vec![0; to_usize(len)];
                        device.read_at(&mut buffer, at)?;
                        Bytes::from(buffer)
                    }
                };
                match runtime.block_on(timeout(patience, chunks.send(Ok(chunk)))) {
                    Ok(Ok(())) => at += len,
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => {
                        let seconds = patience.as_secs();
                        return Err(Error::Invalid(format!("the client took nothing for {seconds} s")));
                    }
                }
            }
        }
        if at == asked {
            return Err(Error::Invalid(format!("the device tells nothing of its content at {at}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::api::fake::Pattern;

    const LONG: Duration = Duration::from_secs(30);

    fn device() -> Arc<Pattern> {
        Arc::new(Pattern { size: 16 * CHUNK_LEN, fails_at: None })
    }

    /// Wait until nobody but the test holds the device.
    async fn until_let_go(device: &Arc<Pattern>) {
        let let_go = async {
            while Arc::strong_count(device) > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, let_go).await.expect("the view is given up");
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_loses_its_stream_and_the_view_is_let_go() {
        let device = device();
        let response = response_within(device.clone(), Duration::from_millis(50));
        until_let_go(&device).await;
        // Whoever reads on nevertheless does not get all.
        let mut body = response.into_body();
        let mut received = 0;
        while let Some(Ok(frame)) = timeout(LONG, body.frame()).await.unwrap() {
            received += frame.into_data().unwrap().len() as u64;
        }
        assert!(received < device.size, "{received}");
    }

    #[tokio::test]
    async fn a_client_that_goes_away_lets_the_view_go() {
        let device = device();
        drop(response_within(device.clone(), LONG));
        until_let_go(&device).await;
    }
}
