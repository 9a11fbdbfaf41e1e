"""The student's convolution against float64, and its refusals."""

import pytest
import torch
import torch.nn.functional as F

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import conv_block

# 1x1 and 3x5: all border; 4x4: the student's start; odd channels: no multiple of a vector.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 3, 5), (2, 48, 16, 4, 4), (1, 7, 3, 9, 6)]


def arguments(n, c_in, c_out, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c_in, height, width, generator=generator)
    weight = torch.randn(c_out, c_in, 3, 3, generator=generator) / (9 * c_in) ** 0.5
    return x.to(dtype), weight.to(dtype), torch.randn(c_out, generator=generator).to(dtype)


def oracle(x, weight, bias, slope, upsample, activation):
    """Written out by taps, in float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    padded = F.pad(x, (1, 1, 1, 1))
    y = bias[None, :, None, None].expand(len(x), -1, *x.shape[2:]).clone()
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            y += torch.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
    return {"leaky_relu": torch.where(y > 0, y, slope * y), "tanh": y.tanh(), "none": y}[activation]


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "none"])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, upsample, activation):
    x, weight, bias = arguments(*shape)
    y = conv_block(x, weight, bias, slope=0.1, upsample=upsample, activation=activation)
    # A dot product errs by at most (number of terms + 1) 2^-24 times the sum of its terms' sizes; tanh adds its own.
    sizes = oracle(x.abs(), weight.abs(), bias.abs(), 0.1, upsample, "none")
    bound = (9 * x.shape[1] + 2) * 2**-24 * sizes + 2**-23
    assert ((y - oracle(x, weight, bias, 0.1, upsample, activation)).abs() <= bound).all()
    strided = x.to(memory_format=torch.channels_last)
    z = conv_block(strided, weight, bias, slope=0.1, upsample=upsample, activation=activation)
    assert ((z - y).abs() <= 2 * bound).all()


def test_up_sampling_folds_into_four_phases():
    """The identity that later kernels rest on: W0 and W1 + W2 for phase 0, W0 + W1 and W2 for phase 1, per axis."""
    x, weight, bias = (tensor.double() for tensor in arguments(2, 3, 4, 5, 6))
    expected = oracle(x, weight, bias, 0.2, True, "none")
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    y = torch.empty_like(expected)
    for a in range(2):
        for b in range(2):
            phase = torch.einsum("ocij,ui,vj->ocuv", weight, fold[a], fold[b])
            padded = F.pad(x, (1 - b, b, 1 - a, a))
            y[:, :, a::2, b::2] = F.conv2d(padded, phase, bias)
    assert (y - expected).abs().max() < 1e-12


def test_empty_batch():
    x, weight, bias = arguments(0, 3, 5, 4, 4)
    assert conv_block(x, weight, bias, upsample=True).shape == (0, 5, 8, 8)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"weight": torch.zeros(5, 3, 5, 5)}, "weight"),
        ({"weight": torch.zeros(5, 4, 3, 3)}, "weight"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"bias": torch.zeros(5).half()}, "dtype"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    x, weight, bias = arguments(1, 3, 5, 4, 4)
    with pytest.raises(InputError, match=name):
        conv_block(**{"x": x, "weight": weight, "bias": bias, **changes})


def test_no_gradient_and_no_other_backend():
    x, weight, bias = arguments(1, 3, 5, 4, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        conv_block(x, weight.requires_grad_(), bias)
    with pytest.raises(BackendUnavailableError, match="not written"):
        conv_block(x, weight.detach(), bias, backend="triton")
