"""The table of tools/coverage, from what llvm-cov exports as JSON (branches, regions) and as lcov (lines).

A generic function is counted once, however often it was made. The tests at the end of a file are not counted.
A branch is one way out of a condition; what `match` and `?` decide has no branches in rustc, but regions.
"""

import collections
import json
import os
import sys


class File:
    def __init__(self, path):
        self.path = path
        with open(path, encoding="utf-8") as file:
            self.text = file.read().splitlines()
        self.end = next((at for at, line in enumerate(self.text, 1) if line == "#[cfg(test)]"), len(self.text) + 1)
        self.lines = {}
        self.regions = collections.Counter()
        self.branches = collections.Counter()

    def missed(self):
        """For each line with something that was not reached: what."""
        found = collections.defaultdict(list)
        for (line, column, to_line, to_column), count in self.regions.items():
            if count == 0:
                text = self.text[line - 1][column - 1 : to_column - 1 if to_line == line else None]
                found[line].append(f"`{text.strip()}`")
        for (line, column, to_line, to_column, way), count in self.branches.items():
            if count == 0:
                text = self.text[line - 1][column - 1 : to_column - 1 if to_line == line else None]
                found[line].append(f"`{text.strip()}` never {way}")
        return sorted(found.items())


def read(json_path, lcov_path):
    files = {}

    def file(path):
        return files.setdefault(path, File(path))

    with open(json_path, encoding="utf-8") as text:
        (export,) = json.load(text)["data"]
    wanted = {entry["filename"] for entry in export["files"]}
    for function in export["functions"]:
        names = function["filenames"]
        for *place, count, name, _expanded, kind in function["regions"]:
            if kind == 0 and names[name] in wanted and place[0] < file(names[name]).end:
                file(names[name]).regions[tuple(place)] += count
        for *place, taken, refused, name, _expanded, _kind in function["branches"]:
            if names[name] in wanted and place[0] < file(names[name]).end:
                file(names[name]).branches[*place, "true"] += taken
                file(names[name]).branches[*place, "false"] += refused
    with open(lcov_path, encoding="utf-8") as text:
        for line in text:
            key, _, value = line.strip().partition(":")
            if key == "SF":
                current = file(value)
            elif key == "DA":
                at, count = (int(part) for part in value.split(",")[:2])
                if at < current.end:
                    current.lines[at] = count
    return [files[path] for path in sorted(files)]


def share(counts):
    reached = sum(count > 0 for count in counts)
    return f"{reached} of {len(counts)}" + (f" ({100 * reached / len(counts):.1f} %)" if counts else "")


def row(name, *kinds):
    print(f"| {name} | " + " | ".join(share(kind) for kind in kinds) + " |")


def main():
    files = read(*sys.argv[1:])
    root = os.getcwd()
    print("| file | lines | regions | branches |\n|---|---|---|---|")
    every = ([], [], [])
    for file in files:
        kinds = [list(kind.values()) for kind in (file.lines, file.regions, file.branches)]
        for all_of_kind, kind in zip(every, kinds):
            all_of_kind.extend(kind)
        row(f"`{os.path.relpath(file.path, root)}`", *kinds)
    row("all", *every)
    for file in files:
        if missed := file.missed():
            print(f"\n`{os.path.relpath(file.path, root)}`\n")
            for line, what in missed:
                print(f"- {line}: {', '.join(what)}")


main()
