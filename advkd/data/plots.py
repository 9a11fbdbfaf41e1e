"""House style of every plot and figure: one width, text that is readable at 900 pixels, colours that all eyes tell apart.

Figures are cards with a light ground of their own, so that they look the same on light and on dark pages.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.0
"""Width of a figure in inches: a point is 1.4 pixels where the figure is shown 900 pixels wide."""
INK, PALE = "#24292f", "#d8dee4"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e7781", "#24292f")
"""Okabe and Ito's colours, in the order in which curves take them."""

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}


@contextlib.contextmanager
def panels(path: str | Path, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Sequence["Axes"]]:
    """Panels of one figure, row by row; the file is written at the end of the block, whole or not at all.

    Args:
        path: file to write; its suffix names the format.
        height: of the figure, in inches; it is :data:`WIDTH` wide.
        rows: rows of panels.
        columns: panels of a row.
        options: as :meth:`matplotlib.figure.Figure.subplots` takes them.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=200, format=Path(path).suffix[1:] or "png")


def show_image(axis: "Axes", pixels: Any, title: str = "", below: str = "") -> None:
    """Show ``(H, W, C)`` uint8 pixels without axes, with a line above and lines below."""
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title(title)
    axis.set_xlabel(below)
