"""Times of one full demo: seconds of its stages, networks beside everything else, and a plot of them.

python -m profiling.trace.demo [--repeats 2] [--out FOLDER]

Each demo runs in a process of its own, from nothing: no trajectories, no student, no kept plan. It fails where a part that is
not a network's takes more than a tenth of the whole.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from advkd.data.plots import COLOURS, panels
from advkd.errors import InputError
from advkd.runtime.files import read_json, write_json

from ..evidence import spaced_markdown
from ..harness import device_folder, provenance
from .workloads import finished

NETWORKS = {"network", "network and step", "student", "student forward", "student update", "critic update"}
"""Last names of the paths that are networks' work."""

MOST = 0.1
"""Share of the whole that a part outside of the networks may take."""

SMALL = 0.005
"""Share below which tables and plot do not name a part."""

PICTURES = ("demo.html", "teacher_and_student.png", "levels.png", "student_samples.png", "loss_curves.png")

SUMMARY = re.compile(
    r"^teacher: .*?, (?P<teacher_ms_per_image>[\d.]+) ms per image; "
    r"student: .*?, (?P<student_ms_per_image>[\d.]+) ms per image \((?P<times_faster>\d+) times faster;",
    re.MULTILINE,
)

RECOGNISED = re.compile(r"^(?P<images>\d+) images of the student .* is sure of (?P<recognised>\d+) of them", re.MULTILINE)

LEAST = 0.8
"""Share of the student's images in which a classifier must be sure of the class asked for."""


def run_once(folder):
    """One demo under ``folder``: its seconds, its parts, and the figures of its summary line."""
    out, clocks = Path(folder) / "demo", Path(folder) / "clocks"
    changes = {"ADVKD_RANGES": f"clock:{clocks}", "ADVKD_CACHE": str(Path(folder) / "cache")}
    command = [sys.executable, "-m", "advkd.cli", "demo", "--out", str(out)]
    begin = time.perf_counter()
    done = finished(command, "the demo", None, **changes)
    seconds = time.perf_counter() - begin
    missing = [name for name in PICTURES if not (out / name).exists()]
    if missing:
        raise InputError(f"the demo has not made {', '.join(missing)}")
    found = [read_json(path, "clock", ("process", "ranges")) for path in sorted(clocks.glob("*.json"))]
    return {"seconds": seconds, "parts": parts(found, seconds), **figures(done.stdout)}


def figures(text):
    """Numbers of the summary line and the share of recognised images, by name."""
    found, seen = SUMMARY.search(text), RECOGNISED.search(text)
    if not found or not seen:
        raise InputError(f"the demo's output holds no summary line: {text.strip()[-200:]!r}")
    numbers = {name: float(value) for name, value in found.groupdict().items()}
    return {**numbers, "recognised": int(seen["recognised"]) / int(seen["images"])}


def parts(clocks, seconds):
    """Seconds by path, which add up to the whole process's.

    While other processes record, the main one waits: the mean over them says what for, and the rest of the wait is their
    start, their imports and, for those that end earlier, the last one.
    """
    main = [clock["ranges"] for clock in clocks if clock["process"] == "MainProcess"]
    recorders = [clock["ranges"] for clock in clocks if clock["process"] != "MainProcess"]
    if len(main) != 1 or "trajectories" not in main[0]:
        raise InputError("the clocks are not those of a demo: there must be one main process, with its range 'trajectories'")
    found = {path: spent["seconds"] for path, spent in main[0].items()}
    outside = seconds - sum(found.values())
    if recorders:
        wait = found.pop("trajectories")
        recorded = {path: _mean(recorders, path) for path in sorted(set().union(*recorders))}
        for path, spent in recorded.items():
            found[path] = found.get(path, 0.0) + spent
        found["trajectories / start and imports"] = wait - sum(recorded.values())
    return {"start and imports": outside, **found}


def _mean(ranges, path):
    return statistics.mean(each.get(path, {"seconds": 0.0})["seconds"] for each in ranges)


def combined(runs):
    """Every run's figures side by side; a part that a run has not is 0 there."""
    paths = dict.fromkeys(path for run in runs for path in run["parts"])
    seconds = {path: [run["parts"].get(path, 0.0) for run in runs] for path in paths}
    kept = ("seconds", "teacher_ms_per_image", "student_ms_per_image", "times_faster", "recognised")
    return {
        "benchmark": "demo",
        **{name: [run[name] for run in runs] for name in kept},
        "parts": {path: {"seconds": spent, "network": is_network(path)} for path, spent in seconds.items()},
    }


def is_network(path):
    return path.rpartition(" / ")[2] in NETWORKS


def rows(result):
    """``[(part, each run's seconds, share of the whole, whether it is a network's)]``, the largest first."""
    whole = sum(result["seconds"])
    found = [(path, part["seconds"], sum(part["seconds"]) / whole, part["network"]) for path, part in result["parts"].items()]
    return sorted(found, key=lambda row: -row[2])


def shown(result):
    """:func:`rows`, those below :data:`SMALL` as one."""
    named = [row for row in rows(result) if row[2] >= SMALL]
    small = [row for row in rows(result) if row[2] < SMALL]
    if small:
        named.append(("the rest", [sum(spent) for spent in zip(*(row[1] for row in small))], sum(r[2] for r in small), False))
    return named


def lines(result):
    """Markdown of a result: one row per part."""
    cells = [(part, spread(spent), f"{100 * share:.1f}", "network" if net else "") for part, spent, share, net in shown(result)]
    outside = sum(share for _, _, share, network in rows(result) if not network)
    cells.append(("all outside of networks", "", f"{100 * outside:.1f}", ""))
    return spaced_markdown(("part", "seconds", "share, %", ""), cells)


def spread(values):
    """One or two values as they are, more as their mean and range."""
    texts = [f"{value:.1f}" for value in values]
    if len(values) <= 2:
        return ", ".join(texts)
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def complaints(result):
    """Parts outside of the networks that take more than :data:`MOST` of the whole, by last names, and too few good images."""
    kinds = {}
    for part, _, share, network in rows(result):
        if not network:
            kind = part.rpartition(" / ")[2]
            kinds[kind] = kinds.get(kind, 0.0) + share
    over = {kind: share for kind, share in kinds.items() if share > MOST}
    found = [
        f"{kind}: {100 * share:.0f} % of the demo's time, at most {100 * MOST:.0f} % are allowed"
        for kind, share in over.items()
    ]
    if min(result["recognised"]) < LEAST:
        found.append(
            f"{100 * min(result['recognised']):.0f} % of the images are recognised, at least {100 * LEAST:.0f} % must be"
        )
    return found


def plot(result, path):
    """A bar for every part, the largest on top: networks in one colour, everything else in another."""
    from matplotlib.patches import Patch

    names, seconds, shares, networks = zip(*shown(result))
    means, colours = [statistics.mean(spent) for spent in seconds], {True: COLOURS[0], False: COLOURS[1]}
    whole, total = statistics.mean(result["seconds"]), sum(share for _, _, share, network in rows(result) if network)
    with panels(path, 1.2 + 0.3 * len(names)) as (axis,):
        bars = axis.barh(names, means, color=[colours[network] for network in networks])
        axis.bar_label(bars, [f"{100 * share:.1f} %" for share in shares], padding=3)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * max(means))
        axis.set(xlabel="seconds", title=f"advkd demo: {whole:.0f} s, {100 * total:.0f} % of them in networks")
        axis.legend([Patch(color=colours[kind]) for kind in colours], ["networks", "everything else"], loc="lower right")
        axis.grid(axis="y", visible=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="demos to run")
    parser.add_argument("--out", help="folder for the results (default: profiling/results/<device>)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    out, runs = Path(options.out or device_folder()), []
    for i in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_once(folder))
        print(f"demo {i + 1} of {options.repeats}: {runs[-1]['seconds']:.1f} s", flush=True)
    result = {**combined(runs), "provenance": provenance()}
    write_json(out / "demo.json", result)
    plot(result, out / "demo.png")
    print("\n".join(lines(result)))
    sys.exit("\n".join(complaints(result)) or 0)


if __name__ == "__main__":
    main()
