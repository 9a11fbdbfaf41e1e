"""Launches, the GPU's busy fraction and time by range of the workloads: by Nsight Systems, or by torch.profiler without it.

python -m profiling.trace.nsys [--device cuda] [--only student] [--repeats 3] [--traces FOLDER] [--out FOLDER]

Every workload and variant runs in a process of its own. ``traces.json`` goes to the results' folder (``--out``); to look at,
there are Nsight's own reports or Chrome traces (``--traces``, by default build/traces). Nsight's documentation describes its
SQLite export ("SQLite Schema Reference"): tables without rows are not in the file, and columns differ between versions.
The command ends with 3 where the tool or the device's counters fail, and with 1 where the variants differ.
"""

import argparse
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import torch

from advkd.errors import InputError
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.files import write_json
from advkd.runtime.hub import reason

from ..evidence import ROOT, device_alone
from ..harness import device_folder, provenance
from . import timeline, torch_trace
from .timeline import COPY, KERNEL, SET, Activity, Span, Trace, summary
from .workloads import FAILURES, SIZES, VARIANTS, WORKLOADS, command, finished, gate, last_words, positive, sizes

FAILED = 3
"""Exit code where a tool or the device's counters fail."""
DOMAIN = "advkd"
"""Domain of the ranges that :mod:`advkd.runtime.ranges` names for NVTX; libraries name ranges of their own."""
PUSH_POP, START_END, DOMAIN_CREATE = 59, 60, 75
"""``NVTX_EVENTS.eventType``."""
THREAD_BITS = 24
"""The lower bits of a global thread id are the thread's, those above are the process's."""


def missing(device):
    """Why Nsight Systems cannot record here, or None."""
    if torch.device(device).type != "cuda":
        return "the work is on a CPU"
    if shutil.which("nsys") is None:
        return "nsys is not on PATH"
    return None if find_spec("nvtx") else "the nvtx package is not installed: pip install 'advkd[profile]'"


def nsys_command(name, variant, device, size, repeats, report):
    """The command line that records one workload into ``report`` + ``.nsys-rep`` and ``.sqlite``."""
    options = ["--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node"]
    options += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--export=sqlite", "--force-overwrite=true"]
    return ["nsys", "profile", *options, f"--output={report}", *command(name, variant, device, size, f"--repeats={repeats}")]


def record(name, variant, device, size, repeats, folder):
    """One workload under Nsight Systems; returns its :class:`Trace`, whose report stays in the folder."""
    report = Path(folder) / file_name(name, variant, size)
    # A report of before must not pass for one of now.
    for end in (".nsys-rep", ".sqlite"):
        report.with_name(report.name + end).unlink(missing_ok=True)
    what, words = f"{name}, {variant}: nsys", nsys_command(name, variant, device, size, repeats, report)
    done, database = finished(words, what, ADVKD_RANGES="nvtx"), report.with_name(report.name + ".sqlite")
    if not database.exists():
        raise InputError(f"{what} has recorded nothing: {last_words(done)}")
    return read(database)


def file_name(name, variant, size):
    """Name of a recording's file, without its ending."""
    return f"trace-{name}-{variant}" + ("" if size == "digits" else f"-{size}")


def read(path):
    """The :class:`~profiling.trace.timeline.Trace` of an SQLite export."""
    try:
        return _read(path)
    except (sqlite3.Error, TypeError) as error:  # TypeError: a cell that this module computes with is empty
        raise InputError(f"{path} is not a whole SQLite export of Nsight Systems ({error}): record it again") from error


def _read(path):
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        if _rows(database, "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "start"):
            raise InputError(f"{path} holds graphs as wholes: record with --cuda-graph-trace=node")
        strings = dict(_rows(database, "StringIds", "id", "value"))
        trace = Trace(_ranges(database, strings), _calls(database))
        for table, kind, names in ACTIVITIES:
            trace.activities += _activities(database, strings, table, kind, names)
    return trace


ACTIVITIES = (
    ("CUPTI_ACTIVITY_KIND_KERNEL", KERNEL, ("demangledName", "shortName")),
    ("CUPTI_ACTIVITY_KIND_MEMCPY", COPY, ()),
    ("CUPTI_ACTIVITY_KIND_MEMSET", SET, ()),
)


def _rows(database, table, *columns):
    """Rows of a table, None for a column that this version does not have; none where there is no such table."""
    known = {row[1] for row in database.execute(f'PRAGMA table_info("{table}")')}
    if not known:
        return []
    chosen = ", ".join(f'"{column}"' if column in known else "NULL" for column in columns)
    return database.execute(f'SELECT {chosen} FROM "{table}"').fetchall()


def _ranges(database, strings):
    columns = ("start", "end", "text", "textId", "eventType", "domainId", "globalTid")
    events = [(*row[:2], row[2] or strings.get(row[3]), *row[4:]) for row in _rows(database, "NVTX_EVENTS", *columns)]
    ours = {domain for _, _, text, kind, domain, _ in events if kind == DOMAIN_CREATE and text == DOMAIN}
    found = []
    for start, end, text, kind, domain, thread in events:
        # A range that the capture's end cut off has no end. An export may leave the domains' names out.
        if kind in (PUSH_POP, START_END) and end is not None and text and (not ours or domain in ours):
            found.append(Span(start, end, text, thread >> THREAD_BITS, thread))
    return found


def _calls(database):
    """The first call of each correlation: the runtime's calls make calls of the driver."""
    found = {}
    for start, thread, correlation in _rows(database, "CUPTI_ACTIVITY_KIND_RUNTIME", "start", "globalTid", "correlationId"):
        key = thread >> THREAD_BITS, correlation
        found[key] = min(start, found.get(key, start))
    return found


def _activities(database, strings, table, kind, names):
    found = []
    for row in _rows(database, table, "start", "end", "correlationId", "globalPid", "bytes", *names):
        start, end, correlation, process, size, *ids = row
        name = next((strings[i] for i in ids if i in strings), kind)
        found.append(Activity(start, end, name, kind, correlation, (process or 0) >> THREAD_BITS, size or 0))
    return found


def recorded(name, variant, device, size, repeats, folder):
    """A row of ``traces.json``: by Nsight Systems where it can, else by torch.profiler."""
    row, why = {"workload": name, "variant": variant, "size": size, "device": str(device)}, missing(device)
    try:
        if why is None:
            return {**row, "tool": version(), **summary(record(name, variant, device, size, repeats, folder))}
        path = Path(folder) / (file_name(name, variant, size) + ".json.gz")
        trace = torch_trace.record(name, variant, device, size, repeats, path)
        return {**row, "tool": torch_trace.tool(device), "not_nsys": why, **summary(trace)}
    except FAILURES as error:
        return {**row, "tool": "none", "error": reason(error)}


def version():
    """Nsight Systems' name and version."""
    said = subprocess.run(["nsys", "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return said[-1] if said else "Nsight Systems"


def options(description):
    """The options that the drivers share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--size", choices=SIZES, help="one size (default: digits; on a GPU all)")
    parser.add_argument("--out", help="folder for the JSON (default: profiling/results/<device>; with --only or --size none)")
    return parser


def given(parser):
    """The options' values, with the folder and what to run: ``work`` is ``[(workload, size), ...]``."""
    values = parser.parse_args()
    if values.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    # A part of the workloads must not replace the result of all.
    part = values.only or values.size
    values.folder = Path(values.out) if values.out else None if part else device_folder(values.device)
    names = [values.only] if values.only else list(WORKLOADS)
    values.work = [(name, size) for size in ([values.size] if values.size else sizes(values.device)) for name in names]
    return values


def made(folder):
    """A folder that is there, by its whole name: processes elsewhere write into it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder).resolve()


def main():
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=3, help="units of work in each recording")
    parser.add_argument("--traces", default=str(ROOT / "build" / "traces"), help="folder for traces to look at")
    values = given(parser)
    folder = made(values.traces)
    print(f"traces to look at: {folder}", flush=True)

    def rows_of(name, device, size):
        return [recorded(name, variant, device, size, values.repeats, folder) for variant in VARIANTS]

    drive(values, rows_of, "traces.json", timeline.lines)


def drive(values, rows_of, name, lines):
    """Record every workload whose variants agree; store it, unless nothing was recorded, show it, and end the command."""
    keep_freed_memory()
    rows, gates = [], {}
    for work, size in values.work:
        gates[f"{work}, {size}"] = found = gate(work, values.device, size)
        rows += rows_of(work, values.device, size) if found["passed"] else []
        print(f"{work}, {size}: done", file=sys.stderr, flush=True)
    failed = [f"{row['workload']}, {row['variant']}: {row['error']}" for row in rows if "error" in row]
    off = [f"{work}: the variants differ, not recorded" for work, found in gates.items() if not found["passed"]]
    if len(failed) < len(rows):
        result = {"rows": rows, "parity": gates, "provenance": provenance(values.device)}
        if values.folder:
            write_json(values.folder / name, result)
        print("\n".join(lines([result], device_alone)))
    print("\n".join([*off, *failed]), file=sys.stderr)
    sys.exit(FAILED if failed else 1 if off else 0)


if __name__ == "__main__":
    main()
