//! Bytes that somebody sends us, as the body of a request.
//!
//! Owns the queue between whoever reads the request and the arrival, bounded by `PARTS_QUEUED_MAX`, so that a sender is
//! only ever as fast as the disk. An upload cannot be asked for again: one that breaks off is over, and nothing is kept
//! of it (see [`Failure::Upload`]).

use std::time::Duration;

use hyper::body::Bytes;
use tokio::{
    runtime::Handle,
    sync::mpsc::{Receiver, Sender, channel},
    time::sleep,
};

use super::{Source, Validator};
use crate::prep::{
    arrival::{Arrival, Opening},
    failure::{Failure, Result},
};

/// Parts that were read from a request and not yet taken.
const PARTS_QUEUED_MAX: usize = 4;
/// How long a sender may send nothing, also before its first byte.
const SENDER_IDLE_MAX: Duration = Duration::from_secs(5 * 60);

/// Where the parts of an upload go, in order. `None` says that the last one has been sent; dropped before that, the
/// upload broke off. Closed when the arrival has ended.
pub type Parts = Sender<Option<Bytes>>;

/// The end at which the parts come out.
#[derive(Debug)]
pub struct UploadSource {
    parts: Receiver<Option<Bytes>>,
    runtime: Handle,
}

/// An upload that the node did not live to see the end of. Only what had arrived as a whole is of use then.
#[derive(Debug)]
pub struct LostUpload;

impl Source for LostUpload {
    fn transfer(&mut self, _: &mut Arrival<'_>) -> Result<()> {
        Err(Failure::Source("the node was restarted before the upload was whole".to_owned()))
    }
}

impl UploadSource {
    /// A source, and where its bytes are to be put. `runtime` carries the waits.
    pub fn new(runtime: Handle) -> (Parts, UploadSource) {
        let (sender, parts) = channel(PARTS_QUEUED_MAX);
        (sender, UploadSource { parts, runtime })
    }

    /// The next part; `None` after the last.
    async fn next(&mut self, arrival: &mut Arrival<'_>) -> Result<Option<Bytes>> {
        let stop = arrival.stop().clone();
        let mut patience = std::pin::pin!(sleep(SENDER_IDLE_MAX));
        loop {
            tokio::select! {
                part = self.parts.recv() => return part.ok_or_else(|| {
                    Failure::Source(format!("the upload broke off after {} bytes", arrival.position()))
                }),
                () = sleep(arrival.mark_due_in()) => arrival.mark()?,
                () = &mut patience => {
                    let seconds = SENDER_IDLE_MAX.as_secs();
                    return Err(Failure::TimedOut(format!("the upload's sender sent nothing for {seconds} s")));
                }
                // Returns why; should it not know yet, the next round asks again.
                () = stop.fired() => stop.check()?,
            }
        }
    }
}

impl Source for UploadSource {
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        if arrival.position() > 0 {
            arrival.restart()?;
        }
        arrival.begin(Opening { total: None, needed_bytes: None, validator: Validator::None })?;
        let runtime = self.runtime.clone();
        runtime.block_on(async {
            while let Some(bytes) = self.next(arrival).await? {
                arrival.bytes(&bytes)?;
            }
            Ok(())
        })
    }
}
