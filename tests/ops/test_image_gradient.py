"""The gradient down to an image against the convolution's own backward pass."""

import pytest
import torch
import torch.nn.functional as F

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import image_gradient, registry

ENGINES = [b for b in ("cpu", "reference") if registry.gap("image_gradient", b, torch.device("cpu")) is None]
# Image, features, kernel, stride, padding, dilation: DCGAN's layers; lanes with a remainder and without; pixels that no group
# of four covers; strides beyond the kernel (pixels without a tap); kernels wider than the image; dilation; one pixel.
CASES = [
    ((3, 16, 16), 32, (4, 4), 2, 1, 1),
    ((1, 8, 8), 64, (4, 4), 2, 1, 1),
    ((3, 9, 7), 19, (3, 3), 1, 1, 1),
    ((4, 13, 22), 5, (5, 2), (2, 1), (2, 0), 1),
    ((2, 11, 17), 16, (2, 3), 4, 1, 1),
    ((3, 5, 5), 33, (7, 7), 1, 3, 1),
    ((3, 20, 20), 16, (3, 3), (1, 2), 2, (2, 3)),
    ((1, 1, 1), 7, (1, 1), 1, 0, 1),
]


def problem(case, n=2, dtype=torch.float64):
    image, features, kernel, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *image, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(features, image[0], *kernel, generator=generator, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    y = F.conv2d(x, weight, **options)
    d = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(y, x, d)
    return d.to(dtype), weight.to(dtype), tuple(x.shape), options, wanted


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, backend):
    d, weight, shape, options, wanted = problem(case, dtype=torch.float32)
    found = image_gradient(d, weight, shape, backend=backend, **options)
    assert found.shape == shape and found.is_contiguous(memory_format=torch.channels_last)
    theirs = image_gradient(d, weight, shape, backend="reference", **options).double()
    # Twice the reference's error, and the rounding of the sum's terms: the square root of their number, at the size of a term.
    terms = case[1] * case[2][0] * case[2][1]
    floor = 4 * torch.finfo(torch.float32).eps * terms**0.5
    assert (found.double() - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + floor
    last = image_gradient(d.contiguous(memory_format=torch.channels_last), weight, shape, backend=backend, **options)
    assert torch.equal(found, last) or backend == "reference"


def test_other_dtypes_groups_and_channels_take_the_reference():
    d, weight, shape, options, wanted = problem(CASES[0])
    assert (image_gradient(d, weight, shape, **options) - wanted).abs().max() < 1e-12
    wide = torch.randn(2, 6, 8, 8), torch.randn(6, 5, 3, 3)
    assert image_gradient(*wide, (2, 5, 10, 10)).shape == (2, 5, 10, 10)
    with pytest.raises(InputError, match="float32, one group, at most 4 channels"):
        image_gradient(*wide, (2, 5, 10, 10), backend="cpu")
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' cannot run image_gradient"):
            image_gradient(*wide, (2, 5, 10, 10), backend=backend)
    grouped = image_gradient(torch.randn(2, 6, 8, 8), torch.randn(6, 1, 3, 3), (2, 2, 10, 10), groups=2)
    assert grouped.shape == (2, 2, 10, 10)


def test_neighbours_do_not_leak():
    """Non-finite values in one sample stay there."""
    d, weight, shape, options, _ = problem(CASES[0], dtype=torch.float32)
    clean = image_gradient(d, weight, shape, **options)
    d[0] = float("nan")
    spoiled = image_gradient(d, weight, shape, **options)
    assert torch.equal(spoiled[1], clean[1]) and not spoiled[0].isfinite().any()


def test_threads_and_repeats_give_the_same_bits():
    d, weight, shape, options, _ = problem(CASES[0], 5, torch.float32)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        found.append(image_gradient(d, weight, shape, **options))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_empty_batches_and_refusals():
    d, weight, shape, options, _ = problem(CASES[0], dtype=torch.float32)
    assert image_gradient(d[:0], weight, (0, *shape[1:]), **options).shape == (0, *shape[1:])
    with pytest.raises(InputError, match=r"d must be \(N, out, 8, 8\)"):
        image_gradient(d[:, :, :4], weight, shape, **options)
    with pytest.raises(InputError, match="do not fit each other"):
        image_gradient(d[:1], weight, shape, **options)
    with pytest.raises(InputError, match="d must be a float32"):
        image_gradient(d.long(), weight, shape, **options)
    with pytest.raises(InputError, match="weight must be torch.float32 on cpu like d"):
        image_gradient(d, weight.double(), shape, **options)
    with pytest.raises(InputError, match="weight must have a multiple of groups, 7"):
        image_gradient(d, weight, shape, **{**options, "groups": 7})
    found = image_gradient(d.requires_grad_(), weight, shape, **options)
    with pytest.raises(RuntimeError, match="image_gradient has no gradient"):
        found.sum().backward()


def test_opcheck():
    d, weight, shape, _, _ = problem(CASES[0], dtype=torch.float32)
    arguments = (d, weight, list(shape), [2, 2], [1, 1], [1, 1], 1, "auto")
    torch.library.opcheck(torch.ops.advkd.image_gradient, arguments)
