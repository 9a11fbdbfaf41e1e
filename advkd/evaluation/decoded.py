"""The floor of latent models: real images that went through their autoencoder, which no model of the latents can undercut."""

from pathlib import Path

import torch

from ..data.pictures import eight_bit
from ..diffusion.teacher import Teacher
from ..models.autoencoder import TOGETHER
from .features import Extractor, extract
from .image_sets import shuffled

DECODED = "decoded real images"
"""Name of the floor in tables."""


def decoded_features(model: Teacher, extractor: Extractor, images: torch.Tensor, cache: Path) -> torch.Tensor | None:
    """Features of one half of the real images, encoded and decoded, to be compared with the other half.

    Args:
        model: the model.
        extractor: of the features.
        images: all real images, uint8 ``(N, C, S, S)``.
        cache: folder of kept features.

    Returns:
        ``(N - N // 2, D)``, of the second half in the order of :func:`~advkd.evaluation.image_sets.shuffled`; None for a model
        of pixels.
    """
    if model.autoencoder is None:
        return None
    parts = shuffled(images)[len(images) // 2 :].split(TOGETHER)
    decoded = (model.images(model.autoencoder.encode(part.to(model.device))) for part in parts)
    return extract(extractor, torch.cat([eight_bit(part) for part in decoded]), cache=cache)
