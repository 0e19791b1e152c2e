"""The table of tools/coverage, from what llvm-cov exports as JSON (branches, regions) and as lcov (lines).

A generic function is counted once, however often it was made. The tests at the end of a file are not counted.
A branch is one way out of a condition; what `match` and `?` decide has no branches in rustc, but regions. Switches of
planted bugs are constants here, and not counted.
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

    def quote(self, line, column, to_line, to_column):
        """A piece of the file, in one line."""
        pieces = self.text[line - 1 : to_line]
        pieces[-1] = pieces[-1][: to_column - 1]
        pieces[0] = pieces[0][column - 1 :]
        return "`" + " ".join(piece.strip() for piece in pieces) + "`"

    def missed(self):
        """What was not reached: runs of lines, then conditions of lines that were, then errors that `?` never passed on."""
        runs = []
        for line in sorted(line for line, count in self.lines.items() if count == 0):
            if runs and all(self.lines.get(at, 0) == 0 for at in range(runs[-1][1] + 1, line)):
                runs[-1][1] = line
            else:
                runs.append([line, line])
        if runs:
            yield "lines: " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        for (*place, way), count in sorted(self.branches.items()):
            if count == 0 and self.lines.get(place[0], 0) > 0:
                yield f"{place[0]}: {self.quote(*place)} is never {way}"
        passed = [place[0] for place, count in sorted(self.regions.items()) if count == 0 and self.quote(*place) == "`?`"]
        if passed := [line for line in passed if self.lines.get(line, 0) > 0]:
            yield "`?`: " + ", ".join(map(str, passed))


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
            if names[name] not in wanted or "planted::is" in file(names[name]).quote(*place):
                continue
            if place[0] < file(names[name]).end:
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
        if missed := list(file.missed()):
            print(f"\n`{os.path.relpath(file.path, root)}`\n")
            print("\n".join(f"- {what}" for what in missed))


main()
