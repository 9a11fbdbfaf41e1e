"""Images as deterministic functions of their own parameters, the g of x = g(phi) in score distillation."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.draws import Draw
from ..errors import InputError


class OptimisedImages(nn.Module):
    """Images in [-1, 1] or latents, each a function of its own row of one parameter.

    Args:
        start: ``(num, ...)`` the parameter where optimisation begins.
        bounded: False for latents, which may be any numbers.

    Attributes:
        values: ``(num, ...)`` the parameter.
        spread: standard deviation of the parameter's start.
    """

    spread: ClassVar[float] = 0.5

    def __init__(self, start: Tensor, bounded: bool = True):
        super().__init__()
        self.values, self.bounded = nn.Parameter(start), bounded

    def __len__(self) -> int:
        return len(self.values)

    def forward(self, numbers: Tensor) -> Tensor:
        """Some of the images.

        Args:
            numbers: ``(N,)`` int64, each in [0, ``num``).

        Returns:
            ``(N, ...)`` images in the parameter's dtype; gradients flow to their own rows of it.
        """
        raise NotImplementedError

    def _bounded(self, x):
        return x.tanh() if self.bounded else x


class Pixels(OptimisedImages):
    """Every pixel is a number: x = tanh(phi), or phi of latents.

    Args:
        start: ``(num, ...)``, of the images' own shape, whatever it is.
        bounded: see :class:`OptimisedImages`.
    """

    def forward(self, numbers: Tensor) -> Tensor:
        """Some of the images; see :class:`OptimisedImages`."""
        return self._bounded(self.values[numbers])


class Coefficients(OptimisedImages):
    """A smaller grid of numbers, enlarged bilinearly: x = tanh(U phi), so that no image has details finer than the grid.

    Args:
        start: ``(num, C, grid, grid)``.
        size: ``(height, width)`` of the images.
        bounded: see :class:`OptimisedImages`; x = U phi of latents.
    """

    def __init__(self, start: Tensor, size: Sequence[int], bounded: bool = True):
        super().__init__(start, bounded)
        self.size = tuple(size)

    def forward(self, numbers: Tensor) -> Tensor:
        """Some of the images; see :class:`OptimisedImages`."""
        return self._bounded(F.interpolate(self.values[numbers], self.size, mode="bilinear", align_corners=False))


class Warp(OptimisedImages):
    """An affine map of a prototype's plane, identity + phi, six numbers an image; outside, the prototype's border goes on.

    The images are means of neighbouring pixels of the prototype and stay within its range.

    Args:
        start: ``(num, 2, 3)``; 0 is the prototype itself. Lengths are halves of the image's side.
        prototypes: ``(num, C, H, W)``.
    """

    spread = 0.05
    prototypes: Tensor
    identity: Tensor

    def __init__(self, start: Tensor, prototypes: Tensor):
        super().__init__(start)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("identity", torch.eye(2, 3, dtype=start.dtype, device=start.device))

    def forward(self, numbers: Tensor) -> Tensor:
        """Some of the images; see :class:`OptimisedImages`."""
        prototypes = self.prototypes[numbers]
        grid = F.affine_grid(self.identity + self.values[numbers], list(prototypes.shape), align_corners=False)
        return F.grid_sample(prototypes, grid, mode="bilinear", padding_mode="border", align_corners=False)


GENERATORS: dict[str, type[OptimisedImages]] = {"pixels": Pixels, "coefficients": Coefficients, "warp": Warp}
"""Name -> kind of optimised images."""


def optimised_images(
    generator: str,
    shape: Sequence[int],
    num: int,
    seed: int = 0,
    grid: int = 16,
    prototypes: Tensor | None = None,
    bounded: bool = True,
) -> OptimisedImages:
    """Images at a random start, in float32 on the CPU.

    Args:
        generator: one of :data:`GENERATORS`.
        shape: of an image; ``(C, H, W)`` but for ``pixels``.
        num: number of images, at least 1.
        seed: of the start; image i's is a function of (seed, i) alone.
        grid: side of the grid of ``coefficients``, from 1 to the image's own.
        prototypes: of ``warp``: ``(C, H, W)``, or ``(num, C, H, W)`` for one an image, finite, and in [-1, 1] if ``bounded``.
        bounded: True for images, which are in [-1, 1]; False for latents.

    Returns:
        Module of the images.

    Raises:
        InputError: another generator, no image, a grid larger than the image, or prototypes that are missing, not needed, of
            another shape, not finite or out of range.

    Examples:
        >>> optimised_images("pixels", (1, 8, 8), num=4)(torch.arange(4)).shape
        torch.Size([4, 1, 8, 8])
    """
    if generator not in GENERATORS:
        raise InputError(f"generator must be one of {', '.join(GENERATORS)}, got {generator!r}")
    if num < 1:
        raise InputError(f"num must be at least 1, got {num}")
    if (prototypes is None) == (generator == "warp"):
        fault = "warp needs prototypes: name images by --data" if prototypes is None else f"{generator} has no prototype"
        raise InputError(f"generator {fault}")
    draw = Draw(seed, 0, num, "cpu", torch.float32)
    shape, kind = tuple(shape), GENERATORS[generator]
    if generator == "pixels":
        return Pixels(kind.spread * draw.normal("start", *shape), bounded)
    if generator == "warp":
        assert prototypes is not None
        return Warp(kind.spread * draw.normal("start", 2, 3), _prototypes(prototypes, shape, num, bounded))
    channels, *size = shape
    if not 1 <= grid <= min(size):
        what = "image" if bounded else "latent"
        raise InputError(f"grid must be from 1 to the {what}'s side, {min(size)}, got {grid}")
    return Coefficients(kind.spread * draw.normal("start", channels, grid, grid), size, bounded)


def _prototypes(prototypes, shape, num, bounded):
    """One prototype an image, checked."""
    if tuple(prototypes.shape) not in (shape, (num, *shape)):
        raise InputError(f"prototypes must be {shape} or {(num, *shape)}, got {tuple(prototypes.shape)}")
    largest = float(prototypes.abs().max()) if prototypes.isfinite().all() else math.inf
    if not largest <= (1 if bounded else torch.finfo(torch.float32).max):
        wanted = "finite images in [-1, 1]" if bounded else "finite latents"
        raise InputError(f"prototypes must be {wanted}, the largest magnitude is {largest:g}: choose other --data")
    return prototypes.detach().to("cpu", torch.float32).expand(num, *shape).clone()
