"""The sound images: one recipe each, over every feature of the format.

Owns what is in them. Each is made by qemu's own programs (a few are patched afterwards in a way that the specification
allows), passes `qemu-img check`, and must read as `qemu-img convert` reads it.
"""

from dataclasses import dataclass, field
from typing import Callable

import layout
from qemu import bitmap, snapshot, io, run

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


@dataclass
class Recipe:
    """An image: `qemu-img create` with `options`, then `commands` by qemu-io, then `then` in order."""

    name: str
    size: int | None
    options: dict = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    then: list[Callable] = field(default_factory=list)
    # (file within the corpus, format, name as recorded)
    backing: tuple[str, str, str] | None = None
    # Content given as a whole and compressed by `qemu-img convert -c`, instead of `commands`.
    source: list[tuple[int, str, int]] | None = None
    # The header's size is this, not a multiple of 512.
    exact_size: int | None = None
    # What readers other than ours are known not to manage.
    features: frozenset = frozenset()
    # The exit code of `qemu-img check`; 1 where it cannot run.
    check: int = 0

    @property
    def file(self):
        return self.name if "." in self.name.rsplit("/", 1)[-1] else f"{self.name}.qcow2"


def w(pattern, offset, length):
    return f"write -q -s {{patterns}}/pattern-{pattern} {offset} {length}"


def wc(pattern, offset, length):
    return f"write -q -c -s {{patterns}}/pattern-{pattern} {offset} {length}"


def z(offset, length, flags=""):
    return f"write -q -z {flags} {offset} {length}"


def discard(offset, length):
    return f"discard -q {offset} {length}"


def mixed(size, cluster):
    """Whole, partial and crossing writes, zeros and a discard, up to the last byte."""
    wanted = [
        (w, 0, 0, cluster), (w, 1, 3 * cluster + 512, cluster), (w, 2, 6 * cluster, 2 * cluster),
        (w, 3, size // 2 + 512, 1024), (w, 4, size - 1024, 1024), (w, 5, 10 * cluster, 3 * cluster),
    ]
    commands = [make(tag, at, length) for make, tag, at, length in wanted if at >= 0 and at + length <= size]
    if size >= 16 * cluster:
        commands += [z(7 * cluster, cluster), z(11 * cluster, cluster, "-u"), discard(12 * cluster, cluster)]
    return commands


def compressed(size, cluster):
    """Compressed clusters between plain ones, some overwritten, some that do not compress."""
    commands = [wc(i % 7, i * cluster, cluster) for i in range(0, min(size // cluster, 24), 2)]
    commands += [wc("noise", cluster, cluster), w(7, 3 * cluster, cluster), w(1, 4 * cluster + 512, 512)]
    return [c for c in commands if int(c.split()[-2]) + int(c.split()[-1]) <= size]


def patched(change):
    """A step that changes bytes of the finished file."""

    def step(path, _shop):
        image = layout.Qcow2(path)
        change(image)
        image.save()

    return step


def flags(incompatible=0, compatible=0, autoclear=0):
    def change(image):
        image["incompatible_features"] |= incompatible
        image["compatible_features"] |= compatible
        image["autoclear_features"] |= autoclear

    return patched(change)


def commands(*texts):
    return lambda path, shop: io(path, shop.fill(texts))


def snap(name):
    return lambda path, _shop: snapshot(path, name)


def snapshot_command(*options):
    return lambda path, _shop: run("qemu-img", "snapshot", "-q", *options, path)


def marked(name, *options):
    return lambda path, _shop: bitmap(path, name, *options)


def resize(size, *options):
    return lambda path, _shop: run("qemu-img", "resize", "-q", "-f", "qcow2", *options, path, size)


def geometry():
    for bits in range(9, 22):
        cluster = 1 << bits
        size = max(MIB, 8 * cluster) if bits < 20 else 6 * cluster
        yield Recipe(f"v3_cluster_{cluster}", size, {"cluster_size": cluster}, mixed(size, cluster))
    for cluster in (512, 4 * KIB, 64 * KIB, 2 * MIB):
        size = max(MIB, 4 * cluster)
        options = {"cluster_size": cluster, "compat": "0.10"}
        yield Recipe(f"v2_cluster_{cluster}", size, options, mixed(size, cluster))
    for bits in (1, 2, 4, 8, 16, 32, 64):
        options = {"cluster_size": 4 * KIB, "refcount_bits": bits}
        yield Recipe(f"refcount_bits_{bits}", 2 * MIB, options, mixed(2 * MIB, 4 * KIB))
    # So many clusters that there is more than one refcount block.
    yield Recipe("refcount_blocks_many", 2 * MIB, {"cluster_size": 512, "refcount_bits": 64}, [w(0, 0, MIB)])


def compression():
    for method in ("zlib", "zstd"):
        for cluster in (512, 4 * KIB, 64 * KIB, 2 * MIB):
            size = max(MIB, 4 * cluster)
            options = {"cluster_size": cluster, "compression_type": method}
            yield Recipe(f"{method}_{cluster}", size, options, compressed(size, cluster))
        # Written in one go, so that streams share host clusters and the last one ends the file.
        source = [(0, "0", 300 * KIB), (320 * KIB, "noise", 70 * KIB), (MIB - 40 * KIB, "3", 40 * KIB)]
        yield Recipe(f"{method}_packed", MIB, {"compression_type": method}, source=source)
        source = [(900 * KIB, "5", 124 * KIB + 512)]
        yield Recipe(f"{method}_odd_tail", MIB + 512, {"compression_type": method}, source=source)
    for cluster in (4 * KIB, 64 * KIB):
        options = {"cluster_size": cluster, "compat": "0.10"}
        yield Recipe(f"v2_zlib_{cluster}", MIB, options, compressed(MIB, cluster))


def zeros():
    size, c = MIB, 64 * KIB
    yield Recipe("zero_plain", size, {}, [z(0, size // 2), w(0, 0, 512), w(1, size - c, c)])
    yield Recipe("zero_allocated", size, {}, [w(0, 0, 8 * c), z(c, 2 * c), z(5 * c + 512, 512)])
    yield Recipe("zero_unmapped", size, {}, [w(0, 0, 8 * c), z(c, 2 * c, "-u"), discard(4 * c, 2 * c)])
    yield Recipe("zero_whole", size, {}, [z(0, size)])
    yield Recipe("empty", size)
    for mode in ("metadata", "falloc", "full"):
        yield Recipe(f"prealloc_{mode}", size, {"preallocation": mode}, [w(2, c + 512, c), z(6 * c, c)])
    yield Recipe("v2_discarded", size, {"compat": "0.10"}, [w(0, 0, 8 * c), discard(2 * c, 3 * c)])


def subclusters(cluster):
    sub = cluster // 32
    return [
        w(0, 0, cluster), w(1, cluster + sub, sub), w(2, 2 * cluster + 3 * sub + 512, 2 * sub),
        w(3, 3 * cluster, cluster), z(3 * cluster + 4 * sub, 5 * sub), discard(3 * cluster + 16 * sub, 4 * sub),
        z(4 * cluster, cluster), z(5 * cluster + sub, 7 * sub), w(4, 6 * cluster - 512, 512),
    ]


def extended_l2():
    for cluster in (16 * KIB, 64 * KIB, 2 * MIB):
        options = {"cluster_size": cluster, "extended_l2": "on"}
        size = 8 * cluster
        yield Recipe(f"extl2_{cluster}", size, options, subclusters(cluster))
    for method in ("zlib", "zstd"):
        options = {"cluster_size": 32 * KIB, "extended_l2": "on", "compression_type": method}
        yield Recipe(f"extl2_{method}", MIB, options, compressed(MIB, 32 * KIB) + [w(2, 600 * KIB, 3 * KIB)])
    options = {"cluster_size": 64 * KIB, "extended_l2": "on"}
    yield Recipe("extl2_prealloc", MIB, options | {"preallocation": "metadata"}, [w(0, 70 * KIB, 5 * KIB)])
    yield Recipe("extl2_zero_whole", MIB, options, [z(0, MIB), w(0, 512, 512)])
    then = [snap("first"), commands(*subclusters(64 * KIB))]
    yield Recipe("extl2_snapshot", MIB, options, [w(6, 60 * KIB, 200 * KIB)], then)
    # The end of the file cuts the last cluster in its unallocated part: `qemu-img check` calls it clean.
    options = {"cluster_size": 2 * MIB, "extended_l2": "on"}
    yield Recipe("extl2_last_cluster_cut", 8 * MIB, options, [w(3, 2 * MIB + 70 * KIB, 512)])


def states():
    c = 64 * KIB
    lazy = {"lazy_refcounts": "on"}
    yield Recipe("lazy_refcounts", MIB, lazy, mixed(MIB, c))
    yield Recipe("dirty", MIB, lazy, mixed(MIB, c), [flags(incompatible=layout.DIRTY)], features=frozenset({"dirty"}))
    yield Recipe("corrupt", MIB, {}, mixed(MIB, c), [flags(layout.CORRUPT)], features=frozenset({"corrupt"}))
    both = [flags(layout.DIRTY | layout.CORRUPT)]
    yield Recipe("dirty_and_corrupt", MIB, {}, mixed(MIB, c), both, features=frozenset({"dirty", "corrupt"}))
    yield Recipe("unknown_compatible_features", MIB, {}, mixed(MIB, c), [flags(0, 1 << 63 | 2, 1 << 62)])


def snapshots():
    c = 64 * KIB
    between, after = commands(w(1, 0, 2 * c), z(3 * c, c)), commands(w(2, c, c), discard(5 * c, c))
    then = [snap("first"), between, snap("second"), after]
    yield Recipe("snapshots", MIB, {}, [w(0, 0, 8 * c)], then)
    yield Recipe("v2_snapshots", MIB, {"compat": "0.10"}, [w(0, 0, 8 * c)], then)
    yield Recipe("snapshots_4k", MIB, {"cluster_size": 4 * KIB}, [w(0, 0, 8 * c)], then)
    then = [snap("small"), resize(2 * MIB), commands(w(4, MIB, c), w(5, 0, 512))]
    yield Recipe("snapshot_of_smaller_disk", MIB, {}, [w(0, 0, 8 * c)], then)
    then = [snap("packed"), commands(w(1, c, c), wc(2, 5 * c, c)), snap("mixed"), commands(wc(3, 7 * c, c))]
    yield Recipe("snapshots_zlib", MIB, {}, compressed(MIB, c), then)
    yield Recipe("snapshots_zstd", MIB, {"compression_type": "zstd"}, compressed(MIB, c), then)
    delete = snapshot_command("-d", "first")
    then = [snap("first"), commands(w(1, 0, 2 * c)), snap("second"), delete, commands(w(2, c, c))]
    yield Recipe("snapshot_deleted", MIB, {}, [w(0, 0, 8 * c)], then)
    then = [snap("first"), commands(w(1, 0, 2 * c)), snap("second"), snapshot_command("-a", "first")]
    yield Recipe("snapshot_applied", MIB, {}, [w(0, 0, 8 * c)], then)
    state = commands("write -q -b -P 7 0 128k")
    yield Recipe("snapshot_with_vm_state", MIB, {}, [w(0, 0, 8 * c)], [state, snap("vm"), commands(w(1, 0, c))])


def bitmaps():
    c = 64 * KIB
    yield Recipe("bitmap", MIB, {}, [w(0, 0, c)], [marked("since-monday"), commands(w(1, c, c))])
    many = [marked("coarse", "-g", "1M"), marked("fine", "-g", "512"), marked("paused", "--disable")]
    yield Recipe("bitmaps", MIB, {}, [w(0, 0, c)], [*many, commands(w(1, 3 * c, c))])
    yield Recipe("bitmap_and_snapshot", MIB, {}, [w(0, 0, c)], [snap("s"), marked("b"), commands(w(1, 0, c))])


def sizes():
    c = 64 * KIB
    yield Recipe("size_0", 0, features=frozenset({"size_0"}))
    for size in (512, c - 512, c + 512, MIB - 512, 3 * c + 4096):
        yield Recipe(f"size_{size}", size, {}, [w(0, 0, size)])
    # qemu-img rounds such sizes up when it makes an image, and when it reads one.
    for size in (1, 511, c + 1, 3 * c - 1):
        exact = patched(lambda image, size=size: image.set(size=size))
        made = -(-size // 512) * 512
        yield Recipe(f"exact_{size}", made, {}, [w(1, 0, made)], [exact], exact_size=size)
    # Shrinking keeps the L1 table as it is: more entries than the size needs.
    yield Recipe("shrunk", 8 * MIB, {"cluster_size": 4 * KIB}, [w(0, 0, 64 * KIB)], [resize(MIB, "--shrink")])
    far = [w(0, 0, c), w(1, 17 * TIB + 512, 1024), w(2, 40 * TIB - c, 2 * c), w(3, 64 * TIB - 512, 512)]
    yield Recipe("sparse_64t", 64 * TIB, {}, far, features=frozenset({"huge"}))
    options = {"cluster_size": 2 * MIB, "extended_l2": "on"}
    yield Recipe("sparse_64t_extl2", 64 * TIB, options, [*far, z(3 * TIB, 4 * MIB)], features=frozenset({"huge"}))
    # The end of the file cuts a last cluster that lies past the virtual size.
    cut = patched(lambda image: image.cut(image.host(1) + 4096))
    yield Recipe("last_cluster_cut_past_size", c + 4096, {}, [w(0, 0, c + 4096)], [cut])


def extensions():
    c = 64 * KIB
    unknown = patched(lambda image: image.add_extension(0x12345678, b"of a later version"))
    yield Recipe("extension_unknown", MIB, {}, mixed(MIB, c), [unknown])
    end = patched(lambda image: image.put(image["header_length"], 0))
    yield Recipe("extensions_none", MIB, {}, mixed(MIB, c), [end])

    def short(image):
        image["header_length"] = 104
        image.put(104, 0)

    yield Recipe("header_104_bytes", MIB, {}, mixed(MIB, c), [patched(short)])

    def long(image):
        image["header_length"] = 256
        image.data[112:256 + 8] = bytes(152)

    yield Recipe("header_256_bytes", MIB, {}, mixed(MIB, c), [patched(long)])
    # The flag says that no snapshot shares a cluster; readers have no use for it.
    plain = patched(lambda image: image.set_entry(0, image.entry(0) & ~layout.COPIED))
    yield Recipe("copied_flag_clear", MIB, {}, mixed(MIB, c), [plain], check=2)


def chains():
    c = 64 * KIB
    over = [w(6, 2 * c + 512, c), z(5 * c, c), z(7 * c, 512), discard(9 * c, c)]

    def on(name, backing, size=MIB, options=None, extra=(), then=(), recorded=None, form="qcow2"):
        chosen = (backing, form, recorded or backing)
        features = {"chain", "over_extl2"} if backing.startswith("extl2") else {"chain"}
        return Recipe(name, size, options or {}, over + list(extra), list(then), chosen, features=frozenset(features))

    yield on("over_raw", "base.raw", form="raw")
    yield on("over_raw_short", "short.raw", form="raw")
    yield on("over_raw_odd", "odd.raw", form="raw")
    yield on("over_raw_long", "base.raw", 700 * KIB, form="raw")
    yield on("over_qcow2", "v3_cluster_65536.qcow2")
    yield on("over_qcow2_short", "v3_cluster_65536.qcow2", 2 * MIB, extra=[w(1, 2 * MIB - c, c)])
    yield on("over_qcow2_odd_cluster", "v3_cluster_4096.qcow2", MIB, {"cluster_size": 2 * MIB})
    yield on("over_zlib", "zlib_packed.qcow2")
    yield on("over_zstd", "zstd_packed.qcow2", options={"compression_type": "zstd"}, extra=[wc(3, 0, c)])
    yield on("over_extl2", "extl2_65536.qcow2", 640 * KIB)
    extended = {"cluster_size": c, "extended_l2": "on"}
    yield on("extl2_over_raw", "base.raw", options=extended, extra=subclusters(c), form="raw")
    yield on("extl2_over_qcow2", "v3_cluster_4096.qcow2", options={"extended_l2": "on"}, extra=subclusters(c))
    yield on("over_two", "over_raw.qcow2", extra=[w(1, 0, 512)])
    yield on("over_three", "over_two.qcow2", extra=[w(2, 13 * c, 3 * c)])
    yield on("over_v2", "v2_cluster_65536.qcow2", options={"compat": "0.10"})
    yield on("over_snapshot", "base.raw", then=[snap("s"), commands(w(3, 0, 4 * c))], form="raw")
    yield on("sub/over_beside", "sub/beside.raw", recorded="beside.raw", form="raw")
    yield on("sub/over_above", "base.raw", recorded="../base.raw", form="raw")

    def unnamed(image):
        at = image.extension(layout.BACKING_FORMAT) - 8
        image.put(at, 0x7E57_0000, 4)

    yield on("over_raw_format_not_said", "base.raw", then=[patched(unnamed)], form="raw")
    yield on("over_qcow2_format_not_said", "zlib_packed.qcow2", then=[patched(unnamed)])


def data_files():
    def beside(name, options, written):
        return Recipe(name, MIB, {"data_file": f"{name}.data", **options}, written, features=frozenset({"data_file"}))

    yield beside("data_file", {"data_file_raw": "off"}, mixed(MIB, 64 * KIB))
    yield beside("data_file_raw", {"data_file_raw": "on"}, mixed(MIB, 64 * KIB))
    yield beside("data_file_extl2", {"extended_l2": "on"}, subclusters(64 * KIB))


def small():
    """Of each feature one in a few KiB: what a fuzzer begins with is read and changed again and again."""
    c = 512
    tiny, end = {"cluster_size": c}, 16 * c
    then = [snap("first"), commands(w(1, 0, 2 * c), z(3 * c, c)), snap("second"), commands(w(2, c, c))]
    yield Recipe("small_snapshots", end, tiny, [w(0, 0, 4 * c)], then)
    yield Recipe("small_v2_snapshots", end, tiny | {"compat": "0.10"}, [w(0, 0, 4 * c)], then)
    for method in ("zlib", "zstd"):
        then = [snap("packed"), commands(w(1, c, c), wc(2, 9 * c, c))]
        yield Recipe(f"small_{method}", end, tiny | {"compression_type": method}, compressed(8 * c, c), then)
        packed = {"cluster_size": 4 * KIB, "compression_type": method}
        yield Recipe(f"small_{method}_packed", 16 * KIB, packed, source=[(0, "0", 9 * KIB)])
    yield Recipe("small_bitmaps", end, tiny, [w(0, 0, c)], [marked("a", "-g", "512"), commands(w(1, c, c)), snap("s")])
    yield Recipe("small_zeros", end, tiny, [w(0, 0, 8 * c), z(c, c), z(3 * c, c, "-u"), discard(5 * c, c)])
    yield Recipe("small_refcounts", 256 * c, tiny | {"refcount_bits": 64}, [w(0, 0, 66 * c)])
    c = 16 * KIB
    extended, sub = {"cluster_size": c, "extended_l2": "on"}, c // 32
    some = [w(0, 0, c), w(1, c + sub, sub), z(c + 4 * sub, 5 * sub), z(2 * c, c)]
    yield Recipe("small_extl2", 4 * c, extended, some)
    yield Recipe("small_extl2_zstd", 4 * c, extended | {"compression_type": "zstd"}, [wc(0, 0, c), wc(1, c, c)])


GROUPS = [
    geometry, compression, zeros, extended_l2, states, snapshots, bitmaps, sizes, extensions, chains, data_files, small,
]


def recipes():
    return [recipe for group in GROUPS for recipe in group()]


def raw_bases(patterns):
    """Raw files that images stand on: name and content."""
    yield "base.raw", patterns.bytes("4", 1 * MIB)
    yield "short.raw", patterns.bytes("5", 400 * KIB)
    yield "odd.raw", patterns.bytes("6", 300 * KIB + 700)
    yield "sub/beside.raw", patterns.bytes("7", 1 * MIB)
