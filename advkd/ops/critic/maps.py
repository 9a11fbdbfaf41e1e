"""The linear maps between a critic's activations: convolutions, maps without parameters, their adjoints and options."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ..image_gradient import image_gradient
from ..layout import pair, with_usual_strides
from .layers import ADVICE, Plan

aten = torch.ops.aten


def layer_options(plan: Plan, critic: nn.Module) -> list[tuple]:
    """The options of each layer, in the form that the passes take."""
    return [_options(layer, critic) for layer in plan.layers]


def layer_weights(plan: Plan, critic: nn.Module) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The weight and bias of each layer, None where it has none."""
    return [_weights(layer, critic) for layer in plan.layers]


def _weights(layer, critic):
    if layer.kind not in ("convolution", "linear"):
        return None, None
    if layer.module is not None:
        module = critic.get_submodule(layer.module)
        return module.weight, module.bias
    return tuple(path and _attribute(critic, path) for path in layer.weights)


def _attribute(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _options(layer, critic):
    if layer.kind == "activation" and layer.module is not None:
        return (critic.get_submodule(layer.module).negative_slope,)
    if layer.kind != "convolution":
        return layer.options
    if layer.module is None:
        stride, padding, dilation, groups = layer.options
        kernel = _attribute(critic, layer.weights[0]).shape[2:]
    else:
        module = critic.get_submodule(layer.module)
        stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
        kernel = module.kernel_size
    dilation = pair(dilation)
    return pair(stride), _padding(layer, padding, kernel, dilation), dilation, groups


def _padding(layer, padding, kernel, dilation):
    if padding == "valid":
        return [0, 0]
    if padding != "same":
        return pair(padding)
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(t % 2 for t in total):
        raise InputError(f"{layer.name} pads one side more than the other: {ADVICE}")
    return [t // 2 for t in total]


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple) -> torch.Tensor:
    """A convolution layer; ``options`` as :func:`layer_options` gives them."""
    stride, padding, dilation, groups = options
    return aten.convolution(x, with_usual_strides(weight, groups), bias, stride, padding, dilation, False, [0, 0], groups)


def transposed_convolution(d: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], options: tuple) -> torch.Tensor:
    """The adjoint of a convolution of ``shape``; its own backward pass would need that input, which is no longer kept."""
    stride, padding, dilation, groups = options
    sides = zip(shape[2:], d.shape[2:], weight.shape[2:], stride, padding, dilation)
    rest = [whole - ((side - 1) * s - 2 * p + q * (k - 1) + 1) for whole, side, k, s, p, q in sides]
    return aten.convolution(d, with_usual_strides(weight, groups), None, stride, padding, dilation, True, rest, groups)


def narrow_image_gradient(d: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], options: tuple) -> torch.Tensor:
    """:func:`transposed_convolution` down to an image, whose few channels have a kernel of their own."""
    stride, padding, dilation, groups = options
    return image_gradient(d, weight, shape, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _expanded(d, shape, dims, keepdim):
    if not keepdim:
        for dim in sorted(dim % len(shape) for dim in dims):
            d = d.unsqueeze(dim)
    return d.expand(shape)


def _mean_adjoint(d, shape, dims, keepdim):
    count = 1
    for dim in dims:
        count *= shape[dim]
    return (_expanded(d, shape, dims, keepdim) / count).contiguous()


def _upsample_adjoint(d, shape, size, factor):
    scales = (None, None) if factor is None else factor
    return aten.upsample_nearest2d_backward(d, list(d.shape[2:]), list(shape), *scales)


def _back(d, shape, *options):
    return d.reshape(shape)


def _like(d, shape):
    return torch.empty(shape, dtype=d.dtype, device=d.device)


MAPS = {
    "flatten": (lambda x, rows, start, end: x.flatten(start, end), _back),
    "reshape": (lambda x, rows, shape: x.reshape(rows, *shape), _back),
    "squeeze": (lambda x, rows, dim: x.squeeze(dim), _back),
    "unsqueeze": (lambda x, rows, dim: x.unsqueeze(dim), _back),
    "pool": (
        lambda x, rows, *options: aten.avg_pool2d(x, *options),
        lambda d, shape, *options: aten.avg_pool2d_backward(d, _like(d, shape), *options),
    ),
    "adaptive_pool": (
        lambda x, rows, size: F.adaptive_avg_pool2d(x, size),
        lambda d, shape, size: aten._adaptive_avg_pool2d_backward(d, _like(d, shape)),
    ),
    "upsample": (lambda x, rows, size, factor: F.interpolate(x, size, factor), _upsample_adjoint),
    "mean": (lambda x, rows, dims, keepdim: x.mean(dims, keepdim), _mean_adjoint),
    "total": (lambda x, rows, dims, keepdim: x.sum(dims, keepdim), lambda d, *s: _expanded(d, *s).contiguous()),
    "scale": (lambda x, rows, factor: x * factor, lambda d, shape, factor: d * factor),
}
"""Maps without parameters, called with (value, rows, options), and adjoints, with (gradient, input's shape, options)."""

BATCH_DIMS = {
    "flatten": lambda start, end: (start,),
    "squeeze": lambda dim: (dim,),
    "unsqueeze": lambda dim: (dim,),
    "mean": lambda dims, keepdim: dims,
    "total": lambda dims, keepdim: dims,
}
"""The dimensions that a map works on; the batch's may not be among them."""
