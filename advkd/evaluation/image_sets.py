"""Sets of images that are compared: eight bits deep, real ones in a random order."""

from collections.abc import Iterable, Sequence

import torch

from ..data.glyph_sets import held_out_glyphs
from ..data.glyphs import LARGEST
from ..data.images import describe_shape, load_images, read_pictures
from ..data.pictures import eight_bit
from ..errors import InputError


def real_images(
    source: str,
    shape: Sequence[int],
    option: str = "--real",
    num: int = 0,
    progress: bool = False,
    classes: Sequence[str] = (),
) -> torch.Tensor:
    """Real images to compare with.

    Args:
        source: ``digits``, a data set of glyphs, of which held-out ones are taken, or a folder of pictures.
        shape: ``(C, S, S)`` that they must have.
        option: name of the source in errors.
        num: number of glyphs (0: :data:`advkd.data.glyph_sets.REFERENCE`).
        progress: show a bar while glyphs are drawn.
        classes: names of the classes of what is compared, which glyphs then have, too; empty: not known.

    Returns:
        uint8 ``(N, C, S, S)``.

    Raises:
        InputError: a folder without pictures, images of another shape, a number of images that are no glyphs, or a class that
            the glyphs do not have.
    """
    if (glyphs := held_out_glyphs(source, num, option)) is not None:
        return glyphs.of(classes, option).images(shape[-1], shape[0], progress)
    images = read_images(source, option)
    if tuple(images.shape[1:]) != tuple(shape):
        found, wanted = describe_shape(images.shape[1:]), describe_shape(shape)
        raise InputError(f"{option} {source} holds {found} images, {wanted} ones are compared")
    return images


def read_images(source: str, option: str) -> torch.Tensor:
    """The digits, or a folder's pictures, uint8 ``(N, C, H, W)``; ``option`` names the source in errors."""
    if held_out_glyphs(source) is not None:
        raise InputError(f"{option} {source}: glyphs have the size of what they are compared with: name them by --reference")
    return eight_bit(load_images("digits")) if source == "digits" else read_pictures(source, option)


def reference_images(source: str, shape: Sequence[int], num: int = 0, progress: bool = False) -> torch.Tensor:
    """Images of ``--reference``.

    Args:
        source: ``digits``, a data set of glyphs, or a folder of pictures, which keep their own size.
        shape: ``(C, S, S)`` of what is compared with them, which glyphs have, too.
        num: number of glyphs, as for :func:`real_images`.
        progress: show a bar while glyphs are drawn.

    Returns:
        uint8 ``(N, C, H, W)``.

    Raises:
        InputError: as for :func:`real_images`.
    """
    if (glyphs := held_out_glyphs(source, num, "--reference")) is None:
        return read_images(source, "--reference")
    if shape[0] != 3 or shape[1] != shape[2] or not 8 <= shape[2] <= LARGEST or shape[2] & (shape[2] - 1):
        wanted = f"colour ones of 4 * 2^k x 4 * 2^k pixels, from 8 to {LARGEST}"
        raise InputError(f"--images are {describe_shape(shape)}, --reference {source} can be compared with {wanted}")
    return glyphs.images(shape[2], progress=progress)


def gather(batches: Iterable[torch.Tensor], num: int) -> torch.Tensor:
    """Batches of uint8 images as one tensor, filled without a copy of the whole."""
    images, first = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
    for batch in batches:
        if first == 0:
            images = torch.empty(num, *batch.shape[1:], dtype=torch.uint8, device="cpu")
        images[first : first + len(batch)] = batch
        first += len(batch)
    return images


def shuffled(features: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows in a seeded random order: real sets are sorted by writer, class or name."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return features[torch.randperm(len(features), generator=generator, dtype=torch.int64, device="cpu")]
