"""The stages of ``advkd sample --cascade``, which enlarge what another model draws."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import tee
from typing import Any

import torch

from ..diffusion.cascade import Base, Cascade, SuperResolution, shape_of
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.solvers import Solver
from ..diffusion.students import student_class
from ..diffusion.teacher import Teacher
from ..errors import InputError
from .output import Draw


def load_stages(
    sources: Sequence[str], device: str | torch.device, solver: Solver | None = None, steps: int | None = None
) -> list[SuperResolution]:
    """The super-resolution models of ``--cascade``, in their order.

    Args:
        sources: folders or hub ids of super-resolution teachers, and of denoiser students of them.
        device: torch device that draws.
        solver: of the teachers; None: ddim.
        steps: of the teachers; None: the solver's usual number.

    Returns:
        Stages; none without sources.

    Raises:
        InputError: files that cannot be read, or models that take no low image.
    """
    with _naming("--cascade"):
        return [_stage(source, device, solver, steps) for source in sources]


def _stage(source, device, solver, steps):
    if student_class(source) is DenoiserStudent:
        return SuperResolution(DenoiserStudent.from_pretrained(source, device))
    return SuperResolution(Teacher.from_pretrained(source, device), solver, steps)


@contextlib.contextmanager
def _naming(option):
    """Give the error of what ``option`` named its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def enlarged(
    draw: Draw, record: dict[str, Any], base: Base, stages: Sequence[SuperResolution], level: int | None, seed: int
) -> tuple[Draw, dict[str, Any], int, str]:
    """A function that draws batches, and its record, with the images enlarged.

    Args:
        draw: draws the base's batches.
        record: JSON values that name everything these depend on.
        base: the model that draws them.
        stages: those of :func:`load_stages`; without any nothing changes.
        level: of the low images' noise; None: see :meth:`SuperResolution.level`.
        seed: of the stages' noise.

    Returns:
        ``(draw, record, side of the images, words for what the stages cost)``.

    Raises:
        InputError: stages that do not fit each other or the base, or a level that one was not trained with.
    """
    if not stages:
        return draw, record, shape_of(base)[-1], ""
    with _naming("--cascade"):
        cascade = Cascade(base, *stages)
    with _naming("--cascade-level"):
        levels = cascade.levels(level)

    def draw_enlarged(parts: Iterator[tuple[int, int]]) -> Iterator[torch.Tensor]:
        parts, places = tee(parts)
        for images in draw(parts):
            yield cascade.enlarge(images, seed, next(places)[0], level)

    record = {**record, "cascade": [_identity(stage, level) for stage, level in zip(stages, levels, strict=True)]}
    costs = (f"{stage.evaluations} at {stage.model.shape[-1]} pixels" for stage in stages)
    return draw_enlarged, record, cascade.image_size, "; network evaluations of the cascade: " + ", ".join(costs)


def _identity(stage, level):
    """JSON values that a stage's images depend on."""
    model = {**stage.model.identity(stage.solver), "name": None}
    return {"model": model, "solver": stage.solver.identity(), "steps": stage.steps, "level": level}
