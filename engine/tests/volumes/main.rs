//! Volumes on a real file system: every operation against plain byte vectors.

mod life;
mod util;
