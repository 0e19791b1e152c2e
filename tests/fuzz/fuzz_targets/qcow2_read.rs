//! Reading: whatever the tables and the compressed data say.
#![no_main]

use std::path::Path;

use bedplate_engine::{
    error::Error,
    image::{
        BaseImage,
        qcow2::{Qcow2Image, View},
    },
};
use bedplate_fuzz_targets::file_of;
use libfuzzer_sys::fuzz_target;

const READ_MAX: u64 = 1 << 20;
const PIECE: usize = 24 << 10;

fuzz_target!(|bytes: &[u8]| {
    let Ok(image) = Qcow2Image::open(file_of(bytes), Path::new("fuzz"), &View::Active) else { return };
    let end = image.len().0.min(READ_MAX);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < end {
        let len = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
        match image.read_at(&mut buffer[..len], at) {
            Ok(()) | Err(Error::Corrupt { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        at += len as u64;
    }
});
