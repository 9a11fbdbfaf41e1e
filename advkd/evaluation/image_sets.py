"""Sets of images that are compared: eight bits deep, real ones in a random order."""

from collections.abc import Iterable, Sequence

import torch

from ..data.images import describe_shape, load_images, read_pictures
from ..data.pictures import to_uint8
from ..errors import InputError


def real_images(source: str, shape: Sequence[int], option: str = "--real") -> torch.Tensor:
    """Real images to compare with.

    Args:
        source: ``digits`` or a folder of pictures.
        shape: ``(C, S, S)`` that they must have.
        option: name of the source in errors.

    Returns:
        uint8 ``(N, C, S, S)``.

    Raises:
        InputError: a folder without pictures, or images of another shape.
    """
    images = read_images(source, option)
    if tuple(images.shape[1:]) != tuple(shape):
        found, wanted = describe_shape(images.shape[1:]), describe_shape(shape)
        raise InputError(f"{option} {source} holds {found} images, {wanted} ones are compared")
    return images


def read_images(source: str, option: str) -> torch.Tensor:
    """The digits, or a folder's pictures, uint8 ``(N, C, H, W)``; ``option`` names the source in errors."""
    return eight_bit(load_images("digits")) if source == "digits" else read_pictures(source, option)


def gather(batches: Iterable[torch.Tensor], num: int) -> torch.Tensor:
    """Batches of uint8 images as one tensor, filled without a copy of the whole."""
    images, first = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
    for batch in batches:
        if first == 0:
            images = torch.empty(num, *batch.shape[1:], dtype=torch.uint8, device="cpu")
        images[first : first + len(batch)] = batch
        first += len(batch)
    return images


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 ``(N, C, H, W)``, which all are compared in: PNGs of the same images give the same figures."""
    return to_uint8(images).cpu().permute(0, 3, 1, 2).contiguous()


def shuffled(features: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows in a seeded random order: real sets are sorted by writer, class or name."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return features[torch.randperm(len(features), generator=generator, dtype=torch.int64, device="cpu")]
