"""Parts that diffusers' pipelines of images have in common: their seeds, and the forms of their images."""

from typing import Any

import torch
from diffusers import ImagePipelineOutput

from ..data.pictures import to_pil
from ..errors import InputError

Generators = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None
"""One generator, one for each image, or torch's own."""


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed of 64 bits from a generator, or from torch's own.

    Args:
        generator: on any device, or None.

    Returns:
        Number in [0, 2^64).
    """
    device = generator.device if generator is not None else "cpu"
    high, low = torch.randint(2**32, (2,), generator=generator, dtype=torch.int64, device=device).tolist()
    return high << 32 | low


def require_call(batch_size: int, generator: Generators, output_type: str) -> None:
    """Refuse arguments of a pipeline's call with which nothing can be drawn.

    Args:
        batch_size: number of images.
        generator: None, one, or one for each image.
        output_type: ``pil``, ``np`` or ``pt``.

    Raises:
        InputError: a batch size below 1, another output type, or another number of generators.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if output_type not in ("pil", "np", "pt"):
        raise InputError(f"output_type must be pil, np or pt, got {output_type!r}")
    if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
        raise InputError(f"generator: {len(generator)} generators came for batch_size {batch_size}")


def pipeline_output(images: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
    """Images in the form that a pipeline was asked for.

    Args:
        images: ``(N, C, H, W)`` float32 in [-1, 1].
        output_type: ``pil`` (Pillow images), ``np`` (``(N, H, W, C)`` in [0, 1]) or ``pt`` (``(N, C, H, W)`` in [0, 1]).
        return_dict: False for a tuple.

    Returns:
        An ``ImagePipelineOutput`` with the field ``images``, or the tuple of it.
    """
    found: Any = to_pil(images) if output_type == "pil" else (images / 2 + 0.5).clamp(0, 1)
    if output_type == "np":
        found = found.permute(0, 2, 3, 1).cpu().numpy()
    return ImagePipelineOutput(images=found) if return_dict else (found,)
