"""A critic's forward as a list of piecewise-linear layers, found by tracing it once (torch.fx)."""

import ctypes
import functools
import operator
import types
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

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
        inputs: numbers of the values it takes.
        module: path of the module that holds weights and options, or None.
        weights: paths of weight and bias where a function was given them.
        options: the other arguments.
        moved: whether the image flows through it.
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


def plan_of(critic, conditional):
    """The :class:`Plan` of a module, kept until one of its parts, their attributes or the training mode change.

    A plan holds no weights. One whose forward computes with values of tensors (``self.alpha.item()``) is not kept. Values
    that a forward reads outside of the module, such as a global number, are taken for constant.

    Raises:
        InputError: the critic cannot be traced, or a layer is not piecewise linear or couples samples; it is named.
    """
    if not isinstance(critic, nn.Module):
        raise InputError(f"critic must be a torch.nn.Module for the tangent pass, got {type(critic).__name__}: {ADVICE}")
    if torch.compiler.is_compiling():
        # What is read here is guarded: compiled code is made again where it changes. (Slopes are read with the options.)
        for module in critic.modules():
            if module.training and isinstance(module, (nn.Dropout, nn.Dropout2d)) or any(_hooks(module)):
                raise InputError(f"layer {type(module).__name__} drops at random or has hooks: {ADVICE}")
        return _constant_plan(id(critic), conditional)
    return _kept_plan(critic, conditional)


def unwrapped(critic):
    """The critic inside DataParallel, DistributedDataParallel, AveragedModel and ``torch.compile``'s module, in any nesting.

    Raises:
        InputError: its parameters are sharded.
    """
    if not isinstance(critic, nn.Module):
        return critic
    while (inner := _inside(critic)) is not None:
        critic = inner
    if not torch.compiler.is_compiling():
        _refuse_sharded(critic)
    return critic


def _inside(module):
    """The module that a wrapper passes its arguments to; None where it is no such wrapper."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return module.module
    # A scripted module's table of children has no get().
    return module._modules["_orig_mod"] if "_orig_mod" in module._modules else None


def _refuse_sharded(critic):
    kinds = {type(part) for part in (*critic.modules(), *critic.parameters())}
    if any(map(_shards, kinds)):
        raise InputError(
            "critic's parameters are sharded (FullyShardedDataParallel, fully_shard or DTensor), but are needed whole: "
            "wrap it in DistributedDataParallel, or in nothing (advkd.critic_step averages gradients over the processes itself)"
        )


@functools.cache
def _shards(kind):
    # By name: to import these classes takes a second.
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule", "DTensor") for base in kind.__mro__)


_PLANS = weakref.WeakKeyDictionary()
_PLAIN = (int, float, bool, str, type(None))


def _kept_plan(critic, conditional, constant=False):
    state = [_state(module) for module in critic.modules()]
    plans = _PLANS.setdefault(critic, {})
    if conditional in plans and plans[conditional][0] == state:
        return plans[conditional][1]
    plans.pop(conditional, None)
    try:
        _refuse_hooks(critic)
        graph, reads = _trace(critic, conditional)
        plan = _Builder(critic, graph).plan()
    except InputError as error:
        if [name for name, _ in critic.named_children()] != ["module"]:
            raise
        raise InputError(f"{error}; where {type(critic).__name__} only wraps a critic, pass critic.module") from error
    if not reads:
        plans[conditional] = (state, plan)
    elif constant:
        raise InputError(f"the critic's forward computes with values of tensors, which compiled code would keep: {ADVICE}")
    return plan


def _constant_plan(identity, conditional):
    # A module is no constant to the compilers of torch 2.10 and 2.11; its address is one, guarded, while the caller holds it.
    critic = ctypes.cast(identity, ctypes.py_object).value
    return _kept_plan(critic, conditional, constant=True)


# What torch.compiler.assume_constant_result does, which would import the compiler with this module.
_constant_plan._dynamo_marked_constant = True


def _state(module):
    """What a traced forward may depend on: the module itself, its hooks, and its attributes as text where they are objects."""
    kept = [weakref.ref(module), type(module), *_hooks(module)]
    if _inside(module) is not None:
        return kept
    for name, value in module.__dict__.items():
        if isinstance(value, _PLAIN):
            kept.append(value)
        elif name not in _INTERNAL and not isinstance(value, torch.Tensor):
            text = repr(value)
            # An object that does not tell its contents, or not all of them, is taken for changed.
            kept.append(object() if " at 0x" in text or "..." in text else text)
    return kept


_INTERNAL = frozenset(nn.Module().__dict__)


def _hooks(module):
    return [
        len(hooks)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks or (),
        )
    ]


UNWRAP = (
    "take accelerate's mixed precision off, accelerator.unwrap_model(critic, keep_fp32_wrapper=False), and call this under "
    "accelerator.autocast()"
)


def _refuse_hooks(critic):
    for path, module in critic.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"layer {path or 'critic'} is compiled by torch.jit, whose layers cannot be read: {ADVICE}")
        own = module.__dict__.get("forward")
        replaced = own not in (None, types.MethodType(type(module).forward, module)) and _inside(module) is None
        if any(_hooks(module)) or replaced:
            name = f"layer {path or 'critic'} ({type(module).__name__})"
            remedy = UNWRAP if "_original_forward" in module.__dict__ else ADVICE
            raise InputError(f"{name} has hooks or a forward of its own, which the tangent pass would not run: {remedy}")


class _Call(nn.Module):
    """Gives the critic a parent, for the tracer to find its parts by their paths whatever it is."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        return self.critic(x)


class _ConditionalCall(_Call):
    def forward(self, x, condition):
        return self.critic(x, condition)


class _Reads(TorchFunctionMode):
    """Note whether a forward computes with a tensor of its own and no traced value: the result may enter as a constant."""

    found = False

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        values = [*arguments, *(options or {}).values()]
        if function not in METADATA and any(isinstance(v, torch.Tensor) for v in values) and not any(map(_is_traced, values)):
            self.found = True
        return function(*arguments, **(options or {}))


METADATA = frozenset(
    (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__)
    + tuple(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad"))
)


def _is_traced(value):
    from torch.fx import Proxy

    return isinstance(value, Proxy) or isinstance(value, (tuple, list)) and any(map(_is_traced, value))


def _trace(critic, conditional):
    """The graph of a critic's forward, and whether it has used values of tensors."""
    from torch import fx

    class Tracer(fx.Tracer):
        def call_module(self, module, forward, args, kwargs):
            inner = _inside(module)
            if inner is not None:
                return inner(*args, **kwargs)
            if module._compiled_call_impl is not None and not self.is_leaf_module(module, self.path_of_module(module)):
                return module._call_impl(*args, **kwargs)
            return super().call_module(module, forward, args, kwargs)

        def create_node(self, *args, **kwargs):
            if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                raise InputError(f"the critic's forward switches gradients or autocast: {ADVICE}")
            return super().create_node(*args, **kwargs)

    call = (_ConditionalCall if conditional else _Call)(critic)
    try:
        without_autocast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        with torch.enable_grad(), without_autocast[0], without_autocast[1], _Reads() as reads:
            return Tracer().trace(call), reads.found
    except InputError:
        raise
    except Exception as error:  # whatever a forward raises that looks at values or shapes
        raise InputError(f"the critic's forward cannot be traced ({error}): {ADVICE}") from error


class _Builder:
    """A traced graph as layers: those that the output needs, in order."""

    def __init__(self, critic, graph):
        self.critic, self.layers, self.moved, self.graph = critic, [], {IMAGE}, graph
        self.values = dict(zip((node for node in graph.nodes if node.op == "placeholder"), (IMAGE, CONDITION)))
        (self.result,) = (node.args[0] for node in graph.nodes if node.op == "output")

    def plan(self):
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

    def add(self, kind, name, nodes, options=(), module=None, weights=()):
        """Append a layer; the number of its value."""
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

    def require_alone(self, name, node):
        """What is changed in place must have no other reader, nor what it is a view of."""
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

    def path(self, name, node):
        """The path of a weight that a function was given."""
        if node is not None and not (getattr(node, "op", None) == "get_attr" and node.target.startswith("critic.")):
            raise InputError(f"{name} has a weight that is computed: {ADVICE}")
        return node and node.target.removeprefix("critic.")


VIEWS = ("flatten", "reshape", "squeeze", "unsqueeze")


def _plain(name, *values):
    """Options, which must be constants."""
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
    """Whether a node is x.size(0), x.shape[0] or x.size()[0]."""
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
