"""The damaged images whose header is sound: what is wrong is in a table, a cluster, the refcounts or a list.

Owns those cases only; see damaged.py. Guest cluster numbers are those of the recipes in sound.py: cluster 3 of a
`mixed` image is data, cluster 2 of a `compressed` one is compressed, cluster 1 of a `subclusters` one is partial.
"""

import struct
import zlib

import layout
from expect import Case, corrupt, lost, lost_ranges, lost_somehow, lost_table, readable, undecodable, unlisted

PLAIN = "v3_cluster_65536"
# Thirty-two L2 tables of one 512-byte cluster, of which 0, 16 and 31 exist.
SMALL = "v3_cluster_512"
# One 4 KiB cluster of L2 entries.
MEDIUM = "v3_cluster_4096"
EXTENDED = "extl2_65536"
LISTED = "snapshots"

KIB, MIB = 1 << 10, 1 << 20
C = 64 * KIB
SUB_ALLOC, SUB_ZERO = 1, 1 << 32


def entry(guest_cluster, change):
    """Change an L2 entry, given the image and the old value."""
    return lambda image: image.set_entry(guest_cluster, change(image, image.entry(guest_cluster)))


def l1_entry(index, change):
    return lambda image: image.put(image.l1_at(index), change(image, image.get(image.l1_at(index))))


def cut(where):
    """End the file at a place of the image."""
    return lambda image: image.cut(where(image))


def put(where, value, width=8):
    """Write a number at a place of the image; the number may depend on the image too."""
    return lambda image: image.put(where(image), value(image) if callable(value) else value, width)


def ones(width):
    return (1 << 8 * width) - 1


def at_l1(index=0):
    return lambda image: image.l1_at(index)


def past_the_end():
    yield Case("l1_entry_past_end", SMALL, l1_entry(16, lambda *_: layout.COPIED | 1 << 40), corrupt("L1", at_l1(16)))
    yield Case("l1_entry_2_55", SMALL, l1_entry(16, lambda *_: layout.COPIED | 1 << 55), corrupt("L1", at_l1(16)))
    end = cut(lambda image: image["l1_table_offset"] + 128)
    yield Case("file_ends_in_l1_table", SMALL, end, corrupt("L1"))
    end = cut(lambda image: image["l1_table_offset"])
    yield Case("file_ends_before_l1_table", PLAIN, end, corrupt("L1"))
    end = cut(lambda image: image.l2_table() + 1024)
    yield Case("file_ends_in_l2_table", MEDIUM, end, corrupt("L1", at_l1()))
    end = cut(lambda image: image.l2_table())
    yield Case("file_ends_before_l2_table", PLAIN, end, corrupt("L1"))

    yield Case("data_past_end", PLAIN, entry(3, lambda *_: layout.COPIED | 1 << 40), lost("L2", [3]))
    yield Case("data_at_2_55", PLAIN, entry(3, lambda *_: layout.COPIED | 1 << 55), lost("L2", [3]))
    at_end = entry(3, lambda image, _: layout.COPIED | -(-len(image.data) // C) * C)
    yield Case("data_just_past_end", PLAIN, at_end, lost("L2", [3]))
    v2 = entry(3, lambda *_: layout.COPIED | 1 << 40)
    yield Case("v2_data_past_end", "v2_cluster_65536", v2, lost("L2", [3]))
    # The file ends in the last cluster, all of which the image needs.
    end = cut(lambda image: image.host(7) + 512)
    missing = [(7 * C + 512, C - 512)]
    yield Case("file_ends_in_data", "zero_allocated", end, lost_ranges("L2", missing))
    end = cut(lambda image: image.host(7))
    yield Case("file_ends_before_data", "zero_allocated", end, lost("L2", [7]))
    end = cut(lambda image: image.host(5))
    yield Case("file_ends_three_clusters_early", "zero_allocated", end, lost("L2", [5, 6, 7]))
    # Allocated subclusters lie behind the end, not only unallocated ones.
    end = cut(lambda image: image.host(1) + 70 * KIB)
    missing = [(2 * MIB + 70 * KIB, 58 * KIB)]
    yield Case("extl2_file_ends_in_subcluster", "extl2_last_cluster_cut", end, lost_ranges("L2", missing))


def table_entries():
    for name, change in {
        "unaligned": lambda _, old: old + 8 * 512,
        "reserved_low": lambda _, old: old | 1,
        "reserved_high": lambda _, old: old | 1 << 56,
        "reserved_bit_62": lambda _, old: old | 1 << 62,
    }.items():
        yield Case(f"l1_entry_{name}", PLAIN, l1_entry(0, change), corrupt("L1", at_l1()))
    targets = {
        "header": lambda image: 0,
        "l1_table": lambda image: image["l1_table_offset"],
        "refcount_table": lambda image: image["refcount_table_offset"],
        "refcount_block": lambda image: image.refcount_block_at(),
    }
    for name, target in targets.items():
        change = l1_entry(0, lambda image, _, target=target: layout.COPIED | target(image))
        yield Case(f"l1_entry_at_{name}", PLAIN, change, corrupt("L1", at_l1()))
        change = entry(3, lambda image, _, target=target: layout.COPIED | target(image))
        yield Case(f"l2_entry_at_{name}", PLAIN, change, lost("L2", [3]))
    change = entry(3, lambda image, _: layout.COPIED | image.l2_table())
    yield Case("l2_entry_at_l2_table", PLAIN, change, lost("L2", [3]))
    shared = put(at_l1(16), lambda image: image.get(image.l1_at()))
    yield Case("l1_entries_share_a_table", SMALL, shared, corrupt("L1", at_l1(16)))
    yield Case("l1_of_2_mib_shares_one_table", SMALL, share_one_table, corrupt("L1"))

    for name, change in {
        "unaligned": lambda _, old: old + 512,
        "reserved_bit_1": lambda _, old: old | 2,
        "reserved_bit_8": lambda _, old: old | 1 << 8,
        "reserved_bit_56": lambda _, old: old | 1 << 56,
        "reserved_bit_61": lambda _, old: old | 1 << 61,
    }.items():
        yield Case(f"l2_entry_{name}", PLAIN, entry(3, change), lost("L2", [3]))
    yield Case("v2_zero_flag", "v2_cluster_65536", entry(3, lambda _, old: old | 1), lost("L2", [3]))
    flag = entry(2, lambda _, old: old | layout.COPIED)
    yield Case("copied_flag_on_compressed", "zlib_65536", flag, lost("L2", [2]))
    table = put(lambda image: image.l2_table(), ones(4096), 4096)
    yield Case("l2_table_all_ones", MEDIUM, table, lost_somehow("", *range(256)))
    yield Case("l2_table_of_garbage", SMALL, garbage_table, lost_table("L2", 16))


def share_one_table(image):
    """A quarter of a million L1 entries, all of them the same table: a disk of 8 GiB from 2 MiB."""
    entries = 1 << 18
    table = image.get(image.l1_at())
    image["l1_table_offset"] = len(image.data) + -len(image.data) % image.cluster
    image["l1_size"] = entries
    image["size"] = entries * image.l1_covers()
    image.data.extend(bytes(-len(image.data) % image.cluster))
    image.data.extend(table.to_bytes(8, "big") * entries)


def garbage_table(image):
    """Unaligned entries with reserved bits throughout one L2 table."""
    at = image.l2_table(16)
    for slot in range(64):
        image.put(at + 8 * slot, layout.COPIED | 1 << 57 | slot << 10 | 6)


def deflate(data):
    """A stream as qcow2 has it: raw, with a window of 4 KiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def zstd_of_one_byte(length):
    """A zstd frame of `length` equal bytes, in blocks that repeat one."""
    blocks = [min(length - at, 128 << 10) for at in range(0, length, 128 << 10)]
    headers = b"".join(
        struct.pack("<I", size << 3 | 1 << 1 | (1 if i + 1 == len(blocks) else 0))[:3] + b"B"
        for i, size in enumerate(blocks)
    )
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", length) + headers


def bombs(image):
    """Every cluster of the image decodes from the same small stream, to far too much."""
    image.replace_compressed(0, deflate(bytes(64 << 20)))
    for guest_cluster in range(1, 16):
        image.set_entry(guest_cluster, image.entry(0))


def compressed():
    def stream(data):
        return lambda image: image.replace_compressed(2, data)

    noise = bytes((i * 197 + 91) % 251 for i in range(4096))
    for method, base in (("zlib", "zlib_65536"), ("zstd", "zstd_65536")):
        yield Case(f"{method}_garbage", base, stream(b"\xff" * 16 + noise), undecodable(2))
        yield Case(f"{method}_zeros", base, stream(bytes(4096)), undecodable(2))
        cut = entry(2, lambda image, _: image.compressed_entry(image.compressed(2)[0], 1))
        yield Case(f"{method}_input_cut", base, cut, undecodable(2))
        far = entry(2, lambda image, _: image.compressed_entry(1 << 40, 512))
        yield Case(f"{method}_past_end", base, far, lost_somehow("", 2))
        header = entry(2, lambda image, _: image.compressed_entry(0, 512))
        yield Case(f"{method}_at_header", base, header, lost_somehow("", 2))
    yield Case("zlib_short", "zlib_65536", stream(deflate(b"s" * (C // 2))), undecodable(2))
    yield Case("zlib_one_byte_short", "zlib_65536", stream(deflate(b"s" * (C - 1))), undecodable(2))
    yield Case("zlib_one_byte_long", "zlib_65536", stream(deflate(b"l" * (C + 1))), undecodable(2))
    yield Case("zlib_long", "zlib_65536", stream(deflate(b"l" * (2 * C))), undecodable(2))
    yield Case("zlib_bomb", "zlib_65536", stream(deflate(bytes(64 << 20))), undecodable(2))
    yield Case("zlib_bomb_in_every_cluster", "zlib_65536", bombs, undecodable(*range(16)))
    yield Case("zlib_with_its_header", "zlib_65536", stream(zlib.compress(b"h" * C)), undecodable(2))
    yield Case("v2_zlib_garbage", "v2_zlib_65536", stream(b"\xff" * 512), undecodable(2))
    yield Case("zstd_short", "zstd_65536", stream(zstd_of_one_byte(C // 2)), undecodable(2))
    yield Case("zstd_one_byte_short", "zstd_65536", stream(zstd_of_one_byte(C - 1)), undecodable(2))
    yield Case("zstd_one_byte_long", "zstd_65536", stream(zstd_of_one_byte(C + 1)), undecodable(2))
    yield Case("zstd_long", "zstd_65536", stream(zstd_of_one_byte(2 * C)), undecodable(2))
    yield Case("zstd_bomb", "zstd_65536", stream(zstd_of_one_byte(1 << 30)), undecodable(2))
    yield Case("zlib_stream_in_zstd_image", "zstd_65536", stream(deflate(b"z" * C)), undecodable(2))
    yield Case("zstd_stream_in_zlib_image", "zlib_65536", stream(zstd_of_one_byte(C)), undecodable(2))


def extended_l2():
    def bitmap(guest_cluster, change):
        """Change the subcluster bitmap behind an L2 entry."""

        def apply(image):
            at = image.l2_at(guest_cluster) + 8
            image.put(at, change(image.get(at)))

        return apply

    both = bitmap(1, lambda old: old | SUB_ZERO << 1 | SUB_ALLOC << 1)
    yield Case("extl2_allocated_and_zero", EXTENDED, both, lost("L2", [1]))
    whole = bitmap(0, lambda old: (1 << 64) - 1)
    yield Case("extl2_all_allocated_and_zero", EXTENDED, whole, lost("L2", [0]))
    nowhere = bitmap(7, lambda old: old | SUB_ALLOC << 3)
    yield Case("extl2_allocated_nowhere", EXTENDED, nowhere, lost("L2", [7]))
    flag = entry(1, lambda _, old: old | layout.ZERO)
    yield Case("extl2_zero_flag_of_standard_entries", EXTENDED, flag, lost("L2", [1]))
    squeezed = bitmap(2, lambda old: 0xFFFF_FFFF)
    yield Case("extl2_compressed_with_subclusters", "extl2_zlib", squeezed, lost("L2", [2]))
    far = entry(1, lambda *_: layout.COPIED | 1 << 40)
    yield Case("extl2_data_past_end", EXTENDED, far, lost("L2", [1]))


def refcounts():
    def count(guest_cluster, value):
        return lambda image: image.set_refcount(image.host(guest_cluster) // image.cluster, value)

    yield Case("refcount_zero", PLAIN, count(3, 0), readable(2))
    yield Case("refcount_two", PLAIN, count(3, 2), readable(2))

    def leak(image):
        image.set_refcount(len(image.data) // C, 1)
        image.data.extend(bytes(C))

    yield Case("refcount_of_nothing", "zero_allocated", leak, readable(3))

    def table_entry(value):
        return put(lambda image: image["refcount_table_offset"], value)

    yield Case("refcount_block_missing", PLAIN, table_entry(0), readable(2))
    yield Case("refcount_block_past_end", PLAIN, table_entry(1 << 40), readable(2))
    unaligned = table_entry(lambda image: image.refcount_block_at() + 512)
    yield Case("refcount_block_unaligned", PLAIN, unaligned, readable(1))
    reserved = table_entry(lambda image: image.refcount_block_at() | 1)
    yield Case("refcount_table_reserved_bits", PLAIN, reserved, readable(2))
    zeros = put(lambda image: image.refcount_block_at(), 0, 64)
    yield Case("refcounts_all_zero", PLAIN, zeros, readable(2))


def snapshots():
    def field(name, value):
        return lambda image: image.put(image.snapshot_at(name)[0], value, image.snapshot_at(name)[1])

    def header(**values):
        return lambda image: image.set(**values)

    yield Case("snapshots_65537", LISTED, header(nb_snapshots=65537), unlisted("snapshots"))
    yield Case("snapshots_2_32_less_1", LISTED, header(nb_snapshots=0xFFFF_FFFF), unlisted("snapshots"))
    yield Case("snapshots_one_too_many", LISTED, header(nb_snapshots=3), unlisted("snapshots"))
    yield Case("snapshot_table_past_end", LISTED, header(snapshots_offset=1 << 40), unlisted("snapshots"))
    yield Case("snapshot_table_at_2_63", LISTED, header(snapshots_offset=1 << 63), unlisted("snapshots"))
    unaligned = put(lambda _: layout.HEADER["snapshots_offset"][0], lambda image: image["snapshots_offset"] + 8)
    yield Case("snapshot_table_unaligned", LISTED, unaligned, unlisted("snapshots"))
    yield Case("snapshot_table_at_0", LISTED, header(snapshots_offset=0), unlisted("snapshots"))
    yield Case("snapshot_extra_2_32", LISTED, field("extra_size", 0xFFFF_FFFF), unlisted("snapshots"))
    yield Case("snapshot_name_too_long", LISTED, field("name_size", 0xFFFF), unlisted("snapshots"))
    yield Case("snapshot_l1_past_end", LISTED, field("l1_table_offset", 1 << 40), unlisted("snapshots"))
    yield Case("snapshot_l1_unaligned", LISTED, field("l1_table_offset", 0x50008), unlisted("snapshots"))
    yield Case("snapshot_l1_size_2_32", LISTED, field("l1_size", 0xFFFF_FFFF), unlisted("snapshots"))
    yield Case("snapshot_disk_size_2_63", LISTED, field("disk_size", 1 << 63), unlisted("snapshots"))
    garbage = put(lambda image: image["snapshots_offset"], ones(128), 128)
    yield Case("snapshot_table_of_ones", LISTED, garbage, unlisted("snapshots"))


def bitmaps():
    def extension(at, value, width=8):
        return lambda image: image.put(image.extension(layout.BITMAPS) + at, value, width)

    yield Case("bitmaps_0", "bitmap", extension(0, 0, 4), unlisted("bitmaps"))
    yield Case("bitmaps_2_32_less_1", "bitmap", extension(0, 0xFFFF_FFFF, 4), unlisted("bitmaps"))
    yield Case("bitmap_directory_past_end", "bitmap", extension(16, 1 << 40), unlisted("bitmaps"))
    yield Case("bitmap_directory_unaligned", "bitmap", extension(16, 0x10008), unlisted("bitmaps"))
    yield Case("bitmap_directory_2_63_bytes", "bitmap", extension(8, 1 << 63), unlisted("bitmaps"))
    directory = put(lambda image: image.get(image.extension(layout.BITMAPS) + 16), ones(64), 64)
    yield Case("bitmap_directory_of_ones", "bitmap", directory, unlisted("bitmaps"))


GROUPS = [past_the_end, table_entries, compressed, extended_l2, refcounts, snapshots, bitmaps]
