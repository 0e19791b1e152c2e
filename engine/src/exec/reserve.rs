//! The space that a full disk gives up, so that it can still flush, discard and delete snapshots (invariant 8).
//!
//! Owns [`Reserve`]: an allocated file. Once given up, writes are refused until the space could be taken again.

use std::sync::{Arc, PoisonError};

use super::storage::Storage;
use crate::{
    error::{Error, Result},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes of the reserve on a large disk; a small one keeps 1/64 of itself.
pub const RESERVE_LEN_MAX: u64 = 64 << 20;
const PATH: &str = "reserve";

#[derive(Debug)]
pub struct Reserve {
    storage: Arc<dyn Storage>,
    len: u64,
    spent: AtomicBool,
    taking: Mutex<()>,
}

impl Reserve {
    /// Take the reserve of a disk; on a full disk it starts as spent.
    pub fn take(storage: Arc<dyn Storage>) -> Result<Reserve> {
        let len = (storage.total_bytes()? / 64).min(RESERVE_LEN_MAX);
        let reserve = Reserve { storage, len, spent: AtomicBool::new(true), taking: Mutex::new(()) };
        reserve.retake();
        Ok(reserve)
    }

    /// Give the space up; `false` if it was given up before.
    pub fn give_up(&self) -> bool {
        if self.spent.swap(true, Ordering::AcqRel) {
            return false;
        }
        tracing::warn!(disk = %self.storage.full_path("").display(), "the disk is full: its reserve is given up");
        self.storage.allocate(PATH, 0).is_ok()
    }

    /// Whether [`Reserve::admit`] has to ask the disk.
    pub fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Acquire)
    }

    /// Whether a change that takes space may start.
    pub fn admit(&self) -> Result<()> {
        if !self.spent.load(Ordering::Acquire) || self.retake() {
            return Ok(());
        }
        Err(Error::NoSpace { path: self.storage.full_path("") })
    }

    fn retake(&self) -> bool {
        let _one = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        if self.spent.load(Ordering::Acquire) && self.storage.allocate(PATH, self.len).is_ok() {
            self.spent.store(false, Ordering::Release);
        }
        !self.spent.load(Ordering::Acquire)
    }
}
