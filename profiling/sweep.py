"""Figures without contestants: of one piece of work by batch, size, threads or processes, as JSON, with a plot of them."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from advkd.runtime.files import replacing, write_json

from .harness import device_folder, passes, provenance


@dataclass(frozen=True)
class Sweep:
    """What one command, or a part of it, measures.

    Attributes:
        name: of ``<name>.json``, and of its plot.
        measure: function that gives the result.
        parity_tests: pytest arguments; they must pass before anything is timed.
        said: function of the result that gives lines for the terminal.
        plot: function of the result and a path, or None.
        options: ``{name: default}`` of the numbers that ``measure`` takes, which a benchmark's command line takes too.
    """

    name: str
    measure: Callable
    parity_tests: list
    said: Callable = lambda result: ()
    plot: Callable | None = None
    options: dict = field(default_factory=dict)

    def run(self, out=None, **options):
        """Measure and store; returns whether the parity tests were green.

        Args:
            out: folder, default :func:`device_folder`.
            options: those that differ from their defaults.
        """
        if not passes(self.parity_tests):
            print(f"{self.name}: the parity tests failed or none ran, nothing was timed", file=sys.stderr)
            return False
        out = Path(out or device_folder())
        result = {**self.measure(**{**self.options, **options}), "parity_tests": self.parity_tests, "provenance": provenance()}
        write_json(out / f"{self.name}.json", result)
        if self.plot:
            self.plot(result, out / f"{self.name}.png")
        print(*self.said(result), sep="\n", flush=True)
        return True

    def main(self, description):
        """The command line of a sweep that stands alone."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", help="folder for the results (default: profiling/results/<device>)")
        sys.exit(0 if self.run(parser.parse_args().out) else 1)


@contextlib.contextmanager
def panels(*paths, size, count=1, **options):
    """Panels side by side, written at the end of the block.

    Args:
        paths: files of the figure, each in the format of its ending and whole at any time.
        size: of the figure, in inches.
        count: panels.
        options: as :func:`matplotlib.pyplot.subplots` takes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, found = pyplot.subplots(1, count, figsize=size, constrained_layout=True, squeeze=False, **options)
    yield found[0]
    for path in paths:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format=path.suffix[1:])
    pyplot.close(figure)


def curves(panel, places, milliseconds, proportional=(), **labels):
    """Times by place, both axes logarithmic.

    Args:
        panel: of :func:`panels`.
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
