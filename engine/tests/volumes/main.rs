//! Volumes on a real file system: every operation against plain byte vectors.

mod damage;
mod faults;
mod life;
mod util;
