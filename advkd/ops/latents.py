"""The student's latent z: an orthonormal projection of the teacher's start noise x_T, hence exactly N(0, I).

Two layouts, both one flat ``(N, numel)`` tensor:

* ``blocks``: x_T is cut into 4x4 blocks of side s = size / 4; per block and channel the m x m lowest coefficients of the
  orthonormal DCT-II are kept (m = 1 is the block's mean times s; m = s keeps all of x_T). Shape ``(C m m, 4, 4)``.
* ``pyramid``: the orthonormal Haar pyramid of x_T. The coarse 4x4 band ``(C, 4, 4)`` comes first, then for R = 4, 8, ...,
  size / 2 the three detail bands ``(3 C, R, R)`` that lift R to 2R. Nothing of x_T is lost.
"""

import math
from collections.abc import Sequence

import torch

from ..errors import InputError
from ..runtime.devices import without_autocast
from .arguments import flag, require_dense, whole


def latent_parts(image_channels: int, image_size: int, latent_size: int, detail_noise: bool) -> list[tuple[int, int]]:
    """Shapes ``[(channels, side), ...]`` of the parts of a flat latent, in order."""
    coarse = [(image_channels * latent_size * latent_size, 4)]
    if not detail_noise:
        return coarse
    return coarse + [(3 * image_channels, 4 << i) for i in range(int(math.log2(image_size // 4)))]


def latent_numel(image_channels: int, image_size: int, latent_size: int, detail_noise: bool) -> int:
    """Number of elements of one latent."""
    parts = latent_parts(image_channels, image_size, latent_size, detail_noise)
    return sum(channels * side * side for channels, side in parts)


def split_latent(z: torch.Tensor, parts: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Cut a flat ``(N, numel)`` latent into ``[(N, channels, side, side), ...]``."""
    numels = [channels * side * side for channels, side in parts]
    if z.ndim != 2 or z.shape[1] != sum(numels):
        raise InputError(f"z must have shape (N, {sum(numels)}), got {tuple(z.shape)}")
    pieces = torch.split(z, numels, dim=1)
    # Not len(z): a batch size that is recorded (torch.export, torch.jit.trace) must not become a constant.
    return [piece.reshape(z.shape[0], channels, side, side) for piece, (channels, side) in zip(pieces, parts, strict=True)]


def project(x_T: torch.Tensor, latent_size: int = 1, detail_noise: bool = False) -> torch.Tensor:
    """The latent z of a start state.

    Args:
        x_T: ``(N, C, S, S)`` with S = 4 * 2^k.
        latent_size: m, between 1 and S / 4 (1 with ``detail_noise``).
        detail_noise: False for ``blocks``, True for ``pyramid``.

    Returns:
        ``(N, latent_numel)``, in ``x_T``'s dtype.
    """
    _check_state(x_T)
    latent_size, detail_noise = whole("latent_size", latent_size), flag("detail_noise", detail_noise)
    n, channels, size, _ = x_T.shape
    check_latent(size, latent_size, detail_noise)
    if detail_noise:
        return _haar_pyramid(x_T)
    side = size // 4
    basis = dct_basis(side, latent_size).to(x_T)
    blocks = x_T.reshape(n, channels, 4, side, 4, side)
    # Autocast would round the orthonormal basis.
    with without_autocast(x_T):
        coefficients = torch.einsum("ncyaxb,ua,vb->ncuvyx", blocks, basis, basis)
    return coefficients.reshape(n, channels * latent_size**2 * 16)


def _check_state(x_T):
    require_dense("x_T", x_T)
    if not x_T.is_floating_point() or torch.finfo(x_T.dtype).bits < 16:
        raise InputError(f"x_T must be a floating-point tensor of 16 bits or more, got {x_T.dtype}")
    side = x_T.shape[-1] if x_T.ndim == 4 else 0
    if side < 4 or side & (side - 1) or x_T.shape[2] != side:
        raise InputError(f"x_T must have shape (N, C, S, S) with S = 4 * 2^k, got {tuple(x_T.shape)}")


def check_latent(image_size: int, latent_size: int, detail_noise: bool) -> None:
    """Raise :class:`InputError` for a latent that does not fit the images."""
    if detail_noise and latent_size != 1:
        raise InputError(f"latent_size must be 1 with detail_noise, got {latent_size}")
    if not 1 <= latent_size <= image_size // 4:
        raise InputError(f"latent_size must be between 1 and {image_size // 4}, got {latent_size}")


def dct_basis(side: int, count: int) -> torch.Tensor:
    """The ``count`` lowest rows of the orthonormal DCT-II matrix of order ``side``, float64 on the CPU."""
    k = torch.arange(count, dtype=torch.float64, device="cpu").unsqueeze(1)
    positions = torch.arange(side, dtype=torch.float64, device="cpu") + 0.5
    basis = torch.cos(math.pi * k * positions / side) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


def _haar_pyramid(x):
    details = []
    while x.shape[-1] > 4:
        a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
        c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        details.append(torch.cat((a - b + c - d, a + b - c - d, a - b - c + d), dim=1).flatten(1) / 2)
        x = (a + b + c + d) / 2
    return torch.cat((x.flatten(1), *reversed(details)), dim=1)
