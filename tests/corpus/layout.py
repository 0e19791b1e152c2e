"""Where things are in a qcow2 file, for whoever wants to break exactly one of them.

Owns the offsets of header fields and table entries, and changes to them in memory. It believes the file: it is only
given sound ones, made a moment ago by qemu-img.
"""

import struct

# Header fields: offset and width in bytes.
HEADER = {
    "magic": (0, 4), "version": (4, 4), "backing_file_offset": (8, 8), "backing_file_size": (16, 4),
    "cluster_bits": (20, 4), "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4),
    "l1_table_offset": (40, 8), "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible_features": (72, 8),
    "compatible_features": (80, 8), "autoclear_features": (88, 8), "refcount_order": (96, 4),
    "header_length": (100, 4), "compression_type": (104, 1),
}

# Fields of a snapshot table entry.
SNAPSHOT = {
    "l1_table_offset": (0, 8), "l1_size": (8, 4), "id_size": (12, 2), "name_size": (14, 2), "extra_size": (36, 4),
    "disk_size": (48, 8),
}

BACKING_FORMAT, FEATURE_NAMES, BITMAPS, DATA_FILE = 0xE2792ACA, 0x6803F857, 0x23852875, 0x44415441
LUKS = 0x0537BE77

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = 1, 2, 4, 8, 16

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00


class Qcow2:
    """The bytes of an image, with names for the places in it."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as f:
            self.data = bytearray(f.read())

    def save(self, path=None):
        with open(path or self.path, "wb") as f:
            f.write(self.data)

    def get(self, at, width=8):
        return int.from_bytes(self.data[at : at + width], "big")

    def put(self, at, value, width=8):
        """Write a big-endian number; the file grows when it lies past the end."""
        if len(self.data) < at + width:
            self.data.extend(bytes(at + width - len(self.data)))
        self.data[at : at + width] = value.to_bytes(width, "big")

    def cut(self, length):
        """Keep only the start of the file."""
        del self.data[length:]

    def __getitem__(self, field):
        return self.get(*HEADER[field])

    def __setitem__(self, field, value):
        at, width = HEADER[field]
        self.put(at, value, width)

    def set(self, **fields):
        for field, value in fields.items():
            self[field] = value

    @property
    def cluster(self):
        return 1 << self["cluster_bits"]

    @property
    def extended(self):
        return self["version"] > 2 and bool(self["incompatible_features"] & EXTENDED_L2)

    @property
    def entry_len(self):
        return 16 if self.extended else 8

    @property
    def l2_entries(self):
        return self.cluster // self.entry_len

    def l1_at(self, index=0):
        """Where in the file L1 entry `index` is."""
        return self["l1_table_offset"] + 8 * index

    def l1_covers(self):
        """Guest bytes under one L1 entry."""
        return self.l2_entries * self.cluster

    def l2_table(self, index=0):
        """Where the L2 table of L1 entry `index` begins."""
        return self.get(self.l1_at(index)) & OFFSET_MASK

    def l2_at(self, guest_cluster):
        """Where in the file the L2 entry of a guest cluster is."""
        table, slot = divmod(guest_cluster, self.l2_entries)
        return self.l2_table(table) + slot * self.entry_len

    def entry(self, guest_cluster):
        return self.get(self.l2_at(guest_cluster))

    def set_entry(self, guest_cluster, value):
        self.put(self.l2_at(guest_cluster), value)

    def host(self, guest_cluster):
        """Host offset of an uncompressed guest cluster."""
        return self.entry(guest_cluster) & OFFSET_MASK

    def compressed(self, guest_cluster):
        """Host offset and bytes that the entry of a compressed cluster reserves, up to the end of its last sector."""
        entry = self.entry(guest_cluster)
        assert entry & COMPRESSED, f"{self.path}: cluster {guest_cluster} is not compressed"
        return self._descriptor(entry)

    def _descriptor(self, entry):
        split = 62 - (self["cluster_bits"] - 8)
        offset = entry & ((1 << split) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> split
        return offset, (sectors + 1) * 512 - offset % 512

    def compressed_entry(self, offset, length):
        """The entry of a compressed cluster that lies at `offset` and needs `length` bytes."""
        split = 62 - (self["cluster_bits"] - 8)
        sectors = (offset + length - 1) // 512 - offset // 512
        return COMPRESSED | (sectors << split) | offset

    def replace_compressed(self, guest_cluster, stream):
        """Append `stream` to the file and make it what a guest cluster decodes from."""
        at = -(-len(self.data) // self.cluster) * self.cluster
        self.data.extend(bytes(at - len(self.data)))
        self.data.extend(stream)
        self.data.extend(bytes(-len(self.data) % self.cluster))
        self.set_entry(guest_cluster, self.compressed_entry(at, len(stream)))

    def refcount_block_at(self, index=0):
        """Where refcount block `index` begins."""
        return self.get(self["refcount_table_offset"] + 8 * index) & OFFSET_MASK

    def set_refcount(self, host_cluster, value):
        """For the default width of 16 bits, in the first refcount block."""
        self.put(self.refcount_block_at() + 2 * host_cluster, value, 2)

    def extensions(self):
        """(type, where its data begins, length) of each header extension."""
        at = self["header_length"] if self["version"] > 2 else 72
        while True:
            kind, length = struct.unpack_from(">II", self.data, at)
            if kind == 0:
                return
            yield kind, at + 8, length
            at += 8 + -(-length // 8) * 8

    def extension(self, kind):
        """Where the data of an extension begins."""
        return next(at for found, at, _ in self.extensions() if found == kind)

    def extensions_end(self):
        """Where the end marker of the extensions is."""
        last = self["header_length"] if self["version"] > 2 else 72
        for _, at, length in self.extensions():
            last = at + -(-length // 8) * 8
        return last

    def add_extension(self, kind, data, length=None):
        """Append an extension that claims `length` bytes; the backing name must not lie behind it."""
        at = self.extensions_end()
        padded = data + bytes(-len(data) % 8)
        struct.pack_into(">II", self.data, at, kind, len(data) if length is None else length)
        self.data[at + 8 : at + 8 + len(padded)] = padded
        self.data[at + 8 + len(padded) : at + 16 + len(padded)] = bytes(8)

    def set_backing(self, name):
        """Record a backing file name (bytes) at the end of the header's cluster."""
        at = self.cluster - 1024 if self.cluster > 2048 else self.extensions_end() + 8
        self.data[at : at + len(name)] = name
        self["backing_file_offset"] = at
        self["backing_file_size"] = len(name)

    def mapped(self):
        """Every L2 entry that is not 0, of the active image and of the snapshots."""
        tables = [(self["l1_table_offset"], self["l1_size"])]
        tables += [(self.get(at), self.get(at + 8, 4)) for at in self._snapshot_entries()]
        for l1, size in tables:
            for index in range(size):
                table = self.get(l1 + 8 * index) & OFFSET_MASK
                slots = range(table, table + self.cluster, self.entry_len) if table else ()
                yield from filter(None, (self.get(at) for at in slots))

    def is_shared_by_streams_and_data(self):
        """Whether a host cluster holds compressed streams and is data as well."""
        data, streams = set(), set()
        for entry in self.mapped():
            if entry & COMPRESSED:
                offset, length = self._descriptor(entry)
                streams |= {offset // self.cluster, (min(offset + length, len(self.data)) - 1) // self.cluster}
            else:
                data.add((entry & OFFSET_MASK) // self.cluster)
        return bool(data & streams)

    def _snapshot_entries(self):
        at = self["snapshots_offset"]
        for _ in range(self["nb_snapshots"]):
            yield at
            id_size, name_size = struct.unpack_from(">HH", self.data, at + 12)
            at += -(-(40 + self.get(at + 36, 4) + id_size + name_size) // 8) * 8

    def snapshot_sizes(self):
        """Virtual size of the disk at each internal snapshot, in order."""
        return [self.get(at + 48) for at in self._snapshot_entries()]

    def snapshot_at(self, field):
        """Offset and width of a field of the first snapshot table entry."""
        at, width = SNAPSHOT[field]
        return self["snapshots_offset"] + at, width
