//! What becomes of requests when a ring serves no more.
//!
//! The kernel may refuse a ring for good: it was short of memory for a completion, which is lost then. What is on that
//! ring has an end that nobody hears of, at a time that nobody knows. So whatever memory it uses is never given back,
//! and a volume with changes on it fails as after a failed sync: a write may still come to its file, over a newer one.
//! Everything else ends: what threads do, and what waits for any of this.

use std::sync::Arc;

use super::{
    Worker,
    flight::{Task, TaskKind, Work},
};
use crate::{
    error::Error,
    exec::{carrier::Reporter, executor::Shared},
};

impl Worker {
    /// The ring has failed with `error`, and is not used any more.
    pub(super) fn strand(&mut self, error: &Error) {
        self.stranded = Some(error.clone());
        let mut lost: Vec<u32> =
            self.flights.iter().filter(|flight| flight.work.is_on_ring()).map(|flight| flight.task).collect();
        lost.sort_unstable();
        lost.dedup();
        let mut actions = Vec::new();
        for task in lost {
            if let Some(Task { kind: TaskKind::Action { change, planned }, .. }) = self.tasks.get_mut(task)
                && let Some(change) = self.changes.get_mut(change.0)
            {
                actions.push((change.shared().clone(), planned.action.id));
            }
        }
        // Before the first of them counts as ended: nobody gets its blocks.
        let mut failed: Vec<&Arc<Shared>> = Vec::new();
        for (shared, _) in &actions {
            if !failed.iter().any(|other| Arc::ptr_eq(other, shared)) {
                failed.push(shared);
                shared.fail(error, &mut self.reporter());
            }
        }
        for (shared, action) in &actions {
            shared.complete(*action, Err(error.clone()), &mut self.reporter());
        }
    }

    fn reporter(&mut self) -> Reporter<'_> {
        Reporter::Worker { post: self.handle.post(), messages: &mut self.messages }
    }

    /// Whether nothing is left but what is on a ring that serves no more.
    pub(super) fn is_only_stranded(&self) -> bool {
        self.stranded.is_some()
            && self.flights.iter().all(|flight| flight.work.is_on_ring())
            && self.changes.iter().all(|change| change.has_actions())
    }

    /// The requests whose memory the kernel, or a thread, may still use.
    pub(super) fn held(&mut self) -> Vec<u32> {
        let tasks: Vec<u32> = self.flights.iter().map(|flight| flight.task).collect();
        let held = tasks.into_iter().filter_map(|task| match &self.tasks.get_mut(task)?.kind {
            TaskKind::Read { token, .. }
            | TaskKind::Whole { token, .. }
            | TaskKind::Admission { token, .. } => Some(*token),
            TaskKind::Action { change, .. } => Some(self.changes.get_mut(change.0)?.token()),
            // It uses the files' own.
            TaskKind::Commit { .. } => None,
        });
        held.collect()
    }
}

impl Work {
    fn is_on_ring(&self) -> bool {
        match self {
            Work::Read(_) | Work::Write(_) | Work::Punch(..) => true,
            Work::Thread => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::{
        super::{
            setting::{Nobody, disk, worker},
            window::Lent,
            worker::Lease,
        },
        *,
    };
    use crate::{
        device::{BlockDevice, Durability},
        exec::executor::CLOSE_WAIT_MAX,
        units::ByteLen,
        volume::{device::VolumeState, life::Origin},
    };

    #[test]
    fn a_ring_that_fails_ends_its_volumes_writes_and_all_who_wait_for_them_and_no_other_volume() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = disk(dir.path());
        for name in ["on-it", "waits", "other"] {
            disk.create_volume(name, Origin::Empty, Some(ByteLen(65536))).expect("created");
        }
        let mut worker = worker();
        let data: &'static [u8] = vec![7; 4096].leak();
        #[expect(unsafe_code, reason = "the kernel would read a vector of the test")]
        // SAFETY: it is never freed.
        let data = unsafe { Lent::of_source(data) };
        let write = Lease::Write { offset: 0, data, durability: Durability::Volatile };
        let volume = disk.volume("on-it").expect("there");
        worker.start_leased(volume.clone(), write, 1);
        worker.start_leased(volume.clone(), Lease::Flush, 2);
        worker.start_leased(disk.volume("waits").expect("there"), Lease::Flush, 3);
        // Both wait for that write, or come later: there is no third.
        let (tell, told) = mpsc::channel();
        let overwrite = std::thread::spawn({
            let (volume, tell) = (volume.clone(), tell.clone());
            move || tell.send(volume.write_at(&[9; 4096], 0, Durability::Volatile)).expect("somebody waits")
        });
        let snapshot = std::thread::spawn({
            let disk = disk.clone();
            move || tell.send(disk.create_snapshot("on-it", "s").map(drop)).expect("somebody waits")
        });

        worker.ring.break_down();
        let ended = worker.run(&mut Nobody);
        assert!(matches!(ended, Err(Error::Io { op: "enter", .. })), "{ended:?}");
        let finished = worker.finish();
        assert!(matches!(finished, Err(Error::Io { op: "enter", .. })), "{finished:?}");
        assert_eq!(worker.held(), [1], "the kernel may read it yet; both flushes have ended");

        for _ in 0..2 {
            let result = told.recv_timeout(CLOSE_WAIT_MAX).expect("it is answered");
            assert!(result.is_err(), "{result:?}");
        }
        overwrite.join().expect("no panic");
        snapshot.join().expect("no panic");
        assert!(matches!(volume.state(), VolumeState::ReadOnly { reason } if reason.contains("io_uring")));
        let refused = volume.flush();
        assert!(matches!(refused, Err(Error::Failed { .. })), "{refused:?}");
        let read = volume.read_at(&mut [0; 512], 0);
        assert!(matches!(read, Err(Error::Lost { .. })), "{read:?}");
        for name in ["waits", "other"] {
            let volume = disk.volume(name).expect("there");
            volume.write_at(&[9; 4096], 0, Durability::Fua).expect("nothing is wrong with it");
        }
        drop((worker, volume));
        assert!(disk.recover("on-it").is_ok(), "there is a way out");
    }
}
