"""Plots of figures by batch, size, threads or processes, and the memory of a process."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def curves(panel, places, milliseconds, proportional=(), **labels):
    """Times by place, both axes logarithmic.

    Args:
        panel: of :func:`advkd.data.plots.panels`.
        places: numbers along the panel.
        milliseconds: ``{label: list}``.
        proportional: lists that are dotted, unlabelled: growth by the work.
        labels: as :meth:`matplotlib.axes.Axes.set` takes them.
    """
    for label, values in milliseconds.items():
        panel.loglog(places, values, "o-", label=label)
    for values in proportional:
        panel.loglog(places, values, ":", color="gray")
    panel.set_xticks(places, map(str, places))
    panel.xaxis.minorticks_off()
    panel.set(**labels)
    panel.legend()


def medians(rows, *keys):
    """Milliseconds of rows: the median at ``row[key][key]...``."""
    found = []
    for row in rows:
        for key in keys:
            row = row[key]
        found.append(1e3 * row["median"])
    return found


def growth(values, works, at):
    """Values in proportion to the works, equal to the given ones at one index."""
    return [values[at] / works[at] * work for work in works]


def forget_peak():
    """Begin this process's peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(name):
    """Bytes of this process: ``VmRSS``, what it holds, or ``VmHWM``, the most that it has held."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def apart(function, *arguments):
    """Result of a function of a module in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
