//! Second and third opinions: other readers of qcow2, for the images that they are known to manage.
//!
//! qcow2-rs spins on small clusters and panics on some inputs, and neither reads zstd or subclusters: the corpus
//! names, image by image, who is asked (`engine/docs/decisions` says why neither carries the engine).

use std::{
    panic::{self, AssertUnwindSafe},
    path::Path,
    pin::pin,
    task::{Context, Poll, Waker},
};

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, file::File, qcow2::Qcow2};
use qcow2_rs::{dev::Qcow2DevParams, helpers::Qcow2IoBuf, utils::qcow2_setup_dev_sync};

use super::manifest::Peer;

/// Bytes of one read.
const PIECE_LEN: usize = 64 << 10;
/// A future over blocking calls is ready at once; one that is not after so many polls never will be.
const POLLS_MAX: usize = 1000;

/// The whole content as `peer` reads it; an error is what it said.
pub fn read(peer: Peer, path: &Path) -> Result<Vec<u8>, String> {
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| match peer {
        Peer::Imago => with_imago(path),
        Peer::Qcow2Rs => with_qcow2_rs(path),
    }));
    outcome.unwrap_or_else(|_| Err("it panicked".into()))
}

fn with_imago(path: &Path) -> Result<Vec<u8>, String> {
    let said = |e: std::io::Error| e.to_string();
    let image =
        Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default()).map_err(said)?;
    let image = FormatAccess::new(image);
    let len = usize::try_from(image.size()).map_err(|e| e.to_string())?;
    let mut content = vec![0; len];
    let mut at = 0;
    for piece in content.chunks_mut(PIECE_LEN) {
        let piece_len = piece.len() as u64;
        image.read(piece, at).map_err(said)?;
        at += piece_len;
    }
    Ok(content)
}

fn with_qcow2_rs(path: &Path) -> Result<Vec<u8>, String> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let device = qcow2_setup_dev_sync(path, &params).map_err(|e| format!("{e:?}"))?;
    now(device.qcow2_prep_io())?.map_err(|e| format!("{e:?}"))?;
    let len = usize::try_from(device.info.virtual_size()).map_err(|e| e.to_string())?;
    let mut content = vec![0; len];
    let mut at = 0;
    for piece in content.chunks_mut(PIECE_LEN) {
        // It reads into aligned memory only.
        let mut buffer = Qcow2IoBuf::<u8>::new(piece.len());
        now(device.read_at(&mut buffer, at))?.map_err(|e| format!("{e:?}"))?;
        piece.copy_from_slice(&buffer);
        at += piece.len() as u64;
    }
    Ok(content)
}

/// The outcome of a future that waits for nothing.
fn now<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..POLLS_MAX {
        if let Poll::Ready(outcome) = future.as_mut().poll(&mut context) {
            return Ok(outcome);
        }
    }
    Err("it waits for something that never happens".into())
}
