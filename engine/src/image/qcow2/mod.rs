//! A qcow2 file: read only, strict, without a lock.
//!
//! Owns [`Qcow2Layer`], one file on its own, in which some ranges may belong to a file below, and [`Qcow2Image`], a
//! layer that needs no other file and so can be a base. What is checked when: the header, the L1 table and where the
//! metadata lies when it is opened; an L2 table when it is first needed; a compressed cluster whenever it is decoded.
//! [`Qcow2Layer::verify_tables`] checks all tables at once, before an image is taken in. What of it all is sound and
//! what is not: decision 0006. Layout: the public specification of the format.
//!
//! Memory that any file can cost, by name: [`header::L1_BYTES_MAX`] (half of it again as the index),
//! [`header::REFCOUNT_TABLE_BYTES_MAX`], [`tables::L2_BYTES_MAX`], [`cache::DECODED_BYTES_MAX`]; each is bounded by the
//! file's own length too, but for the last.

#![deny(clippy::indexing_slicing)]

mod bitmaps;
mod cache;
mod compressed;
mod fault;
pub mod header;
mod map;
mod metadata;
mod refcount;
mod snapshots;
mod source;
mod tables;

use std::{fs::File, io, iter::repeat_n, ops::ControlFlow, path::Path, sync::Arc};

pub use self::{
    bitmaps::{BITMAP_DIRECTORY_BYTES_MAX, BITMAPS_MAX, Bitmap},
    cache::{DECODE_WAIT_MAX, DECODED_BYTES_MAX, DECODED_CLUSTERS_MAX},
    fault::Fault,
    header::{Header, UnverifiedHeader},
    map::{Place, Segment},
    refcount::Refcounts,
    snapshots::{SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX, Snapshot},
    source::Source,
    tables::L2_BYTES_MAX,
};
use self::{
    cache::DecodedClusters,
    compressed::Undecoded,
    header::{DataFile, PEEK_LEN},
    tables::{Clusters, Opening, Tables},
};
use super::BaseImage;
use crate::{
    device::{Extent, ExtentKind},
    error::{Corruption, Error, Result},
    exec::asynchronous::Located,
    units::{ByteLen, ByteOffset, ByteRange, to_usize},
};

/// Runs of one [`BaseImage::extents`] answer.
pub const EXTENTS_MAX: usize = 1024;
/// Segments that are looked at for one [`BaseImage::extents`] answer.
const EXTENT_SEGMENTS_MAX: usize = 1 << 16;

/// Which content of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// What was written last.
    #[default]
    Active,
    /// The internal snapshot with this id, or else with this name.
    Snapshot(String),
}

/// One qcow2 file.
#[derive(Debug)]
pub struct Qcow2Layer {
    file: Arc<Source>,
    /// Where data clusters are, if not in `file`.
    data: Option<Source>,
    header: Header,
    tables: Tables,
    decoded: DecodedClusters,
}

impl Qcow2Layer {
    /// Open `file`, which errors call `path`. Damage of single L1 entries is not an error yet.
    pub fn open(file: File, path: &Path, view: &View) -> Result<Qcow2Layer> {
        let file = Arc::new(Source::new(file, path)?);
        let header = read_header(&file)?;
        let (l1, size) = match view {
            View::Active => (header.l1, header.size),
            View::Snapshot(wanted) => {
                let snapshots = list_snapshots(&file, &header)?;
                let snapshot = snapshots
                    .iter()
                    .find(|snapshot| snapshot.id == *wanted)
                    .or_else(|| snapshots.iter().find(|snapshot| snapshot.name == *wanted))
                    .ok_or_else(|| Error::NotFound { kind: "internal snapshot", name: wanted.clone() })?;
                let l1 = snapshot.l1(&header, file.len()).map_err(|fault| fault.of(path))?;
                (l1, snapshot.size(&header))
            }
        };
        let refcounts = Refcounts::open(file.clone(), header.geometry, header.refcounts)?;
        let cluster_size = header.geometry.cluster_size();
        let mut taken: Vec<_> = refcounts.metadata().collect();
        taken.push(0..cluster_size);
        for table in [header.l1, l1] {
            let end = table.offset.0 + (u64::from(table.entries) * 8).next_multiple_of(cluster_size);
            taken.push(table.offset.0..end);
        }
        let clusters = if header.data_file.is_some() { Clusters::External } else { Clusters::Own };
        let opening = Opening {
            geometry: header.geometry,
            version: header.version,
            clusters,
            l1,
            size,
            taken,
            l2_bytes_max: L2_BYTES_MAX,
        };
        let tables = Tables::open(file.clone(), opening)?;
        let decoded = DecodedClusters::new(cluster_size);
        Ok(Qcow2Layer { file, data: None, header, tables, decoded })
    }

    /// Where data clusters are, for a header that names a data file.
    pub fn attach_data_file(&mut self, data: Source) {
        self.tables.set_data_len(data.len());
        self.data = Some(data);
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file, for executors that carry out [`Place::Data`] on their own.
    pub fn file(&self) -> &Source {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// All files that its bytes come from: its own, and the external data file where one is attached.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        std::iter::once(&*self.file).chain(&self.data)
    }

    /// Virtual size of the view.
    pub fn size(&self) -> ByteLen {
        ByteLen(self.tables.size())
    }

    /// Internal snapshots, in the file's order.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        list_snapshots(&self.file, &self.header)
    }

    /// Bitmaps, in the file's order.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(header) = self.header.bitmaps else { return Ok(Vec::new()) };
        let refused = |field, value, at| Err(Fault::field(field, value, at).of(self.file.path()));
        if header.count == 0 || header.count > BITMAPS_MAX {
            return refused("nb_bitmaps", header.count.into(), 0);
        }
        if header.directory_len > BITMAP_DIRECTORY_BYTES_MAX {
            return refused("bitmap_directory_size", header.directory_len, 0);
        }
        let directory = self.file.bytes(header.directory, header.directory_len, "bitmap directory")?;
        bitmaps::list(&directory, header).map_err(|fault| fault.of(self.file.path()))
    }

    /// The refcount table.
    pub fn refcounts(&self) -> Result<Refcounts> {
        Refcounts::open(self.file.clone(), self.header.geometry, self.header.refcounts)
    }

    /// Call `found` for each segment of `range` in order, until it breaks. Neighbours of one kind that lie next to
    /// one another are one segment.
    pub fn each(&self, range: ByteRange, found: impl FnMut(Segment) -> ControlFlow<()>) -> Result<()> {
        let range = ByteRange::within(range.start.0, range.len.0, self.size())?;
        map::each(&self.tables, range, found)
    }

    /// The first segments of `range`, at most `count`.
    pub fn map(&self, range: ByteRange, count: usize) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        self.each(range, |segment| {
            if segments.len() < count {
                segments.push(segment);
            }
            if segments.len() < count { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(segments)
    }

    /// Why `range`, which [`Place::Damaged`] was said of, cannot be read.
    pub fn explain(&self, range: ByteRange) -> Error {
        self.tables.explain(range)
    }

    /// Check every entry of every table, and name the first that is damaged and what it loses. The number of L2
    /// tables is bounded by the file's length, so this is too.
    pub fn verify_tables(&self) -> Result<()> {
        self.verify_range(ByteRange { start: ByteOffset(0), len: self.size() })
    }

    /// The same for the entries that map `range`.
    pub fn verify_range(&self, range: ByteRange) -> Result<()> {
        let mut damaged = None;
        self.each(range, |segment| match segment.place {
            Place::Damaged => {
                damaged = Some(segment.range);
                ControlFlow::Break(())
            }
            Place::Data { .. } | Place::Zero { .. } | Place::Compressed { .. } | Place::Backing => {
                ControlFlow::Continue(())
            }
        })?;
        damaged.map_or(Ok(()), |range| Err(self.explain(range)))
    }

    /// Fill `buffer` from `offset`; `below` fills what belongs to the file below.
    pub fn read_at(
        &self,
        buffer: &mut [u8],
        offset: u64,
        mut below: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let mut result = Ok(());
        let range = ByteRange::within(offset, buffer.len() as u64, self.size())?;
        map::each(&self.tables, range, |segment| {
            let start = to_usize(segment.range.start.0 - offset);
            let part = buffer.get_mut(start..).and_then(|rest| rest.get_mut(..segment.range.len.as_usize()));
            result = match (part, segment.place) {
                (Some(part), Place::Backing) => below(part, segment.range.start.0),
                (Some(part), _) => self.read_segment(segment, part),
                (None, _) => Err(Error::OutOfRange {
                    start: segment.range.start.0,
                    len: segment.range.len.0,
                    size: self.size().0,
                }),
            };
            if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        result
    }

    /// Where the bytes of `range` are, as far as that is in memory; the rest waits for whoever reads it. What belongs to
    /// the file below is zeros, as it reads without one.
    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        let known = self.tables.known(range);
        let mut at = range.start;
        if let (Some(known), Ok(data)) = (known, self.data_source()) {
            let located = map::each(&self.tables, known, |segment| {
                at = segment.range.end();
                match segment.place {
                    Place::Data { host } => data.locate(segment.range, host.0, found),
                    Place::Zero { .. } | Place::Backing => found(segment.range, Located::Zeros),
                    Place::Compressed { host, len } => {
                        let cluster = self.decoded.peek((host, len));
                        let start = to_usize(self.header.geometry.in_cluster(segment.range.start.0));
                        let part = cluster
                            .as_deref()
                            .and_then(|cluster| cluster.get(start..)?.get(..segment.range.len.as_usize()));
                        found(segment.range, part.map_or(Located::Waits, Located::Bytes));
                    }
                    Place::Damaged => found(segment.range, Located::Waits),
                }
                ControlFlow::Continue(())
            });
            debug_assert!(located.is_ok(), "nothing is read for tables in memory");
        }
        if at < range.end() {
            found(ByteRange { start: at, len: range.end().since(at) }, Located::Waits);
        }
    }

    /// Fill `buffer`, which is as long as the segment. What belongs to the file below is filled with zeros, as it reads
    /// without one.
    pub fn read_segment(&self, segment: Segment, buffer: &mut [u8]) -> Result<()> {
        match segment.place {
            Place::Data { host } => self.data_source()?.read(buffer, host.0, "data"),
            Place::Zero { .. } | Place::Backing => {
                buffer.fill(0);
                Ok(())
            }
            Place::Compressed { host, len } => self.read_compressed(segment.range, host, len, buffer),
            Place::Damaged => Err(self.explain(segment.range)),
        }
    }

    fn data_source(&self) -> Result<&Source> {
        match (&self.data, &self.header.data_file) {
            (Some(data), _) => Ok(data),
            (None, None) => Ok(&self.file),
            (None, Some(data_file)) => Err(Error::Unsupported {
                path: self.file.path().to_owned(),
                what: data_file_needed(data_file),
            }),
        }
    }

    fn read_compressed(
        &self,
        range: ByteRange,
        host: ByteOffset,
        len: ByteLen,
        buffer: &mut [u8],
    ) -> Result<()> {
        let geometry = self.header.geometry;
        let key = (host, len);
        let start = to_usize(geometry.in_cluster(range.start.0));
        let copy = |cluster: &[u8], buffer: &mut [u8]| {
            if let Some(part) = cluster.get(start..).and_then(|rest| rest.get(..buffer.len())) {
                buffer.copy_from_slice(part);
            }
        };
        if buffer.len() as u64 == geometry.cluster_size() {
            return match self.decoded.peek(key) {
                Some(cluster) => {
                    copy(&cluster, buffer);
                    Ok(())
                }
                None => self.decode(range, host, len, buffer),
            };
        }
        let cluster = self.decoded.get(key, || {
            let mut cluster: Arc<[u8]> = repeat_n(0, to_usize(geometry.cluster_size())).collect();
            // Nobody shares it yet, so it is filled in place.
            if let Some(output) = Arc::get_mut(&mut cluster) {
                self.decode(range, host, len, output)?;
            }
            Ok(cluster)
        })?;
        copy(&cluster, buffer);
        Ok(())
    }

    /// Decode the cluster at `host` into `output`; `range` is what the guest loses if that fails.
    fn decode(&self, range: ByteRange, host: ByteOffset, len: ByteLen, output: &mut [u8]) -> Result<()> {
        compressed::with_input(len.as_usize(), |input| {
            self.file.read(input, host.0, "compressed cluster")?;
            compressed::decode(self.header.compression, input, output).map_err(|undecoded| match undecoded {
                Undecoded::Corrupt(problem) => {
                    let what = Corruption::Compressed(problem);
                    let cluster = self.cluster_of(range);
                    Fault::Corrupt { what, at: host }.losing(cluster).of(self.file.path())
                }
                Undecoded::NoMemory => {
                    Error::io("decode", self.file.path(), io::ErrorKind::OutOfMemory.into())
                }
            })
        })
    }

    /// The guest bytes of the cluster that `range` is a part of.
    fn cluster_of(&self, range: ByteRange) -> ByteRange {
        let geometry = self.header.geometry;
        let start = range.start.0 - geometry.in_cluster(range.start.0);
        ByteRange::new(start, geometry.cluster_size().min(self.size().0 - start))
    }
}

/// What to do about an image that is not one file.
const REMEDY: &str = "an image must be one file: --allow-references DIR joins them";

fn data_file_needed(data_file: &DataFile) -> String {
    let name = data_file.name.as_deref().map_or("unnamed".into(), String::from_utf8_lossy);
    format!("the external data file {name:?} ({REMEDY})")
}

/// A qcow2 file that needs no other.
#[derive(Debug)]
pub struct Qcow2Image {
    layer: Qcow2Layer,
}

impl Qcow2Image {
    /// Open `file`, which errors call `path`. Refuses one that names another file, and one whose L1 table is damaged.
    pub fn open(file: File, path: &Path, view: &View) -> Result<Qcow2Image> {
        let layer = Qcow2Layer::open(file, path, view)?;
        Qcow2Image::check_self_contained(&layer.header, path)?;
        match layer.tables.first_damaged_table() {
            Some(lost) => Err(layer.explain(lost)),
            None => Ok(Qcow2Image { layer }),
        }
    }

    /// Refuse a header that names another file.
    pub fn check_self_contained(header: &Header, path: &Path) -> Result<()> {
        let unsupported = |what| Err(Error::Unsupported { path: path.to_owned(), what });
        if let Some(backing) = &header.backing {
            let name = String::from_utf8_lossy(&backing.name);
            return unsupported(format!("the backing file {name:?} ({REMEDY})"));
        }
        match &header.data_file {
            Some(data_file) => unsupported(data_file_needed(data_file)),
            None => Ok(()),
        }
    }

    /// The file behind it.
    pub fn layer(&self) -> &Qcow2Layer {
        &self.layer
    }

    /// See [`Qcow2Layer::verify_tables`].
    pub fn verify_tables(&self) -> Result<()> {
        self.layer.verify_tables()
    }
}

impl BaseImage for Qcow2Image {
    fn len(&self) -> ByteLen {
        self.layer.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.layer.read_at(buffer, offset, |part, _| {
            part.fill(0);
            Ok(())
        })
    }

    fn read_ahead(&self, range: ByteRange) {
        // Whoever reads is told what is wrong.
        let _ = self.layer.each(range, |segment| {
            match segment.place {
                Place::Data { host } => {
                    self.layer.file().read_ahead(ByteRange { start: host, len: segment.range.len })
                }
                Place::Compressed { host, len } => {
                    self.layer.file().read_ahead(ByteRange { start: host, len })
                }
                Place::Zero { .. } | Place::Backing | Place::Damaged => {}
            }
            ControlFlow::Continue(())
        });
    }

    /// Damaged ranges count as data, so that whoever wants them reads them and is told.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut looked_at = 0;
        self.layer.each(range, |segment| {
            let kind = match segment.place {
                Place::Data { .. } | Place::Compressed { .. } | Place::Damaged => ExtentKind::Data,
                Place::Zero { .. } | Place::Backing => ExtentKind::Zero,
            };
            looked_at += 1;
            let full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.len.0 += segment.range.len.0,
                Some(_) | None if full => return ControlFlow::Break(()),
                Some(_) | None => extents.push(Extent { range: segment.range, kind }),
            }
            if looked_at < EXTENT_SEGMENTS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(extents)
    }

    fn locate(&self, range: ByteRange, found: &mut dyn FnMut(ByteRange, Located<'_>)) {
        self.layer.locate(range, found);
    }
}

fn read_header(file: &Source) -> Result<Header> {
    let start = file.bytes_up_to(0, PEEK_LEN, "qcow2 header")?;
    let area = file.bytes_up_to(0, UnverifiedHeader::area_len(&start), "qcow2 header")?;
    UnverifiedHeader::parse(&area)
        .and_then(|header| header.verify(file.len()))
        .map_err(|fault| fault.of(file.path()))
}

fn list_snapshots(file: &Source, header: &Header) -> Result<Vec<Snapshot>> {
    let header::SnapshotsRef { offset, count } = header.snapshots;
    if count == 0 {
        return Ok(Vec::new());
    }
    let geometry = header.geometry;
    if offset == 0 || geometry.in_cluster(offset) != 0 || offset >= file.len() {
        return Err(Fault::field("snapshots_offset", offset, 64).of(file.path()));
    }
    let table = file.bytes_up_to(offset, SNAPSHOT_TABLE_BYTES_MAX, "snapshot table")?;
    snapshots::list(&table, offset, count).map_err(|fault| fault.of(file.path()))
}
