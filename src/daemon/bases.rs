//! Between images and volumes: where the engine gets the images that its volumes stand on, and what the image service
//! asks about volumes.
//!
//! Each side needs the other: the engine opens volumes over images, the image service reads volumes and asks who stands
//! on an image. Owns the two links, which are set once while the node starts, the first before the second; whoever asks
//! too early waits, for [`LINK_MAX`] at most.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bedplate_engine::{
    device::BlockDevice,
    error::{Error, Result},
    image::{BaseImage, BaseSource},
    volume::record::ImageRef,
};
use uuid::Uuid;

use super::{view::Views, volumes::Volumes};
use crate::images::{self, Images};

/// How long the start of a node may keep an image job waiting.
const LINK_MAX: Duration = Duration::from_secs(600);

/// A value that is set once and waited for.
pub struct Link<T>(Mutex<Option<T>>, Condvar);

impl<T> Default for Link<T> {
    fn default() -> Link<T> {
        Link(Mutex::new(None), Condvar::new())
    }
}

impl<T: Clone> Link<T> {
    pub fn set(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        self.1.notify_all();
    }

    fn wait(&self, patience: Duration) -> Option<T> {
        let deadline = Instant::now() + patience;
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if slot.is_some() || left.is_zero() {
                return slot.clone();
            }
            slot = self.1.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The images of this node as bases of volumes.
#[derive(Default)]
pub struct Bases(pub Link<Images>);

impl BaseSource for Bases {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        let images = self.0.wait(LINK_MAX).ok_or(Error::Closed)?;
        let (base, sha512) = images.open_base(image.uuid).map_err(|error| match error {
            images::Error::NotFound(_) => Error::NotFound { kind: "image", name: image.name.clone() },
            images::Error::Storage(error) => error,
            error => Error::Invalid(error.to_string()),
        })?;
        if sha512 != image.sha512 {
            return Err(Error::Invalid(format!(
                "image {:?} is not the one that the volume stands on",
                image.name
            )));
        }
        Ok(base)
    }
}

/// What the image service asks about volumes.
#[derive(Default)]
pub struct Host(pub Link<(Arc<Volumes>, Arc<Views>)>);

impl images::Host for Host {
    fn users(&self, image: Uuid) -> Vec<String> {
        let Some((volumes, _)) = self.0.wait(LINK_MAX) else {
            // Nobody is known to use it, which must not mean that nobody does.
            return vec!["a node that is starting".to_owned()];
        };
        volumes.users_of(image)
    }

    fn volume_view(&self, volume: &str, snapshot: Option<&str>) -> Result<Arc<dyn BlockDevice>, String> {
        let (volumes, views) = self.0.wait(LINK_MAX).ok_or("the node is starting")?;
        let located = volumes.find(volume).map_err(|error| error.to_string())?;
        views.open(&located, snapshot).map_err(|error| error.to_string())
    }
}
