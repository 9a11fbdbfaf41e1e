"""The cost of looking at the load on an idle machine: ours with and without sharing, in turns within one process.

python -m profiling.cases.neighbours_idle [--out FOLDER] [--turns 40]

A turn is about a second of calls with ``ADVKD_SHARE=0``, and one with what every command has. The result is the ratio of their
times, a turn at a time.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path

import torch

from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.files import write_json
from advkd.runtime.neighbours import sharing
from advkd.runtime.timing import percentiles

from ..evidence import Table, scaled
from ..harness import device_folder, passes, provenance
from .neighbours import OURS, PARITY_TESTS, contestants, prepared

TURN = 1.0
"""Seconds of calls of one turn."""
SETTINGS = {"shared": "auto", "off": "0"}


def compared(case, turns):
    """A case's row: seconds of a call with each setting, and the ratios of the turns."""
    call, parity = prepared(case, OURS[0])
    if not parity["error"] <= parity["tolerance"]:
        sys.exit(f"{case} differs by {parity['error']:.2e}, nothing was timed")
    call()
    count = max(1, round(TURN / _seconds(call, 3, "0")))
    found = {name: [] for name in SETTINGS}
    for turn in range(turns):
        for name in sorted(SETTINGS, reverse=bool(turn % 2)):
            found[name].append(_seconds(call, count, SETTINGS[name]))
    ratios = [shared / off for shared, off in zip(found["shared"], found["off"], strict=True)]
    seconds = {name: percentiles(times) for name, times in found.items()}
    return {"case": case, **parity, "calls": count, "seconds": seconds, "ratio": _with_error(ratios)}


def _seconds(call, count, setting):
    """Seconds of one of ``count`` calls."""
    os.environ["ADVKD_SHARE"] = setting
    with sharing() if setting != "0" else ExitStack():
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count


def _with_error(ratios):
    """The median of the ratios, and the half width of its 95 % interval (the median's, for ratios that are about normal)."""
    width = 1.96 * 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5
    return {"median": statistics.median(ratios), "half_width": width, "turns": len(ratios)}


TABLE = Table(
    "neighbours-idle",
    {
        "work": "{case}",
        "`ADVKD_SHARE=0`, ms": scaled("seconds/off/median", 1e3, "{:.2f}"),
        "shared, ms": scaled("seconds/shared/median", 1e3, "{:.2f}"),
        "ratio, in turns": "{ratio[median]:.3f} ± {ratio[half_width]:.3f}",
    },
    itemgetter("rows"),
    lambda result: [row["seconds"][name] for row in result["rows"] for name in SETTINGS],
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder for the result (default: profiling/results/<device>)")
    parser.add_argument("--turns", type=int, default=40, help="of each setting (default 40)")
    options = parser.parse_args()
    if not passes(PARITY_TESTS):
        sys.exit("the parity tests failed or none ran, nothing was timed")
    keep_freed_memory()
    rows = []
    for case in contestants():
        rows.append({"threads": torch.get_num_threads(), **compared(case, options.turns)})
        print(f"{case:22} {rows[-1]['ratio']}", flush=True)
    result = {"benchmark": "neighbours-idle", "rows": rows, "parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(Path(options.out or device_folder()) / "neighbours-idle.json", result)


if __name__ == "__main__":
    main()
