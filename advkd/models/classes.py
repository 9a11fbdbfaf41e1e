"""The classes of a conditional student: the labels that it takes, and how a class joins the latent.

The features of a class at 4x4 follow those of the noise as further input channels of the first convolution: flat latents are
``[4x4 part | class | detail parts]``. The convolutions of a conditional student differ from others by that number alone.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..ops.arguments import whole
from ..ops.latents import split_latent
from .autoencoder import Pictured
from .shape import StudentConfig

Labels = int | Sequence[int] | torch.Tensor | None
"""Class numbers that images take in turn: one for all, several, or None for every class."""

SHOWN = 100
"""Most names of classes that a message lists."""


class Conditional(Pictured):
    """The names of a student's classes and the shape of what it draws, as its configuration has them."""

    config: StudentConfig

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """``(C, S, S)`` of what the student draws: pictures, or latents divided by a bound."""
        return (self.config.image_channels, self.config.image_size, self.config.image_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty for an unconditional student."""
        return self.config.classes

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional student."""
        return len(self.config.classes)


def join_class(z: torch.Tensor, parts: Sequence[tuple[int, int]], features: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The parts of latents as maps, the features of their classes behind the 4x4 part's channels.

    Args:
        z: ``(N, latent_numel)`` noise.
        parts: ``[(channels, side), ...]``, the parts of the noise.
        features: ``(N, class_channels * 16)``, one row of the embedding for each latent; None without classes.

    Returns:
        ``[(N, channels + class_channels, 4, 4), (N, channels, side, side), ...]``.

    Raises:
        InputError: a ``z`` of another shape.
    """
    pieces = split_latent(z, parts)
    if features is not None:
        pieces[0] = torch.cat((pieces[0], features.unflatten(1, (-1, *pieces[0].shape[2:]))), dim=1)
    return pieces


def flat_join(z: torch.Tensor, parts: Sequence[tuple[int, int]], features: torch.Tensor) -> torch.Tensor:
    """:func:`join_class` as one flat latent, which engines take.

    Args:
        z: ``(N, latent_numel)`` noise.
        parts: ``[(channels, side), ...]``, the parts of the noise.
        features: ``(N, class_channels * 16)``.

    Returns:
        ``(N, latent_numel + class_channels * 16)``: ``[4x4 part | class | detail parts]``.
    """
    return torch.cat([piece.flatten(1) for piece in join_class(z, parts, features)], dim=1)


def require_labels(labels: torch.Tensor | None, names: Sequence[str], z: torch.Tensor) -> None:
    """Refuse labels that do not fit a student's classes or its latents.

    Numbers are not looked at where they have none yet (in an export or a compilation) or cannot be read (while a CUDA graph is
    captured).

    Args:
        labels: class numbers, or None.
        names: names of the classes; empty for an unconditional student.
        z: the latents ``(N, latent_numel)``.

    Raises:
        InputError: labels of an unconditional student, none of a conditional one, or others than ``(N,)`` int64 in range on
            the latents' device.
    """
    if labels is None and not names:
        return
    _require_conditional(names)
    if labels is None:
        raise InputError(f"labels are missing: the student has classes ({listed(names)}); give the number of one a latent")
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != z.shape[:1]:
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else repr(labels)
        raise InputError(f"labels must be an int64 tensor {tuple(z.shape[:1])}, one class number a latent, got {found}")
    if labels.device != z.device:
        raise InputError(f"labels must be on {z.device} like z, got {labels.device}")
    if _are_known(labels) and len(labels):
        least, most = torch.stack(labels.aminmax()).tolist()
        if not 0 <= least <= most < len(names):
            raise InputError(f"labels must be in [0, {len(names)}), got {least} to {most}")


def told(labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The labels as keywords of a student's call: an unconditional one may have a forward that knows none.

    Args:
        labels: class numbers, or None.

    Returns:
        ``{"labels": labels}``, empty without labels.
    """
    return {} if labels is None else {"labels": labels}


def turns(labels: Labels, names: Sequence[str], argument: str = "labels") -> list[int]:
    """The class numbers that images take in turn by their index.

    Args:
        labels: as :data:`Labels`.
        names: names of the student's classes; empty for an unconditional one.
        argument: name of the argument, for errors.

    Returns:
        Numbers; empty for an unconditional student.

    Raises:
        InputError: labels of an unconditional student, an empty sequence, a number that is no class, or True or False.
    """
    if labels is None:
        return list(range(len(names)))
    _require_conditional(names, argument)
    found: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    found = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    if not found:
        raise InputError(f"{argument} must name a class, got an empty sequence: leave them out for every class in turn")
    return [_number(argument, value, len(names)) for value in found]


def listed(names: Sequence[str]) -> str:
    """Names of classes for a message: all of them, or the first ones of many.

    Args:
        names: the names.
    """
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _number(argument, value, below):
    """A class number of Python, numpy or a tensor; a truth value would be class 0 or 1 without a word."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bool):
        raise InputError(f"{argument} must be a whole number, got {value!r}")
    return whole(argument, value, 0, below)


def _require_conditional(names, argument="labels"):
    if not names:
        raise InputError(f"{argument}: the student is unconditional; leave them out")


def _are_known(labels):
    """True for numbers that can be read now."""
    if labels.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not labels.is_cuda or not torch.cuda.is_current_stream_capturing()
