//! Bytes from a block device of the engine: a volume, a snapshot, an image.
//!
//! What the device says is zero is not read. A device has no validator: after a restart of the node the arrival begins
//! again, as the view that it came from is gone.

use std::sync::Arc;

use bedplate_engine::device::{BlockDevice, ExtentKind, for_each_extent};

use super::{Source, Validator};
use crate::prep::{
    arrival::{Arrival, Opening},
    failure::Result,
};

/// Bytes of one read.
const READ_LEN: u64 = 1 << 20;

/// A device that does not change while it is held.
pub struct DeviceSource {
    device: Arc<dyn BlockDevice>,
}

impl DeviceSource {
    pub fn new(device: Arc<dyn BlockDevice>) -> DeviceSource {
        DeviceSource { device }
    }
}

impl Source for DeviceSource {
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        if arrival.position() > 0 {
            arrival.restart()?;
        }
        let size = self.device.geometry().size.0;
        let mut needed = 0_u64;
        for_each_extent(&*self.device, |range, kind| {
            if kind == ExtentKind::Data {
                needed = needed.saturating_add(range.len.0);
            }
            arrival.stop().check()
        })?;
        let (total, needed_bytes) = (Some(size), Some(needed));
        arrival.begin(Opening { total, needed_bytes, validator: Validator::None })?;

        let mut buffer = vec![0; usize::try_from(READ_LEN.min(size)).unwrap_or(0)];
        for_each_extent(&*self.device, |range, kind| match kind {
            ExtentKind::Zero => arrival.zeros(range.len.0),
            ExtentKind::Data => {
                let mut at = range.start.0;
                while at < range.end().0 {
                    let len = usize::try_from((range.end().0 - at).min(READ_LEN)).unwrap_or(buffer.len());
                    let part = buffer.get_mut(..len).unwrap_or_default();
                    self.device.read_at(part, at)?;
                    arrival.bytes(part)?;
                    at += part.len() as u64;
                }
                Ok(())
            }
        })
    }
}
