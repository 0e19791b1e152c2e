"""The damaged images: a sound one with one thing broken each, and what a reader must make of it.

Owns what is wrong with headers, features and the files that images name; damaged_tables.py has tables, clusters,
refcounts and lists. Where qemu-img reads on (it takes bytes past the end for zeros, and opens every file that it is
told to), the expectation is stricter than qemu-img: the reasons are in tests/README.md.
"""

import os

import damaged_tables
import layout
import qemu
from expect import Case, corrupt, reference, refused, unsupported

PLAIN = "v3_cluster_4096"
V2 = "v2_cluster_4096"
# With the names of the features in it: qemu-img leaves them out of small clusters.
NAMED = "v3_cluster_65536"


def fields(**values):
    """Set header fields."""
    return lambda image: image.set(**values)


def keep(length):
    """Keep only the start of the file."""
    return lambda image: image.cut(length)


def not_the_format():
    for length in (0, 1, 3):
        yield Case(f"only_{length}_bytes", PLAIN, keep(length), corrupt("magic"))
    for length in (4, 8, 24, 71, 72, 103):
        yield Case(f"only_{length}_bytes", PLAIN, keep(length), corrupt("header"))
    yield Case("v2_only_71_bytes", V2, keep(71), corrupt("header"))
    yield Case("wrong_magic", PLAIN, fields(magic=0x514649FA), corrupt("magic"))
    yield Case("all_zeros", PLAIN, lambda image: image.put(0, 0, 512), corrupt("magic"))
    for version in (0, 1, 4, 0xFFFF_FFFF):
        yield Case(f"version_{version}", PLAIN, fields(version=version), unsupported("version"))


def absurd_geometry():
    for bits in (0, 8, 22, 31, 32, 63, 64, 1 << 31, 0xFFFF_FFFF):
        yield Case(f"cluster_bits_{bits}", PLAIN, fields(cluster_bits=bits), corrupt("cluster_bits"))
    for bits in (0, 8, 22, 0xFFFF_FFFF):
        yield Case(f"v2_cluster_bits_{bits}", V2, fields(cluster_bits=bits), corrupt("cluster_bits"))
    yield Case("extl2_cluster_bits_13", "extl2_16384", fields(cluster_bits=13), corrupt("cluster_bits"))
    huge = {"2_62": 1 << 62, "2_63_less_1": (1 << 63) - 1, "2_63": 1 << 63, "2_64_less_1": (1 << 64) - 1}
    for name, size in huge.items():
        yield Case(f"size_{name}", PLAIN, fields(size=size), refused("size"))
    yield Case("size_needs_more_l1", PLAIN, fields(size=1 << 40), corrupt("l1_size"))
    for entries in (0, (1 << 22) + 1, 0xFFFF_FFFF):
        yield Case(f"l1_size_{entries}", PLAIN, fields(l1_size=entries), corrupt("l1_size"))
    yield Case("l1_size_one_short", "v3_cluster_512", fields(l1_size=31), corrupt("l1_size"))
    yield Case("v2_l1_size_0", V2, fields(l1_size=0), corrupt("l1_size"))
    wrong = {"0": 0, "unaligned": 0x3008, "2_63": 1 << 63, "2_64_less_1": (1 << 64) - 1}
    for name, at in wrong.items():
        yield Case(f"l1_table_at_{name}", PLAIN, fields(l1_table_offset=at), corrupt("l1_table_offset"))
    yield Case("l1_table_past_end", PLAIN, fields(l1_table_offset=1 << 40), corrupt("L1 table", at=None))
    yield Case("l1_table_over_refcount_table", PLAIN, fields(l1_table_offset=0x1000), corrupt("L1", at=None))
    for order in (7, 63, 0xFFFF_FFFF):
        yield Case(f"refcount_order_{order}", PLAIN, fields(refcount_order=order), corrupt("refcount_order"))
    for clusters in (0, 1 << 20, 0xFFFF_FFFF):
        values = fields(refcount_table_clusters=clusters)
        yield Case(f"refcount_table_clusters_{clusters}", PLAIN, values, corrupt("refcount_table_clusters"))
    for name, at in (("0", 0), ("unaligned", 0x1200), ("past_end", 1 << 40), ("2_63", 1 << 63)):
        values = fields(refcount_table_offset=at)
        yield Case(f"refcount_table_at_{name}", PLAIN, values, corrupt("refcount_table_offset"))


def header_length_and_extensions():
    for length in (0, 72, 103, 105, 65544, 0xFFFF_FFFF):
        yield Case(f"header_length_{length}", PLAIN, fields(header_length=length), corrupt("header_length"))

    def length_of(kind, length):
        return lambda image: image.put(image.extension(kind) - 4, length, 4)

    for name, length in (("past_cluster", 65536), ("2_31", 1 << 31), ("2_32_less_1", 0xFFFF_FFFF)):
        change = length_of(layout.FEATURE_NAMES, length)
        yield Case(f"extension_length_{name}", NAMED, change, corrupt("extension"))
    change = length_of(layout.BACKING_FORMAT, 0x10000)
    yield Case("backing_format_too_long", "over_raw", change, refused("extension"))

    def too_long(image):
        image.add_extension(layout.LUKS, bytes(16), 1 << 20)

    yield Case("encryption_extension_too_long", PLAIN, too_long, corrupt("extension"))


def features():
    for bit in (5, 31, 63):
        change = fields(incompatible_features=1 << bit)
        yield Case(f"incompatible_feature_{bit}", PLAIN, change, unsupported(f"bit {bit}"))

    def named(image):
        at = image.extension(layout.FEATURE_NAMES)
        image.data[at : at + 48] = bytes([0, 40]) + b"time travel".ljust(46, b"\0")
        image["incompatible_features"] = 1 << 40

    yield Case("incompatible_feature_named", NAMED, named, unsupported("time travel"))
    known = fields(incompatible_features=1 << 6 | layout.DIRTY)
    yield Case("incompatible_feature_beside_known", PLAIN, known, unsupported("bit 6"))
    yield Case("compression_type_without_its_bit", PLAIN, fields(compression_type=1), corrupt("compression_type"))
    bit = fields(incompatible_features=layout.COMPRESSION_TYPE)
    yield Case("compression_bit_without_type", PLAIN, bit, corrupt("compression_type"))
    for kind in (2, 255):
        change = fields(incompatible_features=layout.COMPRESSION_TYPE, compression_type=kind)
        yield Case(f"compression_type_{kind}", PLAIN, change, unsupported("compression_type"))

    def no_field(image):
        image["header_length"] = 104
        image.put(104, 0)
        image["incompatible_features"] = layout.COMPRESSION_TYPE

    yield Case("compression_bit_without_field", PLAIN, no_field, corrupt("compression_type"))
    for base, version in ((PLAIN, "v3"), (V2, "v2")):
        for method in (1, 2, 9, 0xFFFF_FFFF):
            change = fields(crypt_method=method)
            yield Case(f"{version}_crypt_method_{method}", base, change, unsupported("encryption"))


def real_encryption(shop):
    """Images that qemu-img encrypted itself: manifest entries."""
    for form in ("luks", "aes"):
        file = f"damaged/encrypted_{form}.qcow2"
        fast = ",encrypt.iter-time=10" if form == "luks" else ""
        options = f"encrypt.format={form},encrypt.key-secret=key{fast}"
        qemu.run(
            "qemu-img", "create", "-q", "--object", "secret,id=key,data=never-used", "-f", "qcow2",
            "-o", options, shop.path(file), 1 << 20,
        )
        refusal = {"class": "unsupported", "naming": "encryption", "at": None}
        yield {"name": f"encrypted_{form}", "file": file, "expect": {"refused": refusal}}


def names_another_file():
    def backing(name):
        return lambda image: image.set_backing(name)

    refusals = {
        "missing": b"not-there.raw", "absolute": b"/etc/hostname", "above": b"../../../../../../../../etc/hostname",
        "device": b"/dev/zero", "json": b'json:{"driver":"null-co"}', "file_protocol": b"file:../base.raw",
        "nbd": b"nbd:127.0.0.1:10809", "not_utf8": b"base\xff\xfe.raw", "with_nul": b"../base.raw\0.raw",
        "directory": b".", "proc": b"/proc/self/mem",
    }
    for name, recorded in refusals.items():
        yield Case(f"backing_{name}", "over_raw", backing(recorded), reference("backing"))
    yield Case("backing_itself", "over_raw", backing(b"backing_itself.qcow2"), reference("backing"))
    yield Case("backing_loop_a", "over_qcow2", backing(b"backing_loop_b.qcow2"), reference("backing"))
    yield Case("backing_loop_b", "over_qcow2", backing(b"backing_loop_a.qcow2"), reference("backing"))
    link = (("link.raw", lambda path: os.symlink("/etc/hostname", path)),)
    yield Case("backing_link_out", "over_raw", backing(b"link.raw"), reference("backing"), link)
    pipe = (("pipe.raw", os.mkfifo),)
    yield Case("backing_pipe", "over_raw", backing(b"pipe.raw"), reference("backing"), pipe)
    length = fields(backing_file_size=1024)
    yield Case("backing_name_1024_bytes", "over_raw", length, corrupt("backing_file_size"))
    length = fields(backing_file_size=0xFFFF_FFFF)
    yield Case("backing_name_2_32_bytes", "over_raw", length, corrupt("backing_file_size"))
    for name, at in (("past_cluster", 0x10000), ("past_end", 1 << 40), ("2_64_less_1", (1 << 64) - 1)):
        change = fields(backing_file_offset=at)
        yield Case(f"backing_name_{name}", "over_raw", change, corrupt("backing_file_offset"))
    crossing = fields(backing_file_offset=65536 - 4)
    yield Case("backing_name_crossing_cluster", "over_raw", crossing, corrupt("backing_file_offset"))

    def data_file(name):
        def change(image):
            at = image.extension(layout.DATA_FILE)
            image.put(at - 8, 0x7E57_0000, 4)  # the old name becomes an extension that nobody knows
            image.add_extension(layout.DATA_FILE, name)

        return change

    refusals = {
        "missing": b"not-there.data", "absolute": b"/etc/hostname", "device": b"/dev/zero",
        "above": b"../../../../../../../../etc/hostname", "itself": b"data_file_itself.qcow2",
        "json": b'json:{"driver":"null-co"}',
    }
    for name, recorded in refusals.items():
        yield Case(f"data_file_{name}", "data_file", data_file(recorded), reference("data"))
    nameless = fields(incompatible_features=layout.EXTERNAL_DATA)
    yield Case("data_file_without_name", PLAIN, nameless, reference("data"))


GROUPS = [not_the_format, absurd_geometry, header_length_and_extensions, features, names_another_file]


def write(shop, pool):
    """Make them all; returns their manifest entries."""
    cases = [case for group in [*GROUPS, *damaged_tables.GROUPS] for case in group()]
    for case in cases:
        for name, make in case.beside:
            make(shop.path(f"damaged/{name}"))
    return [*pool.map(lambda case: damage(shop, case), cases), *real_encryption(shop)]


def damage(shop, case):
    image = layout.Qcow2(shop.path(case.original))
    expectation = case.expect(image, case)
    case.change(image)
    image.save(shop.path(case.file))
    checked = expectation.get("readable")
    if checked and (said := qemu.check_exit(case.file)) != checked["check"]:
        raise qemu.Failed(f"{case.name}: qemu-img check says {said}, not {checked['check']}")
    return {"name": case.name, "file": case.file, "expect": expectation}
