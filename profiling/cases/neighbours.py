"""The cost of busy processes beside us: the engine and its peers, the teacher's network, a distillation update.

python -m profiling.cases.neighbours [--beside] [--seconds 5] [--idle] [--turns 40] [--out FOLDER]

Every contestant runs in a process of its own, alone and beside 1, 2 and 4 processes of the same priority with two busy threads
each. The fair share is the time alone, times all threads that are ready, over the processors. "ADVKD_SHARE=0" is ours without
what this page is about: threads that spin in barriers for others that do not run. With ``--idle`` ours alone runs on an idle
machine, in one process: a turn is about a second of calls with ``ADVKD_SHARE=0``, and one with what every command has; the
result is the ratio of their times, a turn at a time: what looking at the load costs. Without options both are measured.
"""

import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from operator import itemgetter

import torch

from advkd.data.plots import panels
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.neighbours import sharing, unconfined
from advkd.runtime.timing import percentiles

from ..evidence import Table, scaled
from ..harness import Sweep, absent_package, largest_difference, main
from ..sweep import apart
from ..trace import workloads
from . import student as bench_student
from . import teacher as bench_teacher

NEIGHBOURS, THREADS = (0, 1, 2, 4), 2
SETTLE = 1.0
"""Seconds between the neighbours' start and the first timed call."""
FEWEST = 3
"""Timed calls of each load at least."""
PARITY_TESTS = ["tests/ops/test_student_forward.py", "tests/system/test_neighbours.py"]
BUSY = """
import hashlib, threading
def busy(block=bytes(2**20)):
    while True:
        hashlib.sha256(block)  # without the interpreter's lock
for _ in range({threads} - 1):
    threading.Thread(target=busy, daemon=True).start()
busy()
"""
STUDENTS = {
    "digits, batch 16": "digits, batch 16, float32",
    "pyramid-256, batch 1": "pyramid-256, batch 1, float32",
}
OURS = ("advkd", "advkd, ADVKD_SHARE=0")


def contestants():
    """``{case: names}``; in every case the first two are ours, with and without sharing."""
    peers = ("PyTorch eager, folded", "torch.compile, freezing, conv_transpose2d", "ONNX Runtime", "OpenVINO", "ncnn")
    return {
        **dict.fromkeys(STUDENTS, (*OURS, *peers)),
        "teacher, batch 16": (*OURS, "torch.compile, freezing", "OpenVINO"),
        "update, digits": (*OURS, "PyTorch, autograd"),
    }


def prepared(case, name):
    """The function to time, and its parity: ``{"error", "tolerance"}``."""
    if case == "update, digits":
        variant = "fused" if name in OURS else "baseline"
        gate = workloads.gate("update")
        return workloads.prepare("update", variant), {"error": gate["errors"][variant], "tolerance": gate["tolerance"]}
    found = bench_student.cases("cpu")[STUDENTS[case]]() if case in STUDENTS else bench_teacher.evaluation(16)
    ours = next(c.name for c in found.contestants if c.kind == "ours")
    call = next(c for c in found.contestants if c.name == (ours if name in OURS else name)).prepare()
    return call, {"error": largest_difference(call(), found.oracle()), "tolerance": found.tolerance}


@contextmanager
def busy(processes):
    """So many neighbours, on all processors, until the end."""
    with ExitStack() as stack, unconfined():
        for _ in range(processes):
            neighbour = subprocess.Popen([sys.executable, "-c", BUSY.format(threads=THREADS)])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        started = stack.pop_all()
    with started:
        time.sleep(SETTLE)
        yield


def times(call, seconds):
    """Seconds of calls in a row, for so many seconds."""
    found, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found) < FEWEST:
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return found


def measure(case, name, seconds):
    """One contestant in this process, as its row of the result; what is not installed is ``missing``, with the reason."""
    row = {"threads": torch.get_num_threads(), "processors": len(os.sched_getaffinity(0)), "case": case, "name": name}
    keep_freed_memory()
    os.environ["ADVKD_SHARE"] = "0" if name == OURS[1] else "auto"
    with sharing() if name == "advkd" else ExitStack():
        try:
            call, parity = prepared(case, name)
        except ImportError as error:
            if not absent_package(error):
                raise
            return {**row, "missing": str(error)}
        row |= {**parity, "seconds": {}}
        if not parity["error"] <= parity["tolerance"]:
            return row
        for processes in NEIGHBOURS:
            with busy(processes):
                call()
                found = times(call, seconds)
            row["seconds"][str(processes)] = {**percentiles(found), "mean": statistics.mean(found)}
            time.sleep(SETTLE)
    return row


def fair(row, processes):
    """The fair share's seconds beside so many processes."""
    ready, processors = row["threads"] + THREADS * processes, row["processors"]
    return row["seconds"]["0"]["median"] * max(1.0, ready / processors)


def plot(result, path):
    """A panel a case: time over the fair share, by neighbours."""
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    rows = math.ceil(len(cases) / 2)
    with panels(path, 3.4 * rows, rows, columns=2, sharey=True) as found:
        for panel in found[len(cases) :]:
            panel.set_axis_off()
        for panel, case in zip(found, cases):
            for row in result["rows"]:
                if row["case"] != case or not row.get("seconds"):
                    continue
                style = {"advkd": "o-", OURS[1]: "s--"}.get(row["name"], ".:")
                ratios = [row["seconds"][str(n)]["mean"] / fair(row, n) for n in NEIGHBOURS]
                width = 2 if row["name"] in OURS else 1
                panel.semilogy(range(len(NEIGHBOURS)), ratios, style, label=row["name"], linewidth=width)
            panel.axhline(1, color="gray", linewidth=0.8)
            panel.set_xticks(range(len(NEIGHBOURS)), map(str, NEIGHBOURS))
            panel.set(xlabel="neighbours of two busy threads", title=case)
            panel.legend()
        for panel in found[::2]:
            panel.set_ylabel("mean time over the fair share")


def _beside(processes):
    def cell(row):
        mean = row["seconds"][str(processes)]["mean"]
        return f"{1e3 * mean:.1f} ({mean / fair(row, processes):.2f} x)"

    return cell


def _timed(result):
    return [row for row in result["rows"] if row.get("seconds")]


TABLE = Table(
    "neighbours",
    {
        "work": "{case}",
        "contestant": "{name}",
        "alone, ms": scaled("seconds/0/median", 1e3, "{:.1f}"),
        **{f"beside {n}": _beside(n) for n in NEIGHBOURS[1:]},
    },
    _timed,
    lambda result: [row["seconds"]["0"] for row in _timed(result)],
)


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


IDLE_TABLE = Table(
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


def idle(turns):
    """The result of ours alone on an idle machine, with sharing and without."""
    keep_freed_memory()
    rows = [{"threads": torch.get_num_threads(), **compared(case, turns)} for case in contestants()]
    return {"benchmark": "neighbours-idle", "rows": rows}


def beside(seconds):
    """The result of every contestant, alone and beside neighbours."""
    rows = []
    for case, name in ((case, name) for case, names in contestants().items() for name in names):
        print(f"{case}: {name}", flush=True)
        rows.append(apart(measure, case, name, seconds))
    return {"benchmark": "neighbours", "rows": rows, "neighbour_threads": THREADS}


SWEEPS = {
    "beside": Sweep("neighbours", beside, PARITY_TESTS, [TABLE], plot, {"seconds": 5.0}),
    "idle": Sweep("neighbours-idle", idle, PARITY_TESTS, [IDLE_TABLE], options={"turns": 40}),
}

if __name__ == "__main__":
    main(SWEEPS)
