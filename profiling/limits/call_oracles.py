"""The right answers of models and data, by code of its own: nothing here runs the product's layers, kernels or readers."""

import functools
import gzip
import math
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F


def images_of(student, z, dtype=torch.float64):
    """Images before tanh of a student in evaluation, its norms folded, layer by layer in a dtype."""
    parts = student.latent_parts
    pieces = torch.split(z.to(dtype), [channels * side * side for channels, side in parts], dim=1)
    x, *details = (piece.reshape(len(z), channels, side, side) for piece, (channels, side) in zip(pieces, parts, strict=True))
    at = dict(zip((side for _, side in parts[1:]), details))
    for block in student.submodules:
        if block.upsample:
            x = torch.cat((x, at.pop(x.shape[-1])), 1) if x.shape[-1] in at else x
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        for convolution, norm in ((block.convolution1, block.norm1), (block.convolution2, block.norm2)):
            x = F.leaky_relu(F.conv2d(x, *_folded(convolution, norm, dtype), padding=1), block.slope)
    return F.conv2d(x, student.head.weight.to(dtype), student.head.bias.to(dtype), padding=1)


def images_of_layers(arguments, dtype):
    """Images before tanh of folded layers and their latents, in a dtype."""
    layers = arguments["layers"]
    parts = [(layers[0].c_in, layers[0]), *((layer.detail, layer) for layer in layers if layer.detail)]
    z = arguments["z"].to(dtype)
    pieces = iter(torch.split(z, [channels * layer.height * layer.width for channels, layer in parts], dim=1))
    x = next(pieces).reshape(len(z), layers[0].c_in, layers[0].height, layers[0].width)
    for layer, weight, bias in zip(layers, arguments["weights"], arguments["biases"], strict=True):
        if layer.detail:
            x = torch.cat((x, next(pieces).reshape(len(z), layer.detail, layer.height, layer.width)), 1)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if layer.upsample else x
        x = F.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1)
        x = F.leaky_relu(x, float(arguments["slope"])) if layer.activation == "leaky_relu" else x
    return x


def _folded(convolution, norm, dtype):
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = convolution.weight.double() * scale[:, None, None, None]
    return weight.to(dtype), (norm.bias.double() - scale * norm.running_mean.double()).to(dtype)


def project(arguments):
    """The projection of a start state, one basis function after the other."""
    x, m = arguments["x_T"], arguments["latent_size"]
    size = x.shape[-1]
    if not arguments["detail_noise"]:
        side = size // 4
        grid = (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) * math.pi / side
        rows = torch.stack([torch.cos(k * grid) * math.sqrt((1 if k == 0 else 2) / side) for k in range(m)]).to(x)
        blocks = x.reshape(*x.shape[:2], 4, side, 4, side).permute(0, 1, 3, 5, 2, 4)
        found = torch.stack(
            [torch.stack([(blocks * torch.outer(u, v)[:, :, None, None]).sum((2, 3)) for v in rows], 2) for u in rows], 2
        )
        return found.reshape(len(x), x.shape[1] * m * m * 16)
    parts = []
    while x.shape[-1] > 4:
        a, b, c, d = x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        parts.append(torch.cat([(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2], 1).flatten(1))
        x = (a + b + c + d) / 2
    return torch.cat([x.flatten(1), *parts[::-1]], 1)


@functools.cache
def table_of_digits():
    """The digits of scikit-learn's table, ``(N, 8, 8)`` in [-1, 1]."""
    with gzip.open(files("sklearn.datasets.data").joinpath("digits.csv.gz").open("rb"), "rt") as table:
        rows = np.loadtxt(table, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8) / 8 - 1


def digits(size, channels):
    """The digits at a size, by a cubic convolution (a = -0.75) along either axis, as float32 ``(N, C, size, size)``."""
    along = _cubic(size)
    resized = np.clip(along @ table_of_digits() @ along.T, -1, 1)
    return torch.from_numpy(np.repeat(resized[:, None], channels, axis=1)).to(torch.float32)


def _cubic(size):
    """``(size, 8)``: each new pixel as a sum of the old ones, of which those at the edges go on."""
    weights = np.zeros((size, 8))
    for i in range(size):
        place = (i + 0.5) * 8 / size - 0.5
        for near in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(near, 0), 7)] += _kernel(abs(place - near))
    return weights


def _kernel(t, a=-0.75):
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0
