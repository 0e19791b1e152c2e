//! Mapping: segments cover a range without gaps, and what they call data lies within the file.
#![no_main]

use std::{ops::ControlFlow, path::Path};

use bedplate_engine::{
    image::qcow2::{Place, Qcow2Layer, View},
    units::{ByteOffset, ByteRange},
};
use bedplate_fuzz_targets::file_of;
use libfuzzer_sys::fuzz_target;

const SEGMENTS_MAX: usize = 20_000;

fuzz_target!(|bytes: &[u8]| {
    let Ok(layer) = Qcow2Layer::open(file_of(bytes), Path::new("fuzz"), &View::Active) else { return };
    let whole = ByteRange { start: ByteOffset(0), len: layer.size() };
    let mut end = 0;
    let mut count = 0;
    let mut damaged = None;
    let elsewhere = layer.header().data_file.is_some();
    layer
        .each(whole, |segment| {
            assert_eq!(segment.range.start.0, end);
            assert!(!segment.range.is_empty());
            end = segment.range.end().0;
            match segment.place {
                Place::Data { host } if !elsewhere => {
                    assert!(host.0 + segment.range.len.0 <= bytes.len() as u64);
                }
                Place::Compressed { host, len } => assert!(host.0 + len.0 <= bytes.len() as u64),
                Place::Damaged => damaged = Some(segment.range),
                Place::Data { .. } | Place::Zero { .. } | Place::Backing => {}
            }
            count += 1;
            if count < SEGMENTS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .expect("a file in memory reads");
    assert!(count == SEGMENTS_MAX || end == whole.len.0);
    if let Some(range) = damaged {
        let _ = layer.explain(range).to_string();
        assert!(layer.verify_tables().is_err());
    }
});
