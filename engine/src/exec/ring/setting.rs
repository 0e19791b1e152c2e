//! What tests of a worker stand on: a front end that wants to know nothing, and a disk.

use std::{path::Path, sync::Arc};

use super::{FrontEnd, Worker};
use crate::{
    error::{Error, Result},
    exec::{choice::ExecutorChoice, pool::Pool},
    image::{BaseImage, BaseSource},
    volume::{
        disk::{Disk, Held},
        record::ImageRef,
    },
};

pub struct Nobody;

impl FrontEnd for Nobody {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}
    fn request_ended(&mut self, _worker: &mut Worker, _token: u32, _result: Result<()>) {}
    fn woken(&mut self, _worker: &mut Worker) {}
}

struct NoImages;

impl BaseSource for NoImages {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        Err(Error::NotFound { kind: "image", name: image.name.clone() })
    }
}

pub fn worker() -> Worker {
    Worker::new(Arc::new(Pool::start("waiter", 2, || {}).expect("threads"))).expect("a ring")
}

/// One without workers of its own.
pub fn disk(dir: &Path) -> Arc<Disk> {
    let held = Held::take(dir).expect("the disk can be had").executor(ExecutorChoice::Blocking);
    held.serve(Arc::new(NoImages)).expect("the disk opens")
}
