"""Runs qemu's programs: who makes the images, and the oracle of what a sound one holds.

Owns the command lines, the patterns that images are filled with, and the digests of what `qemu-img convert` reads.
What an image is made of is in sound.py and differential; what is broken afterwards in damaged.py.
"""

import hashlib
import json
import os
import random
import struct
import subprocess

# One process of qemu on an image of some MiB: whatever takes longer hangs.
TIMEOUT_S = 60
PATTERN_LEN = 256 << 10
PATTERNS = 8


class Failed(Exception):
    """A program of qemu said no, and why."""


def run(*argv):
    """Run a program and return what it wrote to stdout."""
    done = subprocess.run(
        [str(a) for a in argv], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, argv))[:600]}: exit {done.returncode}: {done.stderr.decode()[-600:]}")
    return done.stdout


class Patterns:
    """Files that qemu-io fills its writes from.

    Every 16 bytes are a stamp of their own (pattern, place), so that a byte from another place shows, and still
    compress; the pattern called `noise` does not.
    """

    def __init__(self, directory):
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        for tag in range(PATTERNS):
            word = random.Random(tag).getrandbits(64)
            stamps = (struct.pack("<QQ", word, i) for i in range(PATTERN_LEN // 16))
            self._write(str(tag), b"".join(stamps))
        self._write("noise", random.Random("noise").randbytes(PATTERN_LEN))

    def _write(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)

    def path(self, name):
        return os.path.join(self.directory, f"pattern-{name}")

    def bytes(self, name, length):
        with open(self.path(name), "rb") as f:
            data = f.read()
        return (data * (length // len(data) + 1))[:length]


def create(path, size, options=None, backing=None):
    """`options` are those of `qemu-img create -o`; `backing` is (name as recorded, format).

    Other files are named as they are to be recorded: qemu looks for a data file from the working directory, and for a
    backing file from the image's own.
    """
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        argv += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if backing:
        argv += ["-b", backing[0], "-F", backing[1]]
    run(*argv, path, size)


def io(path, commands):
    """All commands in one process; a command that fails is an error."""
    if not commands:
        return
    argv = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
    for command in commands:
        argv += ["-c", command]
    said = run(*argv, path).decode()
    if "failed" in said or "rror" in said:
        raise Failed(f"{path}: {said[-600:]}")


def convert(source, target, snapshot=None):
    """Decode `source` (or one of its internal snapshots) to a raw file."""
    argv = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"]
    if snapshot is not None:
        argv += ["-l", f"snapshot.id={snapshot}"]
    run(*argv, source, target)


def digest(path, snapshot=None, length=None):
    """Length and SHA-512 of the content as qemu-img reads it, or of its first `length` bytes."""
    raw = f"{path}.raw"
    try:
        convert(path, raw, snapshot)
        return file_digest(raw, length)
    finally:
        if os.path.exists(raw):
            os.unlink(raw)


def file_digest(path, length=None):
    """Length and SHA-512 of a file, or of what is in front of `length`."""
    with open(path, "rb") as f:
        data = f.read(length)
    if length is not None and len(data) != length:
        raise Failed(f"{path}: {len(data)} bytes, not {length}")
    return len(data), hashlib.sha512(data).hexdigest()


def ends_within_a_sector(path):
    """Whether a compressed cluster ends the file: its entry counts whole sectors, more than there is.

    That is sound. qcow2-rs takes what it could not read for zeros, and some of what it could.
    """
    return os.path.getsize(path) % 512 != 0


def info(path):
    return json.loads(run("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path))


def extents(path):
    """`qemu-img map`: runs with start, length, data, zero, depth."""
    return json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", path))


def range_digest(path, start, length):
    """SHA-512 of a range of an image too large to be decoded as a whole."""
    raw = f"{path}.range"
    window = {
        "driver": "raw", "offset": start, "size": length,
        "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(path), "locking": "off"}},
    }
    try:
        run("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(window)}", raw)
        return file_digest(raw)[1]
    finally:
        if os.path.exists(raw):
            os.unlink(raw)


def check_exit(path):
    """The exit code of `qemu-img check`: 0 clean, 1 could not run, 2 corrupt, 3 leaks."""
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    return subprocess.run(argv, capture_output=True, timeout=TIMEOUT_S, check=False).returncode


def snapshot(path, name):
    run("qemu-img", "snapshot", "-q", "-c", name, path)


def bitmap(path, name, *options):
    run("qemu-img", "bitmap", "--add", *options, path, name)
