"""Error by network evaluations of every deterministic solver, on Gaussian data, whose flow is known: the site's plot.

A run ends at its last level that has noise, as the step to the image is one of first order for most solvers. Levels are equally
spaced in log-SNR.
"""

import numpy as np
import torch

from advkd.data.plots import INK, panels
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import METHODS, Solver

COUNTS = (16, 32, 64, 128, 256)
"""Steps of the runs. Steps of 0.006 to 0.1 in log-SNR lie where errors follow their leading term."""

TICKS = (16, 32, 64, 128, 256, 512)

PANELS = {
    "whole runs of order 1 and 2": (("ddim", "heun", "heun-flow", "dpm-2", "dpmpp-2m", "deis-2", "unipc-1"), (1, 2)),
    "higher orders: whole runs of order 2 and 3": (("dpm-3", "dpmpp-3m", "deis-3", "unipc-2", "unipc-3"), (2, 3)),
}
"""Title -> solvers, and slopes of the lines beside them."""
SAME = {"ddim": "ddim, euler, deis-1"}
"""Label of a curve that other solvers share: without clipping theirs is the same step."""


def gaussian():
    """Three directions of different variance, log-SNR from -0.5 to 1."""
    schedule = Schedule(torch.sigmoid(2 * torch.linspace(1.0, -0.5, 1000, dtype=torch.float64)))
    return GaussianTeacher(torch.tensor([0.5, -1.0, 0.25]), torch.tensor([0.3, 0.6, 1.5]), schedule)


def errors(name, n=16):
    """Numbers of evaluations, and the root mean square of the error after them, of ``n`` samples."""
    teacher, solver = gaussian(), Solver(name, "log_snr")
    x_T, first, last = teacher.noise(n), teacher.schedule.sigma(999.0), teacher.schedule.sigma(0.0)
    wanted, found = teacher.flow(x_T, first, last), []
    for steps in COUNTS:
        *_, (_, x), _ = teacher.path(x_T, solver, steps + 1)
        found.append((x - wanted).square().mean().sqrt().item())
    return [METHODS[name].evaluations * steps for steps in COUNTS], found


def fitted_order(counts, found):
    """Least-squares slope of -log error by log count."""
    return -np.polyfit(np.log(counts), np.log(found), 1)[0]


def plot(path):
    """A panel of lower orders and one of higher ones; the legend has fitted slopes, thin lines have whole ones."""
    with panels(path, 4.4, columns=2, sharex=True, sharey=True) as figure:
        for axes, (title, (names, slopes)) in zip(figure, PANELS.items()):
            for name, marker in zip(names, "osXD^vP"):
                counts, found = errors(name)
                axes.loglog(counts, found, marker + "-", label=f"{SAME.get(name, name)}: {fitted_order(counts, found):.2f}")
            for slope in slopes:
                _guide(axes, slope)
            axes.set(title=title, xlabel="network evaluations")
            axes.legend(title="solver: fitted order", loc="lower left")
        figure[0].set_ylabel("error (root mean square)")
        figure[0].set_xticks(TICKS, [str(tick) for tick in TICKS])
        figure[0].set_xticks([], minor=True)


def _guide(axes, slope):
    x = np.array([300.0, 700.0])
    y = 10.0 ** (-1.2 - 1.9 * (slope - 1)) * (x / x[0]) ** -slope
    axes.loglog(x, y, color=INK, lw=0.8)
    axes.annotate(f"slope {slope}", (x[-1], y[-1]), ha="right", va="top", fontsize=7.5)
