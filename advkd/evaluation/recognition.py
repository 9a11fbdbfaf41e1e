"""How sure a classifier of real images is of drawn ones."""

import torch

from ..data.images import normalize
from ..models.classifier import Classifier
from .image_sets import eight_bit

SURE = 0.9
"""Probability over which a classifier is sure."""

BATCH = 256
"""Images that a classifier sees at a time."""


@torch.no_grad()
def recognised(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The images in which a classifier is sure of a class; puts it in eval mode.

    Args:
        classifier: of clean images.
        images: ``(N, C, S, S)``, floating point in [-1, 1] or uint8; the former are rounded to 8 bits, as people see them.
        labels: ``(N,)`` int64 classes that were asked for; None: any class will do.

    Returns:
        ``(N,)`` bool on the CPU: the class has a probability of more than :data:`SURE`.
    """
    classifier.eval()
    seen = images if images.dtype == torch.uint8 else eight_bit(images)
    parts = [classifier(normalize(part).to(classifier.scale)).softmax(dim=1).cpu() for part in seen.split(BATCH)]
    probabilities = torch.cat(parts)
    found = probabilities.amax(1) if labels is None else probabilities.gather(1, labels.cpu()[:, None])[:, 0]
    return found > SURE
