"""Pictures of a teacher: the distance of its images by solver and evaluations, and its classes by weight of guidance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.pictures import LARGEST, to_uint8
from ..data.plots import COLOURS, INK, panels, show_image
from ..diffusion.solvers import Solver
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..runtime.files import read_json, restoring

LINES = ("-", "--", ":")
"""Styles of lines that tell solvers of one colour apart."""

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Weights of guidance, a row each."""

SOLVER, STEPS = "unipc", 10
"""The run that draws classes by weight of guidance."""


def read_solvers(path: str | Path) -> dict[str, Any]:
    """The result of ``advkd evaluate --solvers``.

    Args:
        path: of ``solvers.json``.

    Returns:
        Its contents.

    Raises:
        InputError: a file that is missing, damaged or of another kind.
    """
    result = read_json(path, "solvers", ("rows", "baseline", "teacher", "config"))
    with restoring("solvers", path, "run 'advkd evaluate --solvers' again"):
        if not result["rows"] or not result["config"]["evaluations"] or result["config"]["fine_steps"] < 1:
            raise ValueError("it has no rows")
        for row in result["rows"]:
            for against in ("real", "fine"):
                numbers = (row["evaluations"], *row[against]["at_infinity_interval"], row[against]["at_infinity"])
                if not all(abs(float(number)) <= LARGEST for number in numbers) or row["evaluations"] < 1:
                    raise ValueError("a row cannot be drawn")
    return result


def save_solver_curves(result: dict[str, Any], path: str | Path) -> None:
    """Plot the distance at infinity against network evaluations, to real images and to the fine-step reference.

    Args:
        result: what :func:`read_solvers` gives.
        path: picture to write.
    """
    names = list(dict.fromkeys(row["solver"] for row in result["rows"]))
    titles = {"real": "to real images", "fine": f"to unipc-2 with {result['config']['fine_steps']} steps, other noise"}
    with panels(path, 4.6, 1, 2) as axes:
        for axis, (against, title) in zip(axes, titles.items()):
            for i, name in enumerate(names):
                rows = sorted((row for row in result["rows"] if row["solver"] == name), key=lambda row: row["evaluations"])
                _curve(axis, rows, against, name, COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)])
            axis.set(title=title, xscale="log", xlabel="network evaluations", ylabel="Frechet distance at infinity")
            ticks = sorted({row["evaluations"] for row in result["rows"]})
            axis.set_xticks([t for t in ticks if t in result["config"]["evaluations"]] or ticks)
            axis.get_xaxis().set_major_formatter("{x:.0f}")
            axis.minorticks_off()
            axis.set_yscale("symlog", linthresh=0.1)
        axes[0].legend(ncols=2)


def _curve(axis, rows, against, name, colour, line):
    x = [row["evaluations"] for row in rows]
    y = [row[against]["at_infinity"] for row in rows]
    low, high = zip(*(row[against]["at_infinity_interval"] for row in rows))
    axis.plot(x, y, marker="o", color=colour, linestyle=line, label=name)
    axis.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)


def guided_images(
    teacher: Teacher,
    weights: Sequence[float] = WEIGHTS,
    seed: int = 0,
    solver: str | Solver = SOLVER,
    steps: int = STEPS,
    most: int = 10,
) -> torch.Tensor:
    """One image of a class at every weight of guidance, from one start noise per class.

    Args:
        teacher: a conditional :class:`Teacher` with a null class.
        weights: of guidance.
        seed: of the noise.
        solver: a name, or a :class:`~advkd.diffusion.solvers.Solver`.
        steps: number of steps.
        most: classes that are drawn, the first ones.

    Returns:
        ``(len(weights), classes, C, S, S)`` float32 in [-1, 1].

    Raises:
        InputError: an unconditional teacher, or one without a null class.
    """
    if not teacher.num_classes:
        raise InputError(f"teacher {teacher.name} is unconditional: classes by guidance need a conditional one")
    labels = torch.arange(min(most, teacher.num_classes), device=teacher.device)
    draw = [teacher.sample(len(labels), seed, solver, steps, labels=labels, guidance=weight) for weight in weights]
    return torch.stack(draw).cpu()


def require_guidance(teacher: Teacher) -> None:
    """Refuse a teacher whose classes :func:`save_guidance` cannot show.

    Args:
        teacher: a :class:`Teacher`.

    Raises:
        InputError: it has no classes or no null class, or the solver cannot take its schedule.
    """
    try:
        teacher.check_run(1, SOLVER, STEPS, labels=0, guidance=max(WEIGHTS))
    except InputError as error:
        raise InputError(f"classes by weight of guidance cannot be shown ({error}): name another by --conditional") from error


def save_guidance(teacher: Teacher, path: str | Path, weights: Sequence[float] = WEIGHTS, most: int = 10) -> None:
    """Show classes, a column each, by weight of guidance, a row each.

    Args:
        teacher: a conditional :class:`Teacher` with a null class.
        path: picture to write.
        weights: of guidance.
        most: classes that are shown, the first ones.
    """
    images = guided_images(teacher, weights, most=most)
    pixels = to_uint8(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    rows, columns = images.shape[:2]
    with panels(path, 0.95 * rows, rows, columns) as axes:
        for i in range(rows):
            for j in range(columns):
                axis = axes[i * columns + j]
                show_image(axis, pixels[i, j], teacher.class_names[j] if i == 0 else "")
                if j == 0:
                    axis.set_ylabel(f"w = {weights[i]:g}", color=INK, rotation=0, ha="right", va="center")
