"""Pictures of tensors: grids, strips of levels, loss curves."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..runtime.files import replacing, require_regular
from .plots import WIDTH, panels, show_image

if TYPE_CHECKING:
    from PIL import Image

METRICS_LIMIT = 2**28
"""Bytes that a ``metrics.csv`` may have."""

LARGEST = 1e30
"""Largest magnitude that is drawn: matplotlib multiplies float64 numbers."""


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """``(N, C, H, W)`` in [-1, 1] to ``(N, H, W, C)`` uint8."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 ``(N, C, H, W)``, which all are compared in: PNGs of the same images give the same figures."""
    return to_uint8(images).cpu().permute(0, 3, 1, 2).contiguous()


def to_pil(images: torch.Tensor) -> list["Image.Image"]:
    """``(N, C, H, W)`` in [-1, 1], C = 1, 3 or 4 (or the result of :func:`to_uint8` for them), to a list of Pillow images."""
    from PIL import Image

    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in pixels.cpu().numpy()]


def save_grid(images: torch.Tensor, path: str | Path, columns: int | None = None, scale: int | None = None) -> None:
    """Save ``(N, C, H, W)`` in [-1, 1] as one PNG (or any format Pillow knows by its suffix), row by row.

    ``columns`` defaults to the square root of N; ``scale`` enlarges small images, by default to about 96 pixels.
    """
    from PIL import Image

    if len(images) == 0:
        raise InputError("there is no image to save")
    scale = scale or max(1, 96 // images.shape[-1])
    pixels = to_uint8(images).cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    sheet = _sheet(pixels, columns or math.ceil(math.sqrt(len(images))), gap=2)
    save_image(Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet), path)


def _sheet(pixels, columns, gap):
    """``(N, H, W, C)`` row by row on one white sheet with gaps and a margin, as a numpy array."""
    n, height, width, channels = pixels.shape
    rows = math.ceil(n / columns)
    size = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = torch.full(size, 255, dtype=torch.uint8, device="cpu")
    for i, tile in enumerate(pixels):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return sheet.numpy()


def save_image(image: "Image.Image", path: str | Path) -> None:
    """Save a Pillow image atomically; an unknown suffix is an :class:`InputError`."""
    from PIL import Image

    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise InputError(f"--out {path}: unknown picture suffix {path.suffix!r}; use .png")
    with replacing(path) as temporary:
        image.save(temporary, format=kind)


def save_pairs(
    teacher: torch.Tensor, student: torch.Tensor, path: str | Path, titles: Sequence[str] = ("teacher", "student")
) -> None:
    """Teacher's and student's images of the same noise, column by column, as a PNG."""
    rows = torch.cat((teacher, student))
    _figure_of_rows(rows, len(teacher), titles, path)


def save_levels(
    states: list[torch.Tensor], levels: list[torch.Tensor], timesteps: Sequence[int | None], path: str | Path
) -> None:
    """The student's levels beneath the teacher's states of one sample, each scaled by its own spread (paper's figures 3, 4).

    Args:
        states: the teacher's levels, a list of ``(C, R_k, R_k)``.
        levels: the student's, likewise (standardised or not).
        timesteps: the teacher's timestep of each level (None for x_0).
        path: PNG to write.
    """
    names = [f"{k}: {'x_0' if t is None else f't={t}'}" for k, t in enumerate(timesteps, 1)]
    side = max(state.shape[-1] for state in states)
    tiles = [_tile(image, side, k == len(states)) for row in (states, levels) for k, image in enumerate(row, 1)]
    _figure_of_rows(torch.stack(tiles), len(states), ("teacher", "student"), path, names)


def _tile(image, side, final):
    scaled = image.float().cpu() if final else image.float().cpu() / (2.5 * image.float().std().clamp_min(1e-6)).cpu()
    return torch.nn.functional.interpolate(scaled[None], size=(side, side), mode="nearest")[0]


def _figure_of_rows(images, columns, titles, path, names=None):
    rows = len(images) // columns
    side = WIDTH / (columns + 0.3)
    pixels = to_uint8(images).cpu().numpy()
    with panels(path, rows * side + (0.45 if names else 0.15), rows, columns) as axes:
        for i, axis in enumerate(axes):
            show_image(axis, pixels[i], names[i] if names and i < columns else "")
            if i % columns == 0:
                axis.set_ylabel(titles[i // columns])


def save_strip(images: torch.Tensor, titles: Sequence[str], captions: Sequence[str], path: str | Path) -> None:
    """Save groups of images side by side, each under its title and above its caption, as a PNG.

    Args:
        images: ``(G, N, C, H, W)`` in [-1, 1]: G groups of N images.
        titles: a line above each group.
        captions: a line below each group.
        path: file to write.
    """
    columns = math.ceil(math.sqrt(images.shape[1]))
    with panels(path, WIDTH / len(images) + 0.45, 1, len(images)) as axes:
        for axis, group, title, caption in zip(axes, images, titles, captions, strict=True):
            show_image(axis, _sheet(to_uint8(group).cpu(), columns, gap=1), title, caption)


def save_curves(metrics: str | Path, path: str | Path) -> None:
    """Loss curves from ``metrics.csv`` (see :mod:`advkd.training.log`) as a PNG."""
    columns = read_metrics(metrics)
    updates = _total_updates(columns["stage"], columns["update"])
    levels = [name for name in columns if name.startswith("mse_")]
    adversarial = [name for name in ("critic", "wasserstein", "penalty") if any(map(math.isfinite, columns.get(name, ())))]
    with panels(path, 3.4, columns=2 if levels else 1) as axes:
        right, left = axes[-1], axes[0]
        for i, name in enumerate(levels):
            shade = (0.75 - 0.75 * i / len(levels), 0.85 - 0.55 * i / len(levels), 0.9 - 0.2 * i / len(levels))
            left.plot(updates, columns[name], color=shade, label=f"level {int(name[4:])}", lw=1)
        if levels:
            left.set(title="mean squared error by level", xlabel="update", yscale="log")
            left.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for name in ["loss", *adversarial]:
            right.plot(updates, columns[name], label=name, lw=1)
        right.set(title="losses", xlabel="update")
        right.legend()


def save_extrapolation(curves: dict[str, dict], score: str, path: str | Path) -> None:
    """Frechet distances at several N against 1/N, with the fitted lines, as a PNG.

    Args:
        curves: ``{name: a result of advkd.evaluation.metrics.frechet_at_infinity}``.
        score: name of the distance.
        path: PNG to write.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}), panels(path, 3.4) as (axis,):  # names are no formulas
        for name, fit in curves.items():
            inverse = [1 / size for size in fit["sizes"]]
            (points,) = axis.plot(inverse, fit["distances"], "o")
            ends = [0, max(inverse)]
            axis.plot(ends, [fit["value"] + fit["slope"] * x for x in ends], color=points.get_color(), label=name)
        axis.set(xlabel="1 / N", ylabel=score, title=f"{score} at several N")
        axis.legend()


def read_metrics(path: str | Path) -> dict[str, list[float]]:
    """The columns of a ``metrics.csv``, ``{name: [numbers]}``; a torn last row, of a run in progress, is left out.

    Raises:
        InputError: the file is missing or not a training's metrics.
    """
    require_regular(path, "--metrics", METRICS_LIMIT)
    try:
        columns = _columns(path)
        if any(name.startswith("mse_") and not re.fullmatch(r"mse_\d{1,4}", name) for name in columns):
            raise ValueError("a level has no number")
        if any(LARGEST < abs(number) < math.inf for column in columns.values() for number in column):
            raise ValueError(f"a number is larger than {LARGEST:g}")
    except (OSError, ValueError) as error:
        raise InputError(f"--metrics {path} is not a metrics.csv of 'advkd distill' ({error})") from error
    if not {"stage", "update", "loss"} <= set(columns) or not columns["stage"]:
        raise InputError(f"--metrics {path} is not a metrics.csv of 'advkd distill'")
    return columns


def _columns(path):
    """The columns of a table, row by row: its text takes less memory than lists of all its words."""
    with open(path, encoding="utf-8") as file:
        titles = file.readline(2**16).rstrip("\n").split(",")
        columns = [[] for _ in titles]
        if len(set(titles)) < len(titles):
            raise ValueError("two columns have one title")
        for line in file:
            if not line.endswith("\n"):
                break
            if line.count(",") == len(titles) - 1:
                for column, word in zip(columns, line[:-1].split(","), strict=True):
                    column.append(float(word) if word else math.nan)
            elif line != "\n":
                raise ValueError("a row has more or fewer cells than there are titles")
    return dict(zip(titles, columns, strict=True))


def _total_updates(stages, updates):
    """Updates since the start of the run, from the updates since the start of each stage."""
    total, before, result = 0, None, []
    for stage, update in zip(stages, updates, strict=True):
        if before is not None and stage != before[0]:
            total += before[1]
        before = (stage, update)
        result.append(total + update)
    return result
