//! Ending and removing images: cancel, delete, and what keeps an image from being deleted.
//!
//! Owns the order that makes a deletion safe: the image is marked, so that nothing new begins to stand on it; then its
//! users are asked for; then its job ends; then its record goes, and its bytes last. Whatever refuses on the way takes
//! the mark away again; once the record is gone, the image is *failed* until its deletion is tried again.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use super::{Error, ImageInfo, Images, Result, steps::discard};
use crate::catalog::record::{FailureCode, FailureRecord, RecordState};

/// The longest that a deletion waits for the image's job to end.
const JOB_END_WITHIN: Duration = Duration::from_secs(60);

/// A file of the mount that a program has closed is let go of a moment later, when the kernel says so.
pub const RELEASE_WITHIN: Duration = Duration::from_millis(500);

/// Keeps an image from being deleted until it is dropped, for the time between looking at it and standing on it.
pub struct ImageHold {
    images: Images,
    uuid: Uuid,
    who: Arc<str>,
}

impl Images {
    /// Remove an image; refused while something stands on it. A job of it is cancelled first, and waited for. Goes on to
    /// its end when the caller stops waiting.
    pub async fn delete(&self, name: &str) -> Result<()> {
        self.wait_released(name).await?;
        let (images, wanted) = (self.clone(), name.to_owned());
        let (name, uuid) = blocking(move || images.begin_delete(&wanted)).await?;
        let images = self.clone();
        let deletion = self.0.runtime.spawn(async move {
            let result = images.delete_now(&name, uuid).await;
            match &result {
                Ok(()) => drop(images.0.lock().take(&name)),
                Err(error) => images.end_failed_delete(uuid, error).await,
            }
            images.0.notify();
            result
        });
        deletion.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// End its job (*failed*, cancelled) and clear away what had arrived; of a failed one, clear away what is kept.
    /// Waits until the job has ended. A verification is merely ended.
    pub async fn cancel(&self, name: &str) -> Result<ImageInfo> {
        let (name, job) = {
            let table = self.0.lock();
            let (name, image) = table.image(name)?;
            (name.to_owned(), image.job.clone())
        };
        match job {
            Some(job) => {
                job.stop.cancel();
                self.wait_for_end(&name).await?;
            }
            None => {
                let (images, name) = (self.clone(), name.clone());
                blocking(move || images.clear_failed(&name)).await?;
            }
        }
        self.get(&name)
    }

    fn clear_failed(&self, name: &str) -> Result<()> {
        // Nobody creates it again, and goes on with what is kept, while that is cleared away.
        let _naming = self.0.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let (record, dir) = {
            let table = self.0.lock();
            let (name, image) = table.image(name)?;
            match &image.record.state {
                RecordState::Failed { .. } if image.job.is_none() && !image.deleting => {
                    (image.record.clone(), image.dir.clone())
                }
                RecordState::Failed { .. }
                | RecordState::Pending
                | RecordState::InProgress
                | RecordState::Ready(_) => return Err(Error::NotRunning(name.to_owned())),
            }
        };
        Ok(discard(&record, &dir)?)
    }

    /// Keep an image from being deleted. `who` is named in refusals.
    pub fn hold(&self, name: &str, who: &str) -> Result<ImageHold> {
        let who: Arc<str> = who.into();
        let mut table = self.0.lock();
        let (name, image) = table.image_mut(name)?;
        if image.deleting {
            return Err(Error::NotReady { name, state: "being deleted".to_owned() });
        }
        image.holds.push(who.clone());
        Ok(ImageHold { images: self.clone(), uuid: image.record.uuid, who })
    }

    /// Wait until nobody holds it, for a moment.
    async fn wait_released(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + RELEASE_WITHIN;
        let mut bell = self.0.listen();
        loop {
            bell.borrow_and_update();
            if self.0.lock().image(name)?.1.holds.is_empty()
                || !matches!(tokio::time::timeout_at(deadline, bell.changed()).await, Ok(Ok(())))
            {
                return Ok(());
            }
        }
    }

    /// Mark an image as being deleted, so that nothing new begins to use it.
    fn begin_delete(&self, name: &str) -> Result<(String, Uuid)> {
        // An image that is just being created has its job before it can be deleted.
        let _naming = self.0.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = self.0.lock();
        let (name, image) = table.image_mut(name)?;
        if image.deleting {
            return Err(Error::NotReady { name, state: "being deleted".to_owned() });
        }
        if !image.holds.is_empty() {
            let by = image.holds.iter().map(|who| who.to_string()).collect();
            return Err(Error::InUse { name, by });
        }
        image.deleting = true;
        Ok((name, image.record.uuid))
    }

    async fn delete_now(&self, name: &str, uuid: Uuid) -> Result<()> {
        let host = self.0.host.clone();
        let by =
            tokio::task::spawn_blocking(move || host.users(uuid)).await.map_err(|_| Error::ShuttingDown)?;
        if !by.is_empty() {
            return Err(Error::InUse { name: name.to_owned(), by });
        }
        let (dir, store) = {
            let mut table = self.0.lock();
            let (_, image) = table.image_mut(name)?;
            if let Some(job) = &image.job {
                job.stop.cancel();
            }
            (image.dir.clone(), image.store.clone())
        };
        self.wait_for_end(name).await?;
        blocking(move || Ok(store.delete(&dir)?)).await
    }

    /// Without its record it is no image any more: the next start collects it, so nothing may stand on it.
    async fn end_failed_delete(&self, uuid: Uuid, error: &Error) {
        let Some(dir) = self.0.lock().by_uuid(uuid).map(|image| image.dir.clone()) else { return };
        let has_record = blocking(move || Ok(dir.has_record()?)).await;
        let mut table = self.0.lock();
        let Some(image) = table.by_uuid(uuid) else { return };
        image.deleting = false;
        if !matches!(has_record, Ok(true)) {
            let message = format!("its deletion was not finished: {error}; delete it again");
            let failure = FailureRecord { code: FailureCode::Storage, message };
            image.record.state = RecordState::Failed { failure, published: None };
        }
    }

    async fn wait_for_end(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + JOB_END_WITHIN;
        let mut bell = self.0.listen();
        loop {
            bell.borrow_and_update();
            if self.0.lock().image(name)?.1.job.is_none() {
                return Ok(());
            }
            if !matches!(tokio::time::timeout_at(deadline, bell.changed()).await, Ok(Ok(()))) {
                return Err(Error::TimedOut { name: name.to_owned(), after: JOB_END_WITHIN });
            }
        }
    }
}

impl Drop for ImageHold {
    fn drop(&mut self) {
        if let Some(image) = self.images.0.lock().by_uuid(self.uuid)
            && let Some(at) = image.holds.iter().position(|who| Arc::ptr_eq(who, &self.who))
        {
            image.holds.swap_remove(at);
        }
        self.images.0.notify();
    }
}

/// A few disk operations, off the threads that serve the network.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The runtime goes down.
        Err(_) => Err(Error::ShuttingDown),
    }
}
