"""What libFuzzer says, passed on; and a row of a table: what came of the run.

`figures.py stamp LOG` copies standard input to standard output, and to LOG with the seconds since the start before each
line, as they are not in what libFuzzer says. `figures.py rows LOG...` is the table of such logs.
"""

import os
import re
import sys
import time

EVENT = re.compile(r"#(\d+)\s+([A-Za-z]+)\s+cov: (\d+) ")
DONE = re.compile(r"Done (\d+) runs in (\d+) second")


def stamp(path):
    start = time.monotonic()
    with open(path, "w", encoding="utf-8") as log:
        for line in sys.stdin:
            sys.stdout.write(line)
            log.write(f"{time.monotonic() - start:.1f} {line}")
            log.flush()


def row(path):
    """Edges at the start are those of the corpus; an edge is new when libFuzzer's `cov` grows."""
    began, first, last, newest, done, failed = 0.0, None, 0, 0.0, None, False
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log:
            seconds, _, text = line.partition(" ")
            if event := EVENT.match(text):
                edges = int(event[3])
                if first is None:
                    if event[2] != "INITED":
                        continue
                    began, first = float(seconds), edges
                elif edges > last:
                    newest = float(seconds) - began
                last = edges
            elif found := DONE.match(text):
                done = (int(found[1]), float(seconds) - began)
            failed |= "SUMMARY:" in text
    name = os.path.basename(path).removesuffix(".log")
    if first is None or done is None:
        return f"| `{name}` | {'failed' if failed else 'not at its end'} | | | | | | |"
    runs, took = done
    plateau = "yes" if newest < took / 2 else "no"
    when = f"{newest:.0f} s" if last > first else "none"
    return f"| `{name}` | {took:.0f} s | {runs} | {runs / max(took, 1):.0f} | {first} | {last} | {when} | {plateau} |"


def main():
    verb, *paths = sys.argv[1:]
    if verb == "stamp":
        return stamp(*paths)
    print("| target | time | executions | executions/s | edges at the start | at the end | the last new edge after | plateau |")
    print("|---|---|---|---|---|---|---|---|")
    for path in paths:
        print(row(path))


main()
