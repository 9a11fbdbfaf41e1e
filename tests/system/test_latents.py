"""z is an orthonormal projection of x_T, so it is exactly N(0, I) when x_T is."""

import pytest
import torch

from advkd.errors import InputError
from advkd.ops.latents import latent_numel, latent_parts, project, split_latent

from ..conftest import other_default


def matrix(channels, size, latent_size, detail_noise):
    """The projection as a matrix: one column per pixel."""
    pixels = channels * size * size
    basis = torch.eye(pixels, dtype=torch.float64).reshape(pixels, channels, size, size)
    return project(basis, latent_size, detail_noise).T


@pytest.mark.parametrize(
    ("channels", "size", "latent_size", "detail_noise"),
    [(1, 8, 1, False), (1, 8, 2, False), (3, 16, 2, False), (1, 32, 8, False), (3, 16, 1, True), (1, 8, 1, True)],
)
def test_projection_is_orthonormal(channels, size, latent_size, detail_noise):
    p = matrix(channels, size, latent_size, detail_noise)
    assert p.shape == (latent_numel(channels, size, latent_size, detail_noise), channels * size * size)
    assert (p @ p.T - torch.eye(len(p), dtype=torch.float64)).abs().max() < 1e-12


def test_one_coefficient_is_the_scaled_block_mean():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = torch.nn.functional.avg_pool2d(x, 8) * 8
    assert (project(x, 1).reshape(2, 3, 4, 4) - expected).abs().max() < 1e-12
    assert (project(x, 1, detail_noise=True)[:, :48].reshape(2, 3, 4, 4) - expected).abs().max() < 1e-12


def test_bands_go_from_coarse_to_fine():
    # Neighbours of opposite signs are in the finest bands alone, pairs of them in the ones before.
    for side, band in ((1, 2), (2, 1)):
        line = torch.tensor([1.0, -1.0]).repeat_interleave(side).repeat(8 // side)
        pieces = split_latent(project(line.expand(1, 1, 16, 16).contiguous(), 1, True), latent_parts(1, 16, 1, True))
        assert [bool(piece.abs().max() > 0.5) for piece in pieces] == [i == band for i in range(3)]


def test_split_gives_the_parts():
    parts = latent_parts(3, 16, 1, True)
    assert parts == [(3, 4), (9, 4), (9, 8)]
    pieces = split_latent(torch.arange(2.0 * 768).reshape(2, 768), parts)
    assert [tuple(p.shape) for p in pieces] == [(2, 3, 4, 4), (2, 9, 4, 4), (2, 9, 8, 8)]
    assert pieces[1][0, 0, 0, 0] == 48
    with pytest.raises(InputError, match="z must have shape"):
        split_latent(torch.zeros(2, 5), parts)


@pytest.mark.parametrize(("latent_size", "detail_noise"), [(0, False), (9, False), (2, True)])
def test_bad_latents_are_refused(latent_size, detail_noise):
    with pytest.raises(InputError, match="latent_size"):
        project(torch.zeros(1, 1, 32, 32), latent_size, detail_noise)


def test_a_projection_depends_on_nothing_but_its_arguments():
    """The projection of a size is the same whatever torch's defaults and autograd's mode were when it was first made."""
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    with torch.device("meta"):
        first = project(x, 3)
    with torch.inference_mode():
        second = project(x, 3)
    with other_default(torch.bfloat16):
        third = project(x, 3)
    z = project(x.requires_grad_(), 3)
    assert first.device.type == "cpu" and all(torch.equal(z, other) for other in (first, second, third))
    (gradient,) = torch.autograd.grad(z.square().sum() / 2, x)
    # The projection is orthonormal: its adjoint keeps the norm.
    assert (gradient.norm() - z.norm()).abs() < 1e-12
