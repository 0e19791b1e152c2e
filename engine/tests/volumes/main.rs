//! Volumes on a real file system: every operation against plain byte vectors.

mod damage;
mod life;
mod util;
