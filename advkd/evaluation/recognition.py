"""How sure a classifier of real images is of drawn ones."""

import torch

from ..data.images import normalize
from ..models.classifier import Classifier
from ..models.shape import batches

SURE = 0.9
"""Probability over which a classifier is sure."""


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
    found = []
    for first, count in batches(len(images), 256):
        shown = normalize(images[first : first + count]).clamp(-1, 1)
        pixels = ((shown + 1) * 127.5).round() / 127.5 - 1
        probabilities = classifier(pixels.to(classifier.scale)).softmax(dim=1).cpu()
        found.append(
            probabilities.amax(1)
            if labels is None
            else probabilities.gather(1, labels[first : first + count, None].cpu())[:, 0]
        )
    return torch.cat(found) > SURE
