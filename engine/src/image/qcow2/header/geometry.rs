//! How a guest offset is divided: into an entry of the L1 table, one of an L2 table, and a place in a cluster.
//!
//! Owns [`Geometry`], which follows from two fields of the header. Nothing here reads the file.

/// Smallest and largest cluster, as powers of two.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// What an entry of an L2 table looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Format {
    Standard,
    /// With 32 subclusters a cluster.
    Extended,
}

/// How guest offsets are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    format: L2Format,
}

impl Geometry {
    /// `cluster_bits` is one of [`CLUSTER_BITS`].
    pub(in super::super) fn new(cluster_bits: u32, format: L2Format) -> Geometry {
        Geometry { cluster_bits, format }
    }

    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn l2_format(self) -> L2Format {
        self.format
    }

    /// Bytes of one entry of an L2 table.
    pub fn l2_entry_len(self) -> u64 {
        match self.format {
            L2Format::Standard => 8,
            L2Format::Extended => 16,
        }
    }

    /// Entries of an L2 table, which is one cluster.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_span(self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// The entry of the L1 table that maps this guest offset.
    pub fn l1_index(self, offset: u64) -> u64 {
        offset >> (self.l2_bits() + self.cluster_bits)
    }

    /// The entry of its L2 table that maps this guest offset.
    pub fn l2_index(self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    fn l2_bits(self) -> u32 {
        match self.format {
            L2Format::Standard => self.cluster_bits - 3,
            L2Format::Extended => self.cluster_bits - 4,
        }
    }

    /// Bytes of a subcluster; only with [`L2Format::Extended`].
    pub fn subcluster_size(self) -> u64 {
        self.cluster_size() / 32
    }

    /// Position within the cluster.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }
}
