//! Refcounts of a qcow2 file against what refers to its clusters.
//!
//! Owns [`check`]. Everything that the header leads to is followed: the L1 tables of the image and of its snapshots,
//! their L2 tables and clusters, the snapshot table, the refcount table and its blocks, bitmaps. A cluster that is
//! referred to more often than its refcount says is a corruption, one less often a leak; so are entries that say what
//! they cannot, and a "copied" flag that contradicts the refcount. Clusters are counted in windows of
//! [`WINDOW_CLUSTERS_MAX`], each a pass over all tables, so memory does not grow with the file.

use std::{collections::HashSet, ops::Range};

use bedplate_engine::{
    error::{Error, Result},
    image::qcow2::{Refcounts, Snapshot, header::L1Ref},
    units::to_usize,
};

use crate::tables::{BitmapTables, COPIED, Decoded, L1_RESERVED, L2Entry, OFFSET, QcowFile};

/// Clusters that are counted at once: with 64 KiB clusters a file of 512 GiB. They take 8 bytes each.
pub const WINDOW_CLUSTERS_MAX: u64 = 8 << 20;
/// Passes over one file.
pub const WINDOWS_MAX: u64 = 256;
/// Findings that are told one by one; the others are only counted.
pub const FINDINGS_MAX: usize = 1000;

/// What was found.
#[derive(Debug, Default)]
pub struct Counts {
    /// Clusters of the guest.
    pub total: u64,
    pub allocated: u64,
    /// Allocated clusters that do not follow the one before in the file; each L2 table begins anew.
    pub fragmented: u64,
    pub compressed: u64,
    pub corruptions: u64,
    pub leaks: u64,
    /// End of the last cluster in use.
    pub end: u64,
    pub findings: Vec<String>,
}

impl Counts {
    pub fn corruption(&mut self, text: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.tell(|| format!("ERROR {}", text()));
    }

    fn leak(&mut self, text: impl FnOnce() -> String) {
        self.leaks += 1;
        self.tell(text);
    }

    /// What is only counted is not put into words.
    fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(text());
        }
    }
}

/// Check `file`.
pub fn check(file: &QcowFile) -> Result<Counts> {
    let cluster_size = file.geometry().cluster_size();
    let clusters = file.source.len().div_ceil(cluster_size);
    if clusters > WINDOW_CLUSTERS_MAX * WINDOWS_MAX {
        let most = WINDOW_CLUSTERS_MAX * WINDOWS_MAX;
        let what = format!("a check of a file of more than {most} clusters");
        return Err(Error::Unsupported { path: file.source.path().to_owned(), what });
    }
    let refcounts = file.layer.refcounts()?;
    let mut counts = Counts { total: file.header().size.0.div_ceil(cluster_size), ..Counts::default() };
    let mut start = 0;
    while start < clusters {
        let end = clusters.min(start + WINDOW_CLUSTERS_MAX);
        let pass = if start == 0 { Pass::First } else { Pass::Further };
        Scan::new(file, &refcounts, start..end, pass, &mut counts)?.run()?;
        start = end;
    }
    Ok(counts)
}

/// What does not depend on the window is told in the first pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    First,
    Further,
}

/// Which L1 table is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Active,
    Snapshot,
}

/// One pass over everything that refers to clusters.
struct Scan<'a> {
    file: &'a QcowFile,
    refcounts: &'a Refcounts,
    window: Range<u64>,
    pass: Pass,
    /// Refcounts of the window as the file has them.
    stored: Vec<u32>,
    /// References found.
    counted: Vec<u32>,
    counts: &'a mut Counts,
    /// Where the next cluster would be if nothing was fragmented.
    next: Option<u64>,
}

impl<'a> Scan<'a> {
    fn new(
        file: &'a QcowFile,
        refcounts: &'a Refcounts,
        window: Range<u64>,
        pass: Pass,
        counts: &'a mut Counts,
    ) -> Result<Scan<'a>> {
        let len = to_usize(window.end - window.start);
        let mut scan = Scan {
            file,
            refcounts,
            window,
            pass,
            stored: vec![0; len],
            counted: vec![0; len],
            counts,
            next: None,
        };
        scan.load_stored()?;
        Ok(scan)
    }

    fn run(mut self) -> Result<()> {
        let header = self.file.header();
        self.refer(0, self.file.geometry().cluster_size(), || "the header".to_owned());
        self.l1(header.l1, Table::Active)?;
        self.snapshots()?;
        self.bitmaps()?;
        self.refcount_blocks();
        self.compare();
        Ok(())
    }

    /// Take the refcounts of the window from their blocks.
    fn load_stored(&mut self) -> Result<()> {
        let per_block = self.refcounts.clusters_per_block();
        for index in self.window.start / per_block..self.window.end.div_ceil(per_block) {
            // A block that cannot be followed is told where blocks are counted.
            if !matches!(self.refcounts.block(index), Ok(Some(_))) {
                continue;
            }
            for (cluster, count) in (index * per_block..).zip(self.refcounts.read_block(index)?) {
                if let Some(place) = place(&self.window, cluster)
                    && let Some(stored) = self.stored.get_mut(place)
                {
                    *stored = u32::try_from(count).unwrap_or(u32::MAX);
                }
            }
        }
        Ok(())
    }

    /// Something of `len` bytes lies at `at`.
    fn refer(&mut self, at: u64, len: u64, what: impl Fn() -> String) {
        let cluster_size = self.file.geometry().cluster_size();
        let Some(last) = len.checked_sub(1) else { return };
        // The last cluster may be cut off by the end of the file.
        let within = at
            .checked_add(last)
            .filter(|last| last / cluster_size < self.file.source.len().div_ceil(cluster_size));
        let Some(last) = within else {
            self.corruption(|| format!("{} at {at:#x} lies past the end of the file", what()));
            return;
        };
        for cluster in at / cluster_size..=last / cluster_size {
            if let Some(counted) = place(&self.window, cluster).and_then(|place| self.counted.get_mut(place))
            {
                *counted = counted.saturating_add(1);
            }
        }
    }

    /// A finding of the first pass.
    fn corruption(&mut self, text: impl FnOnce() -> String) {
        if self.pass == Pass::First {
            self.counts.corruption(text);
        }
    }

    /// An entry that points at `at` says whether it is the only one.
    fn copied(&mut self, at: u64, is_copied: bool, what: impl Fn() -> String) {
        let cluster = at / self.file.geometry().cluster_size();
        let stored = match place(&self.window, cluster) {
            Some(place) => self.stored.get(place).copied(),
            // What the file does not have has no refcount.
            None if at >= self.file.source.len() && self.pass == Pass::First => Some(0),
            None => None,
        };
        if let Some(refcount) = stored
            && (refcount == 1) != is_copied
        {
            let flag = if is_copied { "is set" } else { "is not set" };
            self.counts
                .corruption(|| format!("{}: the copied flag {flag}, but the refcount is {refcount}", what()));
        }
    }

    fn l1(&mut self, table: L1Ref, kind: Table) -> Result<()> {
        let geometry = self.file.geometry();
        self.refer(table.offset.0, u64::from(table.entries) * 8, || "an L1 table".to_owned());
        let mut seen = HashSet::new();
        for (index, word) in self.file.l1(table)?.into_iter().enumerate() {
            let name = || format!("L1 entry {index} ({word:#018x})");
            if word & !COPIED == 0 {
                if word != 0 {
                    self.corruption(|| format!("{} has the copied flag, but points nowhere", name()));
                }
                continue;
            }
            if word & L1_RESERVED != 0 {
                self.corruption(|| format!("{} has reserved bits set", name()));
            }
            let at = word & OFFSET;
            self.refer(at, geometry.cluster_size(), || format!("the L2 table of {}", name()));
            if geometry.in_cluster(at) != 0 {
                self.corruption(|| format!("{} is not aligned to a cluster", name()));
                continue;
            }
            // As the engine does: or a few bytes of such entries are tables without end.
            if !seen.insert(at) {
                self.corruption(|| format!("{} shares its L2 table with an entry before it", name()));
                continue;
            }
            if kind == Table::Active {
                self.copied(at, word & COPIED != 0, name);
            }
            let start = index as u64 * geometry.l2_span();
            self.next = None;
            for (entry_index, entry) in self.file.l2(at)?.into_iter().enumerate() {
                let guest = start.saturating_add((entry_index as u64) << geometry.cluster_bits());
                self.entry(entry, guest, kind);
            }
        }
        Ok(())
    }

    /// An entry of an L2 table, which maps the guest's bytes from `guest` on.
    fn entry(&mut self, entry: L2Entry, guest: u64, kind: Table) {
        let geometry = self.file.geometry();
        let external = self.file.header().data_file.is_some();
        let name = || format!("the L2 entry of guest offset {guest:#x} ({:#018x})", entry.word);
        if self.file.reserved(entry) != 0 {
            self.corruption(|| format!("{} has reserved bits set", name()));
        }
        let bitmap = entry.bitmap.unwrap_or(0);
        match self.file.decode(entry) {
            Decoded::Compressed { host, len } => {
                if entry.is_copied() {
                    self.corruption(|| format!("{} is compressed and has the copied flag", name()));
                }
                if external || bitmap != 0 {
                    self.corruption(|| format!("{} is compressed where nothing can be", name()));
                    return;
                }
                self.refer(host.0, len, || format!("the compressed cluster of {}", name()));
                if kind == Table::Active && self.pass == Pass::First {
                    self.counts.allocated += 1;
                    self.counts.compressed += 1;
                    self.counts.fragmented += 1;
                }
            }
            Decoded::Data { host } | Decoded::Zero { host: Some(host) } => {
                if (bitmap >> 32) & bitmap & u64::from(u32::MAX) != 0 {
                    self.corruption(|| format!("{} calls a part allocated and zero", name()));
                }
                if geometry.in_cluster(host.0) != 0 {
                    self.corruption(|| format!("{} is not aligned to a cluster", name()));
                    return;
                }
                if kind == Table::Active {
                    self.follow(host.0);
                }
                if external {
                    return;
                }
                self.refer(host.0, geometry.cluster_size(), || format!("the cluster of {}", name()));
                if kind == Table::Active {
                    self.copied(host.0, entry.is_copied(), name);
                }
            }
            Decoded::Zero { host: None } | Decoded::Unallocated => {
                if bitmap & u64::from(u32::MAX) != 0 {
                    self.corruption(|| format!("{} calls a part allocated, but says not where", name()));
                }
            }
        }
    }

    /// Count a cluster, and whether it comes right after the one before.
    fn follow(&mut self, at: u64) {
        if self.pass == Pass::First {
            self.counts.allocated += 1;
            self.counts.fragmented += u64::from(self.next.is_some_and(|next| next != at));
            self.next = at.checked_add(self.file.geometry().cluster_size());
        }
    }

    fn snapshots(&mut self) -> Result<()> {
        let header = self.file.header();
        let snapshots: Vec<Snapshot> = match self.file.layer.snapshots() {
            Ok(snapshots) => snapshots,
            Err(error) => {
                self.corruption(|| error.to_string());
                return Ok(());
            }
        };
        for snapshot in &snapshots {
            match snapshot.l1(header, self.file.source.len()) {
                Ok(table) => self.l1(table, Table::Snapshot)?,
                Err(fault) => {
                    let error = fault.of(self.file.source.path());
                    self.corruption(|| format!("snapshot {:?}: {error}", snapshot.name));
                }
            }
        }
        if !snapshots.is_empty() {
            let len = self.file.snapshot_table_len()?;
            self.refer(header.snapshots.offset, len, || "the snapshot table".to_owned());
        }
        Ok(())
    }

    fn bitmaps(&mut self) -> Result<()> {
        let cluster_size = self.file.geometry().cluster_size();
        let BitmapTables { directory, tables } = match self.file.bitmap_tables() {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.corruption(|| error.to_string());
                return Ok(());
            }
        };
        self.refer(directory.start, directory.end - directory.start, || "the bitmap directory".to_owned());
        for (at, entries) in tables {
            self.refer(at, u64::from(entries) * 8, || "a bitmap table".to_owned());
            for word in self.file.words(at, entries.into(), "bitmap table")? {
                let at = word & OFFSET;
                if at != 0 {
                    self.refer(at, cluster_size, || "a part of a bitmap".to_owned());
                }
            }
        }
        Ok(())
    }

    fn refcount_blocks(&mut self) {
        let cluster_size = self.file.geometry().cluster_size();
        let table = self.file.header().refcounts.range;
        self.refer(table.start.0, table.len.0, || "the refcount table".to_owned());
        for index in 0..self.refcounts.block_count() {
            match self.refcounts.block(index) {
                Ok(None) => {}
                Ok(Some(at)) => {
                    self.refer(at, cluster_size, || format!("refcount block {index}"));
                    let counted = place(&self.window, at / cluster_size)
                        .and_then(|place| self.counted.get(place).copied());
                    if let Some(counted) = counted.filter(|counted| *counted != 1) {
                        self.counts.corruption(|| format!("refcount block {index} refcount={counted}"));
                    }
                }
                Err(fault) => {
                    let error = fault.of(self.file.source.path());
                    self.corruption(|| error.to_string());
                }
            }
        }
    }

    fn compare(self) {
        let cluster_size = self.file.geometry().cluster_size();
        for (cluster, (stored, counted)) in self.window.zip(self.stored.iter().zip(&self.counted)) {
            if *stored > 0 || *counted > 0 {
                self.counts.end = (cluster + 1) * cluster_size;
            }
            let text = || format!("cluster {cluster} refcount={stored} reference={counted}");
            if stored < counted {
                self.counts.corruption(text);
            } else if stored > counted {
                self.counts.leak(|| format!("Leaked {}", text()));
            }
        }
    }
}

/// Where a cluster is in the arrays of a window.
fn place(window: &Range<u64>, cluster: u64) -> Option<usize> {
    window.contains(&cluster).then(|| to_usize(cluster - window.start))
}
