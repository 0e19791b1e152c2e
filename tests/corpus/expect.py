"""What a reader must make of a damaged image: the vocabulary of the manifest, apart from `same`.

Owns how an expectation is written down. Which image has which is in damaged.py and its neighbours; what each means to
a reader is in tests/README.md.
"""

from dataclasses import dataclass
from typing import Callable

import layout


@dataclass
class Case:
    """`of`, a sound image, with one thing changed: `change` gets it as a layout.Qcow2, `expect` what it has become."""

    name: str
    of: str
    change: Callable
    expect: Callable
    # Further files: (name beside the image, what makes it, given its path).
    beside: tuple = ()

    @property
    def file(self):
        return f"damaged/{self.name}.qcow2"

    @property
    def original(self):
        return f"{self.of}.qcow2"


def corrupt(naming, at=None):
    """Refused when it is opened; the message has `naming`, and `at` is where the wrong bytes are."""
    return lambda image, case: _refused("corrupt", naming, at(image) if callable(at) else at)


def unsupported(naming):
    """Refused when it is opened, as something that is not read here."""
    return lambda image, case: _refused("unsupported", naming, None)


def refused(naming):
    """Refused when it is opened; a matter of taste whether that is corruption."""
    return lambda image, case: _refused("any", naming, None)


def _refused(kind, naming, at):
    if kind == "corrupt" and at is None and naming in layout.HEADER:
        at = layout.HEADER[naming][0]
    return {"refused": {"class": kind, "naming": naming, "at": at}}


def reference(naming):
    """Names a file that must never be opened: refused as an image, and by whoever follows references too."""
    return lambda image, case: {"reference": {"naming": naming}}


def lost(naming, clusters=(), found_by="verify"):
    """These guest clusters are lost, and nothing else; verifying the tables finds it."""
    return lambda image, case: _lost(case, naming, [_cluster_range(image, c) for c in clusters], found_by)


def lost_ranges(naming, ranges):
    """These (start, length) of guest bytes are lost, and nothing else; verifying the tables finds it."""
    return lambda image, case: _lost(case, naming, [list(r) for r in ranges], "verify")


def lost_table(naming, index):
    """Everything under one L2 table is lost."""

    def expect(image, case):
        span = image.l1_covers()
        end = min(image["size"], (index + 1) * span)
        return _lost(case, naming, [[index * span, end - index * span]], "verify")

    return expect


def undecodable(*clusters):
    """These guest clusters do not decode; only reading them tells."""
    return lambda image, case: _lost(case, "compressed", [_cluster_range(image, c) for c in clusters], "read")


def lost_somehow(naming, *clusters):
    """The same, where it is open whether the tables tell already."""
    return lambda image, case: _lost(case, naming, [_cluster_range(image, c) for c in clusters], "either")


def _lost(case, naming, ranges, found_by):
    return {"lost": {"naming": naming, "ranges": ranges, "found_by": found_by, "otherwise": case.original}}


def _cluster_range(image, guest_cluster):
    start = guest_cluster * image.cluster
    return [start, min(image.cluster, image["size"] - start)]


def unlisted(what):
    """Reads as its original; only the list of `what` (snapshots or bitmaps) is corrupt."""
    return lambda image, case: {"unlisted": {"what": what, "otherwise": case.original}}


def readable(check):
    """Reads as its original; a check of refcounts ends with this exit code of qemu-img's."""
    return lambda image, case: {"readable": {"check": check, "otherwise": case.original}}
