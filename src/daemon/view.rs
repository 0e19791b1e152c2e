//! Views of volumes for exports, streams and images, and the tidying up after them.
//!
//! A view of a volume as it is now freezes a layer; once the view has gone, that layer can be merged away, as can those
//! of deleted snapshots. Owns when that is done: after each, as a job of its disk, one at a time. Left undone by a
//! shutdown, it is done after the next start.

use std::sync::{Arc, Weak};

use bedplate_engine::{
    device::{BlockDevice, Complete, Extent, Geometry, Request},
    error::Result,
    exec::asynchronous::Asynchronous,
    units::ByteRange,
    volume::{device::Snapshot, disk::Disk},
};

use super::{
    jobs::{Control, Jobs, Report},
    volumes::Located,
};
use crate::api::{problem::Refusal, types::JobKind};

/// Opens views, and tidies up after them.
#[derive(Debug)]
pub struct Views {
    jobs: Arc<Jobs>,
}

impl Views {
    pub fn new(jobs: Arc<Jobs>) -> Arc<Views> {
        Arc::new(Views { jobs })
    }

    /// A read-only device that does not change while it is held.
    pub fn open(self: &Arc<Self>, located: &Located, snapshot: Option<&str>) -> Result<Arc<dyn BlockDevice>> {
        let view = located.disk.view(&located.name, snapshot)?;
        let after = TidyAfter { disk: Arc::downgrade(&located.disk), views: self.clone() };
        Ok(Arc::new(View { view, _after: after }))
    }

    /// Merge what no name holds any more on this disk, in the background.
    pub fn tidy(&self, disk: &Arc<Disk>) {
        let object = disk.path().display().to_string();
        if !disk.has_unnamed_layers() || self.jobs.is_running(JobKind::DiskReclaim, &object) {
            return;
        }
        let disk = disk.clone();
        let started = self.jobs.start(JobKind::DiskReclaim, object, move |control| reclaim(&disk, control));
        if let Err(refusal) = started {
            // The next occasion does it.
            tracing::debug!(%refusal, "not merged for now");
        }
    }
}

/// The work of merging, in a job.
pub fn reclaim(disk: &Disk, control: &Control) -> super::jobs::Outcome {
    disk.reclaim(|| control.stop.check().is_ok()).map_err(Refusal::from)?;
    match control.stop.check() {
        Err(why) if disk.has_unnamed_layers() => {
            let why = Refusal::from(why);
            let left = "what is left is merged after the next export or deletion, or start";
            Err(Refusal { detail: format!("{}: {left}", why.detail), ..why })
        }
        Ok(()) | Err(_) => Ok(Report::Nothing),
    }
}

/// Fields are dropped in their order: the view first, then what it kept from being merged is.
struct View {
    view: Snapshot,
    _after: TidyAfter,
}

struct TidyAfter {
    disk: Weak<Disk>,
    views: Arc<Views>,
}

impl Drop for TidyAfter {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.upgrade() {
            self.views.tidy(&disk);
        }
    }
}

impl BlockDevice for View {
    fn geometry(&self) -> Geometry {
        self.view.geometry()
    }

    fn submit(&self, request: Request, complete: Complete) {
        self.view.submit(request, complete);
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.view.extents(range)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.view.read_at(buffer, offset)
    }

    fn asynchronous(&self) -> Option<&dyn Asynchronous> {
        self.view.asynchronous()
    }
}
