//! What reads follow: an index together with the files that it names.
//!
//! Owns [`View`]. A view is immutable and shared by any number of readers; whoever holds it holds its index's epoch, so
//! that nothing it names is given back meanwhile.

use std::sync::Arc;

use super::{asynchronous::Located, fair::Key, storage::StorageFile};
use crate::{
    cow::{
        blocks::BlockSet,
        frozen::Slot,
        plan::{Index, Place, Segment},
    },
    device::{Extent, ExtentKind},
    error::{Error, Result},
    image::BaseImage,
    units::{ByteLen, ByteRange, to_usize},
};

/// Runs of one [`View::extents`] answer.
pub const EXTENTS_MAX: usize = 1024;

/// The first bytes of `range` that lie in `blocks`.
pub fn uncertain_bytes(blocks: &BlockSet, range: ByteRange) -> Option<ByteRange> {
    blocks.first_in(range.blocks_touched())?.bytes().intersect(range)
}

/// The data files of frozen layers, by slot.
#[derive(Clone, Debug, Default)]
pub struct LayerFiles {
    /// In ascending order of slots.
    files: Arc<[(Slot, Arc<dyn StorageFile>)]>,
}

impl LayerFiles {
    pub fn new(mut files: Vec<(Slot, Arc<dyn StorageFile>)>) -> LayerFiles {
        files.sort_by_key(|(slot, _)| *slot);
        LayerFiles { files: files.into() }
    }

    /// These files and `others`.
    #[must_use]
    pub fn with(&self, others: &LayerFiles) -> LayerFiles {
        let mut files = self.files.to_vec();
        files.extend(others.files.iter().filter(|(slot, _)| self.get(*slot).is_none()).cloned());
        LayerFiles::new(files)
    }

    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.files.iter().map(|(slot, _)| *slot)
    }

    pub fn get(&self, slot: Slot) -> Option<&Arc<dyn StorageFile>> {
        let at = self.files.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
        self.files.get(at).map(|(_, file)| file)
    }
}

/// An index and the files that it names.
#[derive(Clone, Debug)]
pub struct View {
    pub index: Arc<Index>,
    /// The head's data; none for a snapshot.
    pub head: Option<Arc<dyn StorageFile>>,
    pub layers: LayerFiles,
    pub base: Option<Arc<dyn BaseImage>>,
}

impl View {
    /// Fill `buffer` from `offset`, which lies within the volume.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::within(offset, buffer.len() as u64, self.index.size)?;
        let mut result = Ok(());
        self.index.each(range, |segment| {
            let at = to_usize(segment.range.start.0 - offset);
            result = self.read_segment(segment, &mut buffer[at..at + segment.range.len.as_usize()]);
            result.is_ok()
        });
        result
    }

    /// Call `found` with where the bytes of each part of `range` are, in order and without gaps.
    pub fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) -> Result<()> {
        let range = ByteRange::within(range.start.0, range.len.0, self.index.size)?;
        self.index.each(range, |segment| {
            self.locate_segment(segment, found);
            true
        });
        Ok(())
    }

    /// The same for a segment of a plan. What is missing or lost waits for whoever reads it and is told.
    pub fn locate_segment(&self, segment: Segment, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        let range = segment.range;
        let file = match segment.place {
            Place::Zero => return found(range, Located::Zeros),
            Place::Base => match &self.base {
                Some(base) => return base.locate(range, found),
                None => None,
            },
            Place::Head => self.head.as_ref(),
            Place::Layer(slot) => self.layers.get(slot),
            Place::Lost(_) => None,
        };
        let descriptor = file.and_then(|file| file.descriptor());
        let in_file = |file| Located::File { file, offset: range.start.0 };
        found(range, descriptor.map_or(Located::Waits, in_file));
    }

    /// Fill `buffer`, which is as long as the segment.
    pub fn read_segment(&self, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        let offset = segment.range.start.0;
        let missing = || Error::Invalid(format!("internal: {segment:?} names a file that is not open"));
        match segment.place {
            Place::Zero => {
                buffer.fill(0);
                Ok(())
            }
            Place::Head => self.head.as_ref().ok_or_else(missing)?.read_at(buffer, offset),
            Place::Layer(slot) => self.layers.get(slot).ok_or_else(missing)?.read_at(buffer, offset),
            Place::Base => self.base.as_ref().ok_or_else(missing)?.read_at(buffer, offset),
            Place::Lost(_) => Err(Error::Lost {
                start: offset,
                len: segment.range.len.0,
                reason: "the map of a layer was damaged".into(),
            }),
        }
    }

    /// Runs of data and zeros from the start of `range`, without gaps; at least one, at most about [`EXTENTS_MAX`].
    /// Lost blocks count as data, so that whoever wants them reads them and is told.
    pub fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let range = ByteRange::within(range.start.0, range.len.0, self.index.size)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |extent: Extent| match extents.last_mut() {
            Some(last) if last.kind == extent.kind => last.range.len.0 += extent.range.len.0,
            Some(_) | None => extents.push(extent),
        };
        for segment in self.index.plan_bounded(range, EXTENTS_MAX) {
            match (segment.place, &self.base) {
                (Place::Base, Some(base)) => {
                    let inside = base.extents(segment.range)?;
                    let covered: u64 = inside.iter().map(|extent| extent.range.len.0).sum();
                    inside.into_iter().for_each(&mut push);
                    if covered < segment.range.len.0 {
                        break;
                    }
                }
                (Place::Zero, _) => push(Extent { range: segment.range, kind: ExtentKind::Zero }),
                (Place::Head | Place::Layer(_) | Place::Base | Place::Lost(_), _) => {
                    push(Extent { range: segment.range, kind: ExtentKind::Data });
                }
            }
        }
        Ok(extents)
    }

    /// The image that it shares with others, or itself.
    pub fn waits_for(&self) -> Key {
        self.base.as_ref().map_or(std::ptr::from_ref(&*self.index).addr(), |base| base.identity())
    }

    pub fn size(&self) -> ByteLen {
        self.index.size
    }
}
