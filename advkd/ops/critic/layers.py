"""A traced forward as a list of piecewise-linear layers: the modules and functions that the passes know."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ..layout import pair

ADVICE = "take backend='autograd' for such a critic"
IMAGE, CONDITION = 0, 1
"""Numbers of the first two values; layer i makes value i + 2."""


@dataclass(frozen=True)
class Layer:
    """One layer of a :class:`Plan`.

    Attributes:
        kind: ``convolution``, ``linear``, ``activation``, ``sum``, ``concatenation`` or a map without parameters.
        name: for errors: the module's path and class, or the function's name.
        inputs: numbers of its input values.
        module: path of the module that holds weights and options, or None.
        weights: paths of the weight and bias that a function was given.
        options: the other arguments.
        moved: True if the image flows through it.
    """

    kind: str
    name: str
    inputs: tuple
    module: str | None
    weights: tuple
    options: tuple
    moved: bool


@dataclass(frozen=True)
class Plan:
    """A critic's layers in order, the number of the value that it returns, and how often each value is used."""

    layers: tuple
    output: int
    uses: tuple


class Builder:
    """Turns a traced graph into the layers that its output needs, in order."""

    def __init__(self, critic: nn.Module, graph: "torch.fx.Graph"):
        self.critic, self.moved, self.graph = critic, {IMAGE}, graph
        self.layers: list[Layer] = []
        self.values = dict(zip((node for node in graph.nodes if node.op == "placeholder"), (IMAGE, CONDITION)))
        (self.result,) = (node.args[0] for node in graph.nodes if node.op == "output")

    def plan(self) -> Plan:
        """The layers, or an :class:`InputError` that names what the passes do not know."""
        if not hasattr(self.result, "op"):
            raise InputError("critic must return one tensor")
        needed = self._needed()
        for node in self.graph.nodes:
            if node in needed and node not in self.values:
                self.values[node] = self._module(node) if node.op == "call_module" else self._function(node)
        output = self.values[self.result]
        if output not in self.moved:
            raise InputError("critic must return one tensor that depends on its first argument")
        uses = [0] * (len(self.layers) + 2)
        for value in (output, *(value for layer in self.layers for value in layer.inputs)):
            uses[value] += 1
        return Plan(tuple(self.layers), output, tuple(uses))

    def _needed(self):
        """The nodes whose values the result needs; weights and sizes are looked up where they are used."""
        found, left = set(), [self.result]
        while left:
            node = left.pop()
            if node in found or node.op == "get_attr":
                continue
            found.add(node)
            reshapes = FUNCTIONS.get(node.target) is _reshape
            left += node.all_input_nodes[:1] if reshapes else node.all_input_nodes
        return found

    def add(
        self, kind: str, name: str, nodes: Iterable, options: tuple = (), module: str | None = None, weights: tuple = ()
    ) -> int:
        """Append a layer and return the number of its value."""
        inputs = tuple(self.values[node] for node in nodes)
        moved = not self.moved.isdisjoint(inputs)
        self.layers.append(Layer(kind, name, inputs, module, weights, options, moved))
        number = len(self.layers) + 1
        if moved:
            self.moved.add(number)
        return number

    def _module(self, node):
        path = node.target.removeprefix("critic").removeprefix(".")
        module = self.critic.get_submodule(path)
        name = f"layer {path or 'critic'} ({type(module).__name__})"
        for kind, build in MODULES.items():
            if isinstance(module, kind) and type(module).forward is kind.forward:
                if getattr(module, "inplace", False):
                    self.require_alone(name, node.args[0])
                if len(node.args) != 1 or node.kwargs:
                    raise InputError(f"{name} must be called with one positional argument: {ADVICE}")
                return build(self, name, node.args[0], module, path)
        raise InputError(f"{name} is not piecewise linear, or couples samples: {ADVICE}")

    def _function(self, node):
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if node.target not in FUNCTIONS:
            raise InputError(f"{name} in the critic's forward is not known to be piecewise linear: {ADVICE}")
        name = f"{name} in the critic's forward"
        if node.target is operator.iadd:
            self.require_alone(name, node.args[0])
        try:
            return FUNCTIONS[node.target](self, name, *node.args, **node.kwargs)
        except (TypeError, IndexError, KeyError) as error:
            raise InputError(f"{name} is called in a way that the tangent pass does not know ({error}): {ADVICE}") from error

    def require_alone(self, name: str, node: Any) -> None:
        """Refuse an in-place change of a value that has another reader, or is a view of one that has."""
        while hasattr(node, "op"):
            if len(node.users) > 1 or node.op == "placeholder":
                raise InputError(f"{name} changes a tensor in place that is used elsewhere too: {ADVICE}")
            views = node.op == "call_method" or getattr(node.target, "__name__", "") in VIEWS
            if node.op == "call_module":
                module = self.critic.get_submodule(node.target.removeprefix("critic").removeprefix("."))
                views = isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d))
            if not views or not node.args:
                return
            node = node.args[0]

    def path(self, name: str, node: Any) -> str | None:
        """The path of a weight that a function was given."""
        if node is not None and not (getattr(node, "op", None) == "get_attr" and node.target.startswith("critic.")):
            raise InputError(f"{name} has a weight that is computed: {ADVICE}")
        return node and node.target.removeprefix("critic.")


VIEWS = ("flatten", "reshape", "squeeze", "unsqueeze")


def _plain(name, *values):
    """Options of a layer; they must be constants."""
    for value in values:
        if hasattr(value, "op") or isinstance(value, (tuple, list)) and any(hasattr(v, "op") for v in value):
            raise InputError(f"{name} has an argument that is computed: {ADVICE}")
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _convolution_module(b, name, x, module, path):
    if module.padding_mode != "zeros":
        raise InputError(f"{name} pads with {module.padding_mode}, the tangent pass with zeros: {ADVICE}")
    return b.add("convolution", name, (x,), module=path)


def _dropout(b, name, x, module, path):
    if module.training and module.p:
        raise InputError(f"{name} drops at random: {ADVICE}")
    return b.values[x]


def _pool_module(b, name, x, m, path):
    return _pool(b, name, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


MODULES = {
    nn.Conv2d: _convolution_module,
    nn.Linear: lambda b, name, x, m, path: b.add("linear", name, (x,), module=path),
    nn.LeakyReLU: lambda b, name, x, m, path: b.add("activation", name, (x,), module=path),
    nn.ReLU: lambda b, name, x, m, path: _relu(b, name, x),
    nn.Flatten: lambda b, name, x, m, path: _flatten(b, name, x, m.start_dim, m.end_dim),
    nn.AvgPool2d: _pool_module,
    nn.AdaptiveAvgPool2d: lambda b, name, x, m, path: _adaptive_pool(b, name, x, m.output_size),
    nn.Upsample: lambda b, name, x, m, path: _upsample(
        b, name, x, m.size, m.scale_factor, m.mode, recompute=m.recompute_scale_factor
    ),
    nn.Identity: lambda b, name, x, m, path: b.values[x],
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}


def _convolution(b, name, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    weights = (b.path(name, weight), b.path(name, bias))
    return b.add("convolution", name, (x,), _plain(name, stride, padding, dilation, groups), weights=weights)


def _linear(b, name, x, weight, bias=None):
    return b.add("linear", name, (x,), weights=(b.path(name, weight), b.path(name, bias)))


def _leaky_relu(b, name, x, negative_slope=0.01, inplace=False):
    if inplace:
        b.require_alone(name, x)
    return b.add("activation", name, (x,), _plain(name, negative_slope))


def _relu(b, name, x, inplace=False):
    return _leaky_relu(b, name, x, 0.0, inplace)


def _flatten(b, name, x, start_dim=0, end_dim=-1):
    return b.add("flatten", name, (x,), _plain(name, start_dim, end_dim))


def _reshape(b, name, x, *shape):
    first, *others = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    if first != -1 and not _is_batch_size(first):
        raise InputError(f"{name} must keep the batch's dimension: -1 or x.size(0) first, got {first}: {ADVICE}")
    return b.add("reshape", name, (x,), (_plain(name, *others),))


def _is_batch_size(node):
    """True if a node is x.size(0), x.shape[0] or x.size()[0]."""
    if not hasattr(node, "op"):
        return False
    if node.target == "size":
        return node.args[1:] == (0,)
    sized = node.args and hasattr(node.args[0], "op") and (node.args[0].target == "size" or node.args[0].args[1:] == ("shape",))
    return bool(node.target is operator.getitem and sized and node.args[1] == 0)


def _squeeze(b, name, x, dim=None):
    if not isinstance(dim, int):
        raise InputError(f"{name} must name one dimension, lest it take the batch's: {ADVICE}")
    return b.add("squeeze", name, (x,), _plain(name, dim))


def _unsqueeze(b, name, x, dim):
    return b.add("unsqueeze", name, (x,), _plain(name, dim))


def _pool(
    b, name, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):  # fmt: skip
    window = [pair(kernel_size), pair(kernel_size if stride is None else stride), pair(padding)]
    return b.add("pool", name, (x,), _plain(name, *window, ceil_mode, count_include_pad, divisor_override))


def _adaptive_pool(b, name, x, output_size):
    return b.add("adaptive_pool", name, (x,), _plain(name, pair(output_size)))


def _upsample(b, name, x, size=None, scale_factor=None, mode="nearest", **others):
    if mode != "nearest" or any(others.values()):
        raise InputError(f"{name} up-samples by {mode}, the tangent pass by nearest: {ADVICE}")
    return b.add("upsample", name, (x,), _plain(name, size and pair(size), scale_factor and pair(scale_factor)))


def _mean(kind):
    def build(b, name, x, dim=None, keepdim=False):
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        if dim is None or not dims:
            raise InputError(f"{name} joins samples: {ADVICE}")
        return b.add(kind, name, (x,), _plain(name, tuple(dims), keepdim))

    return build


def _sum(b, name, x, y, alpha=1):
    if alpha != 1 or not (hasattr(x, "op") and hasattr(y, "op")):
        raise InputError(f"{name} must add two tensors: {ADVICE}")
    return b.add("sum", name, (x, y))


def _scale(b, name, x, y):
    x, factor = (x, y) if hasattr(x, "op") else (y, x)
    return b.add("scale", name, (x,), _plain(name, factor))


def _concatenate(b, name, tensors, dim=0):
    if dim != 1:
        raise InputError(f"{name} must join channels (dim 1), got dim {dim}: {ADVICE}")
    return b.add("concatenation", name, tensors)


FUNCTIONS = {
    **dict.fromkeys((F.conv2d, torch.conv2d), _convolution),
    F.linear: _linear,
    F.leaky_relu: _leaky_relu,
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _reshape),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _unsqueeze),
    F.avg_pool2d: _pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    F.interpolate: _upsample,
    **dict.fromkeys((torch.mean, "mean"), _mean("mean")),
    **dict.fromkeys((torch.sum, "sum"), _mean("total")),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), _sum),
    **dict.fromkeys((operator.mul, torch.mul), _scale),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    "contiguous": lambda b, name, x, **options: b.values[x],
}
