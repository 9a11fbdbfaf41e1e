"""Pictures of points, paths, errors and scores."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.plots import COLOURS, INK, panels
from ...diffusion.solvers import METHODS
from ...runtime.files import replacing
from .data import REACH, ToyData
from .methods import LEVELS
from .readings import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXTENT = 2.4
"""Half of the side of the plane that is shown."""
SHOWN = 1500
"""Points of a picture."""
MARKERS = "osXD^vPd<>p*h8"
COLOURS_KEPT = 128
"""Colours of a picture's palette, which takes a third of the bytes."""
ARROWS = 17
"""Arrows along a side."""


def shrink(path: Path) -> None:
    """Write a PNG again with a palette, in a third of its bytes.

    Args:
        path: the file.
    """
    from PIL import Image

    with Image.open(path) as picture:
        # This way keeps rare colours, those of single points.
        smaller = picture.convert("RGB").quantize(COLOURS_KEPT, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with replacing(path) as temporary:
        smaller.save(temporary, format="PNG")


def save_samples(data: ToyData, samples: Mapping[str, Tensor], paths: Mapping[str, Tensor], path: Path) -> None:
    """Points over the data's density, those within three deviations blue; below them paths, where there are any.

    Args:
        data: the data set.
        samples: points by title, one picture or more.
        paths: by title, of some of them.
        path: file to write.
    """
    columns, rows = max(2, len(samples)), 2 if paths else 1
    with panels(path, 0.3 + rows * 9.4 / columns, rows, columns) as axes:
        for axis in axes:
            axis.set_visible(False)
        for i, (title, points) in enumerate(samples.items()):
            show_points(axes[i], data, points, title)
            if title in paths:
                show_paths(axes[columns + i], data, paths[title])


def show_plane(axis: "Axes", data: ToyData) -> None:
    """The plane, with the data's density in grey.

    Args:
        axis: where to draw.
        data: the data set.
    """
    side = torch.linspace(-EXTENT, EXTENT, 160, dtype=torch.float64)
    density = data.density(torch.cartesian_prod(side, side)).reshape(len(side), len(side)).T
    # The fourth root: narrow peaks are seen from three deviations on.
    extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axis.imshow(density.numpy() ** 0.25, extent=extent, origin="lower", cmap="Greys", alpha=0.45, interpolation="bilinear")
    axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=(), yticks=(), visible=True)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def show_points(axis: "Axes", data: ToyData, points: Tensor, title: str) -> None:
    """Points, blue within three deviations of a centre, orange elsewhere.

    Args:
        axis: where to draw.
        data: the data set.
        points: ``(N, 2)``.
        title: above them.
    """
    show_plane(axis, data)
    points = points[:SHOWN]
    near = data.nearest(points)[0] <= REACH
    for chosen, colour in ((near, COLOURS[0]), (~near, COLOURS[1])):
        x, y = points[chosen].T.numpy()
        axis.scatter(x, y, s=2.5, color=colour, linewidths=0, alpha=0.8)
    axis.set_title(textwrap.fill(title, 20), fontsize=9)


def show_paths(axis: "Axes", data: ToyData, paths: Tensor) -> None:
    """Paths from noise, hollow, to points.

    Args:
        axis: where to draw.
        data: the data set.
        paths: ``(steps + 1, n, 2)``.
    """
    show_plane(axis, data)
    for path in paths.transpose(0, 1).numpy():
        axis.plot(path[:, 0], path[:, 1], color=INK, lw=0.6, alpha=0.6)
    (x, y), (ends_x, ends_y) = paths[0].T.numpy(), paths[-1].T.numpy()
    axis.scatter(x, y, s=9, facecolors="none", edgecolors=COLOURS[6], linewidths=0.7)
    axis.scatter(ends_x, ends_y, s=7, color=COLOURS[0], linewidths=0, zorder=3)


def save_orders(orders: Mapping[str, Any], path: Path) -> None:
    """Errors by evaluations, the fitted orders in the legend.

    Args:
        orders: solver -> evaluations, errors and slope.
        path: file to write.
    """
    with panels(path, 4.6) as (axis,):
        for i, (name, (counts, errors, slope)) in enumerate(orders.items()):
            style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ls": "-" if i < 7 else "--"}
            axis.loglog(counts, errors, **style, label=f"{name}: {slope:.2f}")
        _evaluations_axis(axis, (8, 16, 32, 64, 128, 256))
        axis.set(ylabel="median distance from the flow")
        axis.legend(title="solver: fitted order", loc="center left", bbox_to_anchor=(1, 0.5))


def save_shares(whole: Mapping[str, Any], path: Path) -> None:
    """Share of samples within three deviations by evaluations, of deterministic solvers and of those that add noise.

    Args:
        whole: solver -> evaluations and shares.
        path: file to write.
    """
    with panels(path, 4.2, columns=2, sharey=True) as axes:
        for axis, title in zip(axes, ("the probability flow", "with noise")):
            names = [name for name in whole if bool(METHODS[name].order) == (title != "with noise")]
            for i, name in enumerate(names):
                style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ls": "-" if i < 7 else "--"}
                axis.plot(*whole[name], **style, label=name)
            axis.set(title=title, xscale="log")
            _evaluations_axis(axis, (4, 8, 16, 32, 64))
            axis.legend(loc="lower right", ncols=2)
        axes[0].set_ylabel("share within three deviations")


def _evaluations_axis(axis, ticks):
    axis.set_xlabel("network evaluations")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)


def save_bars(found: Mapping[str, float], label: str, path: Path) -> None:
    """Numbers as bars, the first at the top.

    Args:
        found: numbers by title.
        label: of the numbers.
        path: file to write.
    """
    with panels(path, 0.8 + 0.4 * len(found)) as (axis,):
        bars = axis.barh(list(found), list(found.values()), color=COLOURS[0], height=0.6)
        axis.bar_label(bars, [f"{value:.3g}" for value in found.values()], padding=4)
        axis.set(xlabel=label)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)


def save_errors(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Differences of noises by noise level, a panel for each network.

    Args:
        curves: title of a panel -> label -> numbers by :data:`~advkd.evaluation.toy.methods.LEVELS`.
        path: file to write.
    """
    with panels(path, 3.6, columns=len(curves), sharey=True) as axes:
        for axis, (title, lines) in zip(axes, curves.items()):
            for (label, values), marker in zip(lines.items(), MARKERS):
                axis.loglog(LEVELS, values, marker=marker, label=label)
            axis.set(title=title, xlabel="noise level sigma")
            axis.legend(loc="lower left")
        axes[0].set_ylabel("difference of the noises (root mean square)")


@torch.no_grad()
def arrows(data: ToyData, model: Any, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Exact and learned scores on a grid, times sigma.

    Args:
        data: the data set.
        model: a model with ``predict``.
        sigma: noise level.

    Returns:
        Places x0 + sigma eps, exact and learned ones, each ``(N, 2)`` float64.
    """
    side = torch.linspace(-0.93 * EXTENT, 0.93 * EXTENT, ARROWS, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    state = (grid / (1 + sigma**2) ** 0.5).float()
    exact, learned = (-one.predict(state, sigma)[1].double() for one in (data.teacher, model))
    return grid, exact, learned


def save_scores(data: ToyData, found: Mapping[float, tuple[Tensor, Tensor, Tensor]], path: Path) -> None:
    """A network's scores beside the exact ones, as arrows over the data's density.

    Args:
        data: the data set.
        found: of :func:`arrows` by noise level.
        path: file to write.
    """
    with panels(path, 4.8, columns=len(found)) as axes:
        for axis, (sigma, (grid, *scores)) in zip(axes, found.items()):
            show_plane(axis, data)
            for score, colour, width in zip(scores, (INK, COLOURS[1]), (0.007, 0.0035)):
                axis.quiver(*grid.T.numpy(), *score.T.numpy(), scale=45, width=width, color=colour, zorder=3)
            axis.set_title(f"sigma = {sigma:g}: exact black, learned orange", fontsize=9)


def save_summary(measured: Sequence[Measured], path: Path) -> None:
    """Fidelity and modes of all rows by evaluations.

    Args:
        measured: the pictures of students, and of DDPM.
        path: file to write.
    """
    with panels(path, 4.8, columns=2, sharey=True) as axes:
        for axis, key, label in zip(axes, ("within", "modes"), ("share within three deviations", "share of modes kept")):
            for i, name in enumerate(dict.fromkeys(row.name for row in measured)):
                own = sorted((row.evaluations, row.found[key]) for row in measured if row.name == name)
                style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "ls": "-" if i < len(COLOURS) else "--"}
                axis.plot(*zip(*own, strict=True), **style, label="DDPM, exact" if name == "teacher" else name)
            axis.set(title=label, xscale="log", ylim=(-0.03, 1.05))
            _evaluations_axis(axis, (1, 2, 4, 8, 20, 100, 500))
        axes[1].legend(loc="lower right", fontsize=7)
