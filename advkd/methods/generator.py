"""Parts that methods of generator students share: the conditions of critics, and the images that show a stage's result."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labels import labels_in_turn
from ..models.student import Student
from ..ops.latents import split_latent

SHOWN, MOST_SHOWN = 36, 100
"""Images that show a result: so many, or one of each class up to the larger number."""


def condition_channels(student: Student, latent: bool) -> int:
    """Channels of :func:`condition_planes`.

    Args:
        student: the student.
        latent: True if critics see the latent.

    Returns:
        Their number; 0 where critics are told nothing.
    """
    parts = sum(channels for channels, side in student.latent_parts if side == 4) if latent else 0
    return parts + student.num_classes


def condition_planes(student: Student, z: Tensor, labels: Tensor | None, latent: bool) -> Tensor | None:
    """Inputs of critics beside an image: the latent's 4x4 parts, and the class as planes of 0 and 1.

    Args:
        student: the student.
        z: ``(N, latent_numel)``.
        labels: ``(N,)`` int64 classes of a conditional student.
        latent: True if critics see the latent.

    Returns:
        ``(N, channels, 4, 4)`` in ``z``'s dtype, the latent's parts first; None where critics are told nothing.
    """
    planes = []
    if latent:
        parts = zip(split_latent(z, student.latent_parts), student.latent_parts, strict=True)
        planes += [part for part, (_, side) in parts if side == 4]
    if labels is not None:
        planes.append(F.one_hot(labels, student.num_classes).to(z.dtype)[:, :, None, None].expand(-1, -1, 4, 4))
    return torch.cat(planes, dim=1) if planes else None


def previewed(student: Any, seed: int) -> Tensor | None:
    """Images that show a stage's result, the same in every run of one seed, of all classes in turn.

    Args:
        student: the result so far.
        seed: of the latents.

    Returns:
        ``(N, C, H, W)``, or None for a module that has no ``latents`` as :class:`advkd.Student` has.
    """
    if not hasattr(student, "latents"):
        return None
    z, labels = preview(student, seed)
    drawn = student(z, labels=labels)
    return student.images(drawn) if isinstance(student, Student) else drawn


def preview(student: Student, seed: int) -> tuple[Tensor, Tensor | None]:
    """Latents and classes of the images that show a stage's result, the same in every run of one seed.

    Args:
        student: the student.
        seed: of the latents.

    Returns:
        ``(z, labels)``: ``(N, latent_numel)`` in the weights' dtype; ``(N,)`` int64, all classes in turn, or None of an
        unconditional student.
    """
    n = max(SHOWN, min(student.num_classes, MOST_SHOWN))
    z = student.latents(n, seed)
    labels = labels_in_turn(range(student.num_classes), 0, n)
    return z.to(next(student.parameters()).dtype), None if labels is None else labels.to(z.device)
