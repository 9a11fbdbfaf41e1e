"""The plan of a critic: its forward, traced once by torch.fx, and kept until the critic changes."""

import ctypes
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from ...errors import InputError
from .layers import ADVICE, Builder, Plan


def plan_of(critic: nn.Module, conditional: bool) -> Plan:
    """The :class:`Plan` of a module, kept until one of its parts, their attributes or the training mode change.

    A plan holds no weights. One whose forward computes with values of tensors (``self.alpha.item()``) is not kept. Values
    that a forward reads outside of the module, such as a global number, are taken for constant.

    Raises:
        InputError: the critic cannot be traced, or a layer is not piecewise linear or couples samples; it is named.
    """
    if not isinstance(critic, nn.Module):
        raise InputError(f"critic must be a torch.nn.Module for the tangent pass, got {type(critic).__name__}: {ADVICE}")
    if torch.compiler.is_compiling():
        # Reads here are guarded: compiled code is made again where they change. (Slopes are read with the options.)
        for module in critic.modules():
            if module.training and isinstance(module, (nn.Dropout, nn.Dropout2d)) or any(_hooks(module)):
                raise InputError(f"layer {type(module).__name__} drops at random or has hooks: {ADVICE}")
        return _constant_plan(id(critic), conditional)
    return _kept_plan(critic, conditional)


def unwrapped(critic: Callable) -> Any:
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
    """The module that a wrapper passes its arguments to; None for any other module."""
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


_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[list, Plan]]] = weakref.WeakKeyDictionary()
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
        plan = Builder(critic, graph).plan()
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


# As torch.compiler.assume_constant_result does, which would import the compiler with this module.
vars(_constant_plan)["_dynamo_marked_constant"] = True


def _state(module):
    """Everything that a traced forward may depend on: the module, its hooks, and its attributes, objects among them as text."""
    kept = [weakref.ref(module), type(module), *_hooks(module)]
    if _inside(module) is not None:
        return kept
    for name, value in module.__dict__.items():
        if isinstance(value, _PLAIN):
            kept.append(value)
        elif name not in _INTERNAL and not isinstance(value, torch.Tensor):
            text = repr(value)
            # An object whose text does not show all its contents counts as changed.
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
    """A parent for the critic, so that the tracer finds its parts by their paths."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        return self.critic(x)


class _ConditionalCall(_Call):
    def forward(self, x, condition):
        return self.critic(x, condition)


class _Reads(TorchFunctionMode):
    """Notes whether a forward computes with its own tensors and no traced value: the result may enter as a constant."""

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
    """The graph of a critic's forward, and True if that used values of tensors."""
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
    except Exception as error:  # a forward that looks at values or shapes may raise any
        raise InputError(f"the critic's forward cannot be traced ({error}): {ADVICE}") from error
